"""A small archive of the layout of fairseq's IWSLT14 archive, faults of the real one included."""

import io
import tarfile

from tasks.translation import iwslt14


TAGS = {
    "de": [
        "<url>http://www.ted.com/talks/lang/de/x.html</url>",
        "<keywords>talks, Haus</keywords>",
        "<speaker>Anna Muster</speaker>",  # not among the tags that the script drops
        "<talkid>1</talkid>",
        "<title>Anna Muster: Das Haus</title>",
        "<description>Ein Haus & mehr.</description>",
    ],
    "en": [
        "<url>http://www.ted.com/talks/x.html</url>",
        "<keywords>talks, house</keywords>",
        "<speaker>Anna Muster</speaker>",
        "<talkid>1</talkid>",
        "<title>Anna Muster: The House</title>",
        "<description>A house & more.</description>",
    ],
}
# Kept pairs around pairs that Moses' cleaning drops.
BODY = [
    (" Das ist das Haus. ", " This is the house. "),
    ("", "Nothing on the other side."),
    ("Nichts auf der anderen Seite.", "   "),
    ("eins zwei drei vier", "one two three four five six"),  # 6/4 = 1.5 stays
    ("eins zwei drei", "one two three four five"),  # 5/3 goes
    ("wort " * 175, "word " * 175),  # 175 stay
    ("wort " * 176, "word " * 176),  # 176 go
    ("Ein " + "x" * 1001, "One " + "x" * 1001),  # so does a word of 1001 letters
]
FILLERS = [
    (f"das haus nummer {'abcdefghij'[i % 10]} .", f"the house number {'abcdefghij'[i % 10]} .") for i in range(60)
]


def segments(name, language):
    text = {"de": f"Das ist {name} im Haus’ .", "en": f"This isn’t {name}."}[language]
    empty = '<seg id="3"></seg>'
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            "<mteval><doc docid=1 genre=lectures>",  # an attribute without quotation marks: not XML
            f"<title>{name} & more</title>",  # an ampersand on its own: not XML either
            f'<seg id="1"> {text} </seg>',
            f'<seg id="2">{name} < 3</seg>',
            empty,
            "</doc>",  # never closed: mteval
        ]
    )


def contents():
    files = {}
    for side, language in enumerate(("de", "en")):
        lines = TAGS[language] + [pair[side] for pair in BODY + FILLERS]
        files[f"train.tags.de-en.{language}"] = "".join(f"{line}\n" for line in lines)
        for name in iwslt14.TEST_SETS:
            files[f"IWSLT14.{name}.de-en.{language}.xml"] = segments(name.lower(), language) + "\n"
    return files


def pack(file, files):
    with tarfile.open(file, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"de-en/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return file
