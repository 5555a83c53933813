"""Promise 8: every pass of an update is the same pass, whatever a model, a loss or a batch keeps between passes."""

import copy
import functools
import random
from collections import deque

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from toys import CLASSES, HIDDEN, INPUTS, Classifier, Points, arguments, build, train, weights_of
from transformers import Trainer, TrainerCallback

from xsam_hf import XSAMArguments, XSAMMixin, XSAMState, XSAMTrainer, module_state, records, xsam_gradient
from xsam_hf.module_state import StateFollower
from xsam_hf.trainer.micro_batch import copy_of


METHODS = {"search": {}, "sam": {"alpha": 1.0}, "three steps": {"ascent_steps": 3, "alpha": 1.7}}
LR = 0.1


class Net(nn.Module):
    """A tanh network in float64; subclasses keep something between passes, and let the loss depend on it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(INPUTS, HIDDEN, dtype=torch.float64)
        self.second = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)

    def logits(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x, labels=None):
        logits = self.logits(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def by_hand(model, data, rho=0.5, epochs=2, batch=8, loss_of=None, ascent_steps=1, alpha=None):
    """
    The oracle's training of a model that keeps something: each pass runs on a copy of the model as it was before the update,
    and one more pass, at θ_0, on the model itself. Returns the α of every update.
    """
    loss_of = loss_of or (lambda m, x, y: m(x, labels=y)["loss"])
    found, used = 1.0, []
    for i in range(0, epochs * len(data), batch):
        start = i % len(data)
        x, y = data.x[start : start + batch], data.y[start : start + batch]
        before = copy.deepcopy(model)

        def at(theta, before=before):
            copied = copy.deepcopy(before)
            weights = [p for p in copied.parameters() if p.requires_grad]
            torch.nn.utils.vector_to_parameters(torch.from_numpy(theta.copy()), weights)
            return copied, weights

        def loss(theta, x=x, y=y, at=at):
            return float(loss_of(at(theta)[0], x.clone(), y.clone()).detach())

        def gradient(theta, x=x, y=y, at=at):
            copied, weights = at(theta)
            loss_of(copied, x.clone(), y.clone()).backward()
            return torch.cat([p.grad.reshape(-1) for p in weights]).numpy()

        weights = [p for p in model.parameters() if p.requires_grad]
        theta = torch.cat([p.detach().reshape(-1) for p in weights]).numpy()
        wanted = alpha if alpha is not None else (None if start == 0 else found)
        direction, found, _ = oracle.xsam_direction(theta, loss, gradient, rho, k=ascent_steps, alpha=wanted)
        used.append(found)
        loss_of(model, x.clone(), y.clone())
        torch.nn.utils.vector_to_parameters(torch.from_numpy(theta - LR * direction), weights)
    return used


class Whole(nn.Module):
    """Counts in whole numbers, and the loss goes by the counts."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("seen", torch.zeros(CLASSES, dtype=torch.long))

    def forward(self, x, labels=None):
        logits = self.net.logits(x) + 0.05 * self.seen
        self.seen += torch.bincount(logits.argmax(-1), minlength=CLASSES)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Keeps(Net):
    """Takes off a running mean of its logits, kept in one way or another."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        zeros = torch.zeros(CLASSES, dtype=torch.float64)
        if how in ("in place", "assigned", "through data", "data anew"):
            self.register_buffer("centre", zeros)
        elif how == "not persistent":
            self.register_buffer("centre", zeros, persistent=False)
        elif how in ("frozen", "frozen through data"):
            self.centre = nn.Parameter(zeros, requires_grad=False)
        elif how == "grows":
            self.register_buffer("centre", torch.zeros(0, CLASSES, dtype=torch.float64))
        elif how == "attribute":
            self.centre = zeros
        elif how == "attribute that begins as nothing":
            self.centre = None
        elif how == "in a child's buffer":
            self.child = nn.Module()
            self.child.register_buffer("centre", zeros)

    def mean(self):
        if self.how == "appears" and "centre" not in self._buffers:
            return torch.zeros(CLASSES, dtype=torch.float64)
        if self.how == "in a child's buffer":
            return self.child.centre
        if self.how == "grows":
            return self.centre[-4:].sum(0) / 4
        if self.centre is None:
            return torch.zeros(CLASSES, dtype=torch.float64)
        return self.centre

    def forward(self, x, labels=None):
        logits = self.logits(x)
        mean = self.mean()
        loss = nn.functional.cross_entropy(logits - 1.5 * mean, labels)
        with torch.no_grad():
            new = 0.7 * mean + 0.3 * logits.mean(0)
            if self.how in ("in place", "not persistent", "frozen"):
                self.centre.copy_(new)
            elif self.how in ("through data", "frozen through data"):
                self.centre.data.copy_(new)
            elif self.how == "data anew":
                self.centre.data = new
            elif self.how == "in a child's buffer":
                self.child.centre = new
            elif self.how == "grows":
                self.centre = torch.cat([self.centre, logits.mean(0, keepdim=True)])
            elif self.how == "appears" and "centre" not in self._buffers:
                self.register_buffer("centre", new)
            else:
                self.centre = new
        return {"loss": loss, "logits": logits}


class Elsewhere(Net):
    """The same, in a place that is easily passed over."""

    def __init__(self, how):
        super().__init__()
        self.how, zeros = how, torch.zeros(CLASSES, dtype=torch.float64)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        if how == "attribute of torch's own module":
            self.second.kept = zeros
        elif how == "module in a list":
            self.hidden = [Holds(zeros)]
        elif how == "tuple":
            self.kept = (zeros,)
        elif how == "through data, later":
            self.register_buffer("kept", zeros)
        elif how == "nothing, until later":
            self.kept = None

    def place(self):
        if self.how == "module made in the first pass" and not hasattr(self, "made"):
            self.made = Holds(torch.zeros(CLASSES, dtype=torch.float64))
        return {"attribute of torch's own module": self.second, "module in a list": getattr(self, "hidden", [None])[0],
                "module made in the first pass": getattr(self, "made", None)}.get(self.how, self)  # fmt: skip

    def forward(self, x, labels=None):
        self.passes += 1
        logits, place = self.logits(x), self.place()
        kept = place.kept[0] if self.how == "tuple" else place.kept
        mean = torch.zeros(CLASSES, dtype=torch.float64) if kept is None else kept
        new = 0.7 * mean + 0.3 * logits.detach().mean(0)
        if not self.how.endswith("later") or self.passes > 4:
            if self.how == "through data, later":
                loss = nn.functional.cross_entropy(logits - 1.5 * mean.clone(), labels)
                self.kept.data.copy_(new)
                return {"loss": loss}
            place.kept = (new,) if self.how == "tuple" else new
        return {"loss": nn.functional.cross_entropy(logits - 1.5 * mean, labels), "logits": logits}


class Holds(nn.Module):
    def __init__(self, kept):
        super().__init__()
        self.register_buffer("kept", kept)


class Turns(Net):
    """Two modules of one name, in turn."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(HIDDEN, CLASSES, dtype=torch.float64)

    def forward(self, x, labels=None):
        loss = nn.functional.cross_entropy(self.logits(x), labels)
        self.second, self.other = self.other, self.second
        return {"loss": loss}


