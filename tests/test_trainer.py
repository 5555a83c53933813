"""The Trainer with XSAM: against the oracle, against the plain Trainer, against itself on a batch cut otherwise."""

import itertools
import json
import math
import types

import numpy as np
import oracle
import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset
from toys import CLASSES, HIDDEN, INPUTS, Classifier, Points, Tokens, arguments, tiny_gpt2, train, weights_of
from transformers import PretrainedConfig, Trainer, TrainerCallback

from xsam_hf import XSAMArguments, XSAMMixin, XSAMState, XSAMTrainer, xsam_gradient
from xsam_hf.trainer import compatibility
from xsam_hf.trainer.compatibility import check_supported


def search_lines(trainer):
    with open(f"{trainer.args.output_dir}/xsam_search.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, 1.7])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_training_agrees_with_the_oracle(tmp_path, dtype, tolerance, k, alpha, optim):
    data, model = Points(32, dtype), Classifier(dtype=dtype)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().numpy()
    # Adam divides by |g|: an epsilon that is not tiny keeps float32's rounding of gradients near 0 out of the comparison.
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "adam_epsilon": 1e-3}
    method = {"rho": 0.5, "ascent_steps": k, "alpha": alpha}
    run = train(
        tmp_path, model, data, optim=optim, train_sampling_strategy="sequential",
        **(settings if optim != "sgd" else {}), **method,
    )  # fmt: skip
    x, y = data.x.double().numpy(), data.y.numpy()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    # The Trainer does not decay biases.
    decayed = np.concatenate([np.full(p.numel(), "bias" not in name) for name, p in model.named_parameters()])
    base = oracle.SGD(0.1) if optim == "sgd" else oracle.AdamW(0.01, eps=1e-3, weight_decay=0.1 * decayed)
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
    expected, found = oracle.train(network, theta, batches, base, epochs=2, rho=0.5, k=k, alpha=alpha)
    assert np.abs(expected - theta).max() > 0.02
    assert np.abs(weights_of(run).double().numpy() - expected).max() <= tolerance
    assert [line["alpha"] for line in search_lines(run)] == pytest.approx(found)


@pytest.mark.parametrize("extra", [{}, {"dropout": 0.3}, {"batch_norm": True}, {"dropout": 0.3, "batch_norm": True}])
def test_promise_1_rho_zero_is_the_plain_trainer(tmp_path, extra):
    plain = train(tmp_path / "a", Classifier(**extra), trainer=Trainer)
    off = train(tmp_path / "b", Classifier(**extra), rho=0.0)
    on = train(tmp_path / "c", Classifier(**extra), rho=0.1)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, off.model.state_dict()[name]), name
    assert not torch.equal(weights_of(plain), weights_of(on))
    assert history(plain, "loss") == history(off, "loss") != history(on, "loss")
    assert not any(key.startswith("xsam/") for entry in off.state.log_history for key in entry)
    assert (off.model.forwards, off.model.backwards) == (8, 8)


def test_promise_1_the_random_stream_ends_where_the_plain_trainers_does(tmp_path):
    def stream_after(name, **changes):
        torch.manual_seed(5)
        train(tmp_path / name, Classifier(dropout=0.3), **changes)
        return torch.rand(4).tolist(), np.random.rand(4).tolist()

    plain = stream_after("plain", trainer=Trainer)
    assert stream_after("sam", rho=0.5, alpha=1.0) == plain
    assert stream_after("xsam", rho=0.5, ascent_steps=2) == plain
    assert stream_after("longer", trainer=Trainer, num_train_epochs=3) != plain


def test_the_first_reported_loss_is_the_plain_trainers(tmp_path):
    plain = train(tmp_path / "a", Classifier(dropout=0.3), trainer=Trainer)
    ours = train(tmp_path / "b", Classifier(dropout=0.3), rho=0.5)
    assert history(plain, "loss")[0] == history(ours, "loss")[0]
    assert history(plain, "loss")[-1] != history(ours, "loss")[-1]


@pytest.mark.parametrize("method", [{}, {"alpha": 1.0}, {"ascent_steps": 3}])
def test_promise_2_the_update_does_not_depend_on_how_the_batch_is_cut(tmp_path, method):
    runs = [
        train(tmp_path / str(size), rho=0.5, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, **method)
        for size in (16, 8, 4, 1)
    ]  # fmt: skip
    start = torch.cat([p.detach().reshape(-1) for p in Classifier().parameters()])
    assert (weights_of(runs[0]) - start).abs().max() > 0.02
    for run in runs[1:]:
        assert (weights_of(run) - weights_of(runs[0])).abs().max() <= 1e-6
        assert history(run, "xsam/alpha") == history(runs[0], "xsam/alpha")
        assert history(run, "xsam/sharpness") == pytest.approx(history(runs[0], "xsam/sharpness"), abs=1e-6)
        assert history(run, "loss") == pytest.approx(history(runs[0], "loss"), abs=1e-5)


def test_promise_2_with_a_short_last_window(tmp_path):
    # 28 examples: windows of 16 and 12. A mean of unequal micro-batch means is only exact where the cut is even.
    data = Points(28)
    whole = train(tmp_path / "a", data=data, rho=0.5, per_device_train_batch_size=16)
    cut = train(tmp_path / "b", data=data, rho=0.5, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert (weights_of(whole) - weights_of(cut)).abs().max() <= 1e-6


def test_micro_scope_is_an_ascent_for_each_micro_batch(tmp_path):
    data = Points(16, torch.float64)
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 1, "rho": 0.5}
    common = {"data": data, "train_sampling_strategy": "sequential", "alpha": 1.7}
    micro = train(tmp_path / "a", Classifier(dtype=torch.float64), ascent_scope="micro", **cut, **common)
    update = train(tmp_path / "b", Classifier(dtype=torch.float64), **cut, **common)
    # One update: the mean of the four micro-batches' own directions.
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
    theta = torch.cat([p.detach().reshape(-1) for p in Classifier(dtype=torch.float64).parameters()]).numpy()
    x, y = data.x.numpy(), data.y.numpy()
    directions = []
    for i in range(0, 16, 4):
        a, b = x[i : i + 4], y[i : i + 4]
        directions.append(
            oracle.xsam_direction(
                theta,
                lambda t, a=a, b=b: network.loss(t, a, b),
                lambda t, a=a, b=b: network.gradient(t, a, b),
                0.5,
                alpha=1.7,
            )[0]
        )
    expected = theta - 0.1 * np.mean(directions, axis=0)
    assert np.abs(weights_of(micro).numpy() - expected).max() <= 1e-10
    assert np.abs(weights_of(update).numpy() - expected).max() > 1e-4
    alone = {**common, "rho": 0.5, "num_train_epochs": 1, "per_device_train_batch_size": 16}
    same = [
        train(tmp_path / scope, Classifier(dtype=torch.float64), ascent_scope=scope, **alone)
        for scope in ("micro", "update")
    ]
    assert torch.equal(weights_of(same[0]), weights_of(same[1]))


