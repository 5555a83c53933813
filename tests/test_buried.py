"""The study of buried ascents: weights are rounded as bfloat16 rounds them, and the table says what the results do."""

import json

import pytest
import torch
from torch import nn

from scripts import buried, rounded_training
from tasks.image_classification import models, train


RECIPE = "tasks/image_classification/recipes/digits-noise-resnet-small.yaml"
SHORT = ["--max_steps", "2", "--eval_strategy", "no", "--method", "sam", "--rho", "1", "--seed", "0"]


def test_a_rounded_weight_is_seen_on_the_grid_of_a_larger_one():
    torch.manual_seed(0)
    weight = nn.Parameter(-torch.rand(4096) * 0.01)  # the sum stays below 32, where the steps get wider
    rounded = rounded_training.Rounded(weight, 16.0, torch.Generator().manual_seed(0))
    seen = rounded(weight)
    steps = (
        seen + rounded.offset
    ) / 2**-3  # between 16 and 32 bfloat16 has seven digits after the first: one in eight
    assert torch.equal(steps, steps.round()) and 16 <= rounded.offset.min() and rounded.offset.max() <= 32
    error = (seen - weight).detach()
    assert error.abs().max() <= 2**-4 + 1e-5 and error.std() == pytest.approx(2**-3 / 12**0.5, rel=0.05)
    seen.sum().backward()
    assert torch.equal(weight.grad, torch.ones(4096))


def test_what_is_seen_is_compared_in_passes_with_gradients_alone():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    look, model = rounded_training.Seen({weight: torch.round}), nn.Linear(1, 1)
    look(model)
    with torch.no_grad():
        look(model)  # of a search
        weight += torch.tensor([0.6, 0.2])
    look(model.eval())
    look(model.train())
    expected = {"length": 1 / 0.4**0.5, "along": 0.6 / 0.4, "cosine": 0.6 / 0.4**0.5}
    assert {name: found for name, (found,) in look.found.items()} == pytest.approx(expected)


def test_a_run_says_what_it_saw_and_is_the_tasks_own_without_an_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build", models.build)

    def scores(name, run, *flags):
        run.main([RECIPE, *SHORT, "--output_dir", str(tmp_path / name), *flags])
        result = json.loads((tmp_path / name / "result.json").read_text())
        return result["metrics"]["test"]["loss"], result.get("seen")

    whole, none = scores("own", train)
    assert scores("0", rounded_training, "--offset", "0") == (whole, none) == (whole, None)
    loss, seen = scores("16", rounded_training, "--offset", "16")
    assert loss != whole and seen["length"] > 2 and seen["cosine"] < 0.5


def test_the_table_pairs_runs_by_seed():
    def runs(method, offset, *accuracies):
        passes = {"forward": 1, "backward": 1}
        seen = {"length": 3.0, "along": 1.0, "cosine": 0.3} if offset and method != "base" else None
        return [
            {"seed": seed, "metrics": {"test": {"accuracy": a}}, "passes": passes, "seconds": 1}
            | ({"seen": seen} if seen else {})
            for seed, a in enumerate(accuracies)
        ]

    whole = {"base": (0.7, 0.8), "sam": (0.9, 0.95), "xsam": (0.91, 0.96), "base-2x": (0.1,)}
    found = {("base", 4): (0.6, 0.7), ("sam", 4): (0.9, 0.94), ("xsam", 4): (0.9, 0.92), ("base", 16): (0.5,)}
    results = {buried.name_of(*key): runs(*key, *values) for key, values in found.items()}
    lines = buried.section(results, {m: runs(m, 0, *values) for m, values in whole.items()}).splitlines()[-2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:7] == ["float32", "1", "1", "1", "75.00", "92.50", "93.50"]
    assert cells[1][:8] == ["bfloat16, offset 4", "0.30", "3.00", "1.00", "65.00", "92.00", "91.00", "+27.00 ± 38.12"]
    assert cells[1][9] == "-0.50 ± 6.35" and cells[1][-1] == "2" and len(lines) == 2
