"""Write requirements.lock and tests/licences.md: what the requirements bring along, with hashes and licences.

python tests/lock.py                on Linux x86_64 with Python 3.11

Versions are those installed beside the Python that runs this, where they satisfy the requirements, so run it in the
environment whose tests passed. pip asks its package index and its own configuration (a folder of wheels, say), and each
file that either would install has its hash in the lock: torch may be a build for CUDA or one for CPUs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests/requirements.txt"  # which includes the root's
NEWEST_PIP = "pip>=23.3"  # older ones download what they would only have to look at
LOCK_HEAD = """\
# Everything that requirements.txt and tests/requirements.txt bring along on Linux x86_64 with Python 3.11, for
#     pip install --require-hashes -r requirements.lock
# Written by `python tests/lock.py` (its docstring says where to run it); do not edit. Of torch's two files pip takes
# the index's, which is for CUDA; it keeps the one for CPUs where that is installed already.
"""
LICENCES_HEAD = """\
# Licences

Of all distributions in requirements.lock, as their own metadata name them; written by `python tests/lock.py`.

| distribution | version | licence |
| --- | --- | --- |
"""


def normal(name):
    """The name of a distribution as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(pip, constraints, environment):
    """What pip would install, as its report lists it: dicts with metadata and download_info."""
    options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--quiet", "--report=-"]
    command = [pip, "install", *options, "-c", constraints, "-r", REQUIREMENTS]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["install"]


def licence(found):
    """The licence that a distribution's metadata name: the SPDX expression, classifiers, or the first line of text."""
    classifiers = [each.split(" :: ") for each in found.get("classifier", []) if each.startswith("License :: ")]
    names = [words[-1] for words in classifiers if words[-1] != "OSI Approved"]
    text = (found.get("license") or "").strip().partition("\n")[0].strip()
    return found.get("license_expression") or ", ".join(names) or text or "not named"


def main():
    """Resolve the requirements twice, with pip's configuration and without, and write both files."""
    installed = {normal(each.metadata["Name"]): each.version.partition("+")[0] for each in metadata.distributions()}
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name == "PIP_CERT"}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip, constraints = Path(folder, "bin/pip"), Path(folder, "constraints.txt")
        subprocess.run([pip, "install", "--quiet", "--upgrade", NEWEST_PIP], check=True)
        # A pin of torch would leave out the build on disk, whose version has a suffix; the requirements pin it.
        pins = [f"{name}=={version}" for name, version in installed.items() if name not in ("torch", "pip")]
        constraints.write_text("\n".join(pins))
        found = [resolve(pip, constraints, env) for env in (os.environ, {**own, "PIP_CONFIG_FILE": os.devnull})]
    hashes, licences = {}, {}
    for each in (each for side in found for each in side):
        about = each["metadata"]
        key = normal(about["name"]), about["version"].partition("+")[0]
        hashes.setdefault(key, set()).add(each["download_info"]["archive_info"]["hashes"]["sha256"])
        licences[key] = licence(about)
    lines = [
        " \\\n".join([f"{name}=={version}", *(f"    --hash=sha256:{digest}" for digest in sorted(digests))])
        for (name, version), digests in sorted(hashes.items())
    ]
    (ROOT / "requirements.lock").write_text(LOCK_HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    rows = [f"| {name} | {version} | {text} |" for (name, version), text in sorted(licences.items())]
    (ROOT / "tests/licences.md").write_text(LICENCES_HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"requirements.lock: {len(lines)} distributions")


if __name__ == "__main__":
    sys.exit(main())
