"""IWSLT14 German-English, prepared as fairseq's examples/translation/prepare-iwslt14.sh does, without Perl."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm.auto import tqdm

from tasks.files import read_members, write_whole
from tasks.translation.text import Subwords, Tokenizer
from tasks.translation.vocabulary import Vocabulary


URL = "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
LANGUAGES = ("de", "en")
MERGES = 10000
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")  # in the order of the script
DROPPED_TAGS = ("<url>", "<talkid>", "<keywords>")
STRIPPED_TAGS = re.compile(r"</?(title|description)>")
SHORTEST, LONGEST, LONGEST_WORD, RATIO = 1, 175, 1000, 1.5
VALIDATION_EVERY = 23

# Lines that fairseq's script makes of its archive.
SIZES = {"train": 160239, "valid": 7283, "test": 6750}

Sides = dict[str, list[str]]  # lines by language


def download(file: Path) -> None:
    """
    Fetches fairseq's archive. One that breaks off is kept as `.part`, and the next call goes on from there.

    Raises:
        `ValueError`: the server cannot be reached, or the connection broke off.
    """
    part = file.with_name(file.name + ".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    there = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(URL, headers={"Range": f"bytes={there}-"} if there else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != 206:  # the whole file, also from a server that does not know ranges
                there = 0
            length = answer.headers["Content-Length"]
            total = None if length is None else there + int(length)
            with (
                open(part, "ab" if there else "wb") as output,
                tqdm(total=total, initial=there, unit="B", unit_scale=True, desc=URL) as bar,
            ):
                while chunk := answer.read(1 << 20):
                    output.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is there is no part of this file
            part.unlink()
        raise ValueError(
            f"{URL} could not be fetched ({error}): try again, or fetch it elsewhere and give it as --archive."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"{URL} could not be fetched ({error}): try again, or fetch it elsewhere and give it as --archive."
        ) from error
    found = part.stat().st_size
    if total is not None and found != total:
        raise ValueError(f"{URL} broke off after {found} of {total} bytes: the same command goes on from there.")
    os.replace(part, file)


def read_archive(file: Path) -> dict[str, list[str]]:
    """
    The lines of every file that the preparation needs, by name.

    Raises:
        `ValueError`: no such file, no archive, cut off, damaged, not UTF-8, or a file is missing in it.
    """
    names = [f"train.tags.de-en.{language}" for language in LANGUAGES]
    names += [f"IWSLT14.{test}.de-en.{language}.xml" for test in TEST_SETS for language in LANGUAGES]
    lines = {}
    for name, content in read_members(file, names).items():
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is cut off, damaged or no archive ({name}: {error}): delete it and fetch it again."
            ) from error
        lines[name] = text.removesuffix("\n").split("\n") if text else []
    return lines


def training_lines(lines: Iterable[str]) -> list[str]:
    """Lines of a train.tags file without addresses, numbers and keywords; titles and descriptions lose their tags only."""
    return [STRIPPED_TAGS.sub("", line) for line in lines if not any(tag in line for tag in DROPPED_TAGS)]


def test_lines(lines: Iterable[str]) -> list[str]:
    """The text of a file's segments. By line, not as XML, which the files are not quite; an empty segment stays."""
    segments = (line for line in lines if "<seg id" in line)
    opened = (re.sub(r'<seg id="[0-9]*">\s*', "", line) for line in segments)
    return [re.sub(r"\s*</seg>\s*", "", line).replace("’", "'") for line in opened]


def clean(german: str, english: str) -> bool:
    """Whether Moses' `clean-corpus-n.perl -ratio 1.5 ... 1 175` keeps a tokenised pair."""
    words = german.split(), english.split()
    counts = [len(side) for side in words]
    if min(counts) < SHORTEST or max(counts) > LONGEST or max(counts) / min(counts) > RATIO:
        return False
    return all(len(word) <= LONGEST_WORD for side in words for word in side)


