"""A report as a list of parts, which become a Markdown document and a self-contained HTML page.

The texts of the parts are plain text, without markup.
"""

import base64
import html
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
table { border-collapse: collapse; font-size: .88rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { white-space: nowrap; border-bottom: 2px solid #888; } .text { text-align: left; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption { font-size: .88rem; color: #444; }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #e6e6e6; } pre { background: #2a2a2a; } figcaption { color: #bbb; }
  img { background: white; } h2, th, td { border-color: #444; }
}
"""


@dataclass(frozen=True)
class Heading:
    """A section's title; level 1 is the report's."""

    text: str
    level: int = 2

    def markdown(self):
        return f"{'#' * self.level} {self.text}"

    def html(self, folder):
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str

    def markdown(self):
        return self.text

    def html(self, folder):
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: list

    def markdown(self):
        return "\n".join(f"- {text}" for text in self.texts)

    def html(self, folder):
        return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in self.texts) + "</ul>"


@dataclass(frozen=True)
class Table:
    """Rows of texts below a head; columns named in `words` are aligned left, the others, which are numbers, right."""

    head: list
    rows: list
    words: tuple = ()

    def markdown(self):
        rule = ["---" if name in self.words else "---:" for name in self.head]
        lines = [self.head, rule, *self.rows]
        return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in lines)

    def html(self, folder):
        def line(row, tag):
            classes = [" class=text" if name in self.words else "" for name in self.head]
            return "".join(f"<{tag}{each}>{html.escape(text)}</{tag}>" for each, text in zip(classes, row, strict=True))

        body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in self.rows)
        return f"<table><thead><tr>{line(self.head, 'th')}</tr></thead>\n<tbody>{body}</tbody></table>"


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
        return f"![{self.alternative}]({self.name})\n\n{self.caption}"

    def html(self, folder):
        data = base64.b64encode((Path(folder) / self.name).read_bytes()).decode("ascii")
        alt, text = html.escape(self.alternative), html.escape(self.caption)
        return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


@dataclass(frozen=True)
class Code:
    """A command to type."""

    text: str

    def markdown(self):
        return f"```sh\n{self.text}\n```"

    def html(self, folder):
        return f"<pre><code>{html.escape(self.text)}</code></pre>"


def markdown(parts):
    """The parts as a Markdown document."""
    return "\n\n".join(part.markdown() for part in parts) + "\n"


def web_page(parts, title, folder):
    """The parts as an HTML document that needs no other file; the PNGs are read from folder."""
    body = "\n".join(part.html(folder) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )
