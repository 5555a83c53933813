"""What `gpu_check` asks of trainings: half precision, dropout, refusals, compilation, repetition, and several processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from scripts.checks import TOLD, Found, Skip, at_least, at_most, each, exactly, needs_a_gpu
from scripts.gpu_numbers import changed, distance
from xsam_hf import XSAMTrainer, XSAMTrainingArguments
from xsam_hf.pass_state import PassState


QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_nan_inf_filter": False}


def tiny_gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    dropouts = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], dropout)
    size = {"vocab_size": 200, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, use_cache=False, **size, **dropouts))


def language_model_training(
    device: str, train: bool = True, dropout: float = 0.0, resume: str | None = None, plain: bool = False, **settings
):
    """A trainer of a tiny GPT-2 on 64 sequences in their order, trained."""
    tokens = torch.randint(200, (64, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    torch.manual_seed(0)
    model = tiny_gpt2(dropout)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder, "per_device_train_batch_size": 16, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0,
            "train_sampling_strategy": "sequential", "use_cpu": device == "cpu", "seed": 0, **QUIET,
        }  # fmt: skip
        if plain:
            trainer = Trainer(model, TrainingArguments(**{**common, **settings}), train_dataset=data)
        else:
            trainer = XSAMTrainer(
                model,
                XSAMTrainingArguments(**{**common, "rho": 0.3, "alpha_samples": 5, **settings}),
                train_dataset=data,
            )
        if train:
            trainer.train(resume_from_checkpoint=resume)
    return trainer


def half_precision(device: str) -> Found:
    """Autocast; a GradScaler, and an update that overflows."""
    right = _losses(device)
    names = ("bf16", "fp16", "fp16 overflow") if device == "cuda" else ("bf16",)
    yield from each(_half_precision, names, device, right)


def _losses(device: str, **settings) -> list[float]:
    trainer = language_model_training(device, max_steps=6, logging_steps=1, **settings)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _half_precision(name: str, device: str, right: list[float]) -> Found:
    if name != "fp16 overflow":
        worst = max(abs(a - b) / a for a, b in zip(right, _losses(device, **{name: True}), strict=True))
        yield "losses of six updates beside float32's", worst, at_most(0.02 if name == "bf16" else 0.05), "relative"
        return

    class TooLarge(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            scaler = trainer.accelerator.scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**100})
            self.before = [weight.detach().clone() for weight in trainer.model.parameters()]

    trainer = language_model_training(device, train=False, max_steps=1, fp16=True)
    callback = TooLarge()
    trainer.add_callback(callback)
    trainer.train()
    yield "changed", changed(callback.before, list(trainer.model.parameters())), exactly(0), "numbers"
    yield "scale afterwards", trainer.accelerator.scaler.get_scale() / 2.0**100, exactly(0.5), "of before"


ATTENTION = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def the_same_dropout_in_every_pass(device: str) -> Found:
    names = [*ATTENTION, "inductor", "checkpointing"] if device == "cuda" else ["math", "checkpointing"]
    yield from each(_dropout, names, device)


def _dropout(name: str, device: str) -> Found:
    ids = torch.randint(200, (4, 128), generator=torch.Generator().manual_seed(0)).to(device)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return tiny_gpt2(dropout=0.1).to(device)

    def loss(model: nn.Module) -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    if name == "checkpointing":
        gradients = []
        for model in (build(), build()):
            if gradients:
                model.gradient_checkpointing_enable()
            torch.manual_seed(1)
            loss(model.train()).backward()
            gradients.append(torch.cat([weight.grad.reshape(-1) for weight in model.parameters()]))
        yield "gradient beside that without", distance(*gradients), at_most(1e-5), "relative"
        return
    model = torch.compile(build()) if name == "inductor" else build()
    backend = sdpa_kernel(ATTENTION[name]) if name in ATTENTION else nullcontext()
    with backend, torch.autocast(device, torch.bfloat16):
        before = PassState.capture(None)
        first = loss(model).detach()
        before.restore()
        again, other = loss(model).detach(), loss(model).detach()
    yield "two passes differ by", (first - again).abs(), exactly(0), ""
    yield "with other masks by", (first - other).abs(), at_least(1e-6), ""


def refusals(device: str) -> Found:
    def refused(**settings) -> int:
        try:
            language_model_training(device, train=False, **settings)
        except NotImplementedError:
            return 1
        return 0

    for mode, expected in (("reduce-overhead", 1), ("max-autotune", 1), ("max-autotune-no-cudagraphs", 0)):
        found = refused(torch_compile=True, torch_compile_mode=mode)
        yield f"torch_compile_mode {mode} is refused", found, exactly(expected), ""
    yield "torch_compile_backend cudagraphs is refused", refused(torch_compile=True, torch_compile_backend="cudagraphs"), exactly(1), ""  # fmt: skip
    if device == "cuda":
        model = tiny_gpt2()
        model.lm_head = nn.Linear(64, 200, bias=False)  # untied
        model.transformer.to("cuda")
        model.hf_device_map = {"transformer": "cuda:0", "lm_head": "cpu"}
        model.is_parallelizable = model.model_parallel = True
        try:
            with tempfile.TemporaryDirectory() as folder:
                XSAMTrainer(model, XSAMTrainingArguments(folder, **QUIET))
            found = 0
        except NotImplementedError:
            found = 1
        yield "a model on two devices is refused", found, exactly(1), ""


def compiled(device: str) -> Found:
    needs_a_gpu(device, "tests/test_compile.py does it on a CPU")
    yield from each(
        _compiled, ("default", "max-autotune-no-cudagraphs"), device, _losses(device, alpha_search_steps=2)
    )


def _compiled(mode: str, device: str, eager: list[float]) -> Found:
    class Graphs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, 6):
                found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    found: list[int] = []
    # Trying Triton's kernels for every product takes minutes; CUDA graphs, which the mode is about, do not depend on it.
    torch._inductor.config.max_autotune_gemm_backends = "ATEN"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = language_model_training(
        device,
        train=False,
        max_steps=6,
        logging_steps=1,
        alpha_search_steps=2,
        torch_compile=True,
        torch_compile_mode=mode,
    )
    trainer.add_callback(Graphs())
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    worst = max(abs(a - b) / a for a, b in zip(eager, logged, strict=True))
    yield "losses of six updates beside eager's", worst, at_most(1e-3), "relative"
    yield "graphs", found[0], at_least(1), ""
    yield "graphs made after two updates", found[1] - found[0], exactly(0), ""


def repeated_and_resumed_runs(device: str) -> Found:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

    def weights(**settings) -> list[Tensor]:
        trainer = language_model_training(
            device, dropout=0.1, max_steps=6, learning_rate=1e-3, optim="adamw_torch", **settings
        )
        return [weight.detach().cpu() for weight in trainer.model.parameters()]

    told = TOLD if device == "cuda" else exactly(0)  # atomic additions come in another order every time
    yield "a run and its repetition, kernels as they come", changed(weights(), weights()), told, "numbers"
    torch.use_deterministic_algorithms(True)  # raises where an operation has none
    with tempfile.TemporaryDirectory() as folder:
        whole = weights(output_dir=folder, save_strategy="steps", save_steps=2)
        yield "deterministic kernels: a run and its repetition", changed(whole, weights()), exactly(0), "numbers"
        resumed = weights(resume=f"{folder}/checkpoint-2")
    yield "deterministic kernels: a run and the resumed one", changed(whole, resumed), exactly(0), "numbers"


# --- several processes -----------------------------------------------------------------------------------------------


def trained_by(device: str, processes: int, backend: str, shared: bool, settings: dict[str, Any]) -> list[Tensor]:
    """The weights of a training by several processes, which share a GPU or have one each; by one without a group for 0."""
    with tempfile.TemporaryDirectory() as folder:
        file, port = Path(folder, "weights.pt"), free_port()
        started = []
        for rank in range(max(processes, 1)):
            group = {
                "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": "0" if shared else str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            others = {"ddp_backend": backend, **settings} if processes else settings
            batch = {"max_steps": 4, "per_device_train_batch_size": 16 // max(processes, 1)}
            arguments = (device, group if processes else {}, file, {**batch, **others})
            started.append(multiprocessing.Process(target=_train_one_of, args=arguments))
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            reports = [error.read_text(encoding="utf-8") for error in sorted(Path(folder).glob("*.txt"))]
            codes = [process.exitcode for process in started]
            raise RuntimeError(f"the processes ended with {codes}: {' '.join(reports)}")
        return torch.load(file)


def _train_one_of(device: str, group: dict[str, str], file: Path, settings: dict[str, Any]) -> None:
    os.environ |= group
    torch.set_num_threads(1)
    try:
        trainer = language_model_training(device, **settings)
    except BaseException as error:
        report = f"{type(error).__name__}: {error}"
        file.with_name(f"{group.get('RANK', 0)}.txt").write_text(report, encoding="utf-8")
        raise
    alone = group.get("WORLD_SIZE", "1") == "1"
    parts = [
        weight if not isinstance(weight, DTensor) else weight.to_local() if alone else weight.full_tensor()
        for weight in trainer.model.parameters()
    ]
    if trainer.is_world_process_zero():
        torch.save([part.detach().cpu() for part in parts], file)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
SHARDED: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, find_unused_parameters": {"ddp_find_unused_parameters": True},
    "FSDP2": {"fsdp": True, "fsdp_config": FSDP2},
    "FSDP2, offloaded": {"fsdp": True, "fsdp_config": {**FSDP2, "cpu_offload": True}},  # searches wait for copies
}


def _beside_one(name: str, device: str, processes: int, backend: str, shared: bool) -> Found:
    right, found = (
        torch.cat([part.double().reshape(-1) for part in trained_by(device, *group)])
        for group in ((0, "", shared, {}), (processes, backend, shared, SHARDED[name]))
    )
    yield "weights after four updates beside one process's", distance(found, right), at_most(1e-5), "relative"


def two_gloo_processes(device: str) -> Found:
    yield from each(_beside_one, ["DDP"], device, 2, "gloo", True)


def one_nccl_process(device: str) -> Found:
    needs_a_gpu(device)
    yield from each(_beside_one, ["DDP", "FSDP2", "FSDP2, offloaded"], device, 1, "nccl", True)


def two_gpus(device: str) -> Found:
    needs_a_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skip("there are not two GPUs")
    yield from each(_beside_one, ["DDP", "DDP, find_unused_parameters", "FSDP2"], device, 2, "nccl", False)
