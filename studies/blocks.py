"""Tables of reports in other Markdown files, kept equal to the reports: what `make results` writes anew.

python -m studies.blocks README.md results/README.md        write the blocks of these files anew

A block is what stands between two comments. The first names a report, one of its headings, and the columns of the first
table under it that are wanted, or none for all; under the report's title, with no heading named, its first list:

    <!-- from results/study_lr/report.md | Differences from control | arm, difference, verdict -->
    <!-- end -->
"""

import re
import sys
from pathlib import Path

import configurator
from engine.files import write_text

FIRST = r"^(?P<indent> *)<!-- from (?P<source>[^|\n]+?)(?: \| (?P<rest>[^\n]*?))? -->\n"
BLOCK = re.compile(f"(?P<first>{FIRST}).*?^ *<!-- end -->", re.DOTALL | re.MULTILINE)


def content(source, heading=None, columns=()):
    """The first table under a heading of a report, with these columns; without a heading the report's first list.

    Raises ValueError, naming the report, for what it does not have.
    """
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {source}, from which a block is to be written: {error.strerror}") from error
    blocks = text.split("\n\n")
    if heading is None:
        return next(block for block in blocks if block.startswith("- ")).strip()
    if f"## {heading}" not in blocks:
        raise ValueError(f"{source} has no heading {heading!r}")
    below = blocks[blocks.index(f"## {heading}") + 1 :]
    table = next((block for block in below if block.startswith("| ")), None)
    if table is None:
        raise ValueError(f"{source} has no table under {heading!r}")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.strip().splitlines()]
    if unknown := [name for name in columns if name not in rows[0]]:
        raise ValueError(f"{source} has no column {unknown[0]!r} under {heading!r}; it has {', '.join(rows[0])}")
    places = [rows[0].index(name) for name in columns or rows[0]]
    return "\n".join("| " + " | ".join(row[i] for i in places) + " |" for row in rows)


def renewed(text, folder):
    """A Markdown text with its blocks written anew; folder: from which its reports are named."""

    def block(match):
        heading, _, columns = (match["rest"] or "").partition(" | ")
        columns = [name.strip() for name in columns.split(",") if name.strip()]
        found = content(Path(folder, match["source"]), heading.strip() or None, columns)
        lines = [f"{match['indent']}{line}" for line in [*found.splitlines(), "<!-- end -->"]]
        return match["first"] + "\n".join(lines)

    return BLOCK.sub(block, text)


def main(argv):
    """The command; see the module's docstring."""
    for name in argv:
        text = Path(name).read_text(encoding="utf-8")
        if (new := renewed(text, configurator.ROOT)) != text:
            write_text(name, new)


if __name__ == "__main__":
    configurator.run(main, sys.argv[1:])
