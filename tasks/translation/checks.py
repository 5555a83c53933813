"""What text, ids and dictionaries have to be to give scores that mean something."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from tasks.tables import warn_of_lost_characters
from tasks.translation.vocabulary import BOS, EOS, PAD, UNK, Vocabulary


logger = logging.get_logger(__name__)
# Of the training tokens of a side, which a dictionary is made from: none are unknown with BPE, and a few where rare words were
# left out. Another language's dictionary, of the same BPE, leaves more than a fifth.
UNKNOWN_LIMIT = 0.2
UNKNOWN_TOLD = 0.01
# What BPE, SentencePiece and Moses leave in a line. Of tokenised captions 2.3 % have an escape, of talks 40 %; of running text none.
MARKS = re.compile(r"\S@@(?= |$)|▁|(?<!\S)&apos;|&apos;(?!\S)|(?<!\S)&quot;(?!\S)")
MARKED_LIMIT = 0.02
UNSEEN_TOLD = 0.02  # of the held-out tokens; of good text at most 0.003 are
# By how much more of a side's words are known in the other language than in its own, where the two files are swapped. Of German and English
# text 16 to 58 % of the words are known in the other language (names, full stops), and 80 to 99 % in their own, from 300 pairs on.
SWAPPED = 0.2
# Of the neighbouring tokens of held-out text training has seen as many as of a tenth of its own that is kept aside, within 0.1 of 1. Of
# ids of another dictionary, or words in another order, less than half as many.
OTHER_TEXT = 0.6
ENOUGH = 200  # neighbours, to tell


def warn_of_repetitions(splits: Mapping[str, Dataset]) -> None:
    """
    Warns where more than a tenth of the pairs that are scored are training pairs too, or more than a tenth of validation and test the
    same (of the usual data sets at most a hundredth are), and where the two sides of most pairs are.
    """
    of = {
        name: list(zip(split["source_tokens"], split["target_tokens"], strict=True)) for name, split in splits.items()
    }
    for name, pairs in of.items():
        copies = sum(source == target for source, target in pairs)
        if copies > len(pairs) / 2:
            logger.warning(
                f"{copies} of the {len(pairs)} pairs of {name} have the same text in both languages: is one of its files a copy?"
            )
    trained, chosen = set(of.pop("train")), set(of["validation"])
    again = sum(pair in chosen for pair in of["test"])
    if again > min(len(of["test"]), len(chosen)) / 10:
        logger.warning(
            f"{again} of the {len(of['test'])} pairs of test are pairs of validation too: what is chosen by the one is chosen by the other."
        )
    for name, pairs in of.items():
        again = sum(pair in trained for pair in pairs)
        if again > len(pairs) / 10:
            logger.warning(
                f"{again} of the {len(pairs)} pairs of {name} are training pairs too, and scores of them mean little."
            )


def warn_of_lost(splits: Mapping[str, Dataset], languages: tuple[str, str]) -> None:
    """Warns of characters that a wrong decoding has lost, and of held-out tokens that training has not seen: of text in BPE hardly any."""
    for name, split in splits.items():
        for language, text, ids in zip(
            languages, ("source_text", "target_text"), ("input_ids", "labels"), strict=True
        ):
            warn_of_lost_characters(split[text], f"{name} in {language}")
            unknown = sum(sentence.count(UNK) for sentence in split[ids])
            total = sum(map(len, split[ids])) - len(split)
            if name != "train" and unknown > UNSEEN_TOLD * total:
                logger.warning(
                    f"{unknown / total:.0%} of the {language} tokens of {name} are unknown: is it encoded and cut as the training text is?"
                )


def warn_of_other_text(splits: Mapping[str, Dataset], languages: tuple[str, str]) -> None:
    """
    Warns of held-out text whose neighbouring tokens are far more seldom neighbours in training than those of a tenth of the training text,
    kept aside, are in the rest: it is of another kind, or its ids are another dictionary's.
    """
    for language, side in zip(languages, ("input_ids", "labels"), strict=True):
        trained = splits["train"][side]
        rest = [ids for row, ids in enumerate(trained) if row % 10]
        known = {*map(tuple, rest)}
        aside = _neighbours(ids for ids in trained[::10] if tuple(ids) not in known)
        if len(aside) < ENOUGH:
            continue
        expected = np.isin(aside, np.unique(_neighbours(rest))).mean()
        for name in ("validation", "test"):
            found = _neighbours(splits[name][side])
            share = np.isin(found, np.unique(_neighbours(trained))).mean()
            if len(found) >= ENOUGH and share < OTHER_TEXT * expected:
                logger.warning(
                    f"Of the neighbouring tokens in {language} of {name}, training has {share:.0%} as neighbours too, and of a part of training "
                    f"itself {expected:.0%}: is it text of the same kind, prepared alike and with the same dictionary?"
                )


def _neighbours(sentences: Iterable[Sequence[int]]) -> np.ndarray:
    """Two tokens that follow each other in a sentence, as one number each."""
    flat = np.fromiter(chain.from_iterable(sentences), np.int64)
    return (flat[:-1] << 32 | flat[1:])[flat[:-1] != EOS]


def refuse_copied_side(splits: Mapping[str, Dataset], languages: tuple[str, str]) -> None:
    """
    Refuses two splits of which one side is the same and the other is not: a file was copied under the other's name.

    Raises:
        `ValueError`: more than half of a split's lines in one language are another split's, and less than a tenth in the other.
    """
    for one, other in combinations(splits, 2):
        shares = []
        for side in ("source_tokens", "target_tokens"):
            known, lines = set(splits[one][side]), splits[other][side]
            shares.append(sum(line in known for line in lines) / len(lines))
        if max(shares) > 0.5 and min(shares) < 0.1:
            same = languages[shares.index(max(shares))]
            raise ValueError(
                f"{max(shares):.0%} of the lines in {same} of the {other} split of `dataset` are those of {one}, and {min(shares):.0%} in the "
                "other language: is a file there twice, under two names?"
            )


def refuse_cut(splits: Mapping[str, Sequence[tuple[str, str]]], languages: tuple[str, str]) -> None:
    """
    Refuses text that has been tokenised or cut into subwords, where running text is expected: it would be so again.

    Raises:
        `ValueError`: of one side of a split more lines than `MARKED_LIMIT`, and than two, have such marks.
    """
    for name, pairs in splits.items():
        for number, language in enumerate(languages):
            found = [mark[0] for pair in pairs if (mark := MARKS.search(pair[number]))]
            if len(found) > max(2, MARKED_LIMIT * len(pairs)):
                raise ValueError(
                    f"{len(found)} of the {len(pairs)} lines in {language} of the {name} split of `dataset` have marks such as {found[0][-6:]!r}, of "
                    "subwords or Moses' tokenizer, and running text is expected: give the text as it was before (or, of BPE text, its "
                    f"dict.{language}.txt as well)."
                )


def refuse_swapped(splits: Mapping[str, Dataset], languages: tuple[str, str]) -> None:
    """
    Refuses held-out text that reads like the other language: its file has the wrong name, and the scores would be those of the other
    direction.

    Raises:
        `ValueError`: of the words of one side many more stand in the other side's training text than in its own.
    """
    sides = ("source_tokens", "target_tokens")
    known = [{word for line in splits["train"][side] for word in line.split()} for side in sides]
    for name, split in splits.items():
        for number, side in enumerate(sides):
            words = Counter(word for line in split[side] for word in line.split())
            own, other = (
                sum(times for word, times in words.items() if word in of) / max(words.total(), 1)
                for of in (known[number], known[1 - number])
            )
            if other > own + SWAPPED:
                raise ValueError(
                    f"The {name} split of `dataset` has text in {languages[number]} of which the training text in {languages[number]} "
                    f"knows {own:.0%} of the words, and that in {languages[1 - number]} {other:.0%}: are the two files swapped?"
                )


def refuse_changed(
    vocabularies: Sequence[Vocabulary],
    folder: Path,
    prefix: str,
    sides: Sequence[list[list[int]]],
    languages: tuple[str, str],
) -> None:
    """
    Refuses dictionaries that were changed since the training text was made binary, see [`Vocabulary`], and warns of those that count other
    text.

    Raises:
        `ValueError`: so it is, or the two are exchanged.
    """
    longest = max(map(len, vocabularies))
    times = [np.bincount(np.fromiter(chain.from_iterable(side), np.int64), minlength=longest) for side in sides]
    for language, vocabulary, own in zip(languages, vocabularies, times, strict=True):
        file, size = folder / f"dict.{language}.txt", len(vocabulary)
        vocabulary.refuse_rising(file)
        vocabulary.refuse_lost(file, f"{prefix}.{language}.bin", own[:size].tolist(), sum(times)[:size].tolist())
        counts, first = list(vocabulary.counts.values()), UNK + 1
        fits = [name for name, of in zip(languages, times, strict=True) if counts == of[first:size].tolist()]
        if fits and language not in fits:
            raise ValueError(f"{file} counts the words of {prefix}.{fits[0]}.bin: are the two dictionaries exchanged?")
        if not fits and counts != sum(times)[first:size].tolist():
            logger.warning(
                f"{file} counts other text than {prefix}.{language}.bin: is it the one that this was made with?"
            )


def refuse_symbols(ids: list, folder: Path, split: str, languages: tuple[str, str]) -> None:
    """
    Refuses text in which a special symbol is written out: attention would pass over `<pad>`, and a sentence end at `</s>`.

    Raises:
        `ValueError`: so it is; `<unk>` may be there.
    """
    for language, side in zip(languages, zip(*ids, strict=True), strict=False):
        for number, sentence in enumerate(side, start=1):
            if not {BOS, PAD, EOS}.isdisjoint(sentence[:-1]):
                raise ValueError(
                    f"{folder / split}.{language}, line {number} has <s>, <pad> or </s> in it, which never stand inside of a sentence: "
                    "take them out."
                )


def refuse_unknown(ids: list, folder: Path, split: str, languages: tuple[str, str]) -> None:
    """
    Refuses training text that its dictionary hardly knows, and warns about such held-out text, and about training text of which it does
    not know all.

    Raises:
        `ValueError`: of one side's training tokens a larger share than `UNKNOWN_LIMIT` is `<unk>`.
    """
    for language, side in zip(languages, zip(*ids, strict=True), strict=False):
        found = sum(sentence.count(UNK) for sentence in side)
        total = sum(map(len, side)) - len(side)  # without the ends
        told = (
            f"{folder}: {found / max(total, 1):.0%} of the {language} tokens of {split} are not in dict.{language}.txt"
        )
        if split == "train" and UNKNOWN_TOLD * total < found <= UNKNOWN_LIMIT * total:
            logger.warning(
                f"{told}; one that is made of them without a threshold has all: is it whole, and all text cut alike?"
            )
        if found > UNKNOWN_LIMIT * total:
            if split != "train":
                logger.warning(f"{told}: is it the language and the BPE that the dictionary was made for?")
                continue
            raise ValueError(
                f"{told}, and at most {UNKNOWN_LIMIT:.0%} may be: take the dictionary and the BPE that the text was prepared with."
            )
