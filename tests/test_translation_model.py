"""The model: its size, its start, what is tied and what is frozen, and the traps of FSMT."""

import json
import math

import pytest
import torch

from tasks.translation import trainer
from tasks.translation.corpus import collate
from tasks.translation.model import TranslationTransformer, build, load


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return build("transformer-small", 60, 50, dropout=0.0).eval()


BATCH = collate([{"input_ids": [5, 9, 30, 2], "labels": [4, 7, 2]}, {"input_ids": [8, 2], "labels": [9, 6, 5, 31, 2]}])
INPUTS = {name: tensor for name, tensor in BATCH.items() if name != "labels"}


def test_fairseqs_number_of_trained_parameters_and_its_start():
    torch.manual_seed(0)
    model = build("transformer-iwslt-de-en", 8848, 6632)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 39_469_056
    assert all(p.requires_grad for p in model.parameters())
    # A uniform distribution of bound b has the standard deviation b/√3; bounds and deviations as measured on fairseq 0.12.2.
    d, ffn = 512, 1024
    expected = {
        "embed_tokens.weight": (d**-0.5, None),
        "q_proj.weight": (math.sqrt(6 / (2 * d)) / math.sqrt(2) / math.sqrt(3), math.sqrt(6 / (2 * d)) / math.sqrt(2)),
        "out_proj.weight": (math.sqrt(6 / (2 * d)) / math.sqrt(3), math.sqrt(6 / (2 * d))),
        "out_proj.bias": (0, 0),
        "k_proj.bias": (d**-0.5 / math.sqrt(3), d**-0.5),
        "fc1.weight": (d**-0.5 / math.sqrt(3), d**-0.5),
        "fc2.weight": (ffn**-0.5 / math.sqrt(3), ffn**-0.5),
        "layer_norm.bias": (0, 0),
    }
    expected |= {name: expected["q_proj.weight"] for name in ("k_proj.weight", "v_proj.weight")}
    for name, parameter in model.named_parameters():
        for ending, (deviation, bound) in expected.items():
            if name.endswith(ending):
                tolerance = 0.01 if parameter.dim() > 1 else 0.15
                assert parameter.std().item() == pytest.approx(deviation, rel=tolerance), name
                assert bound is None or parameter.abs().max().item() <= bound * (1 + 1e-6), name
                assert bound is None or parameter.abs().max().item() >= bound * 0.97, name
    for side in (model.model.encoder, model.model.decoder):
        assert not side.embed_tokens.weight[1].any() and side.embed_tokens.weight[0].any()


def test_decoder_input_and_output_are_one_table_and_the_encoders_is_another(small):
    inner = small.model
    assert inner.decoder.output_projection.weight is inner.decoder.embed_tokens.weight
    assert inner.encoder.embed_tokens.weight.shape == (60, 128) and inner.decoder.embed_tokens.weight.shape == (
        50,
        128,
    )


def test_saving_keeps_numbers_ties_and_what_is_trained(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = TranslationTransformer.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**INPUTS).logits, small(**INPUTS).logits)
    assert again.model.decoder.output_projection.weight is again.model.decoder.embed_tokens.weight
    assert [name for name, p in again.named_parameters() if p.requires_grad] == [
        n for n, _ in small.named_parameters()
    ]
    assert not any("embed_positions" in name for name, _ in again.named_parameters())


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_the_search_of_a_saved_model_is_not_steered_by_its_folder(small, tmp_path):
    small.save_pretrained(tmp_path)
    search = lambda model: model.eval().translate(INPUTS["input_ids"], INPUTS["attention_mask"], num_beams=3).tolist()  # noqa: E731
    expected = search(small)
    assert search(load(tmp_path)) == expected
    forbidden = sorted({token for row in expected for token in row} - {1, 2})
    change(
        tmp_path / "generation_config.json", suppress_tokens=forbidden, no_repeat_ngram_size=1, forced_bos_token_id=7
    )
    assert search(TranslationTransformer.from_pretrained(tmp_path)) != expected == search(load(tmp_path))
    change(tmp_path / "config.json", repetition_penalty=5.0, max_length=9)
    assert search(load(tmp_path)) == expected


