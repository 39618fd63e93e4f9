"""Hostile names of runs and datasets in a report: its tables keep their columns, its page shows them as text."""

import html.parser
import re

from run_folders import write_run

import report

from . import children

NAMES = [
    *("a|b", "a\\|b", "|", "\\", "**bold**", "_it_", "`code`", "``", "[x](y)", "![x](y)", "$x^2$", "# title", "- item"),
    *("<img src=x onerror=alert(1)>", "<b>", "<!--", "&amp;", '"quoted"', "it's", "1. one", "> quote", "~~x~~", "\\n"),
    *("a\nb", "a\r\nb", "a\tb", "\x1b[31mred", "a\u2028b", "\u202eright to left", "名前", "ünï", "e\u0301", "\udcff"),
    *("x" * 200, "é" * 110, " ", "a  b", " a", "...", "{n_embd}", "%s%n", "=cmd()", "*", "^", "--", "x,y", "a;b"),
]
GROUP = 5  # names in a report
TAGS = "html head meta title style body h1 h2 h3 div p ul li table thead tbody tr th td figure img".split()
TAGS += "figcaption pre code".split()
ATTRIBUTES = {"lang", "charset", "name", "content", "class", "alt", "src"}
CELL = re.compile(r"(?:\\.|[^|\\])*\|")  # of a row of a Markdown table; a backslash takes a character's meaning


class Page(html.parser.HTMLParser):
    """What a browser makes of a report: its tags, attributes and texts, and the columns of its rows."""

    def __init__(self, text):
        super().__init__()
        self.wrong, self.texts, self.rows = [], [], []
        self.feed(text)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attributes):
        if tag not in TAGS:
            self.wrong.append(f"the tag {tag}")
        self.wrong += [f"the attribute {name}" for name, _ in attributes if name not in ATTRIBUTES]
        if tag == "tr":
            self.rows.append(0)
        elif tag in ("td", "th"):
            self.rows[-1] += 1

    def handle_comment(self, text):
        self.wrong.append("a comment")

    def handle_data(self, text):
        self.texts.append(text)


def columns(row):
    """The number of cells in a row of a Markdown table."""
    return len(CELL.findall(row)) - 1


def wrong_tables(text):
    """What is wrong with the tables of a Markdown document."""
    wrong = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if not lines or not lines[0].startswith("| "):
            continue
        if len(lines) < 3 or not re.fullmatch(r"\|( -+:? \|)+", lines[1]):
            wrong.append(f"a table without a rule: {lines[0][:80]!r}")
        expected = columns(lines[0])
        wrong += [f"{found} columns, not {expected}" for found in map(columns, lines) if found != expected]
    return wrong


def shown(name):
    """A name as a reader sees it: in one line, spaces as one."""
    return " ".join("".join(char if char.isprintable() else " " for char in name).split())


def hostile_names(folder, n, rng):
    """Reports on runs with the first n of NAMES, GROUP of them in each, as folders and as datasets."""
    for first in range(0, min(n, len(NAMES)), GROUP):
        names = NAMES[first : min(n, first + GROUP)]
        trial = folder / f"trial{first}"
        trial.mkdir()
        for number, name in enumerate(["control", *names]):
            fields = dict(n_embd=16 + 2 * number, dataset=f"data {shown(name)}")
            run = write_run(trial / "runs" / str(number), 1, 3 + number / 10, **fields)
            run.rename(run.with_name(name))
        done = children.run(report.main, [f"runs/{name}" for name in ("control", *names)], trial)
        if done.status:
            for name in names:
                yield repr(name), done.describe(), None
            continue
        markdown, page = ((trial / "out/report" / f"report.{kind}").read_text() for kind in ("md", "html"))
        found = Page(page)
        wrong = wrong_tables(markdown) + found.wrong
        for name in names:
            is_shown = shown(name).rstrip("_-") in " ".join(found.text.split())  # an arm's name does not end with them
            missing = [] if is_shown else ["its name is not in the page"]
            yield repr(name), "; ".join(wrong + missing), None