def test_micro_scope_searches_once_an_update(tmp_path):
    run = train(tmp_path, rho=0.5, ascent_scope="micro", per_device_train_batch_size=2, gradient_accumulation_steps=4,
                alpha_search_steps=2)  # fmt: skip
    assert [line["step"] for line in search_lines(run)] == [0, 2, 4, 6]


@pytest.mark.parametrize("scaled_loss", [False, True])
def test_label_smoothing_and_loss_functions_are_probed_as_they_are_trained(tmp_path, scaled_loss):
    def loss_function(outputs, labels, num_items_in_batch=None):
        losses = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return losses / num_items_in_batch

    def run(name, size):
        model = Classifier()
        model.config = PretrainedConfig()  # label smoothing asks it
        made = XSAMTrainer(
            model=model,
            args=arguments(tmp_path / name, rho=0.5, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
                           label_smoothing_factor=0.0 if scaled_loss else 0.1),
            train_dataset=Points(),
            compute_loss_func=loss_function if scaled_loss else None,
        )  # fmt: skip
        made.train()
        return made

    whole, cut = run("a", 8), run("b", 2)
    assert (weights_of(whole) - weights_of(cut)).abs().max() <= 1e-6
    for one, other in zip(search_lines(whole), search_lines(cut), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-5)
    # The probe at ρ_max → 0 would be the reported loss: same scale, so close to it.
    assert search_lines(whole)[0]["losses"][0] == pytest.approx(history(whole, "loss")[0], abs=0.7)
    for run_ in (whole, cut):
        assert max(search_lines(run_)[0]["losses"]) > history(run_, "loss")[0]


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, passes, probes",
    [
        ({"rho": 0.0}, 1, 0),
        ({"alpha": 1.0}, 2, 0),
        ({}, 2, 21),
        ({"ascent_steps": 3}, 4, 21),
        ({"alpha_samples": 5}, 2, 5),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_counted_passes(tmp_path, method, passes, probes, accumulation):
    run = train(
        tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, **method
    )
    updates, searches = 8, 2
    assert run.model.backwards == passes * updates * accumulation
    assert run.model.forwards == (passes * updates + probes * searches) * accumulation


class _LiveBytes(TorchDispatchMode):
    """The most bytes of float storage that were alive at once among tensors made under this mode."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


class OneMatrix(nn.Module):
    """40 equal blocks of weights and next to no activations: what is alive is weights, gradients and our buffers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ParameterList([nn.Parameter(torch.full((200, 200), 0.005 * (i + 1))) for i in range(40)])
        self.size = sum(p.numel() * p.element_size() for p in self.parameters())

    def forward(self, x, labels=None):
        loss = x.sum() * 0
        for block in self.blocks:
            loss = loss + (block @ block[0]).pow(2).sum()
        return {"loss": loss}


@pytest.mark.parametrize(
    "method, buffers", [({"rho": 0.0}, 0), ({"alpha": 1.7}, 1), ({"alpha": 1.0}, 1), ({"ascent_steps": 3, "alpha": 1.7}, 1), ({}, 2)]
)  # fmt: skip
def test_promise_6_peak_of_parameter_sized_buffers(tmp_path, method, buffers):
    peaks = []

    class Watched(XSAMTrainer):
        def training_step(self, *args, **kwargs):
            with _LiveBytes() as live:
                loss = super().training_step(*args, **kwargs)
            peaks.append(live.peak / self.model.size)
            return loss

    train(tmp_path, OneMatrix(), trainer=Watched, num_train_epochs=1, max_steps=2, learning_rate=1e-6, **method)
    # Two of them are the weights and the gradient; a few blocks (1/40 each) are temporaries of single tensors.
    assert 2 + buffers <= max(peaks) < 2 + buffers + 0.2


def test_promise_6_the_second_buffer_is_there_after_the_last_backward_pass_only(tmp_path):
    alive = {"forward": [], "probe": []}

    class Watched(XSAMTrainer):
        def training_step(self, *args, **kwargs):
            with _LiveBytes() as self.live:
                return super().training_step(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            now = sum(size for ref, size in self.live.alive.values() if not ref.expired())
            alive["forward" if torch.is_grad_enabled() else "probe"].append(now / self.model.size)
            return loss

    train(tmp_path, OneMatrix(), trainer=Watched, max_steps=1, learning_rate=1e-6, ascent_steps=2)
    # Weights and copy, no gradient; then weights, copy, displacement and gradient.
    assert len(alive["forward"]) == 3 and max(alive["forward"]) < 2.2
    assert len(alive["probe"]) == 21 and 4 <= min(alive["probe"]) <= max(alive["probe"]) < 4.2


class _Reads(TorchDispatchMode):
    """Counts the reads that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types_, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [{"alpha": 1.0}, {"alpha": 1.7, "ascent_steps": 3}, {"alpha_search_steps": 100}])
def test_promise_6_no_host_synchronisation_of_our_own_a_step(tmp_path, method):
    reads = []

    class Watched(XSAMTrainer):
        def training_step(self, *args, **kwargs):
            with _Reads() as watch:
                loss = super().training_step(*args, **kwargs)
            reads.append(watch.count)
            return loss

    train(tmp_path / "a", trainer=Watched, logging_steps=100, **method)
    assert reads[1:] == [0] * 7
    assert reads[0] == 0 or "alpha_search_steps" in method  # a search may read: it must, once


def test_promise_6_nothing_of_ours_stays_in_the_optimizer_or_the_model(tmp_path):
    plain = train(tmp_path / "a", trainer=Trainer, optim="adamw_torch")
    ours = train(tmp_path / "b", rho=0.5, optim="adamw_torch")
    assert ours.model.state_dict().keys() == plain.model.state_dict().keys()
    for one, other in zip(ours.optimizer.state.values(), plain.optimizer.state.values(), strict=True):
        assert one.keys() == other.keys()
    assert all(p.grad is None for p in ours.model.parameters())


def test_promise_6_weights_keep_their_storage(tmp_path):
    model = Classifier()
    addresses = [p.data_ptr() for p in model.parameters()]
    train(tmp_path, model, rho=0.5)
    assert [p.data_ptr() for p in model.parameters()] == addresses


# --- schedule, logs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, expected", [(None, [0, 4]), (3, [0, 3, 6]), (1, list(range(8))), (0.25, [0, 2, 4, 6]), (0.4, [0, 4])]
)
def test_search_schedule(tmp_path, steps, expected):
    run = train(tmp_path, rho=0.5, alpha_search_steps=steps)
    assert [line["step"] for line in search_lines(run)] == expected


def test_searches_are_written_whole(tmp_path):
    run = train(tmp_path, rho=0.5)
    first, second = search_lines(run)
    assert first["alphas"] == pytest.approx([i / 10 for i in range(21)]) and len(first["losses"]) == 21
    assert first["losses"][first["alphas"].index(first["alpha"])] == max(first["losses"])
    assert (first["step"], first["epoch"], second["step"], second["epoch"]) == (0, 0, 4, 1)
    assert first["rho_max"] == 1.0 and 0 < first["angle"] < math.pi
    again = train(tmp_path, rho=0.5, alpha=1.0)  # a new run into the same directory starts a new file
    assert search_lines(again) == []


def test_log_keys_and_their_values(tmp_path):
    run = train(tmp_path, rho=0.5, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    keys = {"alpha", "angle", "sharpness", "grad_norm_first", "grad_norm_last", "search_gain", "alpha_at_edge"}
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all({f"xsam/{key}" for key in keys} <= set(entry) for entry in logged)
    assert not any(f"xsam/{key}" in entry for entry in run.state.log_history if "loss" not in entry for key in keys)
    first, search = logged[0], search_lines(run)[0]
    assert first["xsam/alpha"] == search["alpha"] and first["xsam/angle"] == pytest.approx(search["angle"], rel=1e-6)
    assert first["xsam/search_gain"] == pytest.approx(max(search["losses"]) - search["losses"][10])
    assert first["xsam/alpha_at_edge"] == 0
    # `grad_norm` is the Trainer's own, of the gradient that we left: ‖g_k‖.
    assert first["grad_norm"] == pytest.approx(first["xsam/grad_norm_last"], rel=1e-5)
    model, batch = Classifier(), run.train_dataset
    assert first["xsam/sharpness"] > 0 and len(batch) == 32 and model.training


def test_logs_are_means_over_the_logging_interval(tmp_path):
    fine, coarse = (train(tmp_path / str(n), rho=0.5, logging_steps=n) for n in (1, 4))
    for key in ("xsam/angle", "xsam/sharpness", "xsam/grad_norm_first", "xsam/grad_norm_last", "loss"):
        steps = history(fine, key)
        assert history(coarse, key) == pytest.approx([sum(steps[:4]) / 4, sum(steps[4:]) / 4], abs=2e-5), key
    assert history(coarse, "xsam/alpha") == [history(fine, "xsam/alpha")[i] for i in (3, 7)]


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 10, 60])
def test_promise_3_weights_are_whole_after_a_failing_pass(tmp_path, error, call):
    class Failing(Classifier):
        calls = 0

        def forward(self, x, labels=None):
            self.calls += 1
            if self.calls == call:
                raise error("out of memory")
            return super().forward(x, labels)

    class Checked(XSAMTrainer):
        whole = None

        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.accelerator.sync_gradients:
                self.whole = weights_of(self)
            return super().training_step(model, inputs, num_items_in_batch)

    run = Checked(
        model=Failing(batch_norm=True),
        args=arguments(tmp_path, rho=0.5, gradient_accumulation_steps=2, per_device_train_batch_size=4),
        train_dataset=Points(),
    )
    with pytest.raises(error):
        run.train()
    start = torch.cat([p.detach().reshape(-1) for p in Classifier(batch_norm=True).parameters()])
    assert torch.equal(weights_of(run), start if run.whole is None else run.whole)
    if call in (3, 4, 10):  # in a pass of ours, not in the Trainer's own
        assert all(p.grad is None for p in run.model.parameters())
    assert run._xsam_micro_batches == []


def test_auto_find_batch_size_survives_out_of_memory_in_an_ascent(tmp_path):
    class Failing(Classifier):
        failed = False

        def forward(self, x, labels=None):
            if self.forwards == 5 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")
            return super().forward(x, labels)

    run = train(tmp_path, Failing(), rho=0.5, alpha=1.0, auto_find_batch_size=True)
    assert run.model.failed and run.state.train_batch_size < 8
    assert run.state.global_step == run.state.max_steps
    fresh = train(tmp_path / "b", rho=0.0)
    assert torch.isfinite(weights_of(run)).all() and weights_of(run).shape == weights_of(fresh).shape


@pytest.mark.parametrize("failing_pass, fallbacks", [(1, 1), (2, 1)])
def test_promise_5_a_later_pass_that_is_not_finite_falls_back(tmp_path, failing_pass, fallbacks, caplog):
    class Failing(Classifier):
        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            if self.training and self.forwards == 1 + failing_pass:
                outputs["loss"] = outputs["loss"] * math.nan
            return outputs

    common = {
        "alpha": 1.7,
        "rho": 0.5,
        "ascent_steps": failing_pass,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    run = train(tmp_path / "a", Failing(), **common)
    start = torch.cat([p.detach().reshape(-1) for p in Classifier().parameters()])
    moved = (start - weights_of(run)) / 0.1
    plain = train(tmp_path / "b", trainer=Trainer, max_steps=1, train_sampling_strategy="sequential")
    g0 = (start - weights_of(plain)) / 0.1
    assert history(run, "xsam/fallbacks") == [fallbacks]
    assert moved.norm() == pytest.approx(g0.norm().item(), rel=1e-4)
    if failing_pass == 1:
        assert (moved - g0).abs().max() < 1e-5
    assert math.isfinite(history(run, "xsam/grad_norm_first")[0])


def test_promise_5_alpha_never_comes_from_a_loss_that_is_not_finite(tmp_path):
    class Failing(Classifier):
        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            if self.training and not torch.is_grad_enabled():
                outputs["loss"] = outputs["loss"] * (math.nan if self.forwards > 30 else math.inf)
            return outputs

    run = train(tmp_path, Failing(), rho=0.5)
    assert history(run, "xsam/alpha") == [1.0] * 8
    assert all(line["alpha"] == 1 and line["losses"] == [None] * 21 for line in search_lines(run))
    assert not history(run, "xsam/search_gain")
    sam = train(tmp_path / "b", rho=0.5, alpha=1.0)
    assert torch.equal(weights_of(run), weights_of(sam))


def test_an_iterable_data_set_with_a_short_last_window_carries_it_over(tmp_path):
    # 5 micro-batches an epoch in windows of 2: the fifth waits for the first of the next epoch, as its gradient does.
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Points(20)[i] for i in range(20)])

    def run(name, trainer=XSAMTrainer, **method):
        return train(tmp_path / name, data=Stream(), trainer=trainer, per_device_train_batch_size=4,
                     gradient_accumulation_steps=2, max_steps=6, **method)  # fmt: skip

    plain, off, on = run("a", Trainer), run("b", rho=0.0), run("c", rho=0.5, alpha_search_steps=2)
    assert torch.equal(weights_of(plain), weights_of(off)) and not torch.equal(weights_of(plain), weights_of(on))
    assert on.state.global_step == 6 and on._xsam_micro_batches == []
    # rho → 0 makes XSAM the plain run: windows of the right micro-batches, gradients counted once.
    tiny = run("d", rho=1e-6, alpha=1.0)
    assert (weights_of(tiny) - weights_of(plain)).abs().max() < 1e-6


# --- what cannot work ------------------------------------------------------------------------------------------------


def build(tmp_path, model=None, cls=XSAMTrainer, optimizers=(None, None), **changes):
    return cls(
        model=Classifier() if model is None else model,
        args=arguments(tmp_path, **changes),
        train_dataset=Points(),
        optimizers=optimizers,
    )


class Lomo(torch.optim.SGD):
    pass


REFUSED = {
    "lomo": (lambda p: build(p, optim="lomo"), "steps inside the backward pass.*adamw_torch"),
    "adalomo": (lambda p: build(p, optim="adalomo"), "steps inside the backward pass"),
    "galore": (
        lambda p: build(p, optim="galore_adamw_layerwise", optim_target_modules=["first"]),
        "inside the backward",
    ),
    "apollo": (
        lambda p: build(p, optim="apollo_adamw_layerwise", optim_target_modules=["first"]),
        "inside the backward",
    ),
    "given": (
        lambda p: build(p, model := Classifier(), optimizers=(Lomo(model.parameters(), lr=0.1), None)),
        "steps inside the backward pass",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_promise_7_optimizers_that_step_in_backward(tmp_path, case):
    made, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=message):
        made(tmp_path)


class Generates(Trainer):
    """Makes its batches with the model, in one of the places where trainers do."""

    where = ""

    def training_step(self, *args, **kwargs):
        self.generate_at("training_step")
        return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        self.generate_at("_prepare_inputs")
        return super()._prepare_inputs(inputs)

    def compute_loss(self, *args, **kwargs):
        self.generate_at("compute_loss")
        return super().compute_loss(*args, **kwargs)

    def generate_at(self, place):
        if place == self.where:
            self.model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2, do_sample=True)


@pytest.mark.parametrize("place", ["training_step", "_prepare_inputs", "compute_loss"])
def test_promise_7_generating_trainers(tmp_path, place):
    class Mine(XSAMMixin, Generates):
        where = place

    def run(name, **changes):
        args = arguments(tmp_path / name, max_steps=2, **changes)
        return Mine(model=tiny_gpt2(), args=args, train_dataset=Tokens(16))

    trained = run("a")
    with pytest.raises(NotImplementedError, match="Mine generates inside its training step.*SFTTrainer"):
        trained.train()
    before = torch.cat([p.detach().reshape(-1) for p in tiny_gpt2().parameters()])
    assert torch.equal(weights_of(trained), before)
    trained.model.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2)  # the refusal does not stay
    run("b", rho=0.0).train()
    Mine.where = ""
    run("c").train()

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            Mine.where = place if state.global_step else ""

    later = run("e")
    later.add_callback(Switch())
    with pytest.raises(NotImplementedError, match="Mine generates inside its training step"):
        later.train()
    assert later.state.global_step == 1
    Mine.where = place
    args = arguments(tmp_path / "d")
    args.use_vllm = True
    with pytest.raises(NotImplementedError, match="generates inside its training step"):
        XSAMTrainer(model=Classifier(), args=args, train_dataset=Points())


@pytest.mark.parametrize(
    "kind, version, scope, message",
    [
        ("FSDP", 1, "update", "FSDP1's flat parameters.*FSDP2"),
        ("FSDP", 2, "micro", "ascent_scope='micro'.*FSDP2"),
        ("MEGATRON_LM", None, "update", "MEGATRON_LM.*DDP or FSDP2"),
        ("XLA", None, "update", "XLA.*DDP or FSDP2"),
        ("FSDP", 2, "update", None),
        ("MULTI_GPU", None, "micro", None),
    ],
)
def test_promise_7_distributed_types(tmp_path, monkeypatch, kind, version, scope, message):
    run = build(tmp_path, rho=0.0)
    plugin = types.SimpleNamespace(fsdp_version=version)
    run.accelerator = types.SimpleNamespace(
        scaler=None,
        distributed_type=DistributedType[kind],
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=None,
    )
    run.args.rho, run.args.ascent_scope = 0.1, scope
    if message is None:
        return check_supported(run, run.xsam_arguments)
    with pytest.raises(NotImplementedError, match=message):
        check_supported(run, run.xsam_arguments)
    run.args.rho = 0.0
    check_supported(run, run.xsam_arguments)


def test_promise_7_micro_scope_under_a_static_graph(tmp_path, monkeypatch):
    run = build(tmp_path, ascent_scope="micro", ddp_static_graph=True)  # one process: there is no DDP
    monkeypatch.setattr(run.accelerator.state, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(NotImplementedError, match="ascent_scope='micro'.*set `ddp_static_graph` to False"):
        check_supported(run, run.xsam_arguments)
    run.args.ascent_scope = "update"
    check_supported(run, run.xsam_arguments)


@pytest.mark.parametrize("part, name", [("cp", "context"), ("sp", "sequence")])
def test_promise_7_parallelism_within_a_batch(tmp_path, monkeypatch, part, name):
    run = build(tmp_path)
    flags = {f"{p}_enabled": p == part for p in ("tp", "cp", "sp")}
    monkeypatch.setattr(type(run.accelerator), "parallelism_config", types.SimpleNamespace(tp_size=1, **flags))
    with pytest.raises(NotImplementedError, match=f"{name} parallelism.*DDP, FSDP2 or tensor parallelism"):
        check_supported(run, run.xsam_arguments)


def test_promise_7_tensor_parallelism_beside_another_one(tmp_path, monkeypatch):
    run = build(tmp_path)
    flags = {"tp_size": 2, "tp_enabled": True, "cp_enabled": False, "sp_enabled": False}
    monkeypatch.setattr(type(run.accelerator), "parallelism_config", types.SimpleNamespace(**flags))
    monkeypatch.setattr(type(run.accelerator), "num_processes", 4)
    with pytest.raises(NotImplementedError, match="by 2 of 4 processes.*`DistributedConfig"):
        check_supported(run, run.xsam_arguments)
    monkeypatch.setattr(compatibility, "_differs", lambda weight: False)
    run.is_distributed_loading_by_transformers = True
    layout = types.SimpleNamespace(fsdp_size=2, ep_size=1)
    run.model.config = types.SimpleNamespace(distributed_config=layout)
    check_supported(run, run.xsam_arguments)
    layout.ep_size = 4
    with pytest.raises(NotImplementedError, match="Experts.*`ep_size`"):
        check_supported(run, run.xsam_arguments)
    monkeypatch.setattr(type(run.accelerator), "num_processes", 8)  # two copies, or two stages of a pipeline
    layout.ep_size = 1
    with pytest.raises(NotImplementedError, match="by 4 of 8 processes"):
        check_supported(run, run.xsam_arguments)


def test_promise_7_models(tmp_path, caplog):
    sparse = Classifier()
    sparse.embedding = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(NotImplementedError, match="'embedding' has sparse gradients.*sparse=False"):
        build(tmp_path, sparse)
    frozen = Classifier()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable weights.*unfreeze"):
        build(tmp_path, frozen)
    build(tmp_path, frozen, rho=0.0)


def test_promise_7_half_precision_weights_are_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(compatibility.logger, "warning", said.append)
    build(tmp_path, Classifier(dtype=torch.float32))
    assert not said
    build(tmp_path, Classifier(dtype=torch.bfloat16))
    assert len(said) == 1 and "dtype=torch.float32" in said[0]


# --- company ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value", [("perturbation", "vasso"), ("perturbation", "fsam"), ("gradient_scale", "slope")]
)
def test_promise_7_what_a_grad_scaler_would_mix_up(tmp_path, monkeypatch, name, value):
    run = train(tmp_path, rho=0.0)
    monkeypatch.setattr(run.accelerator, "scaler", torch.amp.GradScaler("cpu"))
    with pytest.raises(NotImplementedError, match=f"`{name}` '{value}' .* use `bf16=True`"):
        check_supported(run, XSAMArguments(**{name: value}))
    check_supported(run, XSAMArguments())


def test_hyperparameter_search_tunes_rho(tmp_path):
    tried, trained = [], []

    class Seen(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            trained.append((args.rho, torch.cat([p.detach().reshape(-1) for p in model.parameters()])))

    run = XSAMTrainer(
        model_init=lambda: Classifier(),
        args=arguments(tmp_path, eval_strategy="no", rho=0.1, train_sampling_strategy="sequential"),
        train_dataset=Points(),
        eval_dataset=Points(seed=2),
        callbacks=[Seen()],
    )
    choices = iter([0.0, 0.5, 0.05])

    def space(trial):
        trial.suggest_float("rho", 0.0, 1.0)
        tried.append(next(choices))
        return {"rho": tried[-1]}

    run.hyperparameter_search(space, n_trials=3, direction="minimize", backend="optuna")
    assert [rho for rho, _ in trained] == [0.0, 0.5, 0.05]
    for rho, weights in trained:
        alone = train(tmp_path / str(rho), rho=rho, train_sampling_strategy="sequential")
        assert torch.equal(weights, weights_of(alone)), rho


@pytest.mark.parametrize("scope", ["update", "micro"])
def test_a_training_that_was_stopped_between_micro_batches_leaves_nothing_behind(tmp_path, scope):
    class StopInside(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    settings = {"rho": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "ascent_scope": scope}
    stopped = train(tmp_path / "a", callbacks=[StopInside()], **settings)
    assert stopped.state.global_step == 2
    stopped.remove_callback(StopInside)
    fresh = XSAMTrainer(model=Classifier(), args=arguments(tmp_path / "b", **settings), train_dataset=Points())
    fresh.model.load_state_dict(stopped.model.state_dict())
    for run in (stopped, fresh):
        run.optimizer = run.lr_scheduler = None
        run.train()
    assert torch.equal(weights_of(stopped), weights_of(fresh))


def test_promise_7_data_parallel(tmp_path, monkeypatch):
    run = build(tmp_path, rho=0.0)
    monkeypatch.setattr(type(run.args), "n_gpu", 2)
    with pytest.raises(NotImplementedError, match="over 2 devices by DataParallel.*torchrun"):
        check_supported(run, XSAMArguments())


def test_rho_zero_leaves_earlier_searches_alone(tmp_path):
    train(tmp_path, rho=0.5)
    kept = (tmp_path / "xsam_search.jsonl").read_text()
    train(tmp_path, rho=0.0)
    assert (tmp_path / "xsam_search.jsonl").read_text() == kept and kept.count("\n") == 2


def test_training_twice_starts_anew(tmp_path):
    run = train(tmp_path / "a", rho=0.5, train_sampling_strategy="sequential")
    once = weights_of(run).clone()
    run.model.load_state_dict(Classifier().state_dict())
    run.optimizer = run.lr_scheduler = None
    run.train()
    assert torch.equal(weights_of(run), once)
    assert [line["step"] for line in search_lines(run)] == [0, 4]


def test_mixin_goes_with_any_trainer(tmp_path):
    class Scaled(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 3 * super().compute_loss(*args, **kwargs)

    class Mine(XSAMMixin, Scaled):
        pass

    def run(cls, name, **changes):
        made = build(tmp_path / name, cls=cls, rho=0.5, **changes)
        made.train()
        return made

    # Three times the loss at a third of the rate: the same weights, since XSAM's direction does not know scales.
    mine, ours = run(Mine, "a", learning_rate=0.1 / 3), run(XSAMTrainer, "b")
    assert (weights_of(mine) - weights_of(ours)).abs().max() < 1e-6
    assert history(mine, "loss")[0] == pytest.approx(3 * history(ours, "loss")[0], rel=1e-4)


@pytest.mark.parametrize("pair", list(itertools.product(["linear", "cosine"], [0.0, 0.05])))
def test_clipping_and_schedules_stay_the_trainers(tmp_path, pair):
    schedule, clip = pair
    settings = {"lr_scheduler_type": schedule, "max_grad_norm": clip}
    plain, ours = (train(tmp_path / cls.__name__, trainer=cls, **settings) for cls in (Trainer, XSAMTrainer))
    assert history(plain, "learning_rate") == history(ours, "learning_rate")
    start = torch.cat([p.detach().reshape(-1) for p in Classifier().parameters()])
    if clip:
        assert (
            (weights_of(ours) - start).norm()
            <= 0.1 * clip * 8 * 1.001
            < (weights_of(train(tmp_path / "x")) - start).norm()
        )


# --- which weights climb ---------------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """Logits; its loss is weighted by tensors outside of it."""

    def __init__(self):
        super().__init__()
        self.net = Classifier(dtype=torch.float64)

    def forward(self, x, labels=None):
        return {"logits": self.net(x)["logits"]}


@pytest.mark.parametrize("method", [{"alpha": 1.0}, {}, {"ascent_steps": 2, "alpha": 1.7}])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_weights_outside_the_model_climb_too(tmp_path, kind, accumulation, method):
    data, model = Points(32, torch.float64), Weighted()
    s = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    s = nn.Parameter(s.detach().clone()) if kind == "parameter" else s

    def loss(outputs, labels, num_items_in_batch=None):
        ce, size = nn.functional.cross_entropy(outputs["logits"], labels), outputs["logits"].square().mean()
        return (torch.exp(-s[0]) * ce + torch.exp(-s[1]) * size + s.sum()) / accumulation

    theta = torch.cat([p.detach().reshape(-1) for p in [*model.parameters(), s]]).numpy()
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [s], "lr": 0.1}], lr=0.1)
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}

    class Clear(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            s.grad = None  # the Trainer clears the model's gradients only

    run = XSAMTrainer(
        model=model,
        args=arguments(tmp_path, rho=0.5, train_sampling_strategy="sequential", **settings, **method),
        train_dataset=data,
        compute_loss_func=loss,
        optimizers=(optimizer, None),
        callbacks=[Clear()],
    )
    run.train()
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)

    def parts(t, x, y):
        logits = network.forward(t[:-2], x)[0] @ network.unpack(t[:-2])[2].T + network.unpack(t[:-2])[3]
        return network.loss(t[:-2], x, y), (logits**2).mean()

    def value(t, x, y):
        ce, size = parts(t, x, y)
        return np.exp(-t[-2]) * ce + np.exp(-t[-1]) * size + t[-2] + t[-1]

    def gradient(t, x, y):  # by differences: exact enough for 1e-6, and it knows nothing of autograd
        steps = 1e-6 * np.eye(len(t))
        return np.array([(value(t + e, x, y) - value(t - e, x, y)) / 2e-6 for e in steps])

    found = 1.0
    for i in range(8):
        x, y = data.x[8 * (i % 4) :][:8].numpy(), data.y[8 * (i % 4) :][:8].numpy()
        fixed = method.get("alpha", None if i % 4 == 0 else found)
        direction, found, _ = oracle.xsam_direction(
            theta,
            lambda t, x=x, y=y: value(t, x, y),
            lambda t, x=x, y=y: gradient(t, x, y),
            0.5,
            k=method.get("ascent_steps", 1),
            alpha=fixed,
        )
        theta = theta - 0.1 * direction
    assert np.abs(np.concatenate([weights_of(run).numpy(), s.detach().numpy()]) - theta).max() <= 1e-6


@pytest.mark.parametrize("scope", ["update", "micro"])
def test_only_the_weights_that_the_optimizer_steps_climb(tmp_path, scope):
    """A body outside of the optimizer is as good as frozen; what it gets for a gradient is that of the last pass."""
    seen = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0 and model.first.weight.requires_grad:
                seen["gradient"] = model.first.weight.grad.clone()

    def run(name, frozen, **method):
        model = Classifier()
        model.first.requires_grad_(not frozen)
        head = torch.optim.SGD(model.second.parameters(), lr=0.1)
        settings = arguments(
            tmp_path / name, rho=0.5, train_sampling_strategy="sequential", ascent_scope=scope, **method
        )
        made = XSAMTrainer(
            model=model, args=settings, train_dataset=Points(), optimizers=(head, None), callbacks=[Watch()]
        )
        made.train()
        return made

    outside, frozen = run("a", False), run("b", True)
    assert torch.equal(weights_of(outside), weights_of(frozen))
    for key in ("xsam/alpha", "xsam/sharpness", "xsam/grad_norm_last"):
        assert history(outside, key) == history(frozen, key)
    assert torch.equal(outside.model.first.weight, Classifier().first.weight)
    everything = train(tmp_path / "c", rho=0.5, train_sampling_strategy="sequential", ascent_scope=scope)
    assert history(everything, "xsam/sharpness")[0] > history(outside, "xsam/sharpness")[0]
    # One pass's gradient, and not the sum of two: at the moved head.
    model, data = Classifier(), Points()
    x, y = data.x[:8], data.y[:8]
    model(x, y)["loss"].backward()
    g = [model.second.weight.grad, model.second.bias.grad]
    size = torch.cat([part.reshape(-1) for part in g]).norm()
    with torch.no_grad():
        model.second.weight.add_(0.5 * g[0] / size)
        model.second.bias.add_(0.5 * g[1] / size)
    model.zero_grad()
    model(x, y)["loss"].backward()
    assert torch.allclose(seen["gradient"], model.first.weight.grad, atol=1e-6)


def test_an_optimizer_of_other_weights_is_refused(tmp_path):
    other = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    run = build(tmp_path, optimizers=(other, None))
    with pytest.raises(ValueError, match="steps none of the model's trainable weights.*`model.parameters\\(\\)`"):
        run.train()


class Several(torch.optim.Optimizer):
    """Deals the weights out to two optimizers, as factories of Muon's kind do."""

    def __init__(self, model, lr):
        matrices = [p for p in model.parameters() if p.ndim > 1]
        self.inner = [
            torch.optim.SGD(matrices, lr=lr),
            torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=lr),
        ]
        super().__init__(matrices, {"lr": lr})  # a list that is not the whole

    def step(self, closure=None):
        for optimizer in self.inner:
            optimizer.step()


@pytest.mark.parametrize("factory", ["function", "object"])
def test_a_factory_that_makes_several_optimizers(tmp_path, factory):
    class Factory:
        def __call__(self, model, **kwargs):
            return Several(model, **kwargs)

    run = XSAMTrainer(
        model=Classifier(),
        args=arguments(tmp_path / "a", rho=0.5),
        train_dataset=Points(),
        optimizer_cls_and_kwargs=(Factory if factory == "object" else lambda: Several, {"lr": 0.1}),
    )
    run.train()
    alone = train(tmp_path / "b", rho=0.5)
    assert torch.equal(weights_of(run), weights_of(alone))


@pytest.mark.parametrize("perturbation", ["vasso", "fsam"])
def test_layers_that_are_trained_in_turn_keep_their_own_averages(tmp_path, perturbation):
    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.first.requires_grad_(state.global_step // 2 % 2 == 0)
            model.second.requires_grad_(state.global_step // 2 % 2 == 1)

    settings = {"perturbation": perturbation, "rho": 0.5, "alpha": 1.0, "callbacks": [Turns()], "train_sampling_strategy": "sequential"}  # fmt: skip
    whole = train(tmp_path, Classifier(dtype=torch.float64), Points(32, torch.float64), save_strategy="steps", save_steps=1, **settings)  # fmt: skip
    # By hand: two models, each of which sees its own updates only, and the other's weights.
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
    theta = torch.cat([p.detach().reshape(-1) for p in Classifier(dtype=torch.float64).parameters()]).numpy()
    cut = HIDDEN * INPUTS + HIDDEN
    methods = [oracle.Method(perturbation), oracle.Method(perturbation)]
    data = Points(32, torch.float64)
    for step in range(8):
        x, y = data.x[8 * (step % 4) :][:8].numpy(), data.y[8 * (step % 4) :][:8].numpy()
        turn = step // 2 % 2
        mine = slice(cut, None) if turn else slice(0, cut)

        def place(part, mine=mine):
            full = theta.copy()
            full[mine] = part
            return full

        direction = methods[turn].update(
            theta[mine],
            lambda t, x=x, y=y, place=place: network.loss(place(t), x, y),
            lambda t, x=x, y=y, place=place, mine=mine: network.gradient(place(t), x, y)[mine],
            0.5,
        )
        theta[mine] = theta[mine] - 0.1 * direction
    assert np.abs(weights_of(whole).numpy() - theta).max() <= 1e-9
    again = train(tmp_path / "again", Classifier(dtype=torch.float64), Points(32, torch.float64), resume=str(tmp_path / "checkpoint-3"), **settings)  # fmt: skip
    assert torch.equal(weights_of(again), weights_of(whole))


# --- what is heard of the later passes, and when XSAM is not there at all ----------------------------------------------


class Logs:
    """Logs terms of its loss, and counts them in attributes of its own."""

    first_pass_counters = (*XSAMTrainer.first_pass_counters, "seen")
    seen = 0
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.seen += 1
        self.calls += 1
        self.log({"ce": float(outputs["loss"])})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


@pytest.mark.parametrize("method", [{"alpha": 1.0}, {}, {"ascent_scope": "micro"}, {"sharpness_every": 2}])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_compute_loss_logs_is_the_first_passs(tmp_path, method, accumulation):
    plain, ours = type("Plain", (Logs, Trainer), {}), type("Ours", (Logs, XSAMTrainer), {})
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    settings |= {"train_sampling_strategy": "sequential"}
    theirs = train(tmp_path / "a", trainer=plain, **settings)
    mine = train(tmp_path / "b", trainer=ours, rho=0.5, **settings, **method)
    assert len(history(mine, "ce")) == len(history(theirs, "ce")) == 8 * accumulation
    assert history(mine, "ce")[:accumulation] == history(theirs, "ce")[:accumulation]
    # What is named keeps the first passes' count, what is not counts all of them.
    assert mine.seen == theirs.seen == 8 * accumulation < mine.calls


def test_a_training_step_that_passes_xsam_by_is_warned_about(tmp_path, monkeypatch):
    from xsam_hf.trainer import trainer

    class Own:
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    said = []
    monkeypatch.setattr(trainer.logger, "warning", said.append)
    ours = type("Ours", (Own, XSAMTrainer), {})
    run = train(tmp_path / "a", trainer=ours, rho=0.5)
    assert len(said) == 1 and "No pass went through XSAM: the `training_step` of Ours" in said[0]
    assert not any(key.startswith("xsam/") for entry in run.state.log_history for key in entry)
    for rare in ({}, {"logging_steps": 100}, {"logging_strategy": "no"}):  # a second run, and runs that log no loss
        said.clear()
        train(tmp_path / "a", trainer=ours, rho=0.5, **rare)
        assert len(said) == 1
    said.clear()
    train(tmp_path / "b", trainer=ours, rho=0.0)
    train(tmp_path / "c", rho=0.5, sharpness_start=0.8)
    # In front of the other's, the mixin's own passes run through it.
    behind = type("Behind", (XSAMMixin, type("Theirs", (Own, Trainer), {})), {})
    made = behind(model=Classifier(), args=arguments(tmp_path / "d", rho=0.5), train_dataset=Points())
    made.train()
    train(tmp_path / "f", rho=0.5, save_strategy="epoch")
    train(tmp_path / "f", rho=0.5, save_strategy="epoch", resume=True)  # at its end: there is nothing to do

    class Late(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.rho = 0.0

        def on_step_end(self, args, state, control, **kwargs):
            args.rho = 0.5

    train(tmp_path / "g", rho=0.5, callbacks=[Late()])
    assert not said and (weights_of(made) - weights_of(train(tmp_path / "e", rho=0.5))).abs().max() <= 1e-7


def test_promise_7_a_step_in_a_hook(tmp_path):
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            pass

    model = Classifier()

    def step(weight):
        with torch.no_grad():
            weight.sub_(weight.grad, alpha=0.1)
        weight.grad = None

    handles = [weight.register_post_accumulate_grad_hook(step) for weight in model.parameters()]
    with pytest.raises(
        NotImplementedError, match="'first.weight' has a hook that runs as soon as its gradient is there"
    ):
        build(tmp_path, model, optimizers=(Idle(model.parameters(), lr=0.1), None))
    build(tmp_path, model, rho=0.0)
    for handle in handles:
        handle.remove()
    build(tmp_path, model)


def test_promise_1_rho_zero_leaves_the_list_of_callbacks_as_it_is(tmp_path):
    def kinds(run):
        return [type(callback).__name__ for callback in run.callback_handler.callbacks]

    plain, off, on = (build(tmp_path, cls=cls, **rho) for cls, rho in ((XSAMTrainer, {"rho": 0.0}), (XSAMTrainer, {"rho": 0.0}), (XSAMTrainer, {})))  # fmt: skip
    plain = Trainer(model=Classifier(), args=on.args, train_dataset=Points())
    assert kinds(off) == kinds(plain) and kinds(on) == [*kinds(plain), "XSAMCallback"]
    on.args.rho = 0.0
    on.train()
    assert kinds(on) == kinds(plain)
    on.args.rho = 0.5
    on.train()
    assert kinds(on) == [*kinds(plain), "XSAMCallback"]


def test_rho_may_be_switched_on_while_training(tmp_path):
    class SwitchOn(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.rho = 0.5 if state.global_step >= 4 else 0.0

    settings = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "sequential"}
    switched = train(tmp_path / "a", rho=0.0, callbacks=[SwitchOn()], **settings)
    late = train(tmp_path / "b", rho=0.5, sharpness_start=0.5, train_sampling_strategy="sequential")
    assert torch.equal(weights_of(switched), weights_of(late))
    again = train(
        tmp_path / "a", rho=0.0, callbacks=[SwitchOn()], resume=str(tmp_path / "a" / "checkpoint-6"), **settings
    )
    assert torch.equal(weights_of(again), weights_of(switched))


@pytest.mark.parametrize("method", [{"perturbation": "vasso"}, {}])
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end"])
def test_a_checkpoint_just_in_time_resumes_exactly(tmp_path, event, method):
    settings = {"rho": 0.5, "optim": "adamw_torch", "learning_rate": 0.01, "train_sampling_strategy": "sequential"}
    settings |= {"alpha_search_steps": 1, **method}
    whole = train(tmp_path / "whole", **settings)

    class Ask(TrainerCallback):
        def ask(self, args, state, control, **kwargs):
            if state.global_step == 2:
                manager.is_checkpoint_requested = True

    ask = Ask()
    setattr(ask, event, ask.ask)
    run = XSAMTrainer(
        model=Classifier(), args=arguments(tmp_path, enable_jit_checkpoint=True, **settings), train_dataset=Points()
    )
    manager = next(c.jit_manager for c in run.callback_handler.callbacks if getattr(c, "jit_manager", None))
    run.callback_handler.callbacks.insert(0, ask)  # before the one that looks
    run.train()
    assert run.state.global_step < 8
    again = train(tmp_path, resume=True, **settings)
    assert again.state.global_step == 8
    assert torch.equal(weights_of(again), weights_of(whole))


def test_a_checkpoint_between_gradient_and_step_is_refused(tmp_path):
    class Save(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            run._save_checkpoint(run.model, trial=None)

    run = build(tmp_path, rho=0.5)
    run.add_callback(Save())
    with pytest.raises(RuntimeError, match="would not resume exactly: save it in `on_step_end`"):
        run.train()


def test_a_plain_update_did_not_fall_back():
    w, state = nn.Parameter(torch.ones(2)), XSAMState()

    def gradient():
        (w * math.nan).sum().backward()
        return torch.tensor(math.nan)

    update = xsam_gradient([w], gradient, gradient, XSAMArguments(rho=0.0), state)
    assert update.fell_back.dtype == torch.bool and not update.fell_back and update.grad_norm_first.isnan()
