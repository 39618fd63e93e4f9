"""Checkpoints to and from Hugging Face transformers, with its own classes and no custom code.

    python hf.py export --run=out/quick-reduced_tied --out=out/hf           a folder for AutoModelForCausalLM
    python hf.py export --ckpt=theirs.pt --tokenizer=gpt2 --out=out/hf      of any checkpoint file, nanoGPT's included
    python hf.py import --from=gpt2 --out=out/gpt2                          a run folder to sample, fine-tune, measure
    python hf.py import --from=out/hf --out=out/back                        any such folder; an export is what it was

Both compare the logits of the two models, and tokens that transformers generates, before they say `wrote`. Weights are
read from safetensors, or by torch's loader that runs no code. `python hf.py export --help` lists the options.
"""

import dataclasses
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import configurator
from configurator import FilePath
from corpus import hf_tokenizers, tokenizers
from engine import checkpoint, hf_card, hf_classes, hf_folders, run_files, runlog
from engine.files import make_folder, read_json, reason, write_json, write_text
from model import GPT

NAME_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class ExportConfig:
    """Which checkpoint becomes a folder of transformers."""

    run: FilePath | None = None  # the run folder
    ckpt: FilePath = run_files.CHECKPOINT  # the checkpoint in it, such as best.pt; without run any file's path
    out: FilePath | None = None  # the folder to write, which must not exist or be empty
    tokenizer: str | None = None  # gpt2 or bytes; none: the one that run.json beside the checkpoint names
    license: str = "unknown"  # for the model card: an identifier of the hub, such as mit
    push: str | None = None  # owner/name on the hub, to which the folder is uploaded (private, if it is new)

    def __post_init__(self):
        if self.out is None:
            raise ValueError("out is not given: name the folder to write with --out=…")
        if self.run is None and self.ckpt == run_files.CHECKPOINT and not Path(self.ckpt).exists():
            raise ValueError("run is not given: name a run folder with --run=…, or a checkpoint file with --ckpt=…")


@dataclass
class ImportConfig:
    """Which folder of transformers becomes a run folder."""

    source: FilePath | None = None  # a folder, or a name on the hub such as gpt2; --from=… is the same
    out: FilePath | None = None  # the run folder to write, which must not hold a run

    def __post_init__(self):
        for name, meaning in (("source", "the folder or the name on the hub with --from=…"), ("out", "a run folder")):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given: name {meaning}" + (" with --out=…" if name == "out" else ""))


def export(cfg):
    """Write a checkpoint as a folder of transformers, and compare the two; what `hf_folders.compare` says.

    Raises ValueError, with nothing written, for a model that no class of transformers holds, and where logits, tokens
    or token ids differ.
    """
    path, out = Path(cfg.run or "", cfg.ckpt), Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists: choose another --out=…, or delete it")
    state = checkpoint.load(path)
    model = checkpoint.build_model(state).float().eval()
    causal, block_size = model.config.causal, model.config.block_size
    stock = hf_classes.class_of(model.config)
    tokenizer = tokenizers.tokenizer_of(path, cfg.tokenizer, model.config.vocab_size)
    is_text = isinstance(tokenizer, tokenizers.Characters)
    n_vocab = tokenizer.n_vocab + (not causal)  # an encoder's mask token comes after the others
    facts, summary = (read_json(path.parent / name) or {} for name in (run_files.FACTS, run_files.SUMMARY))
    if state["step"] != summary.get("steps"):
        summary = {}  # it is about another checkpoint
    name = "characters" if is_text else tokenizer.name
    facts = {**facts, "data": {**facts.get("data", {}), "tokenizer": name}}
    print(f"exporting {path}, step {state['step']}, as {stock.name}")
    import transformers

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    make_folder(temporary)
    try:
        record = {"tokenizer": name, "step": state["step"]}
        hf_folders.write(temporary, model, n_vocab, None if is_text else tokenizer.eot_token, record)
        hf_tokenizers.fast_tokenizer(tokenizer, block_size, with_mask=not causal).save_pretrained(temporary)
        kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        with hf_folders.quiet():
            theirs = kind.from_pretrained(temporary)
            found = hf_folders.compare(model, theirs, n_vocab)
            if not hf_tokenizers.same_ids(tokenizer, transformers.AutoTokenizer.from_pretrained(temporary)):
                raise ValueError(f"the tokenizer {name} must give the same ids in transformers, and does not")
        source = {"dataset": state.get("config", {}).get("dataset"), "step": state["step"], "license": cfg.license}
        text = hf_card.card(out.name, model, facts, summary, source | {"difference": found["logits"]})
        write_text(temporary / "README.md", text)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(compared(found))
    print(f"wrote {out}: {kind.__name__}.from_pretrained('{out}')")
    if cfg.push:
        push(out, cfg.push)
    return found


