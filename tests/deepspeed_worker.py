"""Runs every scenario of test_deepspeed.py with DeepSpeed in each process, and saves whole weights and what was seen."""

import os
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path


# DeepSpeed compiles a part of itself for CPUs the first time, with the ninja of this environment.
os.environ |= {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from toys import INPUTS, Classifier, Points, Tokens, arguments, tiny_gpt2
from transformers import TrainerCallback, training_args

from xsam_hf import XSAMTrainer


STAGES = (1, 2, 3)
# A search whose α is used at once and later, two micro-batches, a norm that is not the last gradient's and is clipped.
SETTINGS = {
    "rho": 0.3,
    "alpha_search_steps": 2,
    "alpha_samples": 9,
    "gradient_scale": "mean",
    "max_grad_norm": 0.1,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
    "max_steps": 3,
}
SCENARIOS = {
    "xsam": {},
    "other ways of reduction": {"alpha": 1.5, "max_grad_norm": 0.0},
    "asam": {
        "perturbation": "asam",
        "ascent_steps": 2,
        "alpha": 1.5,
        "rho_exclude": ["second.bias"],
        "max_grad_norm": 0.0,
    },
    "slope": {"gradient_scale": "slope_max", "direction": "msam+", "max_grad_norm": 0.0},
    "every other": {"sharpness_every": 2, "alpha": 1.5, "max_grad_norm": 0.0},
    "frozen": {"alpha": 1.5},
    "unused": {"alpha": 1.5, "max_grad_norm": 0.0},
    "later not finite": {"alpha": 1.5},
}
# The optimizer in the host's memory, and the one that was asked for: without the second setting accelerate takes DeepSpeed's Adam.
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
KEEP_OPTIMIZER = {"zero_force_ds_cpu_optimizer": False}
BF16 = {"bf16": True, "gpt2": True, "max_steps": 4}
ZERO = {
    1: {"reduce_bucket_size": 60},
    2: {"overlap_comm": True, "contiguous_gradients": False, "reduce_scatter": False, "allgather_partitions": False},
    3: {"stage3_param_persistence_threshold": 10, "sub_group_size": 30, "reduce_bucket_size": 60},
}


class Scenario(XSAMTrainer):
    """
    Scenarios in which a pass of the second update is not finite, the first or that at the moved weights, and one in which
    only the second micro-batch of an update's first pass has a gradient for one of the layers.
    """

    def compute_loss(self, model, *args, **kwargs):
        name = Path(self.args.output_dir).name
        if name == "unused":
            self.model.with_extra = not self._xsam_replaying and len(self._xsam_micro_batches) == 1
        loss = super().compute_loss(model, *args, **kwargs)
        if self.state.global_step == 1 and name == ("later" if self._xsam_replaying else "first") + " not finite":
            loss = loss * torch.inf
        if self.state.global_step == 1 and name == "first not finite" and not self.is_deepspeed_enabled:
            loss = torch.zeros_like(loss) * self.model.first.bias.sum()  # as DeepSpeed skips the update
        return loss


class Network(Classifier):
    """With odd numbers of weights, which processes cannot share evenly, and a layer that may be left out."""

    def __init__(self):
        super().__init__()
        self.extra, self.with_extra = nn.Linear(INPUTS, INPUTS), True

    def forward(self, x, labels=None):
        x = x.to(self.first.weight.dtype)
        return super().forward(self.extra(x) if self.with_extra else x, labels)


def run(*args, resume=None, **changes):
    trainer = build(*args, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def build(
    directory, name, stage=None, gpt2=False, model=None, data=None, zero=None, config=None, cls=Scenario, **changes
):
    """A trainer; with a ZeRO stage if one is given, and then with this process's part of the batch."""
    settings = {**SETTINGS, **SCENARIOS.get(name, {}), **changes}
    processes = 1
    if stage is not None:
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "loss_scale": 0},
            "zero_optimization": {"stage": stage, **(zero or {})},
            **(config or {}),
        }
        settings["use_cpu"] = False  # or the Trainer would leave DeepSpeed out
        processes = int(os.environ["WORLD_SIZE"])
    batch = 16 // processes // settings["gradient_accumulation_steps"]
    args = arguments(directory / name, per_device_train_batch_size=batch, **settings)
    data = data or (Tokens() if gpt2 else Points(64))
    model = model or (tiny_gpt2(layers=1) if gpt2 else Network())
    if stage is None and not settings.get("bf16"):
        model.double()
    if name == "frozen":
        model.first.weight.requires_grad_(False)
    return cls(model=model, args=args, train_dataset=data, eval_dataset=data)


def result(trainer):
    model, zero3 = trainer.model, False
    weights = own = [weight for weight in model.parameters() if weight.requires_grad]
    if trainer.is_deepspeed_enabled:
        import deepspeed

        weights = [deepspeed.utils.safe_get_full_fp32_param(weight) for weight in own]
        zero3 = hasattr(own[0], "ds_id")
    with deepspeed.zero.GatheredParameters(own) if zero3 else nullcontext():
        own = flat(own)
    keys = (
        "loss",
        "xsam/alpha",
        "xsam/angle",
        "xsam/sharpness",
        "xsam/grad_norm_last",
        "xsam/seen_share",
        "xsam/seen_cosine",
    )
    return {
        "weights": flat(weights),
        "model's own": own,
        "history": {key: [entry[key] for entry in trainer.state.log_history if key in entry] for key in keys},
    }


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


