"""When XSAM is on, and on how much of the batch: counted passes, equality with the plain Trainer where it is off."""

import numpy as np
import oracle
import pytest
import torch
from toys import CLASSES, HIDDEN, INPUTS, Classifier, Points, arguments, train, weights_of
from transformers import Trainer

from xsam_hf import XSAMArguments, XSAMState, XSAMTrainer
from xsam_hf.pass_state import PassState
from xsam_hf.schedule import ascends_at, follow_schedule, search_at
from xsam_hf.trainer.micro_batch import MicroBatch, random_subset


def history(run, key):
    return [entry[key] for entry in run.state.log_history if key in entry]


def on(updates=12, **changes):
    return [i for i in range(updates) if ascends_at(XSAMArguments(**changes), i, updates)]


def test_the_schedule_by_hand():
    assert on() == list(range(12))
    assert on(sharpness_start=0.5) == [6, 7, 8, 9, 10, 11]
    assert on(sharpness_end=0.25) == [0, 1, 2]
    assert on(sharpness_every=5) == [0, 5, 10]
    assert on(sharpness_start=0.25, sharpness_end=0.75, sharpness_every=2) == [3, 5, 7]
    assert on(updates=7, sharpness_start=0.5) == [4, 5, 6]
    # Shares cover everything once: before, between and after.
    parts = [on(sharpness_end=0.3), on(sharpness_start=0.3, sharpness_end=0.6), on(sharpness_start=0.6)]
    assert sum(parts, []) == list(range(12))
    for name, value in (("ascent_fraction", 0.5), ("ascent_scope", "micro")):
        with pytest.raises(ValueError, match=f"`{name}` is {value!r}, and a loop of your own cuts its batches itself"):
            follow_schedule(XSAMArguments(**{name: value}), XSAMState())
    with pytest.raises(ValueError, match="`sharpness_start` is 0.5, a share of training"):
        ascends_at(XSAMArguments(sharpness_start=0.5), 0)
    with pytest.raises(ValueError, match="`sharpness_end` is 0.5, a share of training"):
        ascends_at(XSAMArguments(sharpness_end=0.5), 0)
    searched = [i for i in range(12) if search_at(XSAMArguments(alpha_search_steps=0.25), i, 12)]
    assert searched == [0, 3, 6, 9]
    searched = [i for i in range(10) if search_at(XSAMArguments(alpha_search_steps=0.25), i, 10)]
    assert searched == [0, 3, 6, 9]  # 2.5 is rounded up


@pytest.mark.parametrize("share, whole, first", [(0.07, 100, 7), (0.14, 50, 7), (0.55, 100, 55), (0.25, 10, 3)])
def test_shares_are_rounded_up_but_not_by_floating_point(share, whole, first):
    arguments = XSAMArguments(sharpness_start=share)
    assert [ascends_at(arguments, i, whole) for i in (first - 1, first)] == [False, True]
    assert len(random_subset({"x": torch.zeros(whole)}, share, [0])[0]) == first


def test_the_trainer_knows_the_whole_of_a_share(tmp_path):
    train(tmp_path, Classifier(), Points(32), rho=0.5, alpha_search_steps=0.25)
    assert len((tmp_path / "xsam_search.jsonl").read_text().splitlines()) == 4


def test_passes_are_a_mean_over_updates_not_micro_batches(tmp_path):
    run = train(tmp_path, Classifier(), rho=0.5, alpha=1.0, sharpness_every=2, logging_steps=2, per_device_train_batch_size=4,
                gradient_accumulation_steps=2)  # fmt: skip
    assert history(run, "xsam/passes") == [1.5] * 4


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("changes", [
    {"sharpness_start": 0.5}, {"sharpness_end": 0.5}, {"sharpness_every": 3}, {"sharpness_every": 4, "sharpness_start": 0.25},
])  # fmt: skip
def test_passes_are_counted_and_logged(tmp_path, changes, accumulation):
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    run = train(tmp_path, Classifier(), rho=0.5, alpha=1.0, **settings, **changes)
    sharp = [ascends_at(XSAMArguments(**changes), i, 8) for i in range(8)]
    assert 0 < sum(sharp) < 8
    assert history(run, "xsam/passes") == [2 if s else 1 for s in sharp]
    assert run.model.backwards == run.model.forwards == accumulation * (8 + sum(sharp))
    # XSAM's own keys stand in the logs of its own updates only.
    assert [("xsam/angle" in entry) for entry in run.state.log_history if "loss" in entry] == sharp


