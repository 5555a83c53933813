"""A saved model, or a small new one whose tokenizer is made of the training texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
)

from tasks.command import cut, sentence


NEW = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VOCABULARY = 4000
UNKNOWN_LIMIT = 0.2  # of the tokens of the training texts


def tokenizer(model: str | None, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """
    A saved model's tokenizer; without one RoBERTa's, bytes in pairs, made of the texts.

    Raises:
        `ValueError`: it cannot be loaded, or knows little of the texts.
    """
    if model is not None:
        if model.startswith((".", "/", "~")) and not Path(model).is_dir():
            raise ValueError(
                f"`model_name_or_path` is {model}, which is no folder: give a saved model, or a name of the hub."
            )
        _config(model)
        with _named(model):
            found = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            ids = [i for text in texts[:1000] for i in found(text, add_special_tokens=False)["input_ids"]]
        unknown = 1 - sum(i != found.unk_token_id for i in ids) / max(1, len(ids))
        if not ids or unknown > UNKNOWN_LIMIT:
            raise ValueError(
                f"The tokenizer of {model} knows {1 - unknown:.0%} of the tokens of the training texts: is its vocabulary there, and "
                "for this language?"
            )
        return found
    # Not BERT's: WordPiece makes another vocabulary of the same texts each time, and a run could not be resumed or repeated.
    return RobertaTokenizer().train_new_from_iterator(texts, VOCABULARY, show_progress=False)


def order(model: str | None, names: list[str]) -> list[str]:
    """
    The labels in the order in which a saved classifier has them, whatever their capitals. One whose labels have no names takes them as they
    come.

    Raises:
        `ValueError`: it has as many other labels, or its config.json contradicts itself.
    """
    if model is None:
        return names
    config = _config(model)
    known = {name.casefold(): i for name, i in config.label2id.items()}
    if _is_classifier(config) and {i: name for name, i in config.label2id.items()} != config.id2label:
        raise ValueError(
            f"{model} has a `label2id` in its config.json that is not its `id2label` turned around: mend the one that is wrong."
        )
    if known.keys() == {name.casefold() for name in names}:
        return sorted(names, key=lambda name: known[name.casefold()])
    unnamed = known.keys() == {f"label_{i}" for i in range(len(known))}
    if _is_classifier(config) and len(known) == len(names) and not unnamed:
        raise ValueError(
            f"{model} has the labels {cut(', '.join(config.label2id))}, and `train_file` {cut(', '.join(names))}: which is which is not known. "
            "Write them as the model has them, or take the model that it was made of."
        )
    return names


def _config(model: str) -> PretrainedConfig:
    """
    A saved model's config; no code that lies beside it is executed, nor is the user asked for that.

    Raises:
        `ValueError`: it cannot be read, or is of a kind that transformers makes no classifier of texts of.
    """
    with _named(model):
        written, _ = PretrainedConfig.get_config_dict(model)
        if "auto_map" in written and written.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                "it brings code of its own, which is not executed; take one whose kind transformers knows"
            )
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{model} is a {config.model_type}, of which transformers makes no classifier of texts: give a language model, or such a classifier."
        )
    return config


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def build(
    model: str | None, words: PreTrainedTokenizerBase, names: list[str], length: int, dropout: float | None
) -> PreTrainedModel:
    """
    A saved model with a head for these labels, or a new RoBERTa of two layers.

    Raises:
        `ValueError`: the saved model cannot be loaded, lacks weights or takes fewer tokens than `length`, or `dropout` is given for it.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if model is None:
        rate = 0.1 if dropout is None else dropout
        config = RobertaConfig(
            vocab_size=len(words),
            max_position_embeddings=length + words.pad_token_id + 1,  # it counts from there
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            hidden_dropout_prob=rate,
            attention_probs_dropout_prob=rate,
            **NEW,
            **labels,
        )
        return AutoModelForSequenceClassification.from_config(config)
    if dropout is not None:
        raise ValueError(f"`dropout` is {dropout}, and {model} has its own: leave one of the two out.")
    if length > words.model_max_length:
        raise ValueError(f"`max_seq_length` is {length}, and {model} takes {words.model_max_length} tokens at most.")
    config = _config(model)
    if config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"{model} has `problem_type` {config.problem_type} in its config.json, and texts have one label each here: give a classifier, "
            "or the model that it was made of."
        )
    is_classifier = _is_classifier(config)
    if is_classifier and config.num_labels != len(names):
        raise ValueError(
            f"{model} tells {config.num_labels} labels apart, and `train_file` has {len(names)}: give texts of its labels, or the model "
            "that it was made of."
        )
    with _named(model):
        found, seen = AutoModelForSequenceClassification.from_pretrained(
            model, **labels, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False
        )
    # The head of a model that is no classifier yet is new. Nothing else may be.
    lost = [str(key[0]) for key in seen["mismatched_keys"]] + (sorted(seen["missing_keys"]) if is_classifier else [])
    if lost:
        raise ValueError(
            f"{model} lacks {len(lost)} of the weights that its config.json asks for, {lost[0]} among them: give a whole model."
        )
    return found


def check_tokens(model: PreTrainedModel, name: str | None, encoded: Iterable[Dataset]) -> None:
    """
    Refuses the tokenizer of another model, and texts with more tokens than the model has positions.

    Raises:
        `ValueError`: a token is beyond the model's table of embeddings, or its place beyond that of the positions.
    """
    texts = [ids for split in encoded for ids in split["input_ids"]]
    table = getattr(model.base_model, "embeddings", None)
    if isinstance(positions := getattr(table, "position_embeddings", None), torch.nn.Embedding):
        # RoBERTa and its like count from behind the padding's.
        places = positions.num_embeddings - (table.padding_idx + 1 if hasattr(table, "padding_idx") else 0)
        longest = max(map(len, texts))
        if longest > places:
            raise ValueError(
                f"`max_seq_length` lets a text have {longest} tokens, and {name} has positions for {places}: give {places} or less."
            )
    rows = model.get_input_embeddings().num_embeddings
    highest = max(map(max, texts))
    if highest >= rows:
        raise ValueError(
            f"The tokenizer of {name} makes token {highest} of a text, and the model knows {rows}: they do not belong together."
        )


@contextmanager
def _named(model: str) -> Iterator[None]:
    """
    Around what reads a saved model.

    Raises:
        `ValueError`: instead of whatever transformers stumbles over; it names the model.
    """
    try:
        yield
    except Exception as error:  # of transformers, huggingface_hub, safetensors and the file system
        raise ValueError(f"`model_name_or_path` {model} cannot be loaded: {sentence(error)}") from error