@pytest.mark.parametrize(
    "name, value",
    [("scale_embedding", False), ("tie_word_embeddings", False), ("decoder_layerdrop", 0.5), ("pad_token_id", 0)],
)
def test_a_configuration_of_another_architecture_is_refused(small, tmp_path, name, value):
    small.save_pretrained(tmp_path)
    change(tmp_path / "config.json", dropout=0.4, activation_function="gelu")
    assert load(tmp_path).config.activation_function == "gelu"
    change(tmp_path / "config.json", **{name: value})
    with pytest.raises(ValueError, match=f"config.json has `{name}` {value}, and a transformer_iwslt_de_en "):
        load(tmp_path)


def test_no_position_sees_a_later_one_whether_labels_are_given_or_not(small):
    changed = dict(INPUTS, decoder_input_ids=INPUTS["decoder_input_ids"].clone())
    changed["decoder_input_ids"][:, 2] = 33
    for extra in ({}, {"labels": BATCH["labels"]}):
        before, after = small(**INPUTS, **extra).logits, small(**changed, **extra).logits
        assert torch.equal(before[:, :2], after[:, :2])
        assert (before[:, 2:] - after[:, 2:]).abs().max() > 1e-3
    # FSMT's trap, which `use_cache` False in the configuration avoids.
    trapped = small(**INPUTS, use_cache=True).logits[:, :2] - small(**changed, use_cache=True).logits[:, :2]
    assert trapped.abs().max() > 1e-3


def test_search_never_starts_with_the_end_and_ends_within_the_limit(small):
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    tokens = small.translate(ids, mask, num_beams=3)
    limit = int(1.2 * 4 + 10)
    assert (tokens[:, 1] != 2).all() and not (tokens[:, 1:] == 1).all(1).any()
    assert tokens.shape[1] <= limit + 2 and (tokens == 2).sum(1).ge(2).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_search_never_chooses_padding(beams):
    torch.manual_seed(0)
    model = build("transformer-small", 60, 50, dropout=0.0).eval()
    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    favourite = model.translate(ids[:1], mask[:1], num_beams=beams)[0, 1]
    with torch.no_grad():  # now the model likes padding better still
        model.model.decoder.embed_tokens.weight[1] = 3 * model.model.decoder.embed_tokens.weight[favourite]
    assert model(**INPUTS).logits[0, 0].argmax() == 1
    assert not (model.translate(ids[:1], mask[:1], num_beams=beams) == 1).any()


def test_collating_pads_shifts_and_leaves_labels_alone(small):
    assert BATCH["input_ids"].tolist() == [[5, 9, 30, 2], [8, 2, 1, 1]]
    assert BATCH["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert BATCH["labels"].tolist() == [[4, 7, 2, -100, -100], [9, 6, 5, 31, 2]]
    assert BATCH["decoder_input_ids"].tolist() == [[2, 4, 7, 1, 1], [2, 9, 6, 5, 31]]
    labels = BATCH["labels"].clone()
    small(**BATCH)
    assert torch.equal(BATCH["labels"], labels)


def test_label_smoothing_is_fairseqs_formula_written_out(small):
    logits, epsilon = small(**INPUTS).logits, 0.1
    total = 0.0
    for row, labels in zip(logits.log_softmax(-1).tolist(), BATCH["labels"].tolist(), strict=True):
        for log_probabilities, label in zip(row, labels, strict=True):
            if label != -100:
                wrong = sum(log_probabilities) - log_probabilities[label]
                total -= (1 - epsilon) * log_probabilities[label] + epsilon / 49 * wrong
    loss = trainer.LabelSmoothedLoss(epsilon)
    outputs = small(**INPUTS)
    assert loss(outputs, BATCH["labels"]).item() == pytest.approx(total / 8, rel=1e-6)
    # An update batch of 24 tokens, of which these are 8.
    assert loss(outputs, BATCH["labels"], num_items_in_batch=24).item() == pytest.approx(total / 24, rel=1e-6)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="`model` is 'transformer-big': choose one of transformer-iwslt-de-en"):
        build("transformer-big", 60, 50)
