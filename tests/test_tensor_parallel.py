"""
Tensor parallelism: two gloo processes that share the weights of one model equal one process that has them all; so do four that
share FSDP2's shards of these parts.
"""

import pytest
import torch
from fsdp_worker import result
from processes import in_ranks, launched
from tensor_parallel_worker import LAYOUTS, SCENARIOS, main, main_of_four, run, save_model
from transformers.distributed import DistributedConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("shared")
    results = in_ranks(lambda rank, report: main(model, directory))
    assert results == [(0, "")] * 2, results
    return [torch.load(directory / f"rank{i}.pt", weights_only=True) for i in range(2)]


@pytest.fixture(scope="module")
def four_ranks(model, tmp_path_factory):
    if "fsdp_size" not in DistributedConfig.__dataclass_fields__:
        pytest.skip("this version of transformers loads no model with FSDP2")
    directory = tmp_path_factory.mktemp("shared two ways")
    fewer = ("--num_processes", "4", "--parallelism_config_dp_shard_size", "2", "--mixed_precision", "no")
    launched("tp_fsdp2", lambda: main_of_four(model, directory), *fewer)
    return [torch.load(directory / f"rank{i}.pt", weights_only=True) for i in range(4)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_shared_weights_equal_whole_ones(ranks, model, tmp_path, name):
    check_equal(ranks, result(run(model, tmp_path, name)), name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_that_are_shared_two_ways_equal_whole_ones(four_ranks, model, tmp_path, name):
    assert four_ranks[0]["sizes"] == LAYOUTS["search"]
    check_equal(four_ranks, result(run(model, tmp_path, name, max_steps=2)), name)
    # Without the strided ones norms would add up over half of the processes.
    assert any("_StridedShard" in how for how in four_ranks[0][f"placements {name}"]) == (LAYOUTS[name]["tp_size"] > 1)


def check_equal(ranks, alone, name):
    shared = ranks[0][name]
    assert (shared["weights"] - alone["weights"]).abs().max() <= 1e-6
    for other in ranks[1:]:
        assert torch.equal(shared["weights"], other[name]["weights"])
    history, expected = shared["history"], alone["history"]
    assert history["xsam/alpha"] == expected["xsam/alpha"]
    for key in ("loss", "xsam/angle", "xsam/sharpness", "xsam/grad_norm_last"):
        assert history[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_scenarios_are_different_trainings(ranks):
    found = [ranks[0][name]["weights"] for name in SCENARIOS if name != "accumulation"]  # which equals "xsam"
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one - other).abs().max() > 1e-5


def test_what_cannot_be_right_is_refused(ranks):
    for rank in ranks:
        assert "`ascent_scope='micro'`" in rank["refused"]["micro"]
        assert "'expert' is a part of a weight in each process" in rank["refused"]["a part"]
