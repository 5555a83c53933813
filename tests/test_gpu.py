"""A pretended GPU: what an update would launch, wait for and hold there. And what is refused because of real ones."""

import math
import types

import pytest
import torch
from pretend_gpu import update
from toys import Classifier, Points, build

from xsam_hf import XSAMArguments
from xsam_hf.arithmetic import _scale_half_
from xsam_hf.trainer.compatibility import check_supported
from xsam_hf.trainer.micro_batch import MicroBatch, random_subset


SMALL = [(192, 192), (192,)] * 75
MANY = [(192, 192), (192,)] * 500
WIDE = [(1024, 1024), (1024,)] * 4 + [(4096, 1024), (4096,), (1024, 4096), (1024,)]
VIT_L = WIDE * 24
LARGE = [(4096, 4096), *[(256, 256), (256,)] * 10]
DTYPES = {"float32": (torch.float32,), "bfloat16": (torch.bfloat16,), "mixed": (torch.float32, torch.bfloat16)}
METHODS = {
    **{name: {"perturbation": name, "alpha": 1.3} for name in ("sam", "asam", "vasso", "fsam", "stale")},
    "all of asam": {"perturbation": "asam", "asam_scope": "all", "alpha": 1.0},
    **{name: {"direction": name} for name in ("lsam", "lsam+", "msam", "msam+")},
    **{
        f"{scale} norm": {"alpha": 1.3, "gradient_scale": scale}
        for scale in ("first", "mean", "max", "slope", "slope_max")
    },
    "at random": {"alpha": 1.3, "perturbation_dtype": "stochastic"},
}


CASES = [
    (name, dtypes, k, scaling)
    for name, method in METHODS.items()
    for dtypes in DTYPES
    for k in ((1,) if method.get("perturbation") in ("vasso", "fsam", "stale") else (1, 3))
    for scaling in ((False, True) if name == "sam" else (False,))
]


@pytest.mark.parametrize("name, dtypes, k, scaling", CASES)
def test_an_update_waits_for_nothing_and_needs_little_room(name, dtypes, k, scaling):
    method = METHODS[name]
    # Of averages the second update: they are there already.
    averaging = method.get("perturbation") in ("vasso", "fsam", "stale")
    gpu, own, extra = update(LARGE, DTYPES[dtypes], ascent_steps=k, loss_scaling=scaling, warm_up=averaging, **method)
    kept = own if "direction" in method else 0  # a sum of gradients
    room = 2 if name == "stale" else 1  # of the average and of the gradient, each of which the other needs
    assert extra - kept <= room * max(4 * 4096 * 4096, 64 * 2**20) + 2**20
    # Nothing goes one tensor at a time, but for products of large tensors in half precision.
    assert set(gpu.one_by_one) <= (set() if dtypes == "float32" else {"_foreach_mul_"})
    elements = sum(math.prod(shape) for shape in LARGE)
    # Rounded in pieces: every ascent at random, and the way to slope_max's point.
    in_pieces = dtypes != "float32" and name in ("at random", "slope_max norm")
    pieces = 15 * math.ceil(elements / 2**21) if in_pieces else 0
    kinds = len(DTYPES[dtypes])
    calls = 60 * (k + 1) + 10 * (name == "stale")
    assert gpu.kernels <= kinds * (len(LARGE) + calls + 10 * math.ceil(elements / 2**23)) + pieces * k


def test_float16_is_rounded_at_random_in_little_room():
    """An H100 held 70 MiB. What holds most is a piece of 2**21 elements, in float32 and as whole numbers."""
    _, _, extra = update([(2**12, 2**10)], (torch.float16,), alpha=1.0, measure=False, perturbation_dtype="stochastic")
    assert extra <= 64 * 2**20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scaled_in_float32_and_rounded_once(dtype):
    """As on a GPU, where the factor is not read: large tensors, small ones, a number, one with gaps."""
    vector = [torch.randn(2**20), torch.randn(30, 7), torch.randn(()), torch.randn(9, 8).t()[::2]]
    vector = [part.to(dtype) for part in vector]
    wanted = [(part.float() * 0.3712).to(dtype) for part in vector]
    twice = [part * torch.tensor(0.3712).to(dtype) for part in vector]  # the factor rounded first
    _scale_half_(vector, torch.tensor(0.3712))
    assert all(torch.equal(a, b) for a, b in zip(vector, wanted, strict=True))
    assert not torch.equal(vector[0], twice[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes, kernels", [(SMALL, 150), (MANY, 450)])
def test_few_kernels_are_launched(shapes, kernels, dtype):
    kept, _, _ = update(shapes, (dtype,), alpha=1.3)
    sam, _, _ = update(shapes, (dtype,), alpha=1.0, measure=False)
    # A loop over tensors, of one operator alone, would be more than half of that. To scale half precision they are put together and apart.
    apart = 0 if dtype == torch.float32 else math.ceil(len(shapes) / 128) + math.ceil(len(shapes) / 64)
    assert sam.kernels < kept.kernels <= kernels < 3 * len(shapes) and sam.kernels <= kernels / 2 + apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_pass_sees_is_measured_without_a_wait(dtype):
    """Once in a training: some kernels a weight, and room for a million weights."""
    later, _, less = update(WIDE, (dtype,), alpha=1.3)
    once, _, extra = update(WIDE, (dtype,), alpha=1.3, autocast=torch.bfloat16)
    assert set(once.one_by_one) <= ({"_foreach_mul_"} if dtype == torch.bfloat16 else set())
    assert later.kernels < once.kernels <= later.kernels + 14 * len(WIDE)
    assert extra <= less + 40 * 2**20
    # The next update measures nothing.
    again, _, _ = update(WIDE, (dtype,), alpha=1.3, autocast=torch.bfloat16, warm_up=1)
    assert again.kernels == later.kernels


@pytest.mark.parametrize("measure, alpha, touches", [(True, 1.3, 34), (True, 1.0, 32), (False, 1.0, 22)])
def test_weights_are_read_and_written_seldom(measure, alpha, touches):
    """docs/speed.md counts them one by one. Before the arithmetic was one call for all tensors: 41, whatever α was."""
    gpu, own, _ = update(VIT_L, alpha=alpha, measure=measure)
    assert gpu.bytes / own <= touches + 0.1


def test_the_pretended_gpu_sees_what_it_is_for():
    from pretend_gpu import pretended_gpu

    with pretended_gpu() as gpu:
        a, b = (torch.empty(100, device="cuda:0") for _ in range(2))
        with pytest.raises(AssertionError, match="_local_scalar_dense waits"):
            a.sum().item()
        with pytest.raises(AssertionError, match="_to_copy"):
            a.cpu()
        gpu.begin()
        torch._foreach_mul_([a, b], torch.empty((), device="cuda:0"))
        assert gpu.kernels == 1 and not gpu.one_by_one and gpu.bytes == 2 * 2 * 400 + 4
        torch._foreach_mul_([a.bfloat16(), b], 2.0)
        assert gpu.one_by_one == {"_foreach_mul_": 2}


# --- what real ones ask for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_that_keep_their_memory_are_refused(tmp_path, mode):
    settings = {"torch_compile": True, "torch_compile_mode": mode}
    with pytest.raises(NotImplementedError, match=f"`torch_compile_mode` '{mode}'.*max-autotune-no-cudagraphs"):
        build(tmp_path, **settings)
    build(tmp_path, rho=0.0, **settings)
    build(tmp_path, torch_compile=True, torch_compile_mode="max-autotune-no-cudagraphs")
    with pytest.raises(NotImplementedError, match="`torch_compile_backend` 'cudagraphs'"):
        build(tmp_path, torch_compile=True, torch_compile_backend="cudagraphs")


def test_a_model_on_several_devices_of_one_process_is_refused(tmp_path):
    model = Classifier()
    model.second.to("meta")  # there is no second device here
    run = build(tmp_path)
    run.model = model
    with pytest.raises(NotImplementedError, match="on several devices.*cpu, meta.*device_map"):
        check_supported(run, run.xsam_arguments)
    check_supported(run, XSAMArguments(rho=0.0))


def test_an_offloaded_probe_is_waited_for(tmp_path, monkeypatch):
    """FSDP2 with CPU offload copies shards to the device without waiting: the next point must not be written over them."""
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *args: waited.append(1))
    run = build(tmp_path, rho=0.5)
    run.create_optimizer_and_scheduler(4)
    run.current_gradient_accumulation_steps = 1
    batch = {"x": Points().x[:8], "labels": Points().y[:8]}
    run.training_step(run.model, batch)
    assert not waited
    monkeypatch.setattr(type(run.args), "device", torch.device("meta"))  # weights are on the CPU, passes elsewhere
    micro_batch = types.SimpleNamespace(inputs=lambda whole: (batch, None), accumulation_steps=1, broadcasts=None)
    monkeypatch.setattr(run, "_prepare_inputs", lambda inputs: inputs)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: torch.tensor(0.0))
    with torch.no_grad():
        run._xsam_probe(run.model, [micro_batch])
    assert waited == [1]


def test_the_subset_of_a_batch_is_made_on_its_device_once():
    batch = {"x": torch.arange(8.0), "labels": torch.arange(8)}
    subset, size = random_subset(batch, 0.5, [0])
    assert subset.device == batch["x"].device and (len(subset), size) == (4, 8)
    part, _ = MicroBatch(batch, None, 1, None, subset=subset, size=size).inputs(whole=False)
    assert part["x"].tolist() == part["labels"].tolist() == subset.tolist()
