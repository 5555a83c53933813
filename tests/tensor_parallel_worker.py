"""Runs every scenario of test_tensor_parallel.py with a tiny Llama whose weights processes share, and saves what was seen."""

import os

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from fsdp_worker import result
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from toys import Tokens, arguments
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from xsam_hf import XSAMTrainer


SCENARIOS = {
    "xsam": {"alpha": 1.5},
    "search": {"alpha_search_steps": 2, "max_grad_norm": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "alpha": 1.5},
    "asam": {"perturbation": "asam", "gradient_scale": "slope_max", "alpha": 1.5},
    "vasso": {"perturbation": "vasso", "alpha": 1.7},
    "stale": {"perturbation": "stale", "alpha": 1.0},
    "msam+": {"direction": "msam+", "ascent_steps": 2, "gradient_scale": "mean"},
    "fraction": {"ascent_fraction": 0.25, "alpha": 1.5},
    "not finite": {"alpha": 1.5},
}


# FSDP2's shards of tensor parallelism's parts, and FSDP2 alone, as transformers loads them; four processes.
LAYOUTS = {
    "search": {"tp_size": 2, "fsdp_size": 2},
    "asam": {"tp_size": 2, "fsdp_size": 2},
    "accumulation": {"tp_size": 2, "fsdp_size": 2},
    "xsam": {"tp_size": 1, "fsdp_size": 4},
}


class Overflowing(XSAMTrainer):
    """The gradient at the moved weights of the second update is not finite."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * torch.inf if self.state.global_step == 1 and self._xsam_replaying else loss


def save_model(directory):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **size)).save_pretrained(directory)


def run(model, directory, name, layout=None, **changes):
    """One training of the saved model; in parts if this process is one of several."""
    settings = {"rho": 0.3, "train_sampling_strategy": "sequential", "max_steps": 4, **SCENARIOS[name], **changes}
    shared, batch = {}, 16
    if layout is not None:
        shared, batch = {"distributed_config": DistributedConfig(**layout)}, 16 // layout["fsdp_size"]
    elif "RANK" in os.environ:
        shared = {"tp_plan": "auto", "device_mesh": init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))}
    accumulation = settings.get("gradient_accumulation_steps", 1)
    args = arguments(directory / name, per_device_train_batch_size=batch // accumulation, **settings)
    cls = Overflowing if name == "not finite" else XSAMTrainer
    trainer = cls(model=LlamaForCausalLM.from_pretrained(model, **shared), args=args, train_dataset=Tokens())
    trainer.train()
    return trainer


def refusals(model, directory):
    """What cannot be right is refused when the trainer is built, in all processes alike."""
    said = {}
    shared = {"tp_plan": "auto", "device_mesh": init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))}
    for name, settings, part in (("micro", {"ascent_scope": "micro"}, False), ("a part", {}, True)):
        llama = LlamaForCausalLM.from_pretrained(model, **shared)
        if part:
            llama.expert = nn.Parameter(torch.full((3,), 1.0 + dist.get_rank()))
        try:
            XSAMTrainer(model=llama, args=arguments(directory / name, rho=0.3, **settings), train_dataset=Tokens())
        except NotImplementedError as error:
            said[name] = str(error)
    return said


def main(model, directory):
    # accelerate takes tensor parallelism for a matter of accelerators; PyTorch does not.
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    dist.init_process_group("gloo")
    results = {name: result(run(model, directory, name)) for name in SCENARIOS}
    results["refused"] = refusals(model, directory)
    torch.save(results, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def main_of_four(model, directory):
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    dist.init_process_group("gloo")
    sizes = ParallelismConfig()  # as a script of a reader's would take them from accelerate's config
    sizes = {"tp_size": sizes.tp_size, "fsdp_size": sizes.dp_shard_size}
    results = {"sizes": sizes}
    for name, layout in LAYOUTS.items():
        os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = str(layout == sizes)
        trainer = run(model, directory, name, layout, max_steps=2)
        results[name] = result(trainer)
        results[f"placements {name}"] = {str(weight.placements) for weight in trainer.model.parameters()}
    torch.save(results, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