def test_the_plain_trainer_before_and_after(tmp_path):
    plain = train(tmp_path / "a", Classifier(dropout=0.3), trainer=Trainer)
    late = train(tmp_path / "b", Classifier(dropout=0.3), rho=0.5, sharpness_start=0.5)
    always = train(tmp_path / "c", Classifier(dropout=0.3), rho=0.5)
    assert history(plain, "grad_norm")[:4] == history(late, "grad_norm")[:4] != history(always, "grad_norm")[:4]
    assert not torch.equal(weights_of(plain), weights_of(late))
    assert history(late, "grad_norm")[4] != history(plain, "grad_norm")[4]
    # Paired in data and masks all the way: the same first pass at the moment of the switch.
    assert history(late, "loss")[:5] == history(plain, "loss")[:5]


def test_a_search_that_falls_into_a_plain_update_waits_for_the_next_sharp_one(tmp_path):
    run = train(
        tmp_path, Classifier(), rho=0.5, sharpness_start=0.25, sharpness_every=4
    )  # updates 2 and 6 of 4 an epoch
    assert [i for i, entry in enumerate(run.state.log_history) if entry.get("xsam/passes") == 2] == [2, 6]
    lines = (tmp_path / "xsam_search.jsonl").read_text().splitlines()
    assert len(lines) == 2 and run.model.forwards == 8 + 2 + 2 * 21


class Watched(Classifier):
    """Notes the rows of every pass."""

    def __init__(self, **changes):
        super().__init__(**changes)
        self.rows = []

    def forward(self, x, labels=None):
        if self.training and torch.is_grad_enabled():
            self.rows.append(x.detach().clone())
        return super().forward(x, labels)


@pytest.mark.parametrize("fraction, rows", [(1.0, 8), (0.5, 4), (0.25, 2), (0.3, 3), (0.01, 1)])
def test_the_ascent_takes_a_part_of_the_batch(tmp_path, fraction, rows):
    run = train(tmp_path, Watched(), rho=0.5, alpha=1.0, ascent_fraction=fraction, ascent_steps=2)
    assert [len(x) for x in run.model.rows] == [rows, rows, 8] * 8
    assert history(run, "xsam/passes") == pytest.approx([1 + 2 * rows / 8] * 8)
    for part, again, whole in zip(*(run.model.rows[i::3] for i in range(3)), strict=True):
        assert torch.equal(part, again)  # the same examples in every step of one ascent
        assert all((whole == row).all(1).any() for row in part) and len(part.unique(dim=0)) == rows
    if rows < 8:
        places = [[int((whole == row).all(1).nonzero()) for row in part] for part, _, whole in zip(*(run.model.rows[i::3] for i in range(3)), strict=True)]  # fmt: skip
        assert len({tuple(p) for p in places}) > 1  # others in every update


@pytest.mark.parametrize("scope", ["update", "micro"])
def test_every_micro_batch_has_a_part_of_its_own(tmp_path, scope):
    run = train(tmp_path, Watched(), rho=0.5, alpha=1.0, ascent_fraction=0.5, ascent_scope=scope, max_steps=1,
                per_device_train_batch_size=8, gradient_accumulation_steps=4)  # fmt: skip
    parts, wholes = [x for x in run.model.rows if len(x) == 4], [x for x in run.model.rows if len(x) == 8]
    assert len(parts) == len(wholes) == 4
    places = [
        tuple(int((whole == row).all(1).nonzero()) for row in part) for part, whole in zip(parts, wholes, strict=True)
    ]
    assert len(set(places)) > 1


def test_an_update_with_a_part_agrees_with_the_formula(tmp_path):
    data, model = Points(8, torch.float64), Classifier(dtype=torch.float64)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
    run = train(tmp_path, model, data, rho=0.5, alpha=1.0, ascent_fraction=0.5, num_train_epochs=1, seed=3,
                train_sampling_strategy="sequential")  # fmt: skip
    subset, size = random_subset({"x": data.x, "labels": data.y}, 0.5, [3, 0, 0, 0])
    part = {"x": data.x[subset], "labels": data.y[subset]}
    assert (len(subset), size) == (4, 8)
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
    g0 = network.gradient(theta, part["x"].numpy(), part["labels"].numpy())
    g1 = network.gradient(theta + 0.5 * g0 / np.linalg.norm(g0), data.x.numpy(), data.y.numpy())
    assert np.abs(weights_of(run).numpy() - (theta - 0.1 * g1)).max() <= 1e-12
    assert history(run, "loss") == pytest.approx(
        [network.loss(theta, part["x"].numpy(), part["labels"].numpy())], abs=1e-4
    )


def test_random_streams_do_not_depend_on_the_part(tmp_path):
    def after(name, **changes):
        torch.manual_seed(5)
        train(tmp_path / name, Classifier(dropout=0.3), **changes)
        return torch.rand(4).tolist()

    assert after("a", trainer=Trainer) == after("b", rho=0.5, ascent_fraction=0.25) == after("c", rho=0.5)