class Alternates(Net):
    """A buffer that is there in every other pass."""

    def forward(self, x, labels=None):
        if there := "flag" in self._buffers:
            del self.flag
        else:
            self.register_buffer("flag", torch.ones(1))
        logits = self.logits(x) * (0.5 if there else 1.5)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Teacher(Net):
    """Pulls towards a frozen copy of itself that follows in every pass."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(nn.Sequential(self.first, nn.Tanh(), self.second)).requires_grad_(False)

    def forward(self, x, labels=None):
        logits = self.logits(x)
        loss = nn.functional.cross_entropy(logits, labels) + (logits - self.teacher(x)).square().mean()
        with torch.no_grad():
            for mine, its in zip((self.first, self.second), (self.teacher[0], self.teacher[2]), strict=True):
                its.weight.data.lerp_(mine.weight, 0.3)
                its.bias.data.lerp_(mine.bias, 0.3)
        return {"loss": loss, "logits": logits}


class OwnGenerator(Net):
    """Adds noise of a generator of its own."""

    def __init__(self, kind):
        super().__init__()
        self.g = {"torch": torch.Generator().manual_seed(3), "numpy": np.random.default_rng(3), "old numpy": np.random.RandomState(3), "python": random.Random(3)}[kind]  # fmt: skip

    def forward(self, x, labels=None):
        if isinstance(self.g, torch.Generator):
            noise = torch.randn(x.shape, generator=self.g, dtype=x.dtype)
        elif isinstance(self.g, random.Random):
            noise = torch.tensor([self.g.gauss(0, 1) for _ in range(x.numel())], dtype=x.dtype).view(x.shape)
        else:
            noise = torch.from_numpy(self.g.standard_normal(tuple(x.shape)))
        return super().forward(x + 0.5 * noise, labels)


MODELS = {
    **{how: functools.partial(Keeps, how) for how in (
        "in place", "assigned", "appears", "grows", "not persistent", "through data", "data anew", "frozen",
        "frozen through data", "attribute", "attribute that begins as nothing", "in a child's buffer",
    ) if how != "assigned"},
    "assigned": lambda: Keeps("assigned"),
    "whole numbers": lambda: Whole(Net()),
    **{how: functools.partial(Elsewhere, how) for how in (
        "attribute of torch's own module", "module in a list", "module made in the first pass", "tuple",
        "through data, later", "nothing, until later",
    )},
    "alternates": Alternates,
    "teacher": Teacher,
    **{f"{kind} generator": functools.partial(OwnGenerator, kind) for kind in ("torch", "numpy", "old numpy", "python")},
}  # fmt: skip


def state_of(model):
    kept = {name: value.clone() for name, value in model.named_buffers()}
    kept |= {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    if isinstance(getattr(model, "centre", None), torch.Tensor):
        kept["centre"] = model.centre.clone()
    if isinstance(getattr(model, "g", None), torch.Generator):
        kept["g"] = model.g.get_state()
    return kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_every_pass_starts_from_the_state_before_the_first(tmp_path, name, method):
    data, model, expected = Points(32, torch.float64), MODELS[name](), MODELS[name]()
    run = train(tmp_path, model, data, rho=0.5, train_sampling_strategy="sequential", **METHODS[method])
    alphas = by_hand(expected, data, **METHODS[method])
    assert (weights_of(run) - weights_of(type("", (), {"model": expected}))).abs().max() <= 1e-9
    assert [entry["xsam/alpha"] for entry in run.state.log_history if "xsam/alpha" in entry] == pytest.approx(alphas)
    # Afterwards it is bit for bit what the first pass left, as far as the weights are.
    ours, theirs = state_of(model), state_of(expected)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.shape == theirs[key].shape and value.dtype == theirs[key].dtype, key
        assert (value.double() - theirs[key].double()).abs().max() <= 1e-9, key


def test_modules_that_take_turns(tmp_path):
    class Indexed(Turns):
        def __init__(self):
            super().__init__()
            self.register_buffer("turn", torch.zeros((), dtype=torch.long))

        def forward(self, x, labels=None):
            last = (self.second, self.other)[int(self.turn) % 2]
            self.turn += 1
            return {"loss": nn.functional.cross_entropy(last(torch.tanh(self.first(x))), labels)}

    for method in ({}, {"ascent_steps": 2, "alpha": 0.6}):
        data = Points(32, torch.float64)
        one, two = (train(tmp_path, model(), data, rho=0.5, **method) for model in (Turns, Indexed))
        assert torch.equal(weights_of(one), weights_of(two)) and one.state.global_step == 8


@pytest.mark.parametrize("how", ["detached", "data", "buffer", "in every pass"])
def test_a_view_of_a_trained_weight_moves_with_it(tmp_path, how):
    class Views(Net):
        def __init__(self, how):
            super().__init__()
            self.how, weight = how, self.second.weight
            if how == "buffer":
                self.register_buffer("view", weight.detach(), persistent=False)
            else:
                self.view = weight.data if how == "data" else weight.detach()

        def forward(self, x, labels=None):
            if self.how == "in every pass":
                self.view = self.second.weight.detach()
            view = self.second.weight.detach() if self.how == "none" else self.view
            loss = nn.functional.cross_entropy(self.logits(x), labels)
            return {"loss": loss + (torch.tanh(self.first(x)) @ view.T).square().mean()}

    data = Points(32, torch.float64)
    kept, made = (train(tmp_path, Views(each), data, rho=0.5, ascent_steps=2) for each in (how, "none"))
    assert torch.equal(weights_of(kept), weights_of(made))


@pytest.mark.parametrize("through_data", [False, True])
def test_a_teacher_that_nobody_froze_is_followed(tmp_path, through_data):
    class Taught(XSAMTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            out = model(**inputs)
            with torch.no_grad():
                for old, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
                    (old.data if through_data else old).lerp_(new, 0.3)
                wanted = self.teacher(**inputs)["logits"]
            return out["loss"] + (out["logits"] - wanted).square().mean()

    def run(frozen):
        made = build(tmp_path, Net(), Points(32, torch.float64), Taught, rho=0.5, ascent_steps=2)
        made.teacher = Net().requires_grad_(not frozen)
        made.train()
        return torch.cat([weights_of(made), *(p.detach().reshape(-1) for p in made.teacher.parameters())])

    assert torch.equal(run(frozen=True), run(frozen=False))


@pytest.mark.parametrize("name", ["assigned", "whole numbers", "torch generator", "alternates"])
def test_without_it_the_update_would_be_another(name):
    """The oracle with passes that follow one another, on the model itself, is far from the oracle above."""
    data, model, drifting = Points(8, torch.float64), MODELS[name](), MODELS[name]()
    by_hand(model, data, epochs=1, alpha=1.0)
    weights = [p for p in drifting.parameters() if p.requires_grad]
    theta = torch.cat([p.detach().reshape(-1) for p in weights]).numpy()

    def gradient(vector):
        torch.nn.utils.vector_to_parameters(torch.from_numpy(vector.copy()), weights)
        drifting.zero_grad()
        drifting(data.x, labels=data.y)["loss"].backward()
        return torch.cat([p.grad.reshape(-1) for p in weights]).numpy().copy()

    direction, _, _ = oracle.xsam_direction(theta, None, gradient, 0.5, alpha=1.0)
    trained = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]).numpy()
    assert np.abs(trained - (theta - LR * direction)).max() > 1e-4


@pytest.mark.parametrize("name", ["assigned", "whole numbers", "teacher", "grows", "torch generator"])
def test_with_rho_at_zero_and_the_plain_trainer_the_same_state_is_left(tmp_path, name):
    data = Points(32, torch.float64)
    plain = train(tmp_path / "a", MODELS[name](), data, trainer=Trainer)
    off = train(tmp_path / "b", MODELS[name](), data, rho=0.0)
    tiny = train(tmp_path / "c", MODELS[name](), data, rho=1e-9, alpha=1.0)
    for key, value in state_of(plain.model).items():
        assert torch.equal(value, state_of(off.model)[key]), key
        assert (value.double() - state_of(tiny.model)[key].double()).abs().max() <= 1e-6, key


@pytest.mark.parametrize("scope", ["update", "micro"])
def test_with_accumulation_every_micro_batch_has_its_own_beginning(tmp_path, scope):
    # Two micro-batches of one update: the second starts from what the first one's first pass left, in all of its passes.
    class Watched(Keeps):
        def __init__(self):
            super().__init__("assigned")
            self.starts = []

        def forward(self, x, labels=None):
            self.starts.append((float(x.sum()), self.centre.tolist()))
            return super().forward(x, labels)

    run = train(tmp_path, Watched(), Points(16, torch.float64), rho=0.5, max_steps=1, ascent_scope=scope, ascent_steps=2,
                per_device_train_batch_size=8, gradient_accumulation_steps=2)  # fmt: skip
    starts = {key: [centre for k, centre in run.model.starts if k == key] for key, _ in run.model.starts}
    assert len(starts) == 2 and {len(seen) for seen in starts.values()} <= {3, 3 + 21}
    for seen in starts.values():
        assert all(centre == seen[0] for centre in seen)
    first, second = (seen[0] for seen in starts.values())
    assert first == [0.0] * CLASSES != second


class Centring(nn.Module):
    """A loss with a running mean of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(CLASSES, dtype=torch.float64))

    def forward(self, outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"]
        loss = nn.functional.cross_entropy(logits - 1.5 * self.centre, labels)
        with torch.no_grad():
            self.centre = 0.7 * self.centre + 0.3 * logits.mean(0)
        return loss


class CentringObject:
    """The same, and no module."""

    def __init__(self):
        self.centre = torch.zeros(CLASSES, dtype=torch.float64)

    def __call__(self, outputs, labels, num_items_in_batch=None):
        return Centring.forward(self, outputs, labels)


class Delegates:
    """No module, and has one."""

    def __init__(self, loss):
        self.losses = {"first": loss}

    def __call__(self, outputs, labels, num_items_in_batch=None):
        return self.losses["first"](outputs, labels)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.loss = Net(), Centring()

    def forward(self, x, labels=None):
        return {"loss": self.loss(self.net(x, labels), labels)}


@pytest.mark.parametrize("how", [
    "module", "method", "partial", "partial's argument", "object", "object with a module", "closure", "of the trainer",
    "the trainer's tensor",
])  # fmt: skip
def test_what_a_loss_keeps_is_put_back_too(tmp_path, how):
    class Bare(Net):
        def forward(self, x, labels=None):
            return {"logits": self.logits(x)}

    class Own(XSAMTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = self.criterion if how == "of the trainer" else functools.partial(Centring.forward, self)
            return loss({"logits": model.logits(inputs["x"])}, inputs["labels"])

    loss = CentringObject() if how == "object" else Centring()
    given = {
        "method": loss.forward if how != "object" else None,
        "partial": functools.partial(loss),
        "partial's argument": functools.partial(Centring.forward, loss),
        "object with a module": Delegates(loss),
        "closure": lambda outputs, labels, num_items_in_batch=None: loss(outputs, labels),
    }.get(how, loss)
    own = how in ("of the trainer", "the trainer's tensor")
    data = Points(32, torch.float64)
    run = (Own if own else XSAMTrainer)(
        model=Bare(),
        args=arguments(tmp_path, rho=0.5, train_sampling_strategy="sequential"),
        train_dataset=data,
        compute_loss_func=None if own else given,
    )
    run.criterion = loss
    run.centre = torch.zeros(CLASSES, dtype=torch.float64)
    run.train()
    expected = Both()
    by_hand(expected, data)
    parts = torch.cat([p.detach().reshape(-1) for p in expected.parameters()])
    assert (weights_of(run) - parts).abs().max() <= 1e-9
    centre = run.centre if how == "the trainer's tensor" else loss.centre
    assert (centre - expected.loss.centre).abs().max() <= 1e-9 and centre.abs().max() > 1e-3


def test_buffers_are_copied_and_put_back_by_one_call_a_dtype(monkeypatch):
    """On a GPU each call of a copy is a kernel to launch."""
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(20)])
    follower, calls = StateFollower([model]), []
    copy = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, contents: (calls.append(len(to)), copy(to, contents)))
    before = follower.capture()
    assert sorted(calls) == [20, 40]  # num_batches_tracked; running_mean and running_var
    model(torch.randn(8, 3))
    follower.learn(before)
    calls.clear()
    before.restore()
    assert sorted(calls) == [20, 40]
    assert all(module.num_batches_tracked == 0 and not module.running_mean.any() for module in model)


