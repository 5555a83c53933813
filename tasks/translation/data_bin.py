"""fairseq's data sets: binary sentences, and dictionaries."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.translation.vocabulary import BOS, EOS, PAD, Vocabulary


ELEMENT_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}


def data_bin_prefix(folder: Path, split: str, source_language: str, target_language: str) -> Path | None:
    """`folder/train.de-en` or `folder/train.en-de`, whichever is there, for one binary data set of either direction."""
    for pair in (f"{source_language}-{target_language}", f"{target_language}-{source_language}"):
        if (folder / f"{split}.{pair}.{source_language}.idx").is_file():
            return folder / f"{split}.{pair}"
    return None


def read_binary(prefix: Path) -> list[list[int]]:
    """
    Sentences of one memory-mapped file pair, as token ids with the end symbol.

    Args:
        prefix (`Path`): the files' common name, `.idx` and `.bin` left out.

    Raises:
        `ValueError`: a file is missing, damaged or of another kind, the two do not belong together, or a sentence has no end,
            a token below 0, or a start or padding symbol.

    Source: `fairseq.data.indexed_dataset.MMapIndexedDataset`, 0.12.2: magic, version, element type and number, then the
    sentences' sizes in elements and their places in bytes.
    """
    for file in (f"{prefix}.idx", f"{prefix}.bin"):
        if not Path(file).is_file():
            raise ValueError(
                f"{file} is missing: fairseq-preprocess writes an .idx and a .bin file for every language."
            )
    index = Path(f"{prefix}.idx").read_bytes()
    if index[:9] == b"MMIDIDX\x00\x00" and len(index) < 26:
        raise ValueError(f"{prefix}.idx has {len(index)} bytes, less than its header: it is cut off.")
    if index[:17] != b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") or index[17] not in ELEMENT_TYPES:
        raise ValueError(
            f"{prefix}.idx is not of fairseq's mmap form; run fairseq-preprocess with --dataset-impl mmap."
        )
    count = int.from_bytes(index[18:26], "little")
    if len(index) != 26 + 12 * count:
        raise ValueError(
            f"{prefix}.idx announces {count} sentences and has {len(index)} bytes: it is cut off or damaged."
        )
    sizes = np.frombuffer(index, "<i4", count, offset=26).astype(np.int64)
    starts = np.frombuffer(index, "<i8", count, offset=26 + 4 * count)
    element = np.dtype(ELEMENT_TYPES[index[17]])
    short = np.flatnonzero(sizes < 1)
    if len(short):
        raise ValueError(f"{prefix}.idx gives sentence {short[0]} {sizes[short[0]]} tokens: it is damaged.")
    ends = sizes.cumsum()
    # fairseq writes sentences one after the other, so that the sizes say where each one is.
    moved = np.flatnonzero(starts != (ends - sizes) * element.itemsize)
    if len(moved):
        raise ValueError(
            f"{prefix}.idx places sentence {moved[0]} at byte {starts[moved[0]]}, and the sizes of those before it at "
            f"{(ends - sizes)[moved[0]] * element.itemsize}: it is damaged."
        )
    size, total = Path(f"{prefix}.bin").stat().st_size, int(sizes.sum())
    if size != total * element.itemsize:
        raise ValueError(
            f"{prefix}.bin has {size} bytes, its index {total} tokens of {element.itemsize}: the two do not belong together."
        )
    tokens = np.fromfile(f"{prefix}.bin", dtype=element)
    for number, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        sentence = tokens[start:end]
        if sentence.min() < 0 or sentence[-1] != EOS or (sentence[:-1] == EOS).any():
            raise ValueError(
                f"{prefix}.bin, sentence {number} is {sentence[:20].tolist()}: expected tokens from 0 and one end symbol ({EOS}), "
                "at the end; is it fairseq-preprocess's?"
            )
    symbols = np.flatnonzero((tokens == BOS) | (tokens == PAD))
    if len(symbols):
        number = np.searchsorted(ends, symbols[0], side="right")
        raise ValueError(
            f"{prefix}.bin, sentence {number} is {tokens[ends[number] - sizes[number] : ends[number]][:20].tolist()}: <s> ({BOS}) and "
            f"<pad> ({PAD}) never stand inside of a sentence; take them out of the text and run fairseq-preprocess again."
        )
    return [tokens[start:end].tolist() for start, end in zip(ends - sizes, ends, strict=True)]


def read_dictionaries(folder: Path, source_language: str, target_language: str) -> tuple[Vocabulary, Vocabulary]:
    """The two `dict.xx.txt` of a folder; [`Vocabulary.read`] says what it raises."""
    source, target = (Vocabulary.read(folder / f"dict.{name}.txt") for name in (source_language, target_language))
    return source, target


def write_dictionaries(folder: Path, languages: tuple[str, str], vocabularies: tuple[Vocabulary, Vocabulary]) -> None:
    """Writes the two `dict.xx.txt` into a folder that is there."""
    for language, vocabulary in zip(languages, vocabularies, strict=True):
        vocabulary.write(folder / f"dict.{language}.txt")
