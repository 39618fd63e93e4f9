"""A report as a list of parts, which become a Markdown document and a self-contained HTML page.

The texts of the parts are plain text, without markup: what Markdown or HTML would interpret in them is escaped, and a
line feed becomes a space.
"""

import base64
import html
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --faint: #555; --line: #ddd; --box: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --back: #1b1b1b; --text: #e6e6e6; --faint: #b8b8b8; --line: #444; --box: #2a2a2a; }
}
body { max-width: 74rem; margin: 1.5rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
body { color: var(--text); background: var(--back); overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p, ul, figcaption { max-width: 54rem; } ul { padding-left: 1.3rem; } li { margin: .3rem 0; }
.wide { overflow-x: auto; overflow-wrap: normal; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .55rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { border-bottom: 2px solid var(--faint); vertical-align: bottom; } td { white-space: nowrap; }
.text { text-align: left; } td.text { white-space: normal; } td.text.long { min-width: 16rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); padding-left: 0; }
img { max-width: 100%; height: auto; background: white; } figure { margin: 1rem 0; }
figcaption { font-size: .88rem; color: var(--faint); }
pre { background: var(--box); padding: .6rem; overflow-x: auto; }
@media (max-width: 40rem) {
  body { font-size: 15px; margin: .5rem auto; padding: 0 .7rem; } h1 { font-size: 1.5rem; margin: .6rem 0; }
  th, td { padding: .2rem .4rem; font-size: .82rem; }
  td:first-child { min-width: 6.5rem; max-width: 9rem; overflow-wrap: anywhere; }
}
"""
LONG = 24  # characters: a text of more gets a column that is wide enough to read it

# What Markdown interprets within a line: code, emphasis, tables, strike-through, formulas; a backslash, link, tag or
# character reference only as such. An underscore within a word (W_Q, out_dir) is one, and is left alone.
INLINE = re.compile(
    r"[`*|~$]|(?<![^\W_])_|_(?![^\W_])|\\(?=[!-/:-@\[-`{-~]|$)|\](?=[(\[:])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=\s)#(?=#*$)"
)
# Where a line begins as a heading, a quotation or a list item.
FIRST = re.compile(r"^(\d*)(?=#+(\s|$)|>|[-+]+(\s|$)|[.)](\s|$))")


def plain(text):
    """A text in one line: what cannot be printed, such as a line feed in a folder's name, becomes a space."""
    return "".join(char if char.isprintable() else " " for char in text)


def escaped(text):
    """A text as Markdown that shows it as it is, in one line."""
    return FIRST.sub(r"\1\\", INLINE.sub(r"\\\g<0>", plain(text).strip()))


def escaped_html(text):
    """A text as HTML that shows it as it is, in one line."""
    return html.escape(plain(text))


@dataclass(frozen=True)
class Heading:
    """A section's title; level 1 is the report's."""

    text: str
    level: int = 2

    def markdown(self):
        return f"{'#' * self.level} {escaped(self.text)}"

    def html(self, folder):
        return f"<h{self.level}>{escaped_html(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str

    def markdown(self):
        return escaped(self.text)

    def html(self, folder):
        return f"<p>{escaped_html(self.text)}</p>"


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: list

    def markdown(self):
        return "\n".join(f"- {escaped(text)}" for text in self.texts)

    def html(self, folder):
        return "<ul>" + "".join(f"<li>{escaped_html(text)}</li>" for text in self.texts) + "</ul>"


@dataclass(frozen=True)
class Table:
    """Rows of texts below a head; columns named in `words` are aligned left, the others, which are numbers, right."""

    head: list
    rows: list
    words: tuple = ()

    def markdown(self):
        rule = ["---" if name in self.words else "---:" for name in self.head]
        head, *rows = [[escaped(text) for text in row] for row in (self.head, *self.rows)]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))

    def html(self, folder):
        longest = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]

        def line(row, tag):
            kinds = [
                f' class="text{" long" * (i > 0 and longest[i] > LONG)}"' if name in self.words else ""
                for i, name in enumerate(self.head)
            ]
            return "".join(f"<{tag}{kind}>{escaped_html(text)}</{tag}>" for kind, text in zip(kinds, row, strict=True))

        body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in self.rows)
        head = f"<thead><tr>{line(self.head, 'th')}</tr></thead>"
        return f"<div class=wide><table>{head}\n<tbody>{body}</tbody></table></div>"


@dataclass(frozen=True)
class Figure:
    """A PNG in the report's folder, and its caption."""

    name: str
    caption: str

    @property
    def alternative(self):
        """The caption's first sentence, for where the picture is not shown."""
        return self.caption.partition(". ")[0].removesuffix(".")

    def markdown(self):
        alternative = escaped(self.alternative.replace("[", "(").replace("]", ")"))  # a bracket would end it
        return f"![{alternative}]({quote(self.name)})\n\n{escaped(self.caption)}"

    def html(self, folder):
        data = base64.b64encode((Path(folder) / self.name).read_bytes()).decode("ascii")
        alt, text = escaped_html(self.alternative), escaped_html(self.caption)
        return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


@dataclass(frozen=True)
class Code:
    """A command to type."""

    text: str

    def markdown(self):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", self.text)), default=0))
        return f"{fence}sh\n{self.text}\n{fence}"

    def html(self, folder):
        return f"<pre><code>{html.escape(self.text)}</code></pre>"


def markdown(parts):
    """The parts as a Markdown document."""
    return "\n\n".join(part.markdown() for part in parts) + "\n"


def web_page(parts, title, folder):
    """The parts as an HTML document that needs no other file; the PNGs are read from folder."""
    body = "\n".join(part.html(folder) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped_html(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )
