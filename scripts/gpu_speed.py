"""What `gpu_check` asks of time and memory, of updates and of images."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, default_data_collator

from scripts.benchmark import TrainerStep, gpt2, image_model
from scripts.checks import TOLD, Expected, Found, Skip, at_least, at_most, each, needs_a_gpu
from scripts.gpu_launches import free_passes, synchronize
from tasks.image_classification.augmentation import Augmentation
from tasks.image_classification.catalogue import DATASETS
from tasks.image_classification.labelled_images import Split
from tasks.image_classification.pixels import normalize


def median_of(step: Callable[[], Any], device: str, rounds: int = 10) -> float:
    """Milliseconds."""
    times = []
    for i in range(rounds + 3):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        if i >= 3:
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


OWN: dict[str, tuple[Callable[[], nn.Module], Expected, Expected]] = {
    # A small model's time is that of launching kernels. tests/test_gpu.py counts 36 reads and writes of each weight where α and the
    # angle are kept; AdamW's step has 7.
    "ViT-Ti": (lambda: image_model("vit-ti", "cifar100", 1)[0], at_most(1.5), TOLD),
    "ViT-L": (lambda: vit_large(), TOLD, at_most(36 / 7 * 1.2)),
    "GPT-2 124M": (lambda: gpt2(1, 1)[0], TOLD, at_most(36 / 7 * 1.2)),
}


def own_time(device: str) -> Found:
    """The arithmetic beside AdamW's."""
    yield from each(_own_time, OWN if device == "cuda" else ["ViT-Ti"], device)


def _own_time(name: str, device: str) -> Found:
    build, most_ms, most_times = OWN[name] if device == "cuda" else (OWN[name][0], TOLD, TOLD)
    shapes = [weight.shape for weight in build().parameters()]
    kept, weights = free_passes(device, shapes, alpha=1.5)
    own = statistics.median([kept() for _ in range(8)][3:])
    yield "own arithmetic, alpha kept", own, most_ms, "ms"
    sam, _ = free_passes(device, shapes, measure=False, alpha=1.0)
    yield "own arithmetic, SAM between logs", statistics.median([sam() for _ in range(8)][3:]), most_ms, "ms"
    step = median_of(torch.optim.AdamW(weights, fused=True).step, device, 5)
    yield "fused AdamW's step", step, TOLD, "ms"
    yield "own arithmetic, alpha kept, beside it", own / step, most_times, "times"


def vit_large() -> ViTForImageClassification:
    size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return ViTForImageClassification(ViTConfig(num_labels=1000, **size))


def _vit_large_batch() -> tuple[nn.Module, dict[str, Tensor]]:
    return vit_large(), {"pixel_values": torch.randn(64, 3, 224, 224), "labels": torch.randint(1000, (64,))}


def on_device(device: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _speed(device: str, name: str, build: Callable[[], tuple[nn.Module, dict]], sam_most: Expected) -> Found:
    methods = {"plain": "plain", "sam": "sam", "xsam": "xsam, alpha kept"}
    settings = {"use_cpu": device == "cpu", "logging_nan_inf_filter": False, "logging_steps": 10**6}
    if device == "cuda":
        settings |= {"bf16": True, "optim": "adamw_torch_fused"}
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for short, method in methods.items():
            torch.manual_seed(0)
            model, batch = build()
            steps[short] = TrainerStep(method, model, on_device(device, batch), folder, 1, **settings)
        rounds: dict[str, list[float]] = {short: [] for short in methods}
        for i in range(11 if device == "cuda" else 5):
            for short, step in steps.items():
                synchronize(device)
                began = time.perf_counter()
                step()
                synchronize(device)
                if i >= 3:
                    rounds[short].append(1000 * (time.perf_counter() - began))
    yield f"{name}: plain update", statistics.median(rounds["plain"]), TOLD, "ms"
    for a, b, most in (("sam", "plain", sam_most), ("xsam", "sam", at_most(1.02) if sam_most != TOLD else TOLD)):
        ratio = statistics.median(x / y for x, y in zip(rounds[a], rounds[b], strict=True))
        yield f"{name}: {a} to {b}", ratio, most, "times"


def speed_of_a_small_vit(device: str) -> Found:
    if device == "cpu":
        yield from _speed(device, "vit-small b64", lambda: image_model("vit-small", "digits", 64), TOLD)
    else:
        yield from _speed(device, "ViT-Ti b256 bf16", lambda: image_model("vit-ti", "cifar100", 256), at_most(2.1))


def speed_of_vit_large(device: str) -> Found:
    needs_memory(device, 48)
    yield from _speed(device, "ViT-L b64 bf16", _vit_large_batch, at_most(2.1))


def speed_of_gpt2(device: str) -> Found:
    needs_memory(device, 48)
    yield from _speed(device, "GPT-2 124M 8×1024 bf16", lambda: gpt2(8, 1024), at_most(2.1))


def needs_memory(device: str, gib: int) -> None:
    needs_a_gpu(device)
    if torch.cuda.get_device_properties(0).total_memory < gib * 2**30:
        raise Skip(f"the device has less than {gib} GiB")


def memory(device: str) -> Found:
    """One copy of the weights more than plain training, and 2.05 in a search, when no activations are alive."""
    needs_memory(device, 16)
    peaks = {}
    for name in ("plain", "sam", "xsam, search"):
        torch.manual_seed(0)
        model, batch = gpt2(8, 256)
        own = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            step = TrainerStep(
                name, model, on_device(device, batch), folder, 1, use_cpu=False, optim="adamw_torch_fused"
            )
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                step()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() / own
        del model, step
        gc.collect()  # a Trainer is in cycles
        torch.cuda.empty_cache()
    yield "GPT-2 124M, plain: peak", peaks["plain"], TOLD, "× weights"
    yield "GPT-2 124M, sam: more than plain", peaks["sam"] - peaks["plain"], Expected(0.99, 1.05), "× weights"
    yield (
        "GPT-2 124M, search: more than plain",
        peaks["xsam, search"] - peaks["plain"],
        Expected(0.99, 2.05),
        "× weights",
    )


def images(device: str) -> Found:
    n = 50_000 if device == "cuda" else 10_000
    pictures = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    split = Split(pictures, np.zeros(n, int), Augmentation(DATASETS["cifar100"]))
    order = np.random.default_rng(1).permutation(n)[: n // 256 * 256].reshape(-1, 256).tolist()

    def rate() -> float:
        began = time.thread_time()
        for batch in order:
            default_data_collator(split.__getitems__(batch))
        return len(order) * 256 / (time.thread_time() - began)

    yield "crops and flips, bytes, collated; one core", max(rate() for _ in range(3)), at_least(50_000), "a second"
    batch = default_data_collator(split.__getitems__(order[0]))["pixel_values"]
    there = normalize(batch.to(device), DATASETS["cifar100"]).cpu()
    error = (there - normalize(batch, DATASETS["cifar100"])).abs().max()
    yield "normalised on the device and on a CPU", error, at_most(1e-6), ""
    if device == "cpu":
        return
    workers = min(4, os.cpu_count() or 1)
    loader = DataLoader(
        split, 256, shuffle=True, num_workers=workers, pin_memory=True, persistent_workers=True, drop_last=True,
        collate_fn=default_data_collator,
    )  # fmt: skip
    for _ in range(2):  # the first starts the workers
        began = time.perf_counter()
        for batch in loader:
            normalize(batch["pixel_values"].to(device, non_blocking=True), DATASETS["cifar100"])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    # A plain ViT-Ti on an H100 takes about 20,000.
    yield (
        f"{workers} workers, pinned, on the device and normalised",
        len(order) * 256 / seconds,
        at_least(40_000),
        "a second",
    )
