"""A saved model, or a small new one whose tokenizer is made of the training texts."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
)


NEW = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VOCABULARY = 4000


def tokenizer(model: str | None, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A saved model's tokenizer; without one RoBERTa's, bytes in pairs, made of the texts."""
    if model is not None:
        return AutoTokenizer.from_pretrained(model)
    # Not BERT's: WordPiece makes another vocabulary of the same texts each time, and a run could not be resumed or repeated.
    return RobertaTokenizer().train_new_from_iterator(texts, VOCABULARY, show_progress=False)


def order(model: str | None, names: list[str]) -> list[str]:
    """The labels in the order in which a saved classifier has them, if it has exactly these."""
    known = {} if model is None else AutoConfig.from_pretrained(model).label2id
    return sorted(names, key=lambda name: known[name]) if known.keys() == set(names) else names


def build(
    model: str | None, words: PreTrainedTokenizerBase, names: list[str], length: int, dropout: float | None
) -> PreTrainedModel:
    """
    A saved model with a head for these labels, or a new RoBERTa of two layers.

    Raises:
        `ValueError`: the saved model takes fewer tokens than `length`, or `dropout` is given for it.
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
    return AutoModelForSequenceClassification.from_pretrained(model, **labels)
