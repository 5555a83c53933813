"""Small text: an archive of the layout of fairseq's IWSLT14 archive, its faults included, parallel lines; and runs on them."""

import io
import random
import tarfile

from safetensors.torch import load_file

from tasks import recipes
from tasks.translation import iwslt14
from tasks.translation import train as task


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
            data = text if isinstance(text, bytes) else text.encode()
            member = tarfile.TarInfo(f"de-en/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def pairs(count=60):
    """German-looking and English-looking lines, all different."""
    chance = random.Random(0)
    german, english = ("Haus", "Baum", "grün", "Straße", "ist"), ("house", "tree", "green", "street", "is")
    made = []
    for i in range(count):
        chosen = [chance.randrange(5) for _ in range(chance.randint(2, 9))]
        number = " ".join(str(i))  # digit by digit: no token that only a held-out line has
        made.append(tuple(f"{number} {' '.join(words[c] for c in chosen)}." for words in (german, english)))
    return made


def write(folder, name, rows, languages=("de", "en")):
    folder.mkdir(exist_ok=True)
    for language, lines in zip(languages, zip(*rows, strict=True), strict=True):
        (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def texts(split):
    rows = sorted(zip(split["line"], split["source_text"], split["target_text"], strict=True))
    return [(source, target) for _, source, target in rows]


def write_word_for_word(folder):
    """Sixty short pairs of a toy language, word for word, raw text."""
    words = [("rot", "red"), ("grün", "green"), ("Haus", "house"), ("Baum", "tree"), ("alt", "old")]
    rows = [[words[(i * k) % 5] for k in range(1, 3 + i % 4)] for i in range(60)]
    for side, language in enumerate(("de", "en")):
        lines = [" ".join(pair[side] for pair in row) + " ." for row in rows]
        for name, part in (("train", slice(40)), ("valid", slice(40, 50)), ("test", slice(50, 60))):
            (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines[part]))
    return folder


def parse(*argv):
    return recipes.parse((task.TranslationArguments, task.TrainingArguments), [str(a) for a in argv], "")


def flags(text, output, **changes):
    values = {
        "dataset": text, "output_dir": output, "bpe_merges": 30, "max_tokens": 100, "dropout": 0.0, "num_train_epochs": 2,
        "rho": 0.05, "optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": 1e-3, "use_cpu": True, "report_to": "none",
        "save_strategy": "epoch", "generation_num_beams": 2, "per_device_eval_batch_size": 4, "label_smoothing_factor": 0.1,
        "disable_tqdm": True, **changes,
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def weights(folder):
    return load_file(folder / "model.safetensors")


def difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)
