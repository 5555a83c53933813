"""HSDP, two copies of the weights in two shards each: four gloo processes equal one, and copies count once in a norm."""

import pytest
import torch
from fsdp_worker import result, run
from hsdp_worker import SCENARIOS, main, measured, vectors
from processes import launched


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hsdp")
    fewer = ("--num_processes", "4", "--parallelism_config_dp_shard_size", "2", "--mixed_precision", "no")
    launched("hsdp", lambda: main(directory), *fewer, machines=2)
    return [torch.load(directory / f"rank{i}.pt", weights_only=True) for i in range(4)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_replicated_shards_equal_whole_weights(ranks, tmp_path, name):
    alone = result(run(tmp_path, name, batch=16, max_steps=6))
    assert set(ranks[0][f"placements {name}"]) == {"(Replicate(), Shard(dim=0))"}
    assert (ranks[0][name]["weights"] - alone["weights"]).abs().max() <= 1e-5
    history, expected = ranks[0][name]["history"], alone["history"]
    assert history["xsam/alpha"] == expected["xsam/alpha"] and history["xsam/alpha"][-1] != 1
    for key in ("xsam/angle", "xsam/grad_norm_last"):
        assert history[key] == pytest.approx(expected[key], rel=1e-3), key
    for other in ranks[1:]:
        assert torch.equal(other[name]["weights"], ranks[0][name]["weights"])


def test_copies_count_once(ranks):
    for rank in ranks:
        assert torch.allclose(rank["measured"], measured(*vectors()), rtol=1e-6)
        assert torch.equal(rank["measured"], ranks[0]["measured"])
