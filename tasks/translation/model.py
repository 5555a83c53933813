"""fairseq's `transformer_iwslt_de_en` as a Hugging Face model: FSMT with three of its defaults put right, and fairseq's start."""

import json
import math
from pathlib import Path

from torch import nn
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    FSMTModel,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.fsmt.modeling_fsmt import Attention

from tasks.command import sentence


POSITIONS = 1024  # of the sinusoidal tables, as in fairseq
# Dimensions by model name; what is not given here is FSMT's default and fairseq's alike (post-norm, ReLU).
SIZES = {
    "transformer-iwslt-de-en": {"d_model": 512, "layers": 6, "attention_heads": 4, "ffn_dim": 1024},
    "transformer-small": {"d_model": 128, "layers": 3, "attention_heads": 4, "ffn_dim": 256},
}
# What FSMT can have otherwise, and this architecture and its data have not.
FIXED = {"scale_embedding": True, "tie_word_embeddings": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
FIXED |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


class FinishAtLimit(LogitsProcessor):
    """
    At the last position only the end of the sentence may follow, at its own probability.

    transformers' `forced_eos_token_id` gives it probability 1 and so flatters hypotheses that are cut off; fairseq does
    not. The padding symbol is never chosen.

    Args:
        limit (`int`): length of the decoder's tokens, start included, at which the end must follow.
        eos (`int`), pad (`int`): token ids.
    """

    def __init__(self, limit: int, eos: int, pad: int):
        self.limit, self.eos, self.pad = limit, eos, pad

    def __call__(self, input_ids, scores):
        scores[:, self.pad] = -math.inf
        if input_ids.shape[1] >= self.limit:
            end = scores[:, self.eos].clone()
            scores.fill_(-math.inf)
            scores[:, self.eos] = end
        return scores


class _TranslationBackbone(FSMTModel):
    # FSMT would tie the encoder's table to the decoder's as well, and cut it to the target's vocabulary.
    _tied_weights_keys = {"decoder.output_projection.weight": "decoder.embed_tokens.weight"}


class TranslationTransformer(FSMTForConditionalGeneration):
    """
    An FSMT with separate vocabularies, decoder input and output tied, encoder not, and frozen sinusoidal tables.

    Its `state_dict` has fairseq's names with `model.` in front. Positions are counted from the first token that is not
    padding, so that left and right padding give the same result.

    Source: fairseq 0.12.2, `--arch transformer_iwslt_de_en --share-decoder-input-output-embed`.
    """

    def __init__(self, config: FSMTConfig):
        super().__init__(config)
        self.model = _TranslationBackbone(config)
        for side in (self.model.encoder, self.model.decoder):
            # A parameter in FSMT: weight decay, and the ascent of SAM, would move it. Freezing alone does not survive
            # `from_pretrained`.
            table = side.embed_positions.weight.detach()
            del side.embed_positions.weight
            side.embed_positions.register_buffer("weight", table, persistent=False)
        # With a cache FSMT leaves out the causal mask; generation asks for the cache itself.
        self.config.use_cache = False
        self.generation_config.use_cache = True
        # `FinishAtLimit` instead.
        self.generation_config.forced_eos_token_id = None
        self.post_init()

    def translate(self, input_ids, attention_mask, num_beams: int = 5, **kwargs):
        """
        Beam search as fairseq's `--beam 5 --lenpen 1 --max-len-a 1.2 --max-len-b 10`.

        Args:
            input_ids, attention_mask (`torch.Tensor`): shape (sentences, tokens); the limit follows from the width.
            num_beams (`int`): 1 is greedy search.

        Returns:
            `torch.Tensor`: shape (sentences, tokens), the start symbol first; or what `return_dict_in_generate` asks for.
        """
        limit = min(int(1.2 * input_ids.shape[1] + 10), self.config.max_position_embeddings - 1)
        ending = FinishAtLimit(limit + 1, self.config.eos_token_id, self.config.pad_token_id)
        return self.generate(
            input_ids,
            attention_mask=attention_mask,
            num_beams=num_beams,
            do_sample=False,
            early_stopping=num_beams > 1,
            length_penalty=1.0,
            max_length=limit + 2,
            min_new_tokens=1,
            logits_processor=LogitsProcessorList([ending]),
            **kwargs,
        )


def initialise(model: TranslationTransformer) -> None:
    """
    fairseq's random start, in place: embeddings N(0, 1/d), Xavier attention, linear layers as torch makes them.

    Not in `_init_weights`, because transformers skips modules without parameters of their own there, such as attention.

    Source: measured on fairseq 0.12.2.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, Attention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
            nn.init.xavier_uniform_(module.out_proj.weight)
            nn.init.zeros_(module.out_proj.bias)
    # After the linear layers, because the output layer is the decoder's table.
    for side in (model.model.encoder, model.model.decoder):
        nn.init.normal_(side.embed_tokens.weight, std=side.embed_tokens.embedding_dim**-0.5)
        nn.init.zeros_(side.embed_tokens.weight[side.embed_tokens.padding_idx])


def load(folder: Path, **changes) -> TranslationTransformer:
    """
    A saved model, whole.

    Args:
        folder (`Path`): that `train.py` or `convert_fairseq` wrote.
        changes: of its configuration.

    Raises:
        `ValueError`: its files are missing, damaged or another model's, or lack weights, which would be random.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if (kind := config.get("model_type")) != FSMTConfig.model_type:
            raise ValueError(
                f"its config.json is of a model of type {kind}, not {FSMTConfig.model_type} as of translation"
            )
        for name, needed in FIXED.items():
            if (value := config.get(name, needed)) != needed:
                raise ValueError(f"its config.json has `{name}` {value}, and a transformer_iwslt_de_en {needed}")
        model, found = TranslationTransformer.from_pretrained(folder, output_loading_info=True, **changes)
    except Exception as error:  # of transformers, safetensors, json and the file system
        raise ValueError(f"{folder} holds no model of this task: {sentence(error)}.") from error
    wrong = sorted(
        str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]
    )
    if wrong:
        raise ValueError(f"{folder} holds no model of this task: these weights do not fit: {', '.join(wrong)}.")
    # The search is fairseq's. What the folder says of it beside (generation_config.json: tokens to suppress, ...) has no part in it.
    symbols = {name: number for name, number in FIXED.items() if name.endswith("_id")}
    model.generation_config = GenerationConfig(**symbols, use_cache=True)
    return model


def build(name: str, source_vocabulary: int, target_vocabulary: int, dropout: float = 0.3) -> TranslationTransformer:
    """
    A randomly started model; its random numbers are torch's global ones.

    Args:
        name (`str`): `transformer-iwslt-de-en` or `transformer-small`.
        source_vocabulary, target_vocabulary (`int`): sizes, the four special symbols included.
        dropout (`float`): after embeddings, attention and feed-forward layers.

    Raises:
        `ValueError`: unknown name.
    """
    if name not in SIZES:
        raise ValueError(f"`model` is {name!r}: choose one of {', '.join(SIZES)}.")
    size = SIZES[name]
    sides = {
        f"{side}_{key}": size[key]
        for side in ("encoder", "decoder")
        for key in ("layers", "attention_heads", "ffn_dim")
    }
    config = FSMTConfig(
        src_vocab_size=source_vocabulary,
        tgt_vocab_size=target_vocabulary,
        d_model=size["d_model"],
        dropout=dropout,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        **sides,
    )
    model = TranslationTransformer(config)
    initialise(model)
    return model
