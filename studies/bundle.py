"""What is worth keeping of a folder of runs, in one file: everything but checkpoints, locks and data.

From the unpacked files `report.py` makes the same report elsewhere.
"""

import re
import tarfile

KEPT = {".json", ".jsonl", ".md", ".html", ".png", ".csv", ".txt", ".log", ".py"}
LARGEST = 20 * 2**20  # bytes of a file
NAME = re.compile(r"[A-Za-z0-9._-]+")


def write(folder, path):
    """Write the files under folder that are worth keeping to a tar.gz at path, by their names within it; the names.

    Raises ValueError where there is no such folder, for a name of other characters than letters, digits, '.', '_' and
    '-', and for a file above 20 MiB.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} to bundle: name one with --out_dir=…")
    names = []
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or file.suffix not in KEPT or file.resolve() == path.resolve():
                continue
            name = file.relative_to(folder)
            if not all(NAME.fullmatch(part) for part in name.parts):
                raise ValueError(f"{file} has a name that not every system takes: rename it")
            if file.stat().st_size > LARGEST:
                raise ValueError(f"{file} has more than {LARGEST // 2**20} MiB: move it elsewhere")
            archive.add(file, arcname=str(name))
            names.append(str(name))
    return names
