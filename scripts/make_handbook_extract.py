"""
Writes tasks/translation/handbook/handbook.de-en.tsv.xz: German and English sentences of the Debian Administrator's Handbook.

    apt-get install debian-handbook
    .venv/bin/pip install lxml
    scripts/run make_handbook_extract tasks/translation/handbook/handbook.de-en.tsv.xz

The two HTML editions have the same files with the same paragraphs in the same order. Paragraphs are cut into sentences where
both languages have equally many; otherwise they stay whole, if they are not too long. What was left untranslated is dropped.
"""

import lzma
import re
from collections.abc import Sequence
from pathlib import Path

from lxml import html

from tasks.command import Parser, run
from tasks.files import write_whole


PARAGRAPHS = (
    "//*[@class='para' or @class='title' or @class='term' or @class='simpara'][not(.//*[@class='para'])][not(.//pre)]"
)
# A full stop, then a capital: not after a single letter or digit ("z. B. Debian", "1. Januar").
SENTENCE_END = re.compile(r"(?<=[^\W\d_]{2}[.!?)»“\"])\s+(?=[„«»\"(]?[A-ZÄÖÜ])")
LONGEST = 50  # words; longer paragraphs that could not be cut are left out
HEADING = re.compile(r"^(Chapter |Kapitel )?[\dA-Z]+(\.\d+)*\. ")


def paragraphs(file: Path) -> list[str]:
    """The text of every paragraph, heading and term in the order of the page, white space made single."""
    page = html.fromstring(file.read_bytes(), parser=html.HTMLParser(encoding="utf-8"))
    return [" ".join(node.text_content().replace("\u200b", "").split()) for node in page.xpath(PARAGRAPHS)]


def sentences(german: str, english: str) -> list[tuple[str, str]]:
    """A pair of paragraphs as pairs of sentences, or as the one pair that it is."""
    german, english = HEADING.sub("", german), HEADING.sub("", english)
    cut = [SENTENCE_END.split(text) for text in (german, english)]
    return list(zip(*cut, strict=True)) if len(cut[0]) == len(cut[1]) else [(german, english)]


def usable(german: str, english: str) -> bool:
    """Whether a pair is a translation, not the original left standing, and of sensible length."""
    words = [text.casefold().split() for text in (german, english)]
    counts = [len(side) for side in words]
    kept = sum(word in words[0] for word in words[1])
    return 2 <= min(counts) and max(counts) <= min(LONGEST, 2 * min(counts)) and 2 * kept <= counts[1]


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("destination", type=Path)
    parser.add_argument(
        "--html", type=Path, default="/usr/share/doc/debian-handbook/html", help="editions de-DE and en-US"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.html / "de-DE").is_dir():
        parser.error(f"{arguments.html} has no de-DE edition: run apt-get install debian-handbook, or give --html.")

    pairs = {}
    for page in sorted((arguments.html / "de-DE").glob("*.html")):
        german, english = (paragraphs(arguments.html / edition / page.name) for edition in ("de-DE", "en-US"))
        if len(german) != len(english):
            print(f"left out: {page.name} has {len(german)} German and {len(english)} English paragraphs")
            continue
        for pair in zip(german, english, strict=True):
            # By the German sentence, so that no sentence is in two splits.
            pairs |= {g: e for g, e in sentences(*pair) if usable(g, e) and g not in pairs}

    text = "".join(f"{german}\t{english}\n" for german, english in pairs.items())
    write_whole(arguments.destination, lzma.compress(text.encode(), preset=9))
    print(f"{len(pairs)} pairs, {arguments.destination.stat().st_size} bytes in {arguments.destination}")


if __name__ == "__main__":
    run(main)