def pretend_that_accelerate_knows_deepspeed_on_cpus():
    """
    accelerate finds no backend where there is no accelerator, and counts one process; DeepSpeed and gloo would do. The Trainer
    asks for a GPU that knows bfloat16.
    """
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_CPU)
    training_args.is_torch_bf16_gpu_available = lambda: True


def main(rank, directory, work):
    pretend_that_accelerate_knows_deepspeed_on_cpus()
    torch.save(work(directory), directory / f"rank{rank}.pt")
    dist.destroy_process_group()


def everything(directory):
    """All that the tests look at: processes that have imported DeepSpeed are dear."""
    found, counted = {}, count_collectives()
    for stage in STAGES:
        place = directory / f"{stage}"
        methods = {"plain": {"rho": 0.0}, "xsam": {"alpha": 1.5}, "a search": {"alpha_search_steps": 1}}
        for name, changes in methods.items():
            found[stage, "collectives", name] = collectives_of_an_update(counted, place, stage, **changes)
        for name in SCENARIOS:
            found[stage, name] = result(run(place, name, stage, zero=None if name == "xsam" else ZERO[stage]))
        saving = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
        others = {
            "first not finite": {"alpha": 1.5},
            "bf16": BF16,
            "whole": saving,
            "resumed": {**saving, "save_strategy": "no"},
        }
        for where, zero, names in (
            ("", {}, others),
            (", offloaded", OFFLOAD, ("xsam", "unused", "later not finite", *others)),
        ):
            for name in names:
                folder, settings = directory / f"{stage}{where}", others.get(name, {})
                resume = str(folder / "whole" / "checkpoint-1") if name == "resumed" else None
                both = {**zero, **(ZERO[stage] if name == "unused" else {})}
                trainer = run(folder, name, stage, zero=both, config=KEEP_OPTIMIZER, resume=resume, **settings)
                assert trainer._xsam_shards._shards.offloaded == bool(where)
                found[stage, name + where] = result(trainer)
        found[stage, "interrupted"] = interrupted(place, stage)
    own = {
        "type": "AdamW",
        "params": {"torch_adam": True, **dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    }
    found["own"] = result(run(directory, "own", 2, config={"optimizer": own}, learning_rate=0.01))
    found["own, offloaded"] = result(run(directory, "own", 2, zero=OFFLOAD, optim="adamw_torch", learning_rate=0.01))
    whole = run(directory, "whole batch", 2, zero=OFFLOAD, config=KEEP_OPTIMIZER, gradient_accumulation_steps=1)
    sums = len(whole._xsam_shards.engine.optimizer.accumulated_grads_in_cpu)
    found["whole batch, offloaded"] = {**result(whole), "sums of micro-batches": sums}
    for stage in (2, 3):
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
        found[stage, "bf16, sums in fp32"] = result(run(directory, "sums", stage, config=accumulation, **BF16))
    for accumulation in (1, 2):
        plain = {**BF16, "rho": 0.0, "gradient_accumulation_steps": accumulation}
        found["plain bf16", accumulation] = result(run(directory, "plain", 2, **plain))
    return found


def count_collectives():
    """The elements that DeepSpeed reduces and gathers, each call with more than two of them, by kind."""
    counted = Counter()

    def counting(name, function):
        def count(*args, **kwargs):
            tensors = [thing for thing in (*args, *kwargs.values()) if isinstance(thing, torch.Tensor)]
            if (size := max(tensor.numel() for tensor in tensors)) > 2:
                counted["gathered" if "gather" in name else "reduced"] += size
            return function(*args, **kwargs)

        return count

    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(dist, name, counting(name, getattr(dist, name)))
    return counted


def collectives_of_an_update(counted, directory, stage, **changes):
    """Those of the last of three updates."""

    class Noting(TrainerCallback):
        seen = []

        def on_step_end(self, *args, **kwargs):
            self.seen.append(Counter(counted))

    noting = Noting()
    trainer = build(directory, "counted", stage, gradient_accumulation_steps=1, alpha_samples=9, **changes)
    trainer.add_callback(noting)
    trainer.train()
    return dict(noting.seen[-1] - noting.seen[-2])


class Interrupted(Exception):
    pass


def interrupted(directory, stage):
    """What is said after an exception in the second update's pass at moved weights; the masters before and after it."""

    class Failing(Scenario):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 1 and self._xsam_replaying:
                raise Interrupted
            return super().compute_loss(*args, **kwargs)

    said = []
    trainer = build(directory, "interrupted", stage, cls=Failing, alpha=1.5)
    try:
        trainer.train()
    except Interrupted:
        masters = [weight.to_local().clone() for weight in trainer._xsam_shards.weights.values()]
        for use in (lambda: trainer.save_model(str(directory / "saved")), trainer.evaluate, trainer.train):
            try:
                use()
            except RuntimeError as error:
                said.append(str(error))
    return {"said": said, "masters": masters}


CONFIGURED = {"rho": 0.3, "alpha": 1.5, "max_steps": 2, "train_sampling_strategy": "sequential"}


def configured(directory):
    """A training that `accelerate launch` and a config in scripts/accelerate/ have set up, without a word about DeepSpeed in it."""
    pretend_that_accelerate_knows_deepspeed_on_cpus()
    settings = {**CONFIGURED, "bf16": True, "use_cpu": False, "save_strategy": "steps", "save_steps": 2}
    data = Tokens(32)
    trainer = XSAMTrainer(tiny_gpt2(layers=1), arguments(directory, **settings), train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(directory / "saved"))
    found = result(trainer) | {"stage": trainer.deepspeed.zero_optimization_stage()}
    if dist.get_rank() == 0:
        torch.save(found, directory / "found.pt")
    dist.destroy_process_group()
