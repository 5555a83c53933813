"""HSDP, two copies of the weights in two shards each: four gloo processes equal one, and copies count once in a norm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_worker import result, run
from hsdp_worker import SCENARIOS, measured, vectors


TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hsdp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "4", "--standalone"]
    command = [sys.executable, *launcher, str(TESTS / "hsdp_worker.py"), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
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
