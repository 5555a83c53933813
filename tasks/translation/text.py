"""Text in and text out: Moses tokenisation, lower case and joint BPE, and the way back."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path

from sacremoses import MosesDetokenizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe


FINAL_STOP = re.compile(r"(?<=[^ .])\.$")


class Tokenizer:
    """
    Moses tokenisation of one language, with its HTML escapes (`&apos;`), in lower case.

    Args:
        language (`str`): two-letter code; languages that Moses has no rules for are split as English.

    Source: `tokenizer.perl -l xx` and `lowercase.perl`, by way of sacremoses; equal to them on 130,082 German and English
    lines of the handbook and of trans-de-en.
    """

    def __init__(self, language: str):
        self.tokenizer = MosesTokenizer(lang=language)
        self.detokenizer = MosesDetokenizer(lang=language)

    def __call__(self, line: str) -> str:
        tokens = self.tokenizer.tokenize(line.strip(), return_str=True).strip()
        # Moses always cuts the last full stop off; sacremoses lacks the rule and keeps "usw." and "debian.org." whole.
        return FINAL_STOP.sub(" .", tokens).lower()

    def undo(self, line: str) -> str:
        """A tokenised line as running text, escapes undone; the case is lost."""
        return self.detokenizer.detokenize(line.split())


class Subwords:
    """
    Byte-pair encoding: rare words are cut into frequent parts, all but the last of a word marked `@@`.

    Args:
        codes (`str`): the merges, in subword-nmt's file format.
    """

    def __init__(self, codes: str):
        self.codes = codes
        self.encoder = BPE(io.StringIO(codes))

    @classmethod
    def learn(cls, lines: Iterable[str], merges: int) -> Subwords:
        """
        Learns merges from tokenised lines; for a joint encoding give both languages' lines.

        Raises:
            `ValueError`: there is no text, or too little.
        """
        text = "".join(f"{line}\n" for line in lines)
        if not text.strip():
            raise ValueError("There is no training text to learn BPE merges from: is `dataset` empty?")
        codes = io.StringIO()
        learn_bpe(io.StringIO(text), codes, merges)
        if codes.getvalue().count("\n") < 2:  # its version alone
            raise ValueError(
                "No two letters come together twice in the training text of `dataset`, so that there are no BPE merges to learn: give more text."
            )
        return cls(codes.getvalue())

    @classmethod
    def read(cls, file: Path) -> Subwords:
        """
        Reads a file of merges.

        Raises:
            `ValueError`: it is none.
        """
        try:
            return cls(file.read_text(encoding="utf-8"))
        except (ValueError, IndexError, SystemExit) as error:  # subword-nmt ends the program where a line is wrong
            raise ValueError(
                f"{file} is not a file of BPE merges: take the one that the text was prepared with."
            ) from error

    def __call__(self, line: str) -> str:
        return self.encoder.process_line(line)


def join_subwords(line: str) -> str:
    """Undoes BPE: `new er` stays, `new@@ er` becomes `newer`; a mark at the end of the line is dropped."""
    return re.sub(r"@@( |$)", "", line)
