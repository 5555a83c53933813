"""From any of the inputs to token ids: which sentences, in which vocabulary, and the text to score against."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging

from tasks.translation import folders, sources
from tasks.translation.checks import refuse_changed, refuse_cut, refuse_symbols, refuse_unknown
from tasks.translation.corpus import Corpus, build
from tasks.translation.data_bin import data_bin_prefix, read_binary, read_dictionaries
from tasks.translation.text import Subwords, Tokenizer, join_subwords
from tasks.translation.vocabulary import Vocabulary


logger = logging.get_logger(__name__)
SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours and fairseq's names
MERGES = 10000
SAMPLE = 300  # pairs of a split of a prepared folder, by which its BPE is known again


@dataclass
class DataArguments:
    """What to translate. The README of this task shows every kind of input."""

    dataset: str = field(
        default="handbook",
        metadata={
            "help": "handbook, ding, a folder (prepared by scripts/run prepare_iwslt14, data-bin of fairseq, train.de and train.en, "
            "json/csv/parquet), such a file, or a data set of the hub with a translation column."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set of the hub."})
    source_language: str = field(default="de", metadata={"help": "Language to translate from."})
    target_language: str = field(default="en", metadata={"help": "Language to translate into."})
    bpe_merges: int | None = field(
        default=None,
        metadata={"help": "Joint BPE merges to learn from running text. Default: 10000. Prepared data has its own."},
    )
    train_examples: int | None = field(
        default=None,
        metadata={"help": "Train on so many pairs, spread evenly over the training split. Default: all."},
    )
    max_tokens: int = field(
        default=4096,
        metadata={"help": "Limit for a micro-batch of one process: sentences times the longest, in tokens."},
    )

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"`max_tokens` is {self.max_tokens}: give 1 or more, 4096 for instance.")
        if self.bpe_merges is not None and self.bpe_merges < 1:
            raise ValueError(f"`bpe_merges` is {self.bpe_merges}: give 1 or more, 10000 for instance.")
        if self.train_examples is not None and self.train_examples < 1:
            raise ValueError(
                f"`train_examples` is {self.train_examples}: give 1 or more, or leave it out to train on all."
            )
        if self.source_language == self.target_language:
            raise ValueError(f"`source_language` and `target_language` are both {self.source_language!r}: give two.")


def load(arguments: DataArguments) -> Corpus:
    """
    Reads or builds the corpus that the arguments name.

    Raises:
        `ValueError`: what is there does not fit; the message names field, value and way out.
    """
    languages, examples = (arguments.source_language, arguments.target_language), arguments.train_examples
    folder = Path(arguments.dataset)
    if arguments.dataset in ("handbook", "ding"):
        refuse_ignored(arguments, "dataset_config")
        pairs = (sources.handbook if arguments.dataset == "handbook" else sources.ding)(*languages)
    elif data_bin_prefix(folder, "train", *languages):
        refuse_ignored(arguments, "dataset_config", "bpe_merges")
        return with_part(from_data_bin(folder, *languages), examples)
    elif (folder / f"dict.{languages[0]}.txt").is_file():
        refuse_ignored(arguments, "dataset_config", "bpe_merges")
        return with_part(from_prepared(folder, *languages), examples)
    else:
        folders.refuse_incomplete(folder, *languages)
        if (folder / f"train.{languages[0]}").is_file():
            refuse_ignored(arguments, "dataset_config")
            pairs = sources.parallel_folder(folder, *languages)
        else:
            pairs = sources.from_datasets(arguments.dataset, arguments.dataset_config, *languages)
    return from_text(pairs, *languages, arguments.bpe_merges or MERGES, examples)


def rows_of_part(examples: int, pairs: int) -> list[int]:
    """
    So many rows of the training pairs, spread evenly.

    Raises:
        `ValueError`: there are fewer.
    """
    if examples > pairs:
        raise ValueError(
            f"`train_examples` is {examples}, and there are {pairs} training pairs: give {pairs} or fewer."
        )
    return [row * pairs // examples for row in range(examples)]


def with_part(corpus: Corpus, examples: int | None) -> Corpus:
    """The corpus with a part of its training pairs; BPE and dictionaries are the data's own."""
    if examples is not None:
        train = corpus.splits["train"]
        corpus.splits["train"] = train.select(rows_of_part(examples, len(train)))
    return corpus