def tokenised(contents: dict[str, list[str]]) -> dict[str, Sides]:
    """
    Train, valid and test in tokens and lower case, before BPE.

    Raises:
        `ValueError`: the two languages of a file differ in their number of lines, or a file or a split has no text.
    """
    tokenizers = {language: Tokenizer(language) for language in LANGUAGES}

    def sides(name: str, extract: Callable[[Iterable[str]], list[str]], ending: str = "") -> list[tuple[str, ...]]:
        raw = [extract(contents[f"{name}.{language}{ending}"]) for language in LANGUAGES]
        if len(raw[0]) != len(raw[1]):
            raise ValueError(f"{name}: {len(raw[0])} German and {len(raw[1])} English lines; the archive is damaged.")
        if not any(map(str.strip, raw[0])) or not any(map(str.strip, raw[1])):
            raise ValueError(f"{name}: no text in it; the archive is damaged, or another than IWSLT14's.")
        rows = tqdm(zip(*raw, strict=True), f"Tokenising {name}", len(raw[0]))
        return [
            tuple(tokenizers[language](line) for language, line in zip(LANGUAGES, row, strict=True)) for row in rows
        ]

    train = [pair for pair in sides("train.tags.de-en", training_lines) if clean(*pair)]
    splits = {
        "train": [pair for number, pair in enumerate(train, start=1) if number % VALIDATION_EVERY],
        "valid": train[VALIDATION_EVERY - 1 :: VALIDATION_EVERY],
        "test": [pair for test in TEST_SETS for pair in sides(f"IWSLT14.{test}.de-en", test_lines, ".xml")],
    }
    for split, pairs in splits.items():
        if not pairs:
            raise ValueError(
                f"{split} has no pairs, of {len(train)} that are left of train.tags.de-en after cleaning: the archive is another than "
                "IWSLT14's."
            )
    return {
        split: {language: [pair[side] for pair in pairs] for side, language in enumerate(LANGUAGES)}
        for split, pairs in splits.items()
    }


def prepare(archive: Path, folder: Path) -> None:
    """
    Writes train, valid and test in BPE, the merges (`code`) and both dictionaries; what is there and intact is kept.

    `checksums.json` records every finished file with the archive it came from. Files appear under their names only when
    they are complete.

    Args:
        archive (`Path`): fairseq's de-en.tgz.
        folder (`Path`): made if it is not there, once the archive has been read.

    Raises:
        `ValueError`: see [`read_archive`] and [`tokenised`].
    """
    contents = read_archive(archive)
    record = folder / "checksums.json"
    source = checksum(archive.read_bytes())
    known = read_record(record)
    done = known if known.get("archive") == source else {"archive": source}

    def intact(name: str) -> bool:
        file = folder / name
        return file.is_file() and done.get(name) == checksum(file.read_bytes())

    def write(name: str, lines: Iterable[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        write_whole(folder / name, data)
        done[name] = checksum(data)
        write_whole(record, (json.dumps(done, indent=2) + "\n").encode())

    names = [f"{split}.{language}" for split in ("train", "valid", "test") for language in LANGUAGES]
    dictionaries = [f"dict.{language}.txt" for language in LANGUAGES]
    if all(map(intact, [*names, *dictionaries, "code"])):
        print(f"{folder} is complete.")
        return

    folder.mkdir(parents=True, exist_ok=True)
    # The slow part of tokenising is kept between runs, as in the script's tmp folder.
    (folder / "tmp").mkdir(exist_ok=True)
    if not all(intact(f"tmp/{name}") for name in names):
        for split, sides in tokenised(contents).items():
            for language, lines in sides.items():
                write(f"tmp/{split}.{language}", lines)
    text = {name: (folder / "tmp" / name).read_text(encoding="utf-8").split("\n")[:-1] for name in names}
    if not intact("code"):
        subwords = Subwords.learn((line for language in LANGUAGES for line in text[f"train.{language}"]), MERGES)
        write("code", subwords.codes.removesuffix("\n").split("\n"))
    subwords = Subwords.read(folder / "code")
    for name in names:
        if not intact(name):
            write(name, [subwords(line) for line in tqdm(text[name], f"BPE {name}")])
    for language, name in zip(LANGUAGES, dictionaries, strict=True):
        vocabulary = Vocabulary.learn((folder / f"train.{language}").read_text(encoding="utf-8").split("\n"))
        write(name, vocabulary.lines())
    sizes = ", ".join(f"{name} {len(text[name])}" for name in names)
    print(f"{archive}: SHA-256 {source}")
    for split, size in SIZES.items():
        if len(text[f"{split}.de"]) != size:
            print(
                f"{split} has {len(text[f'{split}.de'])} pairs, fairseq's has {size}: this is another archive than IWSLT14's."
            )
    print(f"{folder}: {sizes} lines; {len(Vocabulary.read(folder / dictionaries[0]))} German and ", end="")
    print(f"{len(Vocabulary.read(folder / dictionaries[1]))} English tokens.")


def read_record(file: Path) -> dict[str, str]:
    """The checksums of finished files; a damaged record is as good as none, and everything is made again."""
    if not file.is_file():
        return {}
    try:
        known = json.loads(file.read_bytes())
    except ValueError:  # not JSON, or not UTF-8
        known = None
    if not isinstance(known, dict):
        print(f"{file} is damaged: everything is made again.")
        return {}
    return known


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