def compared(found):
    """What `hf_folders.compare` found, as a line."""
    greedy = f", and {found['greedy']} greedy tokens the same" if found["greedy"] else ""
    return f"transformers gives the same logits, up to {found['logits']:.1e} of the largest{greedy}"


def push(folder, name):
    """Upload a folder to the hub. Raises ValueError, with the hub's reason, when that is not possible."""
    import huggingface_hub

    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the network, of the hub, or about the name
        raise ValueError(
            f"cannot upload to {name}: {reason(error)}; {folder} is written, `hf upload {name} {folder}` does it later"
        ) from error
    print(f"uploaded to {name}")


def import_(cfg):
    """Write a folder of transformers, or a model of the hub, as a run folder; what `hf_folders.compare` says.

    Raises ValueError, with nothing written, for a model that none of ours computes and for files that hold something
    else than weights.
    """
    out = Path(cfg.out)
    if run_files.holds_run(out):
        raise ValueError(f"{out} already contains a run: choose another --out=…")
    folder = folder_of(cfg.source)
    try:
        stock, theirs, weights, record = hf_folders.read(folder)
        reference = hf_folders.build(stock, theirs, "cpu")
        hf_folders.load(reference, weights)
        recorded = record.get("model_config")
        config, state = hf_classes.ours_from(stock, theirs, weights, recorded if isinstance(recorded, dict) else None)
    except ValueError as error:
        raise ValueError(f"cannot import {cfg.source}: {error}") from error
    print(f"importing {cfg.source}, a {stock.name}")
    model = GPT(config).eval()
    model.load_state_dict(state)
    with hf_folders.quiet():
        found = hf_folders.compare(model, reference, config.vocab_size)
        tokenizer = hf_tokenizers.name_of(folder, record.get("tokenizer"))

    make_folder(out)
    step = record.get("step")
    step = step if isinstance(step, int) and step >= 0 else 0
    facts = {"git_commit": runlog.git_commit(), "versions": runlog.versions(), "imported_from": str(cfg.source)}
    facts |= {"parameters": model.num_params()._asdict(), "data": {"tokenizer": tokenizer} if tokenizer else {}}
    write_json(out / run_files.FACTS, facts)
    checkpoint.save(
        out / run_files.CHECKPOINT, model=model.state_dict(), model_config=dataclasses.asdict(config), step=step
    )
    print(compared(found))
    options = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
    print("model options: " + ", ".join(f"{name}={getattr(config, name)}" for name in options))
    print(f"wrote {out}")
    unknown = "" if tokenizer else " --tokenizer=…   # its own is neither gpt2 nor bytes"
    print(f"to generate text: python sample.py --out_dir={out}{unknown}")
    print(f"to train it further: python train.py --init_from={out / run_files.CHECKPOINT} …")
    return found


def folder_of(source):
    """The folder that --from names, downloaded from the hub if it is a name there."""
    if Path(source).is_dir():
        return Path(source)
    if not NAME_ON_THE_HUB.fullmatch(source):
        raise ValueError(f"there is no folder {source}, and a name on the hub is owner/name, or one such as gpt2")
    import huggingface_hub

    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "*.txt", f"{weights}", f"{weights}.index.json"]
            folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
            if any(folder.glob(weights)):
                break
    except Exception as error:  # of the network, of the hub, or about the name
        raise ValueError(
            f"there is no folder {source}, and the hub's model of this name cannot be downloaded: {reason(error)}"
        ) from error
    return folder


def main(argv):
    """The command; see the module's docstring."""
    commands = {"export": (ExportConfig, export), "import": (ImportConfig, import_)}
    command = argv[0] if argv else None
    if command not in commands:
        if command in ("--help", "-h"):
            print(__doc__.strip())
            return
        raise ValueError(f"the first word must be export or import, got {command or 'nothing'}")
    schema, function = commands[command]
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("hf.py needs the package transformers: pip install transformers")
    options = [f"--source={text.removeprefix('--from=')}" if text.startswith("--from=") else text for text in argv[1:]]
    unknown = configurator.config_files(options)
    if unknown and unknown != ["-h"]:
        raise ValueError(f"{command} takes options alone, written --key=value, got {unknown[0]}")
    function(configurator.parse(schema, options))


if __name__ == "__main__":
    configurator.run(main)