def refuse_ignored(arguments: DataArguments, *names: str) -> None:
    """
    Refuses arguments that play no part for this kind of data.

    Raises:
        `ValueError`: one of them was given.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            raise ValueError(
                f"`{name}` is {value!r}, but `dataset` {arguments.dataset} has no use for it: leave it out."
            )


def from_text(
    splits: dict[str, sources.Pairs], source: str, target: str, merges: int, examples: int | None = None
) -> Corpus:
    """
    Tokenises, lower-cases, learns a joint BPE and separate vocabularies on the training pairs that are taken, and encodes all.
    """
    refuse_cut(splits, (source, target))
    tokenizers = Tokenizer(source), Tokenizer(target)
    # A training pair with an empty side teaches to say nothing.
    train = [pair for pair in splits["train"] if all(side.strip() for side in pair)]
    if empty := len(splits["train"]) - len(train):
        logger.warning(
            f"{empty} of {len(splits['train'])} pairs of train have no text in one language and are left out."
        )
    if examples is not None:
        train = [train[row] for row in rows_of_part(examples, len(train))]
    splits = dict(splits, train=train)
    tokens = {
        name: [
            tuple(tokenizer(line) for tokenizer, line in zip(tokenizers, pair, strict=True))
            for pair in tqdm(pairs, f"Tokenising {name}")
        ]
        for name, pairs in splits.items()
    }
    subwords = Subwords.learn((line for side in zip(*tokens["train"], strict=True) for line in side), merges)
    encoded = {
        name: [tuple(map(subwords, pair)) for pair in tqdm(pairs, f"BPE {name}")] for name, pairs in tokens.items()
    }
    vocabularies = [Vocabulary.learn(side) for side in zip(*encoded["train"], strict=True)]
    datasets = {
        name: build(
            [tuple(v.encode(line) for v, line in zip(vocabularies, pair, strict=True)) for pair in encoded[name]],
            tokens[name],
            splits[name],
            name,
        )
        for name in SPLITS
    }
    return Corpus(datasets, *vocabularies, tokenizers[1], subwords)


def from_prepared(folder: Path, source: str, target: str) -> Corpus:
    """A folder of BPE text with dictionaries, as `scripts/run prepare_iwslt14` writes it."""
    vocabularies = read_dictionaries(folder, source, target)
    datasets, cut = {}, {}
    for name, prefix in SPLITS.items():
        pairs = cut[name] = sources.parallel(folder, prefix, source, target)
        ids = [tuple(v.encode(line) for v, line in zip(vocabularies, pair, strict=True)) for pair in pairs]
        refuse_symbols(ids, folder, prefix, (source, target))
        refuse_unknown(ids, folder, prefix, (source, target))
        # As in fairseq's references: a hypothesis' own `<unk>` must not match one of the text.
        tokens = [tuple(join_subwords(line).replace("<unk>", "<<unk>>") for line in pair) for pair in pairs]
        datasets[name] = build(ids, tokens, running_text(tokens, source, target), name)
    code = folder / "code"
    return Corpus(datasets, *vocabularies, Tokenizer(target), read_subwords(code, cut) if code.is_file() else None)


def read_subwords(code: Path, splits: dict[str, sources.Pairs]) -> Subwords:
    """
    The BPE that encoded the pairs of a folder.

    Raises:
        `ValueError`: it would have encoded one of some hundreds otherwise, which are spread evenly over a split.
    """
    subwords = Subwords.read(code)
    for name, pairs in splits.items():
        lines = [line for row in rows_of_part(min(SAMPLE, len(pairs)), len(pairs)) for line in pairs[row]]
        foreign = sum(subwords(join_subwords(line)).split() != line.split() for line in lines)
        if foreign:
            raise ValueError(
                f"{code} splits {foreign} of {len(lines)} lines of {name} otherwise than they are: put the file there that the text was prepared "
                "with, prepare all files alike, or remove it (the model is then saved without its BPE)."
            )
    return subwords


def from_data_bin(folder: Path, source: str, target: str) -> Corpus:
    """
    A folder that `fairseq-preprocess` wrote. Unknown tokens are `<<unk>>` in references, as in `fairseq-generate`.

    Raises:
        `ValueError`: a split is missing, its sides differ in length, an id is not in the dictionary, or the dictionary was changed.
    """
    vocabularies = read_dictionaries(folder, source, target)
    datasets = {}
    for name, split in SPLITS.items():
        prefix = data_bin_prefix(folder, split, source, target)
        if prefix is None:
            raise ValueError(
                f"{folder} has no {split}.{source}-{target} data: give fairseq-preprocess a --{split}pref."
            )
        sides = [read_binary(Path(f"{prefix}.{language}")) for language in (source, target)]
        for language, vocabulary, side in zip((source, target), vocabularies, sides, strict=True):
            largest = max((i for ids in side for i in ids), default=0)
            if largest >= len(vocabulary):
                raise ValueError(
                    f"{prefix}.{language}.bin has the token id {largest}, dict.{language}.txt {len(vocabulary)} tokens with "
                    "the special ones: the two do not belong together."
                )
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{prefix} has {len(sides[0])} {source} and {len(sides[1])} {target} sentences.")
        if name == "train":
            folders.refuse_other_shards(folder, prefix)
            refuse_changed(vocabularies, folder, str(prefix), sides, (source, target))
        ids = list(zip(*sides, strict=True))
        refuse_unknown(ids, folder, split, (source, target))
        tokens = [
            tuple(join_subwords(v.decode(i, "<<unk>>")) for v, i in zip(vocabularies, pair, strict=True))
            for pair in ids
        ]
        datasets[name] = build(ids, tokens, running_text(tokens, source, target), name)
    return Corpus(datasets, *vocabularies, Tokenizer(target), None)


def running_text(tokens: sources.Pairs, source: str, target: str) -> sources.Pairs:
    """Tokenised lines with Moses' tokenisation undone: the nearest to the original that such data still holds."""
    tokenizers = Tokenizer(source), Tokenizer(target)
    return [tuple(tokenizer.undo(line) for tokenizer, line in zip(tokenizers, pair, strict=True)) for pair in tokens]
