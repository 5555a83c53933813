"""FSDP2 in one and in two gloo processes equals one process with whole weights; resume is exact."""

import pytest
import torch
from fsdp_worker import SCENARIOS, main, main_of_one, result, run, seen_of
from processes import in_ranks, launched
from toys import tiny_gpt2


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(f"fsdp{request.param}")
    if request.param == 1:
        results = in_ranks(lambda rank, report: main(directory), 1)
        assert results == [(0, "")], results
    else:
        launched("fsdp2", lambda: main(directory), "--num_processes", "2", "--mixed_precision", "no")
    return [torch.load(directory / f"rank{i}.pt", weights_only=True) for i in range(request.param)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory, found = tmp_path_factory.mktemp("whole"), {}

    def of(name):
        if name not in found:
            found[name] = result(run(directory, name, batch=16))
        return found[name]

    return of


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("name", SCENARIOS)
def test_shards_equal_whole_weights(ranks, whole, name):
    alone = whole(name)
    assert ranks[0][name]["sharded"] and not alone["sharded"]
    assert (ranks[0][name]["weights"] - alone["weights"]).abs().max() <= 1e-5
    history, expected = ranks[0][name]["history"], alone["history"]
    assert history["xsam/alpha"] == expected["xsam/alpha"]
    for key in ("xsam/angle", "xsam/grad_norm_last"):
        assert history[key] == pytest.approx(expected[key], rel=1e-3), key
    if name == "xsam":
        assert 0 < history["xsam/alpha"][-1] < 2 and history["xsam/alpha"][-1] != 1
    for other in ranks[1:]:
        assert torch.equal(other[name]["weights"], ranks[0][name]["weights"])


def test_two_machines_equal_whole_weights(whole, tmp_path):
    two = ("--num_processes", "2", "--mixed_precision", "no")
    launched("fsdp2_64_gpus", lambda: main_of_one(tmp_path, "xsam"), *two, machines=2)
    one, other = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2))
    assert one["sharded"] and torch.equal(one["weights"], other["weights"])
    assert (one["weights"] - whole("xsam")["weights"]).abs().max() <= 1e-5


def test_scenarios_differ(whole):
    found = {
        name: whole(name)["weights"]
        for name in ("xsam", "sam", "three steps", "asam", "vasso", "stale", "msam+", "every other")
    }
    for name, weights in found.items():
        assert all((weights - other).abs().max() > 1e-4 for n, other in found.items() if n != name), name


def test_policies_reach_the_shards(ranks):
    expected = {
        "sam": (None, "OffloadPolicy"),
        "not resharded": (None, "OffloadPolicy"),
        "offloaded": (None, "CPUOffloadPolicy"),
        "bf16 policy": (torch.bfloat16, "OffloadPolicy"),
    }
    for name, policy in expected.items():
        seen = ranks[0][name]["policies"]
        assert {tuple(of_a_module[:2]) for of_a_module in seen} == {policy}, name
        assert any(of_a_module[2] for of_a_module in seen) == (name != "not resharded"), name


def test_a_policy_in_half_precision_is_near_whole_weights_in_float32(ranks, whole):
    found, full, start = ranks[0]["bf16 policy"]["weights"], whole("xsam")["weights"], flat(tiny_gpt2())
    assert 1e-5 < (found - full).norm() / (full - start).norm() < 0.02
    for rank in ranks:
        assert torch.equal(rank["bf16 policy"]["weights"], found)
        (cosine,) = rank["bf16 policy"]["history"]["xsam/seen_cosine"]  # in the first log alone
        assert 0.99 < cosine < 1
        assert not rank["xsam"]["history"]["xsam/seen_cosine"]


def test_what_the_pass_sees_is_summed_over_shards(ranks):
    expected = seen_of(lambda tensor: tensor)
    assert expected["length"] > 1.5
    for rank in ranks:
        assert rank["seen"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["xsam", "vasso", "stale"])
def test_resume_is_bitwise(ranks, name):
    for rank in ranks:
        uninterrupted, resumed = rank[f"resume {name}"]
        assert torch.equal(uninterrupted, resumed)


@pytest.mark.parametrize("name, reductions", [("sam", 4), ("three steps", 6), ("vasso", 5), ("msam+", 6)])
def test_reductions_are_counted(ranks, name, reductions):
    """What docs/scaling.md says: k + 3 an update, and one more for an average or a sum."""
    seen = ranks[0][name]["reductions"]
    assert len(seen) == 8 * reductions - (name == "vasso")  # the average begins as the first gradient, without a norm
    assert sum(seen) == len(seen)  # the angle's is one number on a CPU, where it is acute
