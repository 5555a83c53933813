"""Two real gloo processes, started by `accelerate launch` with a config and by `torchrun`, against one process with the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import COMMON, SCENARIOS, FirstPoints, Stream, data, main
from processes import under_torchrun
from toys import Classifier, Points, train, weights_of

from xsam_hf import XSAMTrainer


TESTS = Path(__file__).parent
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--config_file", str(TESTS.parent / "scripts" / "accelerate" / "ddp.yaml")),
    *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"),
]
# 2 processes × 8 = 1 × 16, for every scenario that promises so.
SAME = {
    "xsam": {"per_device_train_batch_size": 16},
    "sam": {"per_device_train_batch_size": 16, "alpha": 1.0},
    "three steps": {"per_device_train_batch_size": 16, "ascent_steps": 3},
    "accumulation": {"per_device_train_batch_size": 16},
    "adamw": {"per_device_train_batch_size": 16, "optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-3},
    "used": {"per_device_train_batch_size": 16},
    "vasso": {"per_device_train_batch_size": 16, "perturbation": "vasso", "alpha": 1.7},
    "stale": {"per_device_train_batch_size": 16, "perturbation": "stale", "alpha_search_steps": 3},
    "msam+": {"per_device_train_batch_size": 16, "direction": "msam+", "ascent_steps": 2, "gradient_scale": "slope"},
    "slope_max": {"per_device_train_batch_size": 16, "perturbation": "asam", "gradient_scale": "slope_max"},
    "every other": {"per_device_train_batch_size": 16, "sharpness_every": 2, "rho_exclude": ["^first.bias$"]},
    # The micro scope's counterpart: each process's micro-batch is one of an accumulation in one process.
    "micro": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "ascent_scope": "micro",
        "alpha": 1.7,
    },
    "micro accumulation": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "ascent_scope": "micro",
        "alpha": 1.7,
    },
    "static graph": {"per_device_train_batch_size": 16},
    "padded": {"per_device_train_batch_size": 16},
    # Each process's mean is over its own batch, so that a short one weighs as much as a whole one.
    "unequal batches": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "nothing to learn from": {"per_device_train_batch_size": 16},
    "micro, nothing to learn from": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "ascent_scope": "micro",
        "alpha": 1.7,
    },
    "dispatched stream": {"per_device_train_batch_size": 16, "max_steps": 8},
    "sharded stream": {"per_device_train_batch_size": 16, "max_steps": 8},
    "dispatched": {"per_device_train_batch_size": 16},
    "split": {"per_device_train_batch_size": 16},
    "grouped by length": {"per_device_train_batch_size": 16, "train_sampling_strategy": "group_by_length"},
    "rebalanced": {"per_device_train_batch_size": 16, "train_sampling_strategy": "batch_rebalance"},
}
# Where accelerate repeats the first examples to give both processes as many, the one process is given the same.
SAME_DATA = {
    "padded": lambda: FirstPoints(61, 64),
    "dispatched stream": lambda: Stream(62),
    "sharded stream": lambda: Stream(64),
}


# The one start in the tests of all that a user's command starts; the others spare the imports.
@pytest.fixture(scope="module", params=["accelerate", "torchrun"])
def ranks(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "accelerate":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        command = [sys.executable, *ACCELERATE, str(TESTS / "distributed_worker.py"), str(directory)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-5000:]
    else:
        under_torchrun(lambda: main(directory))
    return directory, [torch.load(directory / f"rank{i}.pt", weights_only=True) for i in range(2)]


def history(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_equal_one(ranks, tmp_path, name):
    _, (rank0, _) = ranks
    examples = SAME_DATA.get(name, lambda: data(name))()
    alone = train(tmp_path, SCENARIOS[name][0](), examples, **{**COMMON, **SAME[name]})
    start = torch.cat([p.detach().reshape(-1) for p in Classifier().parameters()])
    assert (weights_of(alone) - start).abs().max() > 0.02
    assert (rank0[name]["weights"] - weights_of(alone)).abs().max() <= 1e-6
    assert rank0[name]["history"]["xsam/alpha"] == history(alone, "xsam/alpha")
    if not name.startswith("micro"):  # there a micro-batch's share of the loss is logged
        for key in ("loss", "xsam/sharpness", "xsam/grad_norm_last"):
            assert rank0[name]["history"][key] == pytest.approx(history(alone, key), abs=2e-5), key


def test_ranks_never_disagree(ranks):
    _, (rank0, rank1) = ranks
    for name in rank0:
        if isinstance(rank0[name], dict):
            assert torch.equal(rank0[name]["weights"], rank1[name]["weights"]), name
            assert rank0[name]["alpha"] == rank1[name]["alpha"], name
            assert rank0[name]["passes"] == rank1[name]["passes"], name


def test_scopes_are_different_algorithms(ranks):
    _, (rank0, _) = ranks
    assert (rank0["micro search"]["weights"] - rank0["xsam"]["weights"]).abs().max() > 1e-4
    assert rank0["micro search"]["alpha"] != 1


@pytest.mark.parametrize("name", ["not finite", "loss not finite"])
def test_a_rank_that_is_not_finite_makes_all_fall_back(ranks, tmp_path, name):
    _, (rank0, _) = ranks
    outcome = rank0[name]
    assert outcome["history"]["xsam/fallbacks"] == [1] and torch.isfinite(outcome["weights"]).all()
    healthy = train(tmp_path, Classifier(), Points(64), **COMMON, alpha=1.7, per_device_train_batch_size=16)
    assert (outcome["weights"] - weights_of(healthy)).abs().max() > 1e-4


def test_a_mean_over_nothing_in_one_rank_counts_as_no_gradient_there_and_keeps_alpha(ranks, tmp_path):
    """As in plain training: PyTorch's mean over no label is NaN and its gradient 0, and DDP halves the other rank's."""
    _, (rank0, _) = ranks
    assert rank0["mean of nothing"]["alpha"] == 1
    settings = {**COMMON, "alpha": 1.0, "max_steps": 1, "learning_rate": 0.05, "per_device_train_batch_size": 8}
    alone = train(tmp_path, Classifier(), Points(64), **settings)
    assert (rank0["mean of nothing"]["weights"] - weights_of(alone)).abs().max() <= 1e-6


def test_repeated_examples_count(ranks):
    _, (rank0, _) = ranks
    assert (rank0["padded"]["weights"] - rank0["unequal batches"]["weights"]).abs().max() > 1e-4


def test_a_weight_that_one_rank_never_uses_is_trained_and_an_unused_one_is_not(ranks):
    _, (rank0, _) = ranks
    once, never = rank0["micro partly used"]["weights"][:6].split(3)
    assert (never == 1).all()  # no gradient, so no weight decay either
    assert (once != 1).all()


def test_every_search_is_written_once(ranks):
    directory, _ = ranks
    assert len((directory / "xsam" / "xsam_search.jsonl").read_text().splitlines()) == 2


def test_random_streams_and_resume(ranks):
    _, results = ranks
    for rank in results:
        plain, ours = rank["streams"]
        assert torch.equal(plain, ours)
        assert torch.equal(*rank["resume"])


def test_one_process_class_is_the_same(tmp_path):
    assert train(tmp_path, max_steps=1).__class__ is XSAMTrainer
