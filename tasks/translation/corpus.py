"""A translation data set as training and scoring take it: token ids in batches, and the text to score against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers.utils import logging

from tasks.files import write_whole
from tasks.identity import fingerprint
from tasks.translation.data_bin import write_dictionaries
from tasks.translation.model import POSITIONS
from tasks.translation.sources import Pairs
from tasks.translation.text import Subwords, Tokenizer
from tasks.translation.vocabulary import EOS, PAD, Vocabulary


logger = logging.get_logger(__name__)


@dataclass
class Corpus:
    """
    A translation data set, ready to train on.

    Args:
        splits (`dict[str, Dataset]`): train, validation and test. `input_ids` and `labels` end with `</s>`;
            `source_tokens` and `target_tokens` are tokenised lines without BPE, `source_text` and `target_text` running
            text; `line` is the place in the original order, for the held-out sets come sorted by length.
        source_vocabulary, target_vocabulary ([`Vocabulary`]): separate, whatever the BPE.
        target_tokenizer ([`Tokenizer`]): its `undo` makes running text of hypotheses.
        subwords ([`Subwords`], *optional*): the BPE, where it is known.
    """

    splits: dict[str, Dataset]
    source_vocabulary: Vocabulary
    target_vocabulary: Vocabulary
    target_tokenizer: Tokenizer
    subwords: Subwords | None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Twelve digits for each split that stand for its sentences, ids and text."""

        def of(split: Dataset) -> str:
            sides = [split[name] for name in ("input_ids", "labels")]
            ids = [np.array([i for ids in side for i in ids], dtype=np.int64) for side in sides]
            text = "\n".join(split["target_text"]).encode("utf-8", "surrogatepass")
            return fingerprint(*ids, *([len(ids) for ids in side] for side in sides), np.frombuffer(text, np.uint8))

        return {name: of(split) for name, split in self.splits.items()}

    def save(self, folder: Path, source_language: str, target_language: str) -> None:
        """Writes dictionaries and BPE merges, all that it takes to use the model on new text."""
        folder.mkdir(parents=True, exist_ok=True)
        write_dictionaries(
            folder, (source_language, target_language), (self.source_vocabulary, self.target_vocabulary)
        )
        if self.subwords is not None:
            write_whole(folder / "code", self.subwords.codes)


def build(ids: list, tokens: Pairs, text: Pairs, split: str) -> Dataset:
    """
    One split as a data set; validation and test sorted by source length, so that their batches hold little padding.

    Raises:
        `ValueError`: no sentences, no text on one side, or a sentence too long for the model.
    """
    if not ids:
        raise ValueError(
            f"The {split} split of `dataset` has no sentences: train, validation and test need one at least."
        )
    for side, name in enumerate(("source", "target")):
        if not any(pair[side].strip() for pair in tokens):
            raise ValueError(
                f"The {split} split of `dataset` has no text in the {name} language: all of its {len(ids)} sentences are empty."
            )
    if empty := sum(not all(side.strip() for side in pair) for pair in tokens):
        fate = "trained on" if split == "train" else "scored"
        logger.warning(
            f"{empty} of {len(ids)} pairs of {split} have no text in one language and are {fate} as they are."
        )
    for number, pair in enumerate(ids, start=1):
        if max(map(len, pair)) > POSITIONS:
            raise ValueError(
                f"Pair {number} of the {split} split of `dataset` has {len(pair[0])} and {len(pair[1])} tokens, and the model has "
                f"{POSITIONS} positions: leave it out or cut it."
            )
    order = range(len(ids)) if split == "train" else sorted(range(len(ids)), key=lambda i: len(ids[i][0]))
    columns = {"input_ids": (ids, 0), "labels": (ids, 1), "source_tokens": (tokens, 0), "target_tokens": (tokens, 1)}
    columns |= {"source_text": (text, 0), "target_text": (text, 1)}
    return Dataset.from_dict(
        {name: [pairs[i][side] for i in order] for name, (pairs, side) in columns.items()} | {"line": list(order)}
    )


def collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
    """
    Pads a batch on the right; all results have the shape (sentences, tokens).

    The decoder's inputs are made here, from `</s>` and the labels without their last: the model would change the labels
    in place while making them, and the padding would count in the loss.
    """

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    input_ids = padded([example["input_ids"] for example in examples], PAD)
    return {
        "input_ids": input_ids,
        "attention_mask": input_ids.ne(PAD).long(),
        "decoder_input_ids": padded([[EOS, *example["labels"][:-1]] for example in examples], PAD),
        "labels": padded([example["labels"] for example in examples], -100),
    }