# --- large tensors, and what is refused


def test_large_constants_are_not_copied_after_the_first_update(monkeypatch):
    model = Net()
    model.register_buffer("table", torch.zeros(2**16, dtype=torch.float64))  # 512 KiB
    model.register_buffer("count", torch.zeros(1))
    model.base = nn.Linear(300, 300).requires_grad_(False)
    follower, copied = StateFollower([model]), []
    copy = torch._foreach_copy_

    def counted(to, contents):
        copied.extend(part.numel() for part in contents)
        copy(to, contents)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    for update in range(3):
        copied.clear()
        before = follower.capture()
        model.count += 1
        follower.learn(before)
        assert before.complete
        assert 2**16 not in copied and 300 * 300 not in copied, update  # more than the trained weights together
        assert 1 in copied
        model.count += 5
        before.restore()
        assert model.count.item() == update
        model.count += 1


class Late(Net):
    """Writes into a large buffer, from the third update on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(2**14, dtype=torch.float64))
        self.on = False

    def forward(self, x, labels=None):
        logits = self.logits(x) + self.table[0]
        loss = nn.functional.cross_entropy(logits * (1 + self.table[1]), labels)
        if self.on:
            with torch.no_grad():
                self.table += 0.1
        return {"loss": loss, "logits": logits}


def test_a_large_buffer_that_begins_to_move_makes_that_update_a_plain_one(tmp_path):
    class SwitchOn(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.on = state.global_step >= 2

    run = train(tmp_path, Late(), Points(32, torch.float64), rho=0.5, callbacks=[SwitchOn()])
    assert [entry["xsam/passes"] for entry in run.state.log_history if "xsam/passes" in entry] == [
        2,
        2,
        1,
        2,
        2,
        2,
        2,
        2,
    ]
    assert run.model.table[0].item() == pytest.approx(0.6)  # once in each of six updates


class ThroughData(Net):
    """Writes into a large frozen weight, from the second update on, where PyTorch's count of writes leaves it out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2**14, dtype=torch.float64), requires_grad=False)
        self.on = False

    def forward(self, x, labels=None):
        loss = nn.functional.cross_entropy(self.logits(x) * (1 + self.table[0]), labels)
        if self.on:
            self.table.data.add_(0.1)
        return {"loss": loss}


