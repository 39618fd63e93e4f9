"""requirements.lock pins and hashes all that the requirements name; lock.py writes it, and licences.md."""

import re
from importlib import metadata

import lock
import pytest

from configurator import ROOT

ENTRY = re.compile(r"([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


def locked():
    """name -> (version, number of hashes) of the lock, which holds nothing but comments and such entries."""
    text = "".join(
        line for line in (ROOT / "requirements.lock").read_text().splitlines(keepends=True) if line[0] != "#"
    )
    assert ENTRY.sub("", text) == ""
    found = {match[1]: (match[2], match[3].count("sha256:")) for match in ENTRY.finditer(text)}
    assert len(found) == text.count("==")
    return found


def required(path):
    """name -> version of a requirements file and those that it includes; each requirement must name its version."""
    found = {}
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            found |= required(path.parent / line[3:])
        elif line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()
            found[lock.normal(name)] = version
    return found


def test_the_lock_has_every_requirement_with_its_version():
    requirements = required(lock.REQUIREMENTS)
    assert {"torch", "pytest"} <= requirements.keys()
    assert {name: locked()[name][0] for name in requirements} == requirements


def test_the_lock_has_all_that_the_installed_requirements_bring_along():
    names, waiting = set(), [*required(lock.REQUIREMENTS)]
    while waiting:
        name = waiting.pop()
        if name in names:
            continue
        names.add(name)
        try:
            version, needed = metadata.version(name), metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # an optional one
            continue
        if version.partition("+")[0] != locked().get(name, (version,))[0]:  # which may bring along others
            continue
        waiting += [lock.normal(re.match(r"[\w.-]+", each)[0]) for each in needed if ";" not in each]
    assert names <= locked().keys()


def test_torch_is_locked_for_cuda_and_for_cpus_with_the_libraries_of_cuda():
    assert locked()["torch"][1] == 2
    assert {"triton", "nvidia-cublas"} <= locked().keys()


def test_every_distribution_of_the_lock_has_its_licence_in_the_table():
    rows = re.findall(r"\| (\S+) \| (\S+) \| (.+) \|", (ROOT / "tests/licences.md").read_text())[1:]
    rows = [row for row in rows if row[0] != "---"]
    assert {name: version for name, version, _ in rows} == {name: version for name, (version, _) in locked().items()}


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"license_expression": "MIT", "license": "x"}, "MIT"),
        (
            {"classifier": ["License :: OSI Approved", "License :: OSI Approved :: BSD License"], "license": "x"},
            "BSD License",
        ),
        ({"license": "Apache 2.0\n\nlong text"}, "Apache 2.0"),
        ({}, "not named"),
    ],
)
def test_a_licence_is_found_wherever_the_metadata_name_it(found, name):
    assert lock.licence(found) == name
