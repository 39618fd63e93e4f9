"""The files of a dataset on the Hugging Face hub, at one commit: found, then downloaded."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from corpus import sources
from corpus.kinds import first_line
from engine.files import read_json, write_json


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset on the hub, at one commit; those in `missing` are not downloaded yet."""

    repository: str
    revision: str
    paths: tuple[str, ...]
    missing: tuple[str, ...]
    missing_bytes: int


def find(cfg, work):
    """The HubFiles of the source of a PrepareConfig, in the order of load_dataset's train split.

    `datasets` says which files they are. The answer is kept in work/source.json: a branch that moves in the meantime
    changes nothing, and once all files are downloaded no network is needed. Raises ValueError for whatever fails.
    """
    listing = Path(work) / "source.json"
    request = {"source": cfg.source, "subset": cfg.subset, "revision": cfg.revision}
    found = read_json(listing) or {}
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it would print each of its attempts; the last error says it all
    is_new = found.get("request") != request
    try:
        if is_new:
            import datasets

            print(f"asking the hub for the files of {cfg.source}", flush=True)
            builder = datasets.load_dataset_builder(cfg.source, cfg.subset, revision=cfg.revision)
            found = {"request": request, "urls": [str(url) for url in builder.config.data_files["train"]]}
        matches = [re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url) for url in found["urls"]]
        repository, revision = matches[0][1], matches[0][2]
        paths = tuple(match[3] for match in matches)
        options = {"revision": revision, "repo_type": "dataset"}
        cached = [huggingface_hub.try_to_load_from_cache(repository, path, **options) for path in paths]
        missing = tuple(path for path, local in zip(paths, cached, strict=True) if not isinstance(local, str))
        infos = huggingface_hub.HfApi().get_paths_info(repository, list(missing), **options) if missing else ()
        files = HubFiles(repository, revision, paths, missing, sum(info.size for info in infos))
    except Exception as error:  # of the network, of the names, of a dataset without files or without a train split
        raise ValueError(
            f"cannot find the files of {cfg.source}, subset {cfg.subset}, revision {cfg.revision} "
            f"({first_line(error)}): check the network and these names; files on this machine need --source=files"
        ) from error
    if is_new:
        Path(work).mkdir(parents=True, exist_ok=True)
        write_json(listing, found)
    return files


def cache_folder():
    """The folder where the hub's client keeps what it downloads."""
    import huggingface_hub

    return huggingface_hub.constants.HF_HUB_CACHE


def download(files):
    """The TextFiles of HubFiles, downloaded into the cache of the hub's client, which keeps each complete file.

    load_dataset would copy all text into a second cache, 40 GB for OpenWebText, and streaming would download
    everything again after an interruption. Raises ValueError when the download is interrupted.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            files.repository,
            revision=files.revision,
            repo_type="dataset",
            allow_patterns=[glob.escape(path) for path in files.paths],
            local_files_only=not files.missing,
        )
    except Exception as error:  # of the network, in many forms
        raise ValueError(
            f"the download of {files.repository} was interrupted ({first_line(error)}): complete files are kept; "
            "repeat the command to resume"
        ) from error
    return [sources.text_file(os.path.join(folder, path), path, is_pinned=True) for path in files.paths]
