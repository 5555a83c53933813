"""fairseq's dictionaries: which tokens there are, in which order, and the `dict.xx.txt` files that hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tasks.command import cut
from tasks.files import write_whole
from tasks.translation.sources import read_lines


BOS, PAD, EOS, UNK = range(4)
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


class Vocabulary:
    """
    Tokens and ids of one language, the four special symbols first, as fairseq numbers them.

    Args:
        counts (`dict[str, int]`): tokens in the order of their ids, without the special ones, with their frequency.

    Source: `fairseq.data.Dictionary`, 0.12.2.
    """

    def __init__(self, counts: dict[str, int]):
        self.counts = counts
        self.tokens = [*SPECIAL, *counts]
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def learn(cls, lines: Iterable[str]) -> Vocabulary:
        """
        Every token of some tokenised text, most frequent first, equals in alphabetical order; filled up to a multiple of 8.
        A special symbol in the text keeps the id that it has.

        Source: `fairseq-preprocess` without a threshold.
        """
        found = Counter(token for line in lines for token in line.split() if token not in SPECIAL)
        counts = dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
        for i in range(-(len(SPECIAL) + len(counts)) % 8):
            counts[f"madeupword{i:04d}"] = 0
        return cls(counts)

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """
        Reads a `dict.xx.txt`: one token and its frequency a line.

        Raises:
            `ValueError`: no such file, empty, not UTF-8, a line of another form, or a token twice, the special ones included.
        """
        if not file.is_file():
            raise ValueError(
                f"There is no dictionary {file}: fairseq-preprocess and scripts/run prepare_iwslt14 write one."
            )
        counts = {}
        for number, line in enumerate(read_lines(file), start=1):
            token, _, count = line.rstrip().rpartition(" ")
            if token in SPECIAL:
                raise ValueError(
                    f"{file}, line {number} is {cut(repr(line))}: {token} has an id of its own and must not come again, as in "
                    "fairseq; take the line out if the model was trained without it."
                )
            if not token or not count.isdecimal() or token in counts:
                raise ValueError(
                    f"{file}, line {number} is {cut(repr(line))}: expected a token that was not there before, a space and its "
                    "frequency; is this a fairseq dictionary?"
                )
            counts[token] = int(count)
        if not counts:
            raise ValueError(f"The dictionary {file} is empty: take the one that the text was prepared with.")
        return cls(counts)

    def refuse_rising(self, file: Path) -> None:
        """
        Refuses a dictionary in which a later token is more frequent. Where ids are fixed, in binary data and checkpoints, another
        order gives them other tokens.

        Raises:
            `ValueError`: so it is. Padding and what is added after it (a language's tag) may stand anywhere.
        """
        last = None
        for number, (token, count) in enumerate(self.counts.items(), start=1):
            if last is not None and count > last:
                raise ValueError(
                    f"{file}, line {number} ({cut(repr(f'{token} {count}'))}) has a higher count than the lines before, and fairseq writes the most "
                    "frequent first: has it been sorted? Take the one that fairseq-preprocess wrote (or, if it was given one in this order, "
                    "write the same count in all lines)."
                )
            last = count or last

    def refuse_lost(self, file: Path, text: str, times: Sequence[int], joint: Sequence[int]) -> None:
        """
        Refuses a dictionary that was made of the training text and lacks some of its lines since, so that later ids mean other tokens.

        One that was made of another text has counts that the text does not have in this order, and is taken.

        Args:
            file (`Path`): the dictionary's, for the message.
            text (`str`): the training text's, likewise.
            times (`Sequence[int]`): how often each id is in the training text.
            joint (`Sequence[int]`): how often it is there in both languages, as a joint dictionary counts.

        Raises:
            `ValueError`: so it is.
        """
        known = list(self.counts.values())
        for found in (list(times[len(SPECIAL) :]), list(joint[len(SPECIAL) :])):
            wrong = next((i for i, pair in enumerate(zip(known, found, strict=True)) if pair[0] != pair[1]), None)
            if wrong is None:
                return
            rest = iter(found)
            if all(count in rest for count in known if count):  # each after the one before
                raise ValueError(
                    f"{file}, line {wrong + 1}: {cut(repr(self.tokens[len(SPECIAL) + wrong]))} is counted {known[wrong]} times, and its id comes "
                    f"{found[wrong]} times in {text}. All counts fit if a line is missing there: take the file that fairseq-preprocess "
                    "wrote."
                )

    def lines(self) -> list[str]:
        """The lines of a `dict.xx.txt` that fairseq reads."""
        return [f"{token} {count}" for token, count in self.counts.items()]

    def write(self, file: Path) -> None:
        """Writes a `dict.xx.txt`."""
        write_whole(file, "".join(f"{line}\n" for line in self.lines()))

    def encode(self, line: str) -> list[int]:
        """Ids of a tokenised line, its end symbol included; unknown tokens are `<unk>`."""
        return [self.ids.get(token, UNK) for token in line.split()] + [EOS]

    def decode(self, ids: Iterable[int], unknown: str = "<unk>") -> str:
        """
        The tokenised line of some ids, up to the first end symbol after the start.

        Args:
            ids (`Iterable[int]`): a leading end symbol, where generation starts, is passed over; so are padding and labels below 0.
            unknown (`str`): what to write for `<unk>`; fairseq writes `<<unk>>` in references, so that no hypothesis matches it.
        """
        tokens = []
        for i in ids:
            if i == EOS and tokens:
                break
            if i >= 0 and i not in (BOS, PAD, EOS):
                tokens.append(unknown if i == UNK else self.tokens[i])
        return " ".join(tokens)