def test_a_large_tensor_written_through_data_from_the_second_update_on_is_seen_there(tmp_path):
    class SwitchOn(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.on = state.global_step >= 1

    data = Points(32, torch.float64)
    run = train(tmp_path, ThroughData(), data, rho=0.5, alpha=1.0, callbacks=[SwitchOn()])
    passes = [entry["xsam/passes"] for entry in run.state.log_history if "xsam/passes" in entry]
    assert passes == [2, 1, 2, 2, 2, 2, 2, 2]
    assert run.model.table[0].item() == pytest.approx(0.7)  # once in each of seven updates

    model, state, passes = ThroughData(), XSAMState(), []
    for update in range(4):
        model.on = update >= 1
        model.zero_grad()
        passes.append(0)

        def gradient():
            passes[-1] += 1
            loss = model(data.x, data.y)["loss"]
            loss.backward()
            return loss.detach()

        xsam_gradient(model, gradient, gradient, XSAMArguments(rho=0.5, alpha=1.0), state)
    assert passes == [2, 1, 2, 2] and model.table[0].item() == pytest.approx(0.3)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_contents_are_compared_in_the_first_two_updates_and_in_those_that_search(tmp_path, monkeypatch, alpha):
    """Comparing waits for the device."""
    compared, update = set(), 0
    checksum = records.checksum

    def counted(memory):
        compared.add(update)
        return checksum(memory)

    for module in (records, module_state):
        monkeypatch.setattr(module, "checksum", counted)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            nonlocal update
            update = state.global_step

    data = Points(32, torch.float64)
    train(tmp_path, ThroughData(), data, rho=0.5, alpha=alpha, callbacks=[Watch()])
    assert compared == ({0, 1, 4} if alpha is None else {0, 1})  # α is searched at the beginning of each epoch

    compared.clear()
    micro = {"ascent_scope": "micro", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train(tmp_path, ThroughData(), data, rho=0.5, alpha=alpha, callbacks=[Watch()], **micro)
    assert compared == ({0, 1, 4} if alpha is None else {0, 1})

    compared.clear()
    model, state = ThroughData(), XSAMState()
    for update in range(8):
        state.search_due = update % 4 == 0

        def gradient():
            model.zero_grad()
            loss = model(data.x, data.y)["loss"]
            loss.backward()
            return loss.detach()

        xsam_gradient(
            model, gradient, lambda: model(data.x, data.y)["loss"], XSAMArguments(rho=0.5, alpha=alpha), state
        )
    assert compared == ({0, 1, 4} if alpha is None else {0, 1})


class FollowsMoves(Net):
    """A large table that takes in how far the weights are from where they began: nothing in the very first pass."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2**14, dtype=torch.float64), requires_grad=False)
        self.register_buffer("began", self.first.weight.detach().clone())

    def forward(self, x, labels=None):
        self.table.data.add_((self.first.weight.detach() - self.began).abs().sum())
        return {"loss": nn.functional.cross_entropy(self.logits(x) * (1 + self.table[0]), labels)}


def test_a_large_tensor_that_only_moved_passes_write_into_is_refused(tmp_path):
    model = FollowsMoves()
    with pytest.raises(NotImplementedError, match="at moved weights writes into a large .* set `rho` to 0"):
        train(tmp_path, model, Points(32, torch.float64), rho=0.5, alpha=1.0)
    assert all(torch.equal(p, q) for p, q in zip(model.first.parameters(), Net().first.parameters(), strict=True))
    assert model.first.weight.grad is None


class ReplacesFrozen(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def forward(self, x, labels=None):
        self.scale = nn.Parameter(self.scale * 0.9, requires_grad=False)
        return super().forward(x * self.scale, labels)


class ReplacesTrained(Net):
    def forward(self, x, labels=None):
        out = super().forward(x, labels)
        self.second.bias = nn.Parameter(self.second.bias.detach().clone())
        return out


class MaxNorm(Net):
    def forward(self, x, labels=None):
        with torch.no_grad():
            self.first.weight.clamp_(-0.1, 0.1)
        return super().forward(x, labels)


class Normalises(Net):
    def forward(self, x, labels=None):
        self.second.weight.data = nn.functional.normalize(self.second.weight.data)
        return super().forward(x, labels)


class Sparse(Net):
    """A graph's edges, for instance: written into, or assigned anew."""

    def __init__(self, in_place=True):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("edges", torch.eye(HIDDEN, dtype=torch.float64).to_sparse(), persistent=False)

    def forward(self, x, labels=None):
        if self.in_place:
            self.edges.mul_(0.9)
        else:
            self.edges = self.edges * 0.9
        logits = self.second((self.edges @ torch.tanh(self.first(x)).T).T)
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def test_sparse_buffers_are_followed_by_name(tmp_path):
    class Factor(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("factor", torch.ones((), dtype=torch.float64))

        def forward(self, x, labels=None):
            self.factor *= 0.9
            logits = self.second(self.factor * torch.tanh(self.first(x)))
            return {"loss": nn.functional.cross_entropy(logits, labels)}

    data = Points(32, torch.float64)
    sparse, dense = (train(tmp_path, model, data, rho=0.5) for model in (Sparse(in_place=False), Factor()))
    assert (weights_of(sparse) - weights_of(dense)).abs().max() <= 1e-12


def test_a_lazy_module_without_a_batch_is_refused(tmp_path):
    class Lazy(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.LazyBatchNorm1d(affine=False, dtype=torch.float64)

        def forward(self, x, labels=None):
            return super().forward(self.norm(x), labels)

    model, data = Lazy(), Points(32, torch.float64)
    with pytest.raises(
        NotImplementedError, match="'norm.running_mean' belongs to a lazy module.*call the model on a batch"
    ):
        train(tmp_path, model, data, rho=0.5)
    model(data.x, data.y)
    train(tmp_path, model, data, rho=0.5)


@pytest.mark.parametrize("model, sentence", [
    (Normalises, "writes into the trained weight 'second.weight'"),
    (Sparse, "writes into the sparse tensor 'edges'"),
    (ReplacesFrozen, "puts another parameter in the place of 'scale'"),
    (ReplacesTrained, "puts another parameter in the place of 'second.bias'"),
    (MaxNorm, "writes into the trained weight 'first.weight'"),
])  # fmt: skip
def test_what_cannot_be_put_back_is_refused_at_the_first_update(tmp_path, model, sentence):
    run = build(tmp_path, model(), Points(32, torch.float64), rho=0.5)
    with pytest.raises(
        NotImplementedError, match=f"A forward pass {sentence}, which XSAM cannot put back.*on_step_end"
    ):
        run.train()
    assert run.state.global_step == 0
    train(tmp_path / "off", model(), Points(32, torch.float64), rho=0.0)


def test_numbers_and_lists_are_left_alone_and_named_once(tmp_path, caplog):
    class Counts(Net):
        steps, temperature, recent = 0, 1.0, None

        def forward(self, x, labels=None):
            self.steps += 1
            self.temperature *= 0.9
            self.recent = [*(self.recent or []), 1]
            self.history.append(1)
            return super().forward(x, labels)

    model = Counts()
    model.steps, model.temperature, model.recent, model.history = 0, 1.0, [], []
    train(tmp_path, model, Points(32, torch.float64), rho=0.5, alpha=1.0)
    assert model.steps == 16 == len(model.history)
    said = [record.message for record in caplog.records if "A forward pass changes" in record.message]
    assert len(said) == 1 and "changes history, recent, steps, temperature, and later passes" in said[0]
    caplog.clear()
    train(tmp_path / "b", Keeps("assigned"), Points(32, torch.float64), rho=0.5)
    assert "A forward pass changes" not in caplog.text


def holds_itself(held):
    held.append(held)
    return held


CHANGES = {
    "a list": ([0, 1], lambda it: it.__setitem__(0, it[0] + 1)),
    "a dictionary": ({"n": 0}, lambda it: it.__setitem__("n", it["n"] + 1)),
    "a key": ({0: "a"}, lambda it: it.__setitem__(it.popitem()[0] + 1, "a")),
    "a deque": (deque([0.0, 1.0], maxlen=2), lambda it: it.append(2.5)),
    "a set": ({0}, lambda it: it.add(it.pop() + 1)),
    "a list in a dictionary": ({"recent": [0]}, lambda it: it["recent"].__setitem__(0, it["recent"][0] + 1)),
    "a list in a tuple": (([0],), lambda it: it[0].__setitem__(0, it[0][0] + 1)),
    "an array": (np.zeros(3), lambda it: it.__iadd__(1)),
    "an array in a list": ([np.zeros(3)], lambda it: it[0].__iadd__(1)),
    "a tensor in a list": ([torch.zeros(3)], lambda it: it[0].add_(1)),
    "another tensor in a list": ([torch.zeros(3)], lambda it: it.__setitem__(0, it[0] + 1)),
    "a long list": ([0] * 100_000, lambda it: it.__setitem__(0, it[0] + 1)),
    "a list that holds itself": (holds_itself([0]), lambda it: it.__setitem__(0, it[0] + 1)),
}  # fmt: skip


class ChangesInPlace(Net):
    """Keeps something that a pass changes in place."""

    def __init__(self, held, change):
        super().__init__()
        self.held, self.change = held, change

    def forward(self, x, labels=None):
        self.change(self.held)
        return super().forward(x, labels)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_in_place_is_named_and_what_is_not_is_not(tmp_path, caplog, name):
    held, change = CHANGES[name]
    train(
        tmp_path / "still",
        ChangesInPlace(copy.deepcopy(held), lambda it: None),
        Points(16, torch.float64),
        rho=0.5,
        alpha=1.0,
    )
    assert "A forward pass changes" not in caplog.text
    train(tmp_path, ChangesInPlace(copy.deepcopy(held), change), Points(16, torch.float64), rho=0.5, alpha=1.0)
    assert caplog.text.count("A forward pass changes held, and later passes of the update find it changed") == 1


def test_what_cannot_be_compared_is_passed_over_and_contents_are_compared_in_the_first_update_alone(
    tmp_path, monkeypatch
):
    class Odd:
        def __eq__(self, other):
            raise AssertionError("it is compared")

    updates, seen = [], []
    monkeypatch.setattr(
        module_state, "contents_of", lambda held: seen.append(len(updates)) or records.contents_of(held)
    )
    held = [Odd(), float("nan"), np.full(3, np.nan), torch.ones(2), np.zeros(200_000), {"deep": [Odd()]}, None]

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            updates.append(state.global_step)

    run = build(
        tmp_path, ChangesInPlace(held, lambda it: None), Points(32, torch.float64), callbacks=[Watch()], rho=0.5
    )
    run.train()
    assert len(updates) == 8 and set(seen) == {0}


# --- batches


class WritesIntoInputs(Net):
    def forward(self, x, labels=None):
        x.sub_(0.5).div_(1.5)
        labels.add_(1).remainder_(CLASSES)
        return super().forward(x, labels)


class DoesNotWrite(Net):
    def forward(self, x, labels=None):
        return super().forward((x - 0.5) / 1.5, (labels + 1) % CLASSES)


class Pops(XSAMTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        weights = inputs.pop("extra")["weight"]
        weights.mul_(2)
        return model(**inputs)["loss"] * weights.mean()


class DoesNotPop(XSAMTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return model(x=inputs["x"], labels=inputs["labels"])["loss"] * (2 * inputs["extra"]["weight"]).mean()


def with_extra(rows):
    return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.stack([row["labels"] for row in rows]),
            "extra": {"weight": torch.arange(1.0, len(rows) + 1)}}  # fmt: skip


class Basket:
    """An object in a batch, which the loss empties."""

    def __init__(self, size):
        self.left, self.factor = [1.0 + i for i in range(size)], torch.ones(size, dtype=torch.float64)


class TakesFromBasket(XSAMTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        basket = inputs["basket"]
        factor = basket.left.pop(0) * basket.factor.mul_(0.5).mean()
        return model(x=inputs["x"], labels=inputs["labels"])["loss"] * factor


class Constant(XSAMTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return model(x=inputs["x"], labels=inputs["labels"])["loss"] * 0.5


def with_basket(rows):
    return {"x": torch.stack([row["x"] for row in rows]), "labels": torch.stack([row["labels"] for row in rows]),
            "basket": Basket(len(rows))}  # fmt: skip


class ChangesInputs(Trainer):
    """What a trainer below ours does in its training step happens in every pass, and to a fresh batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        inputs["x"].mul_(2)
        inputs["labels"] = (inputs["labels"] + 1) % CLASSES
        return super().training_step(model, inputs, *args, **kwargs)


class ChangesInData(XSAMTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(
            model, {"x": inputs["x"] * 2, "labels": (inputs["labels"] + 1) % CLASSES}, **kwargs
        )


class Mixed(XSAMMixin, ChangesInputs):
    pass


class Scales(Net):
    def forward(self, x, part, labels=None):
        x.mul_(1.5)  # and so the part
        return super().forward(x + part.sum(1, keepdim=True), labels)


class DoesNotScale(Net):
    def forward(self, x, part, labels=None):
        return super().forward(1.5 * (x + part.sum(1, keepdim=True)), labels)


def with_part(rows):
    x = torch.stack([row["x"] for row in rows])
    return {"x": x, "part": x[:, :2], "labels": torch.stack([row["labels"] for row in rows])}


class Differentiates(Net):
    def forward(self, x, labels=None):
        logits = self.logits(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return {"loss": nn.functional.cross_entropy(logits, labels) + slope.square().mean()}


class DifferentiatesACopy(Differentiates):
    def forward(self, x, labels=None):
        return super().forward(x.detach().requires_grad_(), labels)


def with_leaves(rows):
    """Where a loss differentiates with respect to its inputs."""
    x = torch.stack([row["x"] for row in rows]).requires_grad_()
    return {"x": x, "labels": torch.stack([row["labels"] for row in rows])}


BATCHES = {
    "views of one memory": (XSAMTrainer, XSAMTrainer, Scales, DoesNotScale, Points, with_part),
    "leaves": (XSAMTrainer, XSAMTrainer, Differentiates, DifferentiatesACopy, Points, with_leaves),
    "in place": (XSAMTrainer, XSAMTrainer, WritesIntoInputs, DoesNotWrite, Points, None),
    "popped": (Pops, DoesNotPop, Net, Net, Points, with_extra),
    "an object": (TakesFromBasket, Constant, Net, Net, Points, with_basket),
    "in the training step": (Mixed, ChangesInData, Net, Net, Points, None),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "method", [{}, {"alpha": 1.0}, {"ascent_scope": "micro"}, {"ascent_fraction": 0.5, "ascent_steps": 2}]
)
@pytest.mark.parametrize("name", BATCHES)
def test_every_pass_gets_the_batch_that_the_first_one_got(tmp_path, name, method, accumulation):
    if name in ("an object", "views of one memory") and "ascent_fraction" in method:
        return  # an object cannot be cut, and a cut copies
    writing, careful, model, like, points, collator = BATCHES[name]

    def run(where, trainer, net):
        made = trainer(
            model=net,
            args=arguments(tmp_path / where, rho=0.5, remove_unused_columns=False, gradient_accumulation_steps=accumulation, **method),
            train_dataset=points(32, torch.float64),
            data_collator=collator,
        )  # fmt: skip
        made.train()
        return made

    first, second = run("a", writing, model()), run("b", careful, like())
    assert (weights_of(first) - weights_of(second)).abs().max() <= 1e-12
    assert [e.get("xsam/alpha") for e in first.state.log_history] == [
        e.get("xsam/alpha") for e in second.state.log_history
    ]


def test_a_weight_in_the_batch_is_the_models(tmp_path):
    class Prompted(Net):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(torch.full((INPUTS,), 0.1, dtype=torch.float64))

        def forward(self, x, labels=None, prompt=None):
            return super().forward(x + (self.prompt if prompt is None else prompt), labels)

    class InTheBatch(XSAMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, {**inputs, "prompt": model.prompt}, num_items_in_batch)

    data = Points(32, torch.float64)
    one, two = (train(tmp_path, Prompted(), data, trainer, rho=0.5) for trainer in (XSAMTrainer, InTheBatch))
    assert torch.equal(weights_of(one), weights_of(two))


def test_a_copy_leaves_out_the_rest_of_a_large_memory():
    corpus = torch.arange(10_000)
    batch = {"input_ids": corpus[:8], "labels": corpus[1:9]}
    copied = copy_of(batch)
    assert copied["labels"].untyped_storage().nbytes() == batch["labels"].nbytes
    assert torch.equal(copied["labels"], batch["labels"])


def test_a_training_step_that_looks_at_gradients_is_told_that_a_search_makes_none(tmp_path):
    class Scaled(Trainer):
        careful = False

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            for weight in model.parameters():
                if weight.grad is not None or not self.careful:
                    weight.grad.mul_(0.5)
            return loss

    class Mixes(XSAMMixin, Scaled):
        pass

    def run(careful, **method):
        made = Mixes(Net(), arguments(tmp_path, rho=0.5, **method), train_dataset=Points(32, torch.float64))
        made.careful = careful
        made.train()
        return weights_of(made)

    with pytest.raises(NotImplementedError, match="`training_step` of Mixes.*pass over weights whose `grad` is None"):
        run(careful=False)
    assert torch.equal(run(careful=True, alpha=1.0), run(careful=False, alpha=1.0))
    halved = train(tmp_path, Net(), Points(32, torch.float64), rho=0.5, learning_rate=0.05)
    assert torch.equal(run(careful=True), weights_of(halved))


def test_a_batch_is_moved_to_the_device_once(tmp_path):
    class Batch(dict):
        moves = 0

        def to(self, *args, **kwargs):
            Batch.moves += 1
            return self

    def collate(rows):
        return Batch({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

    class Careful(XSAMTrainer):
        def _prepare_inputs(self, inputs):  # would move it again in every pass
            return dict(inputs)

        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=collate)

    run = Careful(model=Net(), args=arguments(tmp_path, rho=0.5, max_steps=3), train_dataset=Points(32, torch.float64))
    run.train()
    assert Batch.moves == 3


@pytest.mark.parametrize("what", [(i for i in range(3)), torch.ones(2, requires_grad=True) * 2])
def test_a_batch_that_cannot_be_copied_is_refused(tmp_path, what):
    class Given(XSAMTrainer):
        def get_batch_samples(self, *args, **kwargs):
            batches, n = super().get_batch_samples(*args, **kwargs)
            return [{**batch, "other": what} for batch in batches], n

        def compute_loss(self, model, inputs, **kwargs):
            inputs.pop("other")
            return super().compute_loss(model, inputs, **kwargs)

    run = Given(model=Net(), args=arguments(tmp_path, rho=0.5), train_dataset=Points(32, torch.float64))
    with pytest.raises(NotImplementedError, match="The batch holds something that cannot be copied.*tensors"):
        run.train()


# --- losses that differentiate inside


class Penalised(Net):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, labels=None):
        if self.how == "penalty":
            x = x.detach().requires_grad_()
            logits = self.logits(x)
            slope = torch.autograd.grad(logits.square().sum(), x, create_graph=True)[0]
            return {"loss": nn.functional.cross_entropy(logits, labels) + slope.square().mean()}
        if self.how == "adversary":  # an inner backward pass, which also leaves gradients at the weights
            shift = torch.zeros_like(x, requires_grad=True)
            kept = [p.grad for p in self.parameters()]
            self.zero_grad()
            nn.functional.cross_entropy(self.logits(x + shift), labels).backward()
            for p, grad in zip(self.parameters(), kept, strict=True):
                p.grad = grad
            return {"loss": nn.functional.cross_entropy(self.logits(x + 0.1 * shift.grad.sign()), labels)}
        jacobian = torch.autograd.functional.jacobian(lambda z: self.logits(z).sum(0), x, create_graph=True)
        return {"loss": nn.functional.cross_entropy(self.logits(x), labels) + jacobian.square().mean()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", ["penalty", "adversary", "jacobian"])
def test_losses_that_differentiate_inside_are_searched(tmp_path, how, accumulation):
    data, expected = Points(32, torch.float64), Penalised(how)
    run = train(tmp_path, Penalised(how), data, rho=0.5, train_sampling_strategy="sequential",
                per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)  # fmt: skip
    if accumulation == 1:
        alphas = by_hand(expected, data)
        assert (weights_of(run) - weights_of(type("", (), {"model": expected}))).abs().max() <= 1e-9
        assert run._xsam_callback.xsam.alpha == pytest.approx(alphas[-1]) != 1
    elif how != "jacobian":
        whole = train(tmp_path / "whole", Penalised(how), data, rho=0.5, train_sampling_strategy="sequential")
        if how == "adversary":
            assert (weights_of(run) - weights_of(whole)).abs().max() <= 1e-9


def test_an_error_of_a_probe_is_not_taken_for_one_that_wants_gradients():
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def gradient():
        loss = (w**3).sum()
        loss.backward()
        return loss.detach()

    def probe():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        xsam_gradient([w], gradient, probe, XSAMArguments(rho=0.1), XSAMState())


def test_an_inner_backward_pass_of_a_probe_leaves_the_gradient_alone():
    """The probe may leave gradients at the weights; the direction is the same as without."""
    found = {}
    for dirty in (False, True):
        w = nn.Parameter(torch.tensor([1.0, 0.1], dtype=torch.float64))

        def loss(w=w):
            return 0.5 * (torch.tensor([1.0, 10.0]) * w**2).sum()

        def gradient(loss=loss):
            value = loss()
            value.backward()
            return value.detach()

        def probe(w=w, loss=loss, dirty=dirty):
            if dirty:
                (w.sum() * 7).backward()  # fails without gradients
            return loss()

        state = XSAMState()
        xsam_gradient([w], gradient, probe, XSAMArguments(rho=0.3), state)
        found[dirty] = w.grad.tolist(), state.alpha
    assert found[False] == found[True]


# --- bare loops


@pytest.mark.parametrize("name", ["assigned", "teacher", "torch generator"])
def test_a_bare_loop_follows_the_model_too(name):
    data, model, expected = Points(32, torch.float64), MODELS[name](), MODELS[name]()
    state = XSAMState()
    for _ in range(2):
        state.search_due = True
        for i in range(0, 32, 8):
            x, y = data.x[i : i + 8], data.y[i : i + 8]

            def gradient(x=x, y=y):
                loss = model(x, labels=y)["loss"]
                loss.backward()
                return loss.detach()

            xsam_gradient(model, gradient, lambda x=x, y=y: model(x, labels=y)["loss"], XSAMArguments(rho=0.5), state)
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(LR * p.grad)
                        p.grad = None
    alphas = by_hand(expected, data)
    weights, wanted = (torch.cat([p.detach().reshape(-1) for p in m.parameters()]) for m in (model, expected))
    assert (weights - wanted).abs().max() <= 1e-9 and state.alpha == pytest.approx(alphas[-1])


# --- training modes


class Turning(Classifier):
    """A pass leaves its BatchNorm and dropout in evaluation mode."""

    def __init__(self, turns):
        super().__init__(dropout=0.5, batch_norm=True)
        self.turns = turns

    def forward(self, x, labels=None):
        found = super().forward(x, labels)
        if self.turns:
            self.norm.eval()
            self.dropout.eval()
        return found


@pytest.mark.parametrize("where", ["the pass", "the probe"])
def test_every_pass_has_the_training_modes_of_the_first(where):
    def after_three_updates(turns):
        torch.manual_seed(0)
        model, state, data = Turning(turns and where == "the pass"), XSAMState(), Points(8)
        modes = []

        def loss():
            modes.append([module.training for module in model.modules()])
            return model(data.x, data.y)["loss"]

        def probe():
            value = loss()
            if turns and where == "the probe":
                model.eval()
            return value

        def gradient():
            value = loss()
            value.backward()
            return value.detach()

        for _ in range(3):
            model.train()
            model.zero_grad()
            xsam_gradient(model, gradient, probe, XSAMArguments(rho=0.5, ascent_steps=2), state)
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.1 * weight.grad
        assert modes == [modes[0]] * len(modes) and all(modes[0]) and len(modes) == 21 + 9
        return model

    turned, straight = after_three_updates(True), after_three_updates(False)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, turned.state_dict()[name]), name
    # As the first pass left them, which is what plain training would leave.
    assert straight.norm.training and turned.norm.training == (where == "the probe")
