"""A dataset on the Hugging Face hub, played by a server on this machine, and the identity of OpenWebText."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from text_files import make_texts, read_bins, reference, write_shards

import data
from configurator import ROOT
from corpus import gathering, openwebtext
from prepare_owt import PrepareConfig


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as it takes to serve the one dataset that lies in `root`."""

    protocol_version = "HTTP/1.1"
    commit = "0123456789abcdef0123456789abcdef01234567"
    root: Path
    requests: list
    broken: str | None = None  # a file whose transfer breaks off, once the client has all others
    cache: Path  # the client's

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, cut=False, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        sizes = {"Content-Length": str(len(content)), "X-Repo-Commit": self.commit}
        for name, value in {**sizes, **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def entry(self, path):
        name = str(path.relative_to(self.root))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        content = path.read_bytes()
        return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}

    def do_POST(self):
        paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer([self.entry(self.root / path) for path in paths])

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.requests.append((self.command, path))
        if path.startswith("/api/datasets/me/corpus/tree/"):
            folder = self.root / path.split("/tree/")[1].partition("/")[2]
            found = folder.rglob("*") if "recursive=true" in url.query.lower() else folder.iterdir()
            self.answer([self.entry(path) for path in sorted(found)])
        elif path.startswith("/api/datasets/me/corpus"):
            names = [str(path.relative_to(self.root)) for path in sorted(self.root.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": name} for name in names]
            self.answer({"id": "me/corpus", "sha": self.commit, "private": False, "tags": [], "siblings": siblings})
        elif path.startswith("/datasets/me/corpus/resolve/"):
            file = self.root / path.split("/resolve/")[1].partition("/")[2]
            if file.is_file():
                tag, cut = self.entry(file)["oid"], file.name == self.broken and self.command == "GET"
                if cut:
                    self.wait_for_other_files()
                self.answer(file.read_bytes(), cut=cut, ETag=f'"{tag}"')
            else:
                self.answer({}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer({}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def wait_for_other_files(self):
        """Files are downloaded side by side: which of them is whole when one breaks off would be chance."""
        others = {path.name for path in self.root.rglob("*.parquet")} - {self.broken}
        deadline = time.monotonic() + 60
        while not others <= {path.name for path in self.cache.glob("hub/**/snapshots/**/*.parquet")}:
            assert time.monotonic() < deadline, f"the client waits for {self.broken} before it asks for {others}"
            time.sleep(0.01)


@contextlib.contextmanager
def served(root, texts, broken=None):
    """A hub with the dataset me/corpus: its handler, and the environment in which its client finds it."""
    write_shards(root / "plain_text", texts, name="train-{}.parquet")
    config = "configs:\n- config_name: plain_text\n  data_files:\n  - split: train\n    path: plain_text/train-*\n"
    (root / "README.md").write_text(f"---\n{config}---\n")
    cache = root.parent / "cache"
    handler = type("Handler", (FakeHub,), {"root": root, "requests": [], "broken": broken, "cache": cache})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        yield handler, environment
        server.shutdown()


def command_on_the_hub(out, environment):
    """A function of further options that prepares me/corpus: exit status and lines on standard error."""

    def run(*options):
        command = [sys.executable, ROOT / "prepare_owt.py", "--source=me/corpus", "--subset=plain_text"]
        command += [f"--out_dir={out}", "--tokenizer=bytes", "--val_fraction=0.05", *options]
        result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        return result.returncode, result.stderr.splitlines()

    return run


def test_a_dataset_on_the_hub_survives_interruption_and_loss_of_the_network(tmp_path):
    texts, out = make_texts(500), tmp_path / "out"
    with served(tmp_path / "hub", texts, broken="train-1.parquet") as (handler, environment):
        run = command_on_the_hub(out, environment)
        status, lines = run("--subset=other")
        assert status == 2 and len(lines) == 1 and "subset other" in lines[0]
        status, lines = run()
        assert status == 2 and len(lines) == 1 and "was interrupted" in lines[0] and "repeat the command" in lines[0]
        handler.broken, handler.requests[:] = None, []
        status, lines = run("--val_fraction=0.9999")  # downloads and encodes; then the split fails
        assert status == 2 and len(lines) == 1 and "each needs one or more" in lines[0]
        downloaded = [
            path.rpartition("/")[2] for command, path in handler.requests if command == "GET" and "resolve" in path
        ]
        assert "train-1.parquet" in downloaded and not {"train-0.parquet", "train-2.parquet"} & set(downloaded)
    assert run() == (0, []), "all is downloaded, and no network is needed"
    assert read_bins(out) == reference(texts)
    manifest = data.read_manifest(out)
    assert manifest["source"]["revision"] == FakeHub.commit and manifest["source"]["id"] == "me/corpus"
    assert run() == (0, []), "nor to see that all is prepared"
    assert run(f"--revision={FakeHub.commit}") == (0, [])
    status, lines = run("--revision=main")
    assert status == 2 and len(lines) == 1 and "revision" in lines[0]
    shutil.rmtree(out)
    environment["HF_HUB_OFFLINE"] = "1"  # else it tries for half a minute
    status, lines = run("--revision=main", "--source=me/other")
    assert status == 2 and len(lines) == 1 and "cannot find the files of me/other" in lines[0]


@pytest.mark.parametrize("first", ["--text_column=wrong", "--revision=main"])
def test_the_same_command_again_is_the_same_preparation(tmp_path, first):
    """A column is corrected; a branch stays the commit that it was."""
    texts = make_texts(100)
    with served(tmp_path / "hub", texts) as (handler, environment):
        run = command_on_the_hub(tmp_path / "out", environment)
        if first == "--text_column=wrong":
            status, lines = run(first)
            assert status == 2 and len(lines) == 1 and "no column 'wrong', only id, text" in lines[0]
            handler.requests.clear()
            assert run() == (0, [])
            assert not [path for _, path in handler.requests if "resolve" in path], "nothing is downloaded again"
        else:
            assert run(first) == (0, [])
            assert data.read_manifest(tmp_path / "out")["source"]["requested_revision"] == "main"
            assert run(first) == (0, [])
            status, lines = run("--revision=other")
            assert status == 2 and len(lines) == 1 and "with other settings" in lines[0]
    assert read_bins(tmp_path / "out") == reference(texts)


def test_the_counts_of_openwebtext_are_checked(tmp_path, capsys):
    cfg = PrepareConfig()
    assert (cfg.source, cfg.subset, cfg.revision) == openwebtext.SOURCE
    assert (cfg.tokenizer, cfg.val_fraction, cfg.seed, cfg.out_dir) == ("gpt2", 0.0005, 2357, "data/openwebtext")
    known = openwebtext.SPLIT_COUNTS
    for name, total in openwebtext.COUNTS.items():
        assert sum(known[split][name] for split in known) == total
    assert len(gathering.split(openwebtext.COUNTS["documents"], 0.0005, 2357)["val"]) == 4007
    manifest = {
        "source": {"id": cfg.source, "subset": cfg.subset, "revision": cfg.revision, "text_column": "text"},
        "split": {"seed": 2357, "val_fraction": 0.0005},
        "tokenizer": "gpt2",
        "splits": {name: dict(counts) for name, counts in known.items()},
    }
    openwebtext.check_counts("out", manifest)
    assert "known for this revision" in capsys.readouterr().out
    manifest["splits"]["val"]["tokens"] += 1
    with pytest.raises(ValueError, match="val: 4,434,607 tokens, not 4,434,606"):
        openwebtext.check_counts("out", manifest)
    manifest["source"]["revision"] = "another"
    openwebtext.check_counts("out", manifest)
