"""
A GPU that is only pretended: fake CUDA tensors, without data or a driver, on which every kernel and every byte is counted.

What a real one would do is derived from the operators that reach it: a foreach call of tensors that are alike is a kernel for
every so many tensors or chunks (MultiTensorApply.cuh), and one of tensors that are not is a kernel for each. Reading a number,
copying to another device without `non_blocking`, and operands of two devices are errors.
"""

import math
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xsam_hf import SeenAscent, XSAMArguments, XSAMState, xsam_gradient


FREE = set(
    "view _unsafe_view view_as_real view_as_complex reshape split split_with_sizes unsqueeze squeeze expand detach select alias slice t "
    "permute unbind as_strided empty empty_like new_empty empty_strided _reshape_alias lift_fresh".split()
)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
TENSORS_A_KERNEL = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # by the number of lists
CHUNK, CHUNKS_A_KERNEL = 65536, 320


class PretendedGPU(TorchDispatchMode):
    """
    Counts what happens on CUDA tensors within the block.

    Attributes:
        kernels (`int`), by_name (`Counter`): launches, and by operator.
        bytes (`int`): read and written.
        one_by_one (`Counter`): tensors of foreach calls that have no kernel in common.
        peak (`int`): the most bytes of new tensors that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.begin()

    @property
    def kernels(self) -> int:
        return sum(self.by_name.values())

    def begin(self) -> None:
        self.by_name, self.one_by_one = Counter(), Counter()
        self.bytes = self.peak = self.held = 0
        self.alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in given if x.is_cuda]
        assert not (on_gpu and name in WAITS), f"{name} waits for the device"
        known = {x.untyped_storage()._cdata for x in given}
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        # A number from the host is an argument of a kernel; copied to the device, it makes the host wait.
        devices = {x.device for x in (*given, *results) if x.ndim > 0 or x.is_cuda or name in COPIES}
        if len(devices) > 1:
            assert name in COPIES and kwargs.get("non_blocking"), f"{name}: operands on {sorted(map(str, devices))}"
        new = [x for x in results if x.untyped_storage()._cdata not in known]
        if any(x.is_cuda for x in (*given, *results)) and func.namespace == "aten" and name not in FREE:
            self.by_name[name] += self._kernels(name, args, given, results)
            written = new or [
                x
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info and argument.alias_info.is_write
                for x in tree_leaves(value)
            ]
            # A copy writes over what it does not read.
            read = tree_leaves(args[1:]) if name in ("copy_", "_foreach_copy_") else given
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, *written) if isinstance(x, torch.Tensor))
        storages = [x.untyped_storage() for x in new if x.is_cuda]
        self.alive |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self.held += sum(storage.nbytes() for storage in storages)
        if self.held > self.peak:  # or those that have gone since do not matter yet
            self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
            self.held = sum(self.alive.values())
            self.peak = max(self.peak, self.held)
        return out

    def _kernels(self, name, args, given, results) -> int:
        lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor)]
        if name == "cat":
            alike = len({x.dtype for x in (*given, *results)}) == 1
            return math.ceil(len(lists[0]) / 128) if alike else len(lists[0])
        if "_foreach_" not in name:
            return 1
        factors = [x for x in args[1:] if isinstance(x, torch.Tensor)]
        for factor in factors:  # FakeTensorMode does not look at these
            assert all(x.device == factor.device for x in lists[0]), f"{name}: the factor is on {factor.device}"
        same_shapes = all(
            a.shape == b.shape and a.stride() == b.stride() for x in lists for a, b in zip(lists[0], x, strict=True)
        )
        kinds = {(x.dtype, x.device) for x in (given if name.startswith("_foreach_") else lists[0])}
        if len(kinds) > 1 or not same_shapes:
            self.one_by_one[name] += len(lists[0])
            return len(lists[0])
        in_place = name.endswith("_") or name == "_foreach_norm"
        chunks = sum(math.ceil(x.numel() / CHUNK) for x in lists[0])
        launches = max(
            math.ceil(len(lists[0]) / TENSORS_A_KERNEL[len(lists) + (not in_place)]),
            math.ceil(chunks / CHUNKS_A_KERNEL),
        )
        return launches + 2 * (name == "_foreach_norm")


class _Generator:
    """The real one asks for a driver."""

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def manual_seed(self, seed):
        return self


def _without_generator(function):
    return lambda *args, generator=None, **kwargs: function(*args, **kwargs)


@contextmanager
def pretended_gpu():
    with FakeTensorMode(), PretendedGPU() as gpu, mock.patch.object(torch, "Generator", _Generator):
        with mock.patch.multiple(
            torch, rand=_without_generator(torch.rand), randint=_without_generator(torch.randint)
        ):
            yield gpu


def update(
    shapes,
    dtypes=(torch.float32,),
    devices=("cuda:0",),
    measure=True,
    loss_scaling=False,
    warm_up=0,
    autocast=None,
    **arguments,
):
    """
    One update whose passes cost nothing.

    Returns:
        `tuple`: the counts, the bytes of the weights, and the most bytes alive beside weights, their copy and gradients.
    """
    with pretended_gpu() as gpu:
        weights = [
            torch.empty(
                shape, dtype=dtypes[i % len(dtypes)], device=devices[i * len(devices) // len(shapes)]
            ).requires_grad_()
            for i, shape in enumerate(shapes)
        ]

        def gradient():
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            return probe()

        def probe():
            return torch.empty((), device=devices[0])

        chosen, state = XSAMArguments(**arguments), XSAMState(search_due=False)
        seen = None if autocast is None else SeenAscent(dict.fromkeys(weights, autocast))
        for i in range(warm_up + 1):
            if i == warm_up:
                gpu.begin()
            options = {"measure": measure, "loss_scaling": loss_scaling, "seen": seen}
            xsam_gradient(weights, gradient, probe, chosen, state, **options)
        assert seen is None or not seen.is_due
        own = sum(weight.numel() * weight.element_size() for weight in weights)
    return gpu, own, gpu.peak - 2 * own
