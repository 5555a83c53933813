"""A page of HTML that holds everything in itself: text, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template


def make_page(title: str, subtitle: str, body: Sequence[str]) -> str:
    """A page from its parts, which are HTML; title and subtitle are text."""
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), subtitle=escape(subtitle), body="\n".join(filter(None, body)))


def to_table(cells: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in line) + "</tr>"
        for tag, line in zip(["th"] + ["td"] * len(cells), cells, strict=False)
    ]
    return f"<table>\n<thead>{lines[0]}</thead>\n<tbody>\n" + "\n".join(lines[1:]) + "\n</tbody>\n</table>"


def to_figure(heading: str, svg: str, caption: str) -> str:
    """A figure with its heading; `svg` is an element."""
    figure = (
        f'<figure role="img" aria-label="{escape(heading)}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
    )
    return f"<h2>{escape(heading)}</h2>\n{figure}"


def paragraphs(sentences: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
