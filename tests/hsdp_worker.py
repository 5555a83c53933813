"""What test_hsdp.py looks at, in each of four processes: two copies of the weights, each in two shards."""

import torch
import torch.distributed as dist
from fsdp_worker import pretend_that_accelerate_shards_on_cpu, result, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from xsam_hf.geometry import angle, norm


SCENARIOS = ["xsam", "accumulation", "vasso"]
PLACEMENTS = [
    (Replicate(), Shard(0)),  # HSDP's own
    (Shard(0), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(0), Shard(0)),
    (Replicate(), Replicate()),
]


def measured(x, y):
    """Both norms and the angle of two vectors: what XSAM asks of them."""
    sizes = norm(x), norm(y)
    return torch.stack([*sizes, angle(x, y, *sizes)])


def vectors():
    """Two vectors of six tensors; three rows and five columns cannot be split evenly."""
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(3, 5, generator=generator) for _ in range(6)] for _ in range(2)]


def spread(vector, mesh):
    """Every tensor with placements of its own; the last stays whole."""
    parts = [distribute_tensor(part, mesh, how) for part, how in zip(vector, PLACEMENTS, strict=False)]
    return [*parts, vector[-1]]


def main(directory):
    pretend_that_accelerate_shards_on_cpu()
    results = {}
    for name in SCENARIOS:
        trained = run(directory, name, batch=4, max_steps=6)
        results[name] = result(trained)
        results[f"placements {name}"] = [str(p.placements) for p in trained.model.parameters()]
    mesh = init_device_mesh("cpu", (2, 2))
    results["measured"] = measured(*(spread(vector, mesh) for vector in vectors()))
    torch.save(results, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
