"""The layout: imports go one way, importing starts nothing, and no module hides one of the standard library."""

import ast
import subprocess
import sys

import pytest

from configurator import ROOT

# What a module may import: the ranks below its own, and its own folder. `configurator` is of the lowest.
RANKS = ("configurator", "model", "train_config", "engine", "data", "corpus", "studies")
BESIDE = ("speed", "theory")  # each other, above all of these
FOLDERS = ("engine", "corpus", "studies", *BESIDE)
ROOT_MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
COMMANDS = [name for name in ROOT_MODULES if name not in RANKS]
MODEL_IMPORTS = ("engine.attention", "engine.experts", "engine.model_options")  # which import nothing of ours
MODULES = [path.relative_to(ROOT) for folder in ("", *FOLDERS) for path in sorted((ROOT / folder).glob("*.py"))]


def imports(path):
    """The project's own modules that a file imports, anywhere in it, as dotted names."""
    ours = {*ROOT_MODULES, *FOLDERS}
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = (ROOT / node.module).is_dir()
            found |= {f"{node.module}.{alias.name}" if inner else node.module for alias in node.names}
    return {name for name in found if name.partition(".")[0] in ours}


def may_import(path, name):
    """Whether a file may import one of the project's modules."""
    importer, imported = path.parts[0].removesuffix(".py"), name.partition(".")[0]
    if importer in COMMANDS:  # bench.py times train.py's steps, and reproduce.py calls commands
        return imported not in COMMANDS or importer == "reproduce" or (importer, imported) == ("bench", "train")
    if importer == "model" and name in MODEL_IMPORTS:
        return True
    if imported in COMMANDS:
        return False
    rank = {name: i for i, name in enumerate(RANKS)} | dict.fromkeys(BESIDE, len(RANKS))
    return importer == imported or rank[imported] < rank[importer]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path):
    assert [name for name in sorted(imports(path)) if not may_import(path, name)] == []


def test_the_root_is_small_and_hides_nothing():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    entries = {name.partition("/")[0] for name in tracked if not name.startswith(".")}
    assert len(entries) <= 28
    assert sum(name.endswith(".py") for name in entries) <= 14
    assert not {name.removesuffix(".py") for name in entries} & set(sys.stdlib_module_names)


def test_importing_every_module_needs_no_optional_library_and_starts_nothing(tmp_path):
    optional = ("datasets", "wandb", "transformers", "matplotlib", "scipy", "tiktoken", "gigatoken", "pyarrow")
    lines = [f"import sys; sys.modules.update(dict.fromkeys({optional}))"]
    lines += [f"import {'.'.join(path.with_suffix('').parts)}" for path in MODULES]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
