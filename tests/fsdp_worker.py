"""Runs every scenario of test_fsdp.py under FSDP2 in each process, and saves whole weights and what was seen."""

import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from toys import Tokens, arguments, tiny_gpt2

from xsam_hf import SeenAscent, XSAMArguments, XSAMState, XSAMTrainer, geometry, xsam_gradient


SCENARIOS = {
    "xsam": {},
    "not resharded": {},
    "sam": {"alpha": 1.0},
    "three steps": {"ascent_steps": 3},
    "accumulation": {"gradient_accumulation_steps": 2},
    "asam": {"perturbation": "asam", "gradient_scale": "slope_max"},
    "vasso": {"perturbation": "vasso", "alpha": 1.7},
    "stale": {"perturbation": "stale", "alpha_search_steps": 3, "gradient_accumulation_steps": 2},
    "msam+": {"direction": "msam+", "ascent_steps": 2, "gradient_scale": "mean"},
    "every other": {"sharpness_every": 2, "rho_exclude": ["wpe"]},
    "offloaded": {"ascent_steps": 2},
}

# Of accelerate's FSDP plugin. Pinned memory asks for a GPU; and `bf16=True` alone sets no policy here (see below).
POLICIES = {
    "not resharded": {"reshard_after_forward": False},
    "offloaded": {"cpu_offload": CPUOffloadPolicy(pin_memory=False)},
    "bf16 policy": {
        "mixed_precision_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    },
}


def run(directory, name, batch, resume=None, **changes):
    """One training of a tiny GPT-2; sharded if this process has a rank, as the launcher's config says if one has started it."""
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        config = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["GPT2Block"],
            "reshard_after_forward": True,
            "state_dict_type": "FULL_STATE_DICT",
        }
        changes |= {"fsdp": True, "fsdp_config": config}
    settings = {"rho": 0.3, "train_sampling_strategy": "sequential", **SCENARIOS.get(name, {}), **changes}
    accumulation = settings.get("gradient_accumulation_steps", 1)
    args = arguments(directory / name, per_device_train_batch_size=batch // accumulation, **settings)
    trainer = XSAMTrainer(model=tiny_gpt2(), args=args, train_dataset=Tokens())
    for policy, value in POLICIES.get(name, {}).items() if "RANK" in os.environ else ():
        setattr(trainer.accelerator.state.fsdp_plugin, policy, value)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def result(trainer):
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
    keys = ("loss", "xsam/alpha", "xsam/angle", "xsam/sharpness", "xsam/grad_norm_last", "xsam/seen_cosine")
    return {
        "weights": torch.cat([part.detach().reshape(-1) for part in parts]),
        "history": {key: [entry[key] for entry in trainer.state.log_history if key in entry] for key in keys},
        "sharded": all(isinstance(p, DTensor) for p in trainer.model.parameters()),
    }


def note_policies():
    """What accelerate tells PyTorch of the shards' dtype and place and of resharding, as a list that grows with each sharded module."""
    original, policies = fsdp.fully_shard, []

    def fully_shard(*args, **kwargs):
        # The last module is never resharded, and of the whole model nothing is said.
        resharded = kwargs.get("reshard_after_forward", False)
        policies.append((kwargs["mp_policy"].param_dtype, type(kwargs["offload_policy"]).__name__, resharded))
        return original(*args, **kwargs)

    fsdp.fully_shard = fully_shard
    return policies


def seen_of(place):
    """What is measured of an ascent whose half on the one process is seen well and on the other hardly."""
    torch.manual_seed(0)
    weight, direction = torch.cat([torch.randn(64, 8) / 100, torch.randn(64, 8)]), torch.randn(128, 8)
    weight = torch.nn.Parameter(place(weight))
    seen = SeenAscent({weight: torch.bfloat16})

    def gradient():
        weight.grad = place(direction)
        return torch.tensor(0.0)

    xsam_gradient([weight], gradient, gradient, XSAMArguments(rho=0.03, alpha=1.0), XSAMState(), seen=seen)
    return seen.read()


def sharded(tensor):
    return distribute_tensor(tensor, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def pretend_that_accelerate_shards_on_cpu():
    """accelerate passes over FSDP where there is no accelerator; PyTorch's own FSDP2 does not."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin

    AcceleratorState.__init__ = init


def count_reductions():
    """The reductions that norms and angles make, as a list that grows by one with each."""
    reductions = []

    def all_reduce(tensor, **kwargs):
        reductions.append(tensor.numel())
        dist.all_reduce(tensor, **kwargs)

    geometry.dist = SimpleNamespace(all_reduce=all_reduce)
    return reductions


def main_of_one(directory, name):
    pretend_that_accelerate_shards_on_cpu()
    found = result(run(directory, name, 16 // int(os.environ["WORLD_SIZE"])))
    torch.save(found, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def main(directory):
    pretend_that_accelerate_shards_on_cpu()
    batch, reductions, results = 16 // int(os.environ["WORLD_SIZE"]), count_reductions(), {}
    policies = note_policies()
    for name in (*SCENARIOS, "bf16 policy"):
        reductions.clear()
        policies.clear()
        results[name] = {
            **result(run(directory, name, batch)),
            "reductions": list(reductions),
            "policies": list(policies),
        }
    for name in ("xsam", "vasso", "stale"):
        settings = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
        whole = run(directory / "whole", name, batch, **settings)
        checkpoint = str(directory / "whole" / name / "checkpoint-3")
        again = run(directory / "again", name, batch, resume=checkpoint, **{**settings, "save_strategy": "no"})
        results[f"resume {name}"] = (result(whole)["weights"], result(again)["weights"])
    results["seen"] = seen_of(sharded)
    torch.save(results, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