def test_a_batch_that_cannot_be_cut_stays_whole():
    whole = {"input_ids": torch.zeros(1, 9), "mask": torch.ones(())}
    assert random_subset(whole, 0.5, [0]) == (None, 1) == random_subset({"name": "n"}, 0.5, [0])
    nested = {"x": {"a": torch.arange(4), "b": [torch.arange(4), torch.arange(3)]}, "y": torch.arange(4), "name": "n"}
    subset, size = random_subset(nested, 0.5, [0], ["y"])
    micro_batch = MicroBatch(nested, 20, 1, PassState.capture(None), subset=subset, size=size)
    part, n = micro_batch.inputs(whole=False)
    assert micro_batch.share == 0.5 and n == 10 and len(part["x"]["a"]) == 2 and torch.equal(part["x"]["a"], part["y"])
    assert torch.equal(part["x"]["b"][0], part["y"]) and len(part["x"]["b"][1]) == 3 and part["name"] == "n"
    whole, n = micro_batch.inputs(whole=True)
    assert n == 20 and torch.equal(whole["y"], torch.arange(4))


def test_a_subset_takes_its_share_of_the_items():
    def of(n, subset):
        return MicroBatch({"x": torch.arange(4)}, n, 1, PassState.capture(None), subset=torch.tensor(subset), size=4).inputs(whole=False)[1]  # fmt: skip

    assert of(20, [1]) == 5 and of(None, [1]) is None and of(torch.tensor(7), [0, 2]).item() == 3.5


@pytest.mark.parametrize("n", [1, 5, None])
def test_the_labels_say_how_many_examples_there_are(tmp_path, n):
    """Whatever tensor comes first: one of a few numbers for the whole batch, or a single number, stays whole."""

    class Weighted(Classifier):
        rows: list[tuple[int, int]] = []

        def forward(self, w, x, labels=None):
            self.rows.append((w.numel(), len(x)))
            found = super().forward(x, labels)
            return {**found, "loss": found["loss"] * w.mean()}

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("x", "labels")}
        return {"w": torch.ones(n) if n else torch.ones(()), **batch}

    args = arguments(tmp_path, rho=0.5, alpha=1.0, ascent_fraction=0.25, max_steps=2, remove_unused_columns=False)
    run = XSAMTrainer(Weighted(), args, collate, Points(12))
    run.train()
    whole = n or 1
    assert Weighted.rows[:4] == [(whole, 2), (whole, 8), (whole, 1), (whole, 4)]
    Weighted.rows.clear()
    assert history(run, "xsam/passes") == [1.25, 1.25]


def test_a_batch_that_does_not_say_how_many_examples_it_has_is_refused():
    x, y, five = torch.zeros(8, 3), torch.arange(8), torch.zeros(5)
    for unclear in (
        {"w": five, "x": x, "y": y},  # without labels
        {"x": torch.zeros(16, 3), "labels": y},  # nothing has as many
        {"x": x, "labels": torch.zeros(1)},
        {"x": x, "labels": [y, five]},
        [five, x],
    ):
        with pytest.raises(ValueError, match=r"how many there are is not clear.* Name the labels \(`label_names`\)"):
            random_subset(unclear, 0.5, [0])
    for clear, names in (
        ({"w": five, "x": x, "y": y}, ["y"]),
        ({"w": five, "x": x, "labels": y}, ["labels"]),
        ({"x": x, "y": y, "w": torch.zeros(1), "s": torch.zeros(())}, ["labels"]),
        ({"x": x, "labels": None}, ["labels"]),
        ({"ids": x, "start": y, "end": y}, ["start", "end"]),
        ({"labels": y}, ["labels"]),
        ([x, y], ["labels"]),
    ):
        subset, size = random_subset(clear, 0.5, [0], names)
        assert (len(subset), size) == (4, 8)


def test_the_search_takes_the_whole_batch(tmp_path):
    class Rows(Classifier):
        probed: list[int] = []

        def forward(self, x, labels=None):
            if self.training and not torch.is_grad_enabled():
                self.probed.append(len(x))
            return super().forward(x, labels)

    train(tmp_path, Rows(), rho=0.5, ascent_fraction=0.5, max_steps=1)
    assert Rows.probed == [8] * 21


def test_schedules_compose(tmp_path):
    run = train(tmp_path, Watched(), rho=0.5, sharpness_start=0.5, sharpness_every=2, ascent_fraction=0.5,
                perturbation="asam")  # fmt: skip
    assert history(run, "xsam/passes") == [1, 1, 1, 1, 1.5, 1, 1.5, 1]
