"""fairseq's checkpoints, read and written as Hugging Face models."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import torch
from transformers import FSMTConfig

from tasks.command import sentence
from tasks.runs import RESULT
from tasks.translation.data_bin import read_dictionaries, write_dictionaries
from tasks.translation.model import TranslationTransformer, load


# The encoder of fairseq 0.12.2 keeps a second, untrained copy of its weights for a faster code path.
DUPLICATES = re.compile(r"encoder\.layers\.\d+\.(in_proj|out_proj|fc[12])_(weight|bias)")
# Sinusoidal tables are recomputed, and fairseq marks its format with a version.
CONSTANTS = re.compile(r"(en|de)coder\.(version|embed_positions\._float_tensor)")
# The one architecture that `TranslationTransformer` is, in fairseq's words.
ARCHITECTURE = {
    "share_decoder_input_output_embed": True,
    "share_all_embeddings": False,
    "encoder_normalize_before": False,
    "decoder_normalize_before": False,
    "encoder_learned_pos": False,
    "decoder_learned_pos": False,
    "no_token_positional_embeddings": False,
    "layernorm_embedding": False,
    "no_scale_embedding": False,
    "no_cross_attention": False,
    "cross_self_attention": False,
    "adaptive_softmax_cutoff": None,
}
SIDES = ("encoder", "decoder")
DIMENSIONS = ["encoder_embed_dim"]
DIMENSIONS += [f"{side}_{name}" for side in SIDES for name in ("ffn_embed_dim", "layers", "attention_heads")]
# What fairseq fills in where an older version stored nothing.
DEFAULTS = {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0, "activation_fn": "relu"}
DEFAULTS |= {"max_target_positions": 1024}


def read_checkpoint(file: Path, languages: tuple[str, str] | None = None) -> TranslationTransformer:
    """
    The model of a fairseq checkpoint, of 0.12.2 or of the main branch; dictionaries are separate files of fairseq's.

    Only tensors, plain containers and `argparse.Namespace` are unpickled: a file cannot run code.

    Raises:
        `ValueError`: not a checkpoint, one that holds anything else, or another architecture; or one of other `languages`, source and target.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of the unpickler: whatever the bytes make it stumble over
        raise ValueError(
            f"{file} was not loaded: it is no PyTorch file, or it holds more than weights and arguments, and unpickling that "
            "may run code. If you trust it, save it again with fairseq's --no-save-optimizer-state, without other objects."
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{file} is no fairseq checkpoint: it has no `model` entry with weights.")
    configuration = checkpoint.get("cfg")
    options = (configuration.get("model") if isinstance(configuration, dict) else None) or checkpoint.get("args")
    if options is None:
        raise ValueError(f"{file} has neither `cfg` nor `args`, where fairseq keeps the dimensions of the model.")

    tables = [f"{side}.embed_tokens.weight" for side in SIDES]
    missing = [name for name in DIMENSIONS if not hasattr(options, name)]
    missing += [name for name in tables if name not in checkpoint["model"]]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}: is it a transformer_iwslt_de_en?")
    told = tuple(getattr(options, f"{end}_lang", None) for end in ("source", "target"))
    if languages is not None and None not in told and told != languages:
        raise ValueError(
            f"{file} translates from {told[0]} to {told[1]}: give --source_language {told[0]} --target_language {told[1]}."
        )
    for name, default in DEFAULTS.items():
        setattr(options, name, getattr(options, name, default))
    for name, needed in ARCHITECTURE.items():
        value = getattr(options, name, needed)
        if value != needed:
            raise ValueError(
                f"{file} has `{name}` = {value}; only transformer_iwslt_de_en with {name} = {needed} can be converted."
            )
    weights = {
        f"model.{name}": tensor
        for name, tensor in checkpoint["model"].items()
        if not DUPLICATES.fullmatch(name) and not CONSTANTS.fullmatch(name)
    }
    _check_dimensions(file, options, checkpoint["model"])
    sizes = {f"{side}_ffn_dim": getattr(options, f"{side}_ffn_embed_dim") for side in SIDES}
    sizes |= {
        f"{side}_{key}": getattr(options, f"{side}_{key}") for side in SIDES for key in ("layers", "attention_heads")
    }
    try:
        model = TranslationTransformer(
            FSMTConfig(
                src_vocab_size=len(weights[f"model.{tables[0]}"]),
                tgt_vocab_size=len(weights[f"model.{tables[1]}"]),
                d_model=options.encoder_embed_dim,
                dropout=options.dropout,
                attention_dropout=options.attention_dropout,
                activation_dropout=options.activation_dropout,
                activation_function=options.activation_fn,
                max_position_embeddings=options.max_target_positions,
                tie_word_embeddings=True,
                **sizes,
            )
        )
    except Exception as error:  # of the configuration's checks and the layers
        raise ValueError(f"{file} has arguments of no transformer_iwslt_de_en: {sentence(error)}.") from error
    expected = model.state_dict()
    different = weights.keys() ^ expected.keys()
    if different:
        raise ValueError(
            f"{file} is not a transformer_iwslt_de_en: these weights have no counterpart: {sorted(different)}."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{file} is not a transformer_iwslt_de_en: {name} is {tuple(tensor.shape)}, and its arguments ask for "
                f"{tuple(expected[name].shape)}; encoder and decoder must be of one width."
            )
    shared, output = (weights[f"model.decoder.{name}.weight"] for name in ("embed_tokens", "output_projection"))
    if not torch.equal(shared, output):
        raise ValueError(
            f"{file} has an output projection that is not the decoder's embedding, which it says is shared."
        )
    model.load_state_dict(weights)
    return model


