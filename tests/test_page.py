"""A page's parts as Markdown and HTML: whatever their texts hold, they are shown as they are."""

from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from studies import page

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
TEXTS = st.text("ab1 _*`|~[]()<>&#;!\\-+.=:\n\t/\"'$éx", min_size=1, max_size=14).filter(str.strip)


class Shown(HTMLParser):
    """The text that HTML shows, its white space as single spaces, and the tags in order."""

    def __init__(self, html):
        super().__init__()
        self.data, self.tags = [], []
        self.feed(html)
        self.text = " ".join("".join(self.data).split())

    def handle_data(self, data):
        self.data.append(data)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


@given(TEXTS)
@example("a_b *c* `d` __init__ [e](f) | <g> ~h~ &amp; \\* 2 * 3")
@example("line\nfeed")
@example("# 1. a")
@example("12. a #")
@example("---")
@example("a\\")
def test_markdown_and_html_show_a_text_as_it_is(text):
    shown = " ".join(page.plain(text).split())
    for part, tags in (
        (page.Paragraph(text), ["p"]),
        (page.Heading(text), ["h2"]),
        (page.Items([text]), ["ul", "li"]),
        (page.Table([text], [[text]]), ["table", "thead", "tr", "th", "tbody", "tr", "td"]),
    ):
        found = [Shown(html) for html in (MARKDOWN.render(part.markdown()), part.html("."))]
        own, other = ([tag for tag in each.tags if tag != "div"] for each in found)  # a table scrolls within a box
        assert own == other == tags, part.markdown()
        times = max(1, tags.count("tr"))
        assert ["".join(each.data).split() for each in found] == [(shown + "\n").split() * times] * 2, part.markdown()


def test_the_usual_words_are_left_alone():
    for text in ("W_Q, W_K", "out_dir=out/a_b", "p < 0.05", "1.01 [0.97, 1.02]", "−0.5", "-0.5", "95 % & 2"):
        assert page.escaped(text) == text


def test_a_figure_s_name_is_a_link_and_its_caption_a_text(tmp_path):
    (tmp_path / "a b(1).png").write_bytes(b"png")
    figure = page.Figure("a b(1).png", "Loss of a]b_ and *c*. More.")
    found = Shown(MARKDOWN.render(figure.markdown()))
    assert found.tags == ["p", "img", "p"]
    assert found.text == figure.caption
    assert 'src="a%20b%281%29.png" alt="Loss of a)b_ and *c*"' in MARKDOWN.render(figure.markdown())
    assert 'alt="Loss of a]b_ and *c*"' in figure.html(tmp_path)


@pytest.mark.parametrize("text", ["python sweep.py 'a`b'", "echo '```'\necho '\n````\n'", "a <b> & *c*"])
def test_a_command_is_shown_as_it_is(text):
    part = page.Code(text)
    for html in (MARKDOWN.render(part.markdown()), part.html(".")):
        found = Shown(html)
        assert (found.tags, "".join(found.data).strip()) == (["pre", "code"], text)
