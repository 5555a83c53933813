"""sentence-transformers' trainer with the mixin: XSAM's gradient for several losses, whose own weights and logs count too."""

from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from xsam_hf import XSAMArguments, XSAMMixin


class XSAMSentenceTransformerTrainer(XSAMMixin, SentenceTransformerTrainer):
    pass


@dataclass
class XSAMSentenceTransformerTrainingArguments(XSAMArguments, SentenceTransformerTrainingArguments):
    pass


class TwoTerms(torch.nn.Module):
    """A loss that is a dictionary of terms, as in the documentation of `GlobalOrthogonalRegularizationLoss`."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.ranking = losses.MultipleNegativesRankingLoss(model)
        self.spread = losses.GlobalOrthogonalRegularizationLoss(model)

    def forward(self, sentence_features, labels=None):
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        ranking = {"ranking": self.ranking.compute_loss_from_embeddings(embeddings, labels)}
        return {**ranking, **self.spread.compute_loss_from_embeddings(embeddings, labels)}


LOSSES = {
    "cosine": losses.CosineSimilarityLoss,
    "ranking": losses.MultipleNegativesRankingLoss,
    "cached ranking": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "two terms": TwoTerms,
    "softmax": lambda model: losses.SoftmaxLoss(
        model, embedding_dimension=16, num_labels=3
    ),  # with weights of its own
}
LABELS = {"cosine": [i % 5 / 4 for i in range(8)], "softmax": [i % 3 for i in range(8)]}
WORDS = ["<pad>", "<unk>", *(f"w{i}" for i in range(30))]


def sentence(i, n):
    return " ".join(f"w{(i * k) % 30}" for k in range(1, n))


def pairs(name, n=8):
    columns = {side: [sentence(i + 3 * j, 4 + i % 5) for i in range(n)] for j, side in enumerate(["one", "other"])}
    if name in LABELS:
        columns["label"] = (LABELS[name] * 2)[:n]
    return Dataset.from_dict(columns)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("encoder"))
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>").save_pretrained(directory)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)
    torch.manual_seed(0)
    # Weights so large that LayerNorm does not turn a small step into a large one.
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, initializer_range=0.3, **size, **dropout)
    BertModel(config).save_pretrained(directory)
    return directory


def build(encoder, directory, name, plain=False, data=None, **changes):
    transformer = Transformer(encoder)
    model = SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").double()
    torch.manual_seed(1)
    trainer = SentenceTransformerTrainer if plain else XSAMSentenceTransformerTrainer
    config = SentenceTransformerTrainingArguments if plain else XSAMSentenceTransformerTrainingArguments
    settings = {
        "per_device_train_batch_size": 8, "num_train_epochs": 3, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, **changes,
    }  # fmt: skip
    return trainer(
        model=model,
        args=config(str(directory), **settings),
        train_dataset=pairs(name) if data is None else data,
        loss=LOSSES[name](model).double(),
    )


def trained_weights(trainer):
    """The loss has the model in it."""
    return torch.nn.utils.parameters_to_vector(trainer.loss.parameters()).detach().clone()


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("k, alpha", [(1, None), (2, 1.7)])
@pytest.mark.parametrize("name", LOSSES)
def test_updates_agree_with_a_loop_over_one_vector(encoder, tmp_path, name, k, alpha):
    run = build(encoder, tmp_path / "ours", name, rho=0.5, ascent_steps=k, alpha=alpha)
    passes = []
    run.loss.register_forward_hook(lambda *args: passes.append(1))
    batch = run.data_collator(list(pairs(name)))
    features, labels = run.collect_features(batch)
    theta = start = trained_weights(run).numpy()
    run.train()
    assert len(passes) == 3 * (k + 1) + (63 if alpha is None else 0)

    by_hand = build(encoder, tmp_path / "by_hand", name)

    def loss_at(vector):
        torch.nn.utils.vector_to_parameters(torch.from_numpy(vector), by_hand.loss.parameters())
        value = by_hand.loss([dict(part) for part in features], labels)
        return sum(value.values()) if isinstance(value, dict) else value

    def gradient(vector):
        by_hand.loss.zero_grad()
        loss_at(vector).backward()
        parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in by_hand.loss.parameters()]
        return torch.nn.utils.parameters_to_vector(parts).numpy().copy()

    def loss(vector):
        with torch.no_grad():
            return loss_at(vector).item()

    by_hand.loss.train()
    for _ in range(3):
        theta = theta - 0.1 * oracle.xsam_direction(theta, loss, gradient, rho=0.5, k=k, alpha=alpha)[0]
    assert np.abs(theta - start).max() > 1e-3
    assert np.abs(trained_weights(run).numpy() - theta).max() < 1e-9


@pytest.mark.parametrize("name", ["two terms", "softmax"])
def test_off_is_the_plain_trainer_and_logs_see_the_first_pass_only(encoder, tmp_path, name):
    plain = build(encoder, tmp_path / "plain", name, plain=True)
    off = build(encoder, tmp_path / "off", name, rho=0.0)
    on = build(encoder, tmp_path / "on", name, rho=0.5, ascent_steps=2)
    for run in (plain, off, on):
        run.train()
    assert torch.equal(trained_weights(plain), trained_weights(off))
    assert (trained_weights(plain) - trained_weights(on)).abs().max() > 1e-3
    terms = ["ranking", "gor_mean", "gor_second_moment"] if name == "two terms" else []
    for term in [*terms, "loss"]:
        assert [entry[term] for entry in logs(off)] == [entry[term] for entry in logs(plain)]
        assert logs(on)[0][term] == logs(plain)[0][term] and logs(on)[-1][term] != logs(plain)[-1][term]
    if terms:  # rounded to four digits
        for entry in logs(on):
            assert sum(entry[term] for term in terms) == pytest.approx(entry["loss"], abs=2e-4)


@pytest.mark.parametrize("name", ["cosine", "softmax"])
@pytest.mark.parametrize("scope", ["update", "micro"])
def test_two_halves_make_the_update_of_the_whole(encoder, tmp_path, name, scope):
    data = pairs(name, 16)
    if scope == "micro":  # each half climbs on its own, which is the same climb only if the halves are the same
        data = data.select([3] * 16)
    changes = {"rho": 0.5, "alpha": 1.7, "data": data}
    whole = build(encoder, tmp_path / "whole", name, per_device_train_batch_size=16, **changes)
    halves = build(encoder, tmp_path / "halves", name, gradient_accumulation_steps=2, ascent_scope=scope, **changes)
    start = trained_weights(whole)
    whole.train()
    halves.train()
    assert (trained_weights(whole) - start).abs().max() > 1e-3
    assert (trained_weights(whole) - trained_weights(halves)).abs().max() < 1e-9


@pytest.mark.parametrize("name, exact", [("cosine", True), ("softmax", False)])
@pytest.mark.parametrize("plain", [True, False])
def test_resume_is_as_exact_as_the_plain_trainers(encoder, tmp_path, name, exact, plain):
    """Its checkpoints leave out a loss's own weights; VaSSO's average, which has a tensor for each of them, comes back."""
    settings = {"plain": plain} if plain else {"rho": 0.5, "alpha": 1.7, "perturbation": "vasso"}
    whole = build(encoder, tmp_path / "whole", name, save_strategy="steps", save_steps=1, **settings)
    whole.train()
    resumed = build(encoder, tmp_path / "resumed", name, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(trained_weights(whole), trained_weights(resumed)) == exact
    if not plain:
        averages, (weights, _) = resumed._xsam_callback.xsam.average, resumed._xsam_weights()
        used = {name: w.shape for name, w in weights.items() if "pooler" not in name}  # which has no gradient
        assert {name: part.shape for name, part in averages.items()} == used
        assert len(weights) == len(list(resumed.loss.parameters())) == len(used) + 2


def test_weights_of_the_losss_own_need_one_process(encoder, tmp_path, monkeypatch):
    for name, refused in (("softmax", True), ("cosine", False)):
        run = build(encoder, tmp_path, name, rho=0.5, num_train_epochs=1)
        run.train()
        monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
        if refused:
            with pytest.raises(NotImplementedError, match="outside the model.* train in one process"):
                run._xsam_weights()
        else:
            weights, unstepped = run._xsam_weights()
            assert list(weights.values()) == list(run.model.parameters()) and not unstepped
