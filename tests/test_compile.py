"""torch.compile: the same numbers, the same dropout masks in all passes of an update, and no graph after the first epoch."""

import json

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from toys import CLASSES, HIDDEN, INPUTS, Points, train, weights_of
from transformers import TrainerCallback


class Network(nn.Module):
    """Without the pass counters of `toys.Classifier`, on whose values dynamo would compile anew each time."""

    def __init__(self, dropout=0.3, batch_norm=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x, labels):
        logits = self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Graphs(TrainerCallback):
    """How many graphs dynamo has made by the end of each update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, *args, **kwargs):
        self.seen.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def run(directory, backend=None, model=None, data=None, **changes):
    if backend is not None:
        changes |= {"torch_compile": True, "torch_compile_backend": backend}
    graphs = Graphs()
    torch.manual_seed(1)
    settings = {"train_sampling_strategy": "sequential", "rho": 0.5, **changes}
    made = train(directory, model or Network(), data or Points(), callbacks=[graphs], **settings)
    return made, graphs.seen


def alphas(run):
    return [entry["xsam/alpha"] for entry in run.state.log_history if "xsam/alpha" in entry]


METHODS = {"xsam": ({}, 2), "sam": ({"alpha": 1.0}, 1), "two steps": ({"ascent_steps": 2}, 2)}


@pytest.mark.parametrize("name", METHODS)
def test_compiled_passes_equal_the_others_and_are_compiled_once(tmp_path, name):
    changes, graphs = METHODS[name]
    plain, none = run(tmp_path / "plain", **changes)
    compiled, made = run(tmp_path / "compiled", "aot_eager", **changes)
    start = nn.utils.parameters_to_vector(Network().parameters())
    assert (weights_of(compiled) - start).abs().max() > 0.02
    assert (weights_of(compiled) - weights_of(plain)).abs().max() <= 1e-6
    assert alphas(compiled) == alphas(plain)
    for ours, theirs in zip(compiled.model.buffers(), plain.model.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    # One graph with a backward pass and, for the search, one without; two epochs of four updates with a search each.
    assert made == [graphs] * 8 and none == [0] * 8


def test_inductor_equals_eager_mode_without_dropout(tmp_path):
    plain, _ = run(tmp_path / "plain", model=Network(dropout=0.0))
    compiled, made = run(tmp_path / "compiled", "inductor", model=Network(dropout=0.0))
    assert (weights_of(compiled) - weights_of(plain)).abs().max() <= 1e-6
    assert alphas(compiled) == alphas(plain) and made == [2] * 8


def test_inductor_draws_the_same_dropout_masks_in_all_passes(tmp_path):
    """Its masks are not eager mode's, but follow the generator; here nothing but a mask can tell two passes apart."""
    changes = {"rho": 1e-6, "learning_rate": 0.0, "alpha_search_steps": 1, "max_steps": 3}
    model = Network(batch_norm=False)
    made, _ = run(tmp_path, "inductor", model=model, data=Points(8), **changes)
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    searches = [json.loads(line) for line in (tmp_path / "xsam_search.jsonl").read_text().splitlines()]
    assert len(logs) == len(searches) == 3
    for entry, search in zip(logs, searches, strict=True):
        assert abs(entry["xsam/sharpness"]) < 1e-5
        assert search["losses"] == pytest.approx([entry["loss"]] * 21, abs=2e-5)
    first, second, third = (entry["loss"] for entry in logs)
    assert min(abs(first - second), abs(second - third), abs(first - third)) > 1e-3