def _check_dimensions(file: Path, options: Namespace, weights: dict) -> None:
    """
    Compares a checkpoint's arguments with its weights, before a model of the size that they claim is made.

    Raises:
        `ValueError`: they do not fit, or are not numbers at all.
    """
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"{file} is no fairseq checkpoint: {name} is a {type(weight).__name__}, not a tensor.")
        if weight.is_meta or weight.layout != torch.strided or not weight.is_floating_point():
            raise ValueError(f"{file} is damaged: {name} is no plain tensor of floating-point numbers.")
        if not CONSTANTS.fullmatch(name) and not weight.isfinite().all():  # fairseq never fills those in
            raise ValueError(f"{file} holds numbers in {name} that are not finite: its training has diverged.")
    for name in (*DIMENSIONS, "max_target_positions"):
        value = getattr(options, name)
        if type(value) is not int or not 1 <= value <= 1 << 16:
            raise ValueError(f"{file} has `{name}` = {value!r}, and a number from 1 to 65536 is expected.")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        value = getattr(options, name)
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{file} has `{name}` = {value!r}, and a number from 0 to below 1 is expected.")
    for side in SIDES:
        layers = {name.split(".")[2] for name in weights if name.startswith(f"{side}.layers.")}
        if len(layers) != getattr(options, f"{side}_layers"):
            raise ValueError(
                f"{file} is not a transformer_iwslt_de_en: its arguments ask for {getattr(options, f'{side}_layers')} layers in the "
                f"{side}, and it has weights of {len(layers)}."
            )
        first = weights.get(f"{side}.layers.0.fc1.weight")
        if first is not None and first.shape[:1] != (getattr(options, f"{side}_ffn_embed_dim"),):
            raise ValueError(
                f"{file} is not a transformer_iwslt_de_en: its arguments ask for {side} layers that are "
                f"{getattr(options, f'{side}_ffn_embed_dim')} wide, and {side}.layers.0.fc1.weight is {tuple(first.shape)}."
            )


def write_checkpoint(model: TranslationTransformer, file: Path, source_language: str, target_language: str) -> None:
    """
    A checkpoint that `fairseq-generate` loads; give it a data-bin folder with the same dictionaries.

    Args:
        model ([`TranslationTransformer`]): its weights are written in their own precision.
        file (`Path`): where to; the folder must exist.
        source_language, target_language (`str`): two-letter codes, which fairseq wants in its arguments.
    """
    config = model.config
    options = dict(
        ARCHITECTURE, arch="transformer_iwslt_de_en", task="translation", criterion="label_smoothed_cross_entropy"
    )
    options |= {"source_lang": source_language, "target_lang": target_language, "data": "", "left_pad_source": True}
    options |= {"dropout": config.dropout, "attention_dropout": config.attention_dropout}
    options |= {"activation_dropout": config.activation_dropout, "activation_fn": config.activation_function}
    options |= dict.fromkeys(("max_source_positions", "max_target_positions"), config.max_position_embeddings)
    for side in SIDES:
        options[f"{side}_embed_dim"] = config.d_model
        options[f"{side}_ffn_embed_dim"] = getattr(config, f"{side}_ffn_dim")
        for key in ("layers", "attention_heads"):
            options[f"{side}_{key}"] = getattr(config, f"{side}_{key}")

    weights = {name.removeprefix("model."): tensor.cpu() for name, tensor in model.state_dict().items()}
    for side in SIDES:
        weights[f"{side}.version"] = torch.tensor([3.0])
        weights[f"{side}.embed_positions._float_tensor"] = torch.zeros(1)
    # The older form, with `args`, which every version upgrades on loading; it looks for an entry of the optimizer's.
    history = [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 0}]
    torch.save({"args": Namespace(**options), "model": weights, "optimizer_history": history, "extra_state": {}}, file)


def to_hugging_face(checkpoint: Path, dictionaries: Path, folder: Path, languages: tuple[str, str]) -> None:
    """
    A checkpoint and its dictionaries as a folder that `--model` and `from_pretrained` take.

    Raises:
        `ValueError`: the dictionaries are another model's, or see [`read_checkpoint`].
    """
    _check_destination(folder)
    model = read_checkpoint(checkpoint, languages)
    vocabularies = read_dictionaries(dictionaries, *languages)
    sizes = model.config.src_vocab_size, model.config.tgt_vocab_size
    for language, vocabulary, size in zip(languages, vocabularies, sizes, strict=True):
        if len(vocabulary) != size:
            raise ValueError(
                f"dict.{language}.txt in {dictionaries} has {len(vocabulary)} tokens with the special ones, the model of "
                f"{checkpoint} {size}: give the folder that the model was trained on."
            )
        vocabulary.refuse_rising(dictionaries / f"dict.{language}.txt")
    model.save_pretrained(folder)
    write_dictionaries(folder, languages, vocabularies)


def _check_destination(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is there and no folder: give another destination.")
    if (folder / RESULT).exists():
        raise ValueError(
            f"{folder} holds a finished run ({RESULT}), whose files would be written over: give another destination."
        )


def to_fairseq(model: Path, folder: Path, languages: tuple[str, str]) -> None:
    """A folder that `train.py` or [`to_hugging_face`] wrote as `checkpoint.pt` and dictionaries of fairseq's."""
    _check_destination(folder)
    loaded = load(model)  # first: what is no translation model has no dictionaries either
    vocabularies = read_dictionaries(model, *languages)
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(loaded, folder / "checkpoint.pt", *languages)
    write_dictionaries(folder, languages, vocabularies)
