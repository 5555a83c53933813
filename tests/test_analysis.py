"""Loss surfaces, sharpness and spectra: closed forms on quadratics, a dense Hessian, and nothing left behind."""

import dataclasses
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from toys import Classifier, Tokens, build, tiny_gpt2
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback

from xsam_hf import XSAMArguments
from xsam_hf.analysis import (
    SharpnessCallback,
    Surface,
    arc_profile,
    ascent_sharpness,
    average_sharpness,
    batches_of,
    built,
    direction_gain,
    hessian_spectrum,
    landscape,
    m_sharpness,
    pictures,
    plane,
    training_curves,
)
from xsam_hf.analysis.__main__ import main
from xsam_hf.analysis.checkpoint import load
from xsam_hf.analysis.measures import MEASURES, Settings
from xsam_hf.analysis.random_directions import random_direction
from xsam_hf.analysis.svg import COLORS


class Bowl(nn.Module):
    """L = x · (½ wᵀ H w + cᵀ w), averaged over the examples x; w is a 2 × 3 matrix, so it has two filters."""

    def __init__(self, curved=True, w=(1.0, -2.0, 0.5, 0.3, 1.5, -1.0)):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        root, c = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((6, 6), (6,)))
        self.H, self.c = (root @ root.T / 6 + torch.eye(6)) * curved, c
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64).view(2, 3))

    def forward(self, x):
        w = self.w.reshape(-1)
        return {"loss": x.mean() * (w @ self.H @ w / 2 + self.c @ w)}


BATCHES = [{"x": torch.ones(3, dtype=torch.float64)}, {"x": torch.full((1,), 5.0, dtype=torch.float64)}]
MEAN = 2.0  # of all four examples; the mean over batches would be 3


class Known:
    """The same in NumPy."""

    def __init__(self, bowl, scale=MEAN):
        self.H, self.c, self.w = (
            scale * bowl.H.numpy(),
            scale * bowl.c.numpy(),
            bowl.w.detach().reshape(-1).numpy().copy(),
        )

    def loss(self, w):
        return w @ self.H @ w / 2 + self.c @ w

    def gradient(self, w):
        return self.H @ w + self.c

    def rise(self, step):
        return self.loss(self.w + step) - self.loss(self.w)


def unit(v):
    return v / np.linalg.norm(v)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).numpy()


def test_the_loss_is_the_mean_over_examples_and_its_gradient_is_right():
    bowl = Bowl()
    known, step = Known(bowl), torch.arange(6.0, dtype=torch.float64).view(2, 3)
    with Surface(bowl, BATCHES).moving() as theta:
        assert theta.loss == pytest.approx(known.loss(known.w), rel=1e-12)
        assert theta.loss_at(([step], 0.3)) - theta.loss == pytest.approx(known.rise(0.3 * np.arange(6)), rel=1e-12)
        loss, gradient = theta.gradient_at(([step], 0.3), ([step], -0.1))
        assert flat(gradient) == pytest.approx(known.gradient(known.w + 0.2 * np.arange(6)), rel=1e-12)
        assert loss != pytest.approx(theta.loss, rel=1e-3)
    assert torch.equal(bowl.w, Bowl().w) and bowl.w.grad is None


@pytest.mark.parametrize("method, tolerance", [("autograd", 1e-10), ("finite_difference", 1e-6)])
def test_the_spectrum_of_a_quadratic(method, tolerance):
    bowl = Bowl()
    found = hessian_spectrum(Surface(bowl, BATCHES), count=6, method=method)
    expected = np.linalg.eigvalsh(Known(bowl).H)[::-1]
    assert found.eigenvalues == pytest.approx(expected, rel=tolerance) and found.method == method
    assert found.trace == pytest.approx(expected.sum(), rel=tolerance)
    assert found.ratio == pytest.approx(expected[0] / expected[4], rel=tolerance)
    assert hessian_spectrum(Surface(bowl, BATCHES[:1]), count=1).eigenvalues[0] < 0.6 * expected[0]


@pytest.mark.parametrize("count", [1, 2, 12, 30])
def test_a_multiple_eigenvalue_is_there_as_often_as_it_is_in_the_matrix(count):
    """Twelve weights of one quadratic, and as many that change nothing: Lanczos finds 0 once."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.idle = (nn.Parameter(torch.ones(12, dtype=torch.float64)) for _ in range(2))
            self.register_buffer("h", torch.arange(1.0, 13.0, dtype=torch.float64))

        def forward(self, x):
            return {"loss": x.mean() * (self.h * self.w**2).sum() / 2 + 0 * self.idle.sum()}

    found = hessian_spectrum(Surface(Flat(), BATCHES[:1]), count=count, trace_products=0)
    assert found.eigenvalues == pytest.approx([*range(12, 0, -1), *[0] * 12][:count], abs=1e-8)
    assert found.size == 24 and max(found.residuals) < 0.02 * 12
    assert (found.products == 24) == (2 * count >= 24)


@pytest.mark.parametrize("method, tolerance", [("autograd", 1e-4), ("finite_difference", 1e-3)])
def test_the_spectrum_of_attention_is_that_of_the_dense_hessian(tmp_path, method, tolerance):
    # sdpa's fused kernel has no second derivative: `autograd` takes another one.
    model = tiny_gpt2(layers=1)
    assert model.config._attn_implementation == "sdpa"
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.endswith("c_attn.bias"))
    trainer = build(tmp_path, model, Tokens(4))
    (batch,) = batches_of(trainer, 1)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    (name,) = trained

    def loss(bias):
        return functional_call(model, {name: bias}, kwargs=dict(batch))["loss"]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        dense = torch.autograd.functional.hessian(loss, trained[name].detach())
    expected = torch.linalg.eigvalsh(dense).flip(0)
    found = hessian_spectrum(Surface(trainer, [batch]), method=method, tolerance=1e-4, trace_products=0)
    assert found.eigenvalues == pytest.approx(expected[:5].tolist(), abs=tolerance * expected[0].item())


@pytest.mark.parametrize("k", [1, 2])
def test_the_arc_is_the_oracles(k):
    bowl = Bowl()
    known = Known(bowl)
    found = arc_profile(Surface(bowl, BATCHES, training=True), XSAMArguments(rho=0.5, ascent_steps=k), [0.5, 4.0])
    assert [search.rho_max for search in found.searches] == [0.5, 4.0]
    for search in found.searches:
        _, best, losses = oracle.xsam_direction(known.w, known.loss, known.gradient, 0.5, k=k, rho_max=search.rho_max)
        assert search.losses == pytest.approx(losses, rel=1e-12) and search.alpha == pytest.approx(best)
    assert found.searches[0].alpha != found.searches[1].alpha
    assert found.loss == pytest.approx(known.loss(known.w))


def test_proposition_1_holds_at_a_distance_and_not_next_to_the_weights():
    bowl = Bowl()
    found = direction_gain(bowl, BATCHES, rhos=[0.1, 0.5], distances=[1e-3, 10.0])
    assert found.share("last", "first").tolist() == [[0, 1], [0, 1]]
    assert found.share("best", "last")[:, 1].tolist() == [1, 1]
    for b, scale in enumerate((1.0, 5.0)):
        known = Known(bowl, scale)
        g0 = unit(known.gradient(known.w))
        g1 = unit(known.gradient(known.w + 0.5 * g0))
        assert found.first[1][b][1] == pytest.approx(known.loss(known.w + 10 * g0), rel=1e-12)
        assert found.last[1][b][1] == pytest.approx(known.loss(known.w + 10 * g1), rel=1e-12)
        arc = [known.loss(known.w + 10 * oracle.rotate(g0, g1, a)) for a in np.linspace(0, 2, 11)]
        assert found.best[1][b][1] == pytest.approx(max(arc), rel=1e-12)


@pytest.mark.parametrize("spanned_by", ["gradients", "arc"])
def test_the_plane_of_an_ascent(spanned_by):
    bowl = Bowl()
    known = Known(bowl)
    found = plane(Surface(bowl, BATCHES), rho=0.6, ascent_steps=2, spanned_by=spanned_by, samples=3)
    steps, gradients = [np.zeros(6)], [known.gradient(known.w)]
    for _ in range(2):
        steps.append(steps[-1] + 0.3 * unit(gradients[-1]))
        gradients.append(known.gradient(known.w + steps[-1]))
    first, second = (gradients[0], gradients[1]) if spanned_by == "gradients" else (steps[-1], gradients[-1])
    e1 = unit(first)
    e2 = unit(second - (e1 @ second) * e1)
    assert found.x == pytest.approx([-1.5, 0, 1.5])
    expected = [[known.loss(known.w + x * e1 + y * e2) for x in found.x] for y in found.y]
    assert np.array(found.losses) == pytest.approx(np.array(expected), rel=1e-12)
    assert np.array(found.points) == pytest.approx(np.array([[e1 @ s, e2 @ s] for s in steps]), abs=1e-12)
    arrows = [[e1 @ unit(g), e2 @ unit(g)] for g in gradients]
    assert np.array(found.gradients) == pytest.approx(np.array(arrows), abs=1e-12)


def test_parallel_gradients_span_no_plane():
    with pytest.raises(ValueError, match="parallel"):
        plane(Surface(Bowl(curved=False), BATCHES), rho=0.5)


@pytest.mark.parametrize("normalisation", ["filter", "element"])
def test_average_sharpness(normalisation):
    bowl = Bowl()
    known, weights = Known(bowl), [bowl.w.detach().clone()]
    found = average_sharpness(Surface(bowl, BATCHES), [0.5, 1.0], 200, normalisation, seed=7)
    for i in (0, 199):
        direction = flat(random_direction(weights, normalisation, 7 + i))
        exact = [known.rise(r * direction) for r in (0.5, 1.0)]
        assert found.samples[i] == pytest.approx(exact, rel=1e-9)
    # E d dᵀ is diagonal: w_i² for each element, ‖w_f‖²/n_f over a filter.
    variance = known.w**2 if normalisation == "element" else (known.w.reshape(2, 3) ** 2).mean(1).repeat(3)
    analytic = 0.5 * (np.diag(known.H) * variance).sum()
    assert abs(found.mean[1] - analytic) < 3 * found.error[1] < 0.5 * analytic
    assert found.convergence[-1] == pytest.approx(found.mean) and found.convergence.shape == (200, 2)


def test_random_directions_are_as_long_as_the_weights_filters_and_leave_biases():
    weights = [torch.randn(4, 3, 2), torch.randn(4)]
    before = torch.get_rng_state()
    filters, bias = random_direction(weights, "filter", 0)
    torch.testing.assert_close(filters.flatten(1).norm(dim=1), weights[0].flatten(1).norm(dim=1))
    assert not bias.any() and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(filters, random_direction(weights, "filter", 1)[0])
    elements, _ = random_direction(weights, "element", 0)
    plain = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(elements, plain * weights[0])


def test_the_landscape_of_a_quadratic():
    bowl = Bowl()
    known, found = Known(bowl), landscape(Surface(bowl, BATCHES), samples=3, seed=4)
    first, second = (flat(random_direction([bowl.w.detach()], "filter", seed)) for seed in (8, 9))
    expected = [[known.loss(known.w + x * first + y * second) for x in (-1, 0, 1)] for y in (-1, 0, 1)]
    assert np.array(found.losses) == pytest.approx(np.array(expected), rel=1e-12)
    assert found.losses[1][1] == found.loss


def test_ascent_sharpness_of_a_slope_and_of_a_bowl():
    slope = Bowl(curved=False)
    assert ascent_sharpness(Surface(slope, BATCHES), 0.7) == pytest.approx(
        0.7 * np.linalg.norm(MEAN * slope.c), rel=1e-9
    )
    bowl = Bowl()
    known = Known(bowl)
    g0 = unit(known.gradient(known.w))
    assert ascent_sharpness(Surface(bowl, BATCHES), 0.7, steps=1) == pytest.approx(known.rise(0.7 * g0), rel=1e-9)
    # Where the gradient vanishes along all but the steepest eigenvector the maximum on the ball is known.
    values, vectors = np.linalg.eigh(known.H)
    centre = np.linalg.solve(known.H, -known.c)
    with torch.no_grad():
        bowl.w.copy_(torch.tensor(centre + 0.1 * vectors[:, -1]).view(2, 3))
    highest = values[-1] * ((0.1 + 0.7) ** 2 - 0.1**2) / 2
    assert ascent_sharpness(Surface(bowl, BATCHES), 0.7) == pytest.approx(highest, rel=1e-9)
    one, five = m_sharpness(bowl, BATCHES, 0.7)
    assert five == pytest.approx(5 * one) and one == pytest.approx(highest / MEAN, rel=1e-9)


# --- nothing is left behind ------------------------------------------------------------------------------------------


def everything(trainer):
    model = trainer.model
    tensors = {
        **model.state_dict(),
        **{f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None},
    }
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    return kept, torch.get_rng_state(), np.random.get_state()[1], [m.training for m in model.modules()]


def assert_same(before, after):
    assert before[0].keys() == after[0].keys() and all(torch.equal(x, after[0][name]) for name, x in before[0].items())
    assert torch.equal(before[1], after[1]) and (before[2] == after[2]).all() and before[3] == after[3]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "look",
    [
        lambda s: arc_profile(s, XSAMArguments(rho=0.5)),
        lambda s: plane(s, 0.5, samples=3),
        lambda s: hessian_spectrum(s, count=1),
        lambda s: hessian_spectrum(s, count=1, method="finite_difference"),
        lambda s: average_sharpness(s, directions=2),
    ],
    ids=["arc", "plane", "hessian", "differences", "average"],
)
def test_weights_gradients_buffers_modes_and_random_numbers_come_back(tmp_path, look, fails):
    trainer = build(tmp_path, Classifier(dropout=0.3, batch_norm=True), rho=0.5)
    batches = batches_of(trainer, 2)
    trainer.model(**batches[0])["loss"].backward()
    trainer.model.dropout.eval()
    before, calls = everything(trainer), []

    def fail(module, inputs):
        calls.append(module)
        if fails and len(calls) == 6:
            raise KeyboardInterrupt

    trainer.model.second.register_forward_pre_hook(fail)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            look(Surface(trainer, batches, training=True))
    else:
        first, second = (look(Surface(trainer, batches, training=True)) for _ in range(2))
        assert str(first) == str(second)  # also of the dropout's masks
    assert len(calls) >= 6
    assert_same(before, everything(trainer))


def test_every_pass_draws_the_same_masks(tmp_path):
    trainer = build(tmp_path, Classifier(dropout=0.5))
    batches = batches_of(trainer, 2)
    with Surface(trainer, batches, training=True).moving() as theta:
        losses = {theta.loss, theta.loss_at(), theta.loss_at(), theta.gradient_at()[0]}
    with Surface(trainer, batches).moving() as theta:
        assert len(losses) == 1 and theta.loss not in losses  # without dropout it is another


class Watch(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def test_the_callback_measures_logs_and_changes_nothing(tmp_path):
    measures, found = ("arc", "ascent", "average", "hessian"), {}
    for name in ("plain", "watched"):
        run = build(tmp_path / name, Classifier(dropout=0.2, batch_norm=True), rho=0.2, max_steps=6)
        watch = Watch()
        run.add_callback(watch)
        if name == "watched":
            run.add_callback(SharpnessCallback(run, every=3, measures=measures, directions=2))
        run.train()
        found[name] = everything(run), watch.logs
    assert_same(found["plain"][0], found["watched"][0])
    lines = [json.loads(line) for line in (tmp_path / "watched" / "sharpness.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert len(lines[0]["arc"]["searches"][0]["losses"]) == 21 and lines[0]["rho"] == 0.2
    logged = [logs for logs in found["watched"][1] if "sharpness/ascent" in logs]
    keys = {f"sharpness/{key}" for key in ("sam", "angle", "ascent", "average", "lambda_1", "backward_passes")}
    assert len(logged) == 2 and keys <= logged[0].keys()
    assert logged[0]["sharpness/ascent"] == lines[0]["sharpness/ascent"] > 0
    assert logged[1]["sharpness/forward_passes"] == 2 * logged[0]["sharpness/forward_passes"] == 2 * (21 + 1 + 2)
    plain = [{k: v for k, v in logs.items() if "loss" in k} for logs in found["plain"][1]]
    assert plain == [
        {k: v for k, v in logs.items() if "loss" in k} for logs in found["watched"][1] if "loss" in str(logs)
    ]
    curves = training_curves(tmp_path / "watched")  # nothing was saved there
    run.state.save_to_json(str(tmp_path / "watched" / "trainer_state.json"))
    assert curves == {} and training_curves(tmp_path / "watched")["xsam/alpha"][0] == [1, 2, 3, 4, 5, 6]


def test_curves_stand_two_in_a_row_in_the_colours_of_the_other_pictures():
    curves = {f"xsam/{key}": ([1, 2], [0.5, 1.0]) for key in ("alpha", "angle", "grad_norm_first")}
    figure = pictures.draw_curves({"SGD": {}, "SAM": curves, "XSAM": {"xsam/alpha": ([1], [1.0])}})
    grid = figure.axes[0].get_gridspec()
    assert (len(figure.axes), grid.nrows, grid.ncols) == (3, 2, 2)
    assert [line.get_color() for line in figure.axes[0].lines] == COLORS[1:3]  # SGD, which logs nothing, has the first
    assert [axes.get_ylabel() for axes in figure.axes[:2]] == ["position on the arc, α", "angle ψ, radians"]


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of a small GPT-2, and batches for it."""
    folder = tmp_path_factory.mktemp("files")
    tiny_gpt2(layers=1).save_pretrained(folder / "gpt2")
    ids = torch.stack([Tokens()[i]["input_ids"] for i in range(8)])
    save_file({"input_ids": ids, "labels": ids.clone()}, folder / "data.safetensors")
    return folder


QUICK = ["--batch_size", "4", "--batches", "2", "--samples", "3", "--directions", "2", "--eigenvalues", "1"]


def test_report_is_one_page_and_nothing_is_measured_twice(files, tmp_path, capsys, monkeypatch):
    common = [f"A={files / 'gpt2'}", "--data", str(files / "data.safetensors"), *QUICK, "--output_dir", str(tmp_path)]
    main(["report", *common])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6 and "http" not in page and "nan" not in page
    assert {path.stem for path in tmp_path.glob("*.svg")} == {path.stem for path in tmp_path.glob("A/*.json")}
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| λ₁ "))
    assert float(row.strip("| ").split("|")[1]) > 0
    monkeypatch.setattr(Surface, "moving", None)
    main(["hessian", *common])
    assert row.split() == next(
        line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("| λ₁ ")
    )
    main(["hessian", *common, "--rho", "0.3", "--samples", "4"])  # settings of other measures
    with pytest.raises(TypeError):  # with other settings of its own it is measured again
        main(["hessian", *common, "--seed", "1"])
    # So is a model with the same weights and another loss.
    config = json.loads((files / "gpt2" / "config.json").read_text())
    shutil.copytree(files / "gpt2", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(TypeError):
        main(["hessian", f"A={tmp_path / 'other'}", *common[1:]])


def test_the_file_of_the_trainer_imports_what_lies_beside_it(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_trainer.py").write_text("NAME = 'as for a script'\n")
    (tmp_path / "mine.py").write_text(
        "from beside_the_trainer import NAME\n\n\ndef build(checkpoint):\n    raise ValueError(NAME)\n"
    )
    with pytest.raises((ValueError, SystemExit), match="as for a script"):
        main(["arc", str(files / "gpt2"), "--trainer", f"{tmp_path}/mine.py:build"])


BUILD = """
import torch
from toys import Tokens, XSAMTrainer, arguments, tiny_gpt2
from safetensors.torch import load_file


def build(checkpoint):
    model = tiny_gpt2(layers=1)
    {change}
    return XSAMTrainer(model=model, args=arguments("unused"), train_dataset=Tokens())
"""
LOADS = "model.load_state_dict(load_file(f'{checkpoint}/model.safetensors'), strict=False)"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A run, its last checkpoint, which is the same, an earlier one; the same weights in several files and in one of another dtype."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = tiny_gpt2(layers=1)
    model.save_pretrained("run")
    shutil.copytree("run", "run/checkpoint-2")
    tiny_gpt2(layers=1).half().save_pretrained("half")
    tiny_gpt2(layers=1).half().float().save_pretrained("several", max_shard_size="20kB")
    with torch.no_grad():
        model.transformer.wpe.weight.add_(0.1)
    model.save_pretrained("run/checkpoint-1")
    for name, change in (("ignores", "pass"), ("loads", LOADS)):
        Path(f"{name}.py").write_text(BUILD.format(change=change))
    return ["--trainer", "loads.py:build", *QUICK, "--output_dir", "out"]


@pytest.mark.parametrize("command", ["hessian", "report"])
def test_a_trainer_that_does_not_load_the_folder_is_refused(runs, command):
    runs[1] = "ignores.py:build"
    with pytest.raises(
        ValueError, match="^run and run/checkpoint-1 hold different weights, and ignores.py:build built the same model"
    ):
        main([command, "x=run", "y=run/checkpoint-1", *runs])


@pytest.mark.parametrize("other", ["run", "run/checkpoint-2", "run/checkpoint-1"])
def test_a_trainer_that_loads_the_folder_is_not(runs, other, monkeypatch):
    monkeypatch.setattr(built.logger, "warning", pytest.fail)
    main(["hessian", "x=run", f"y={other}", *runs])
    same = [json.loads(Path(f"out/{name}/hessian.json").read_text())["of"] for name in "xy"]
    assert (same[0] == same[1]) == (other != "run/checkpoint-1")


def test_the_same_weights_in_other_files_are_the_same(runs):
    assert len(list(Path("several").glob("*.safetensors"))) > 1
    runs[1] = "ignores.py:build"
    main(["hessian", "x=several", "y=half", *runs])  # hold the same weights, and the same model is built of both


def test_a_model_with_other_weights_than_its_folder_is_warned_of(runs, monkeypatch):
    said = []
    monkeypatch.setattr(built.logger, "warning", said.append)
    runs[1] = "ignores.py:build"
    main(["hessian", "run", *runs])
    assert not said  # it is what it would have loaded
    main(["hessian", "run/checkpoint-1", *runs])
    assert said == [
        "ignores.py:build built a model whose 'transformer.wpe.weight' is not that of run/checkpoint-1: is it to load the folder that it is given?"
    ]


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_is_kept_by_the_settings_that_it_looks_at(name):
    looked_at = set()

    class Watched(Settings):
        def __getattribute__(self, of):
            looked_at.add(of)
            return super().__getattribute__(of)

    settings = Watched(samples=2, directions=2, eigenvalues=1)
    looked_at.clear()
    model = tiny_gpt2(layers=1)
    ids = torch.stack([Tokens()[i]["input_ids"] for i in range(4)])
    MEASURES[name].take(model, [{"input_ids": ids, "labels": ids}], settings)
    assert looked_at & {field.name for field in dataclasses.fields(Settings)} == set(MEASURES[name].settings)


class Touch:
    """A pickle of it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("arc", "Give one or more checkpoints"),
        ("toy {gpt2}", "takes no checkpoint"),
        ("arc nowhere --data {data}", "There is no folder nowhere"),
        ("arc {gpt2}", "Say what to measure the loss on"),
        ("arc {gpt2} --data {data} --trainer a.py:f", "in one way"),
        ("arc {gpt2} --data {gpt2}/config.json", "cannot be read as safetensors"),
        ("arc {gpt2} --data {data} --batches 90", "8 examples, and 90 batches of 32"),
        ("arc {gpt2} --data {data} --batch_size 0", "1 at least"),
        ("arc {gpt2} --data {data} --batch_size 4 --batches 1 --rho 0", "`rho` is 0"),
        (
            "hessian {gpt2} --data {data} --batch_size 4 --batches 1 --hessian_method exact",
            "autograd, finite_difference",
        ),
        ("arc {gpt2} {gpt2} --data {data}", "same name"),
        ("arc {gpt2} --trainer nowhere.py:build", "a file that is there"),
        ("arc {gpt2} --trainer {data}:build", "a file that is there"),
        ("arc {gpt2} --trainer {mine}:build", "has to take one argument, the checkpoint's path: too many"),
        (
            "arc {run} --data {data}",
            "run is no checkpoint but holds some: give one of them, such as .*checkpoint-10[.]",
        ),
        ("landscape {gpt2} --data {data} --samples 0", "`samples` is 0: give a whole number, 2 or more"),
        ("arc ../a={gpt2} --data {data}", "'../a' is to name a folder"),
        ("arc ..={gpt2} --data {data}", "'..' is to name a folder"),
        ("arc arc.svg={gpt2} --data {data}", "'arc.svg' is to name a folder"),
        ("gain {gpt2} --data {data} --rho -0.1", "`rho` is -0.1: give a length above 0"),
        ("gain {gpt2} --data {data} --rho nan", "`rho` is nan"),
        ("gain {gpt2} --data {data} --rho_max 0", "`rho_max` is 0.0: give a length above 0"),
        (
            "hessian {gpt2} --data {data} --seed 1180591620717411303424",
            "`seed` is 1180591620717411303424: give a whole",
        ),
        ("hessian {gpt2} --dat {data}", "There is no flag --dat"),
        (
            "hessian {gpt2} --data {data} --output_dir {data}",
            "`output_dir` is .*data.safetensors, a file: give a folder",
        ),
        ("arc {numbered} --data {data}", "numbered is of no named class"),
        ("arc {cut} --data {data}", "cut holds no checkpoint that can be loaded"),
        ("arc {hostile} --data {data}", "hostile holds a pickle with more than weights in it"),
        ("arc {reshaped} --data {data}", "reshaped (holds no checkpoint that can be loaded|lacks)"),
        ("arc {listed} --data {data}", "no config.json that can be read .it is no JSON object"),
        (
            "arc {gpt2} --data {more} --batch_size 4 --batches 1",
            "more.safetensors has 'sentence', which is no argument of GPT2LM",
        ),
        (
            "arc {gpt2} --data {nan} --batch_size 4 --batches 1",
            "nan.safetensors has numbers that are not finite in 'inputs_embeds'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(files, tmp_path, line, sentence):
    for folder in ("checkpoint-9", "checkpoint-10"):
        (files / "run" / folder).mkdir(parents=True, exist_ok=True)
    (files / "mine.py").write_text("def build(): pass\n")
    for name in ("cut", "hostile", "reshaped", "listed", "numbered"):
        shutil.copytree(files / "gpt2", files / name, dirs_exist_ok=True)
    whole = (files / "gpt2" / "model.safetensors").read_bytes()
    (files / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (files / "hostile" / "model.safetensors").unlink(missing_ok=True)
    torch.save({"weight": Touch(str(tmp_path / "executed"))}, files / "hostile" / "pytorch_model.bin")
    config = json.loads((files / "gpt2" / "config.json").read_text())
    (files / "reshaped" / "config.json").write_text(json.dumps({**config, "n_positions": config["n_positions"] + 1}))
    (files / "listed" / "config.json").write_text("[]")
    (files / "numbered" / "config.json").write_text(json.dumps({**config, "architectures": 5}))
    ids = torch.zeros(4, 3, dtype=torch.int64)
    save_file({"input_ids": ids, "sentence": ids.clone()}, files / "more.safetensors")
    save_file({"inputs_embeds": torch.full((4, 3), torch.nan), "labels": ids}, files / "nan.safetensors")
    names = {"gpt2": "gpt2", "data": "data.safetensors", "run": "run", "mine": "mine.py", "cut": "cut"}
    names |= {
        "reshaped": "reshaped",
        "listed": "listed",
        "hostile": "hostile",
        "numbered": "numbered",
        "more": "more.safetensors",
        "nan": "nan.safetensors",
    }
    argv = line.format(**{name: files / file for name, file in names.items()}).split()
    with pytest.raises(ValueError, match=sentence):
        main(argv if "--output_dir" in argv else [*argv, "--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [lambda ids: ids.float(), lambda ids: ids.repeat(1, 40)])
def test_batches_that_the_model_cannot_take_are_told(files, tmp_path, change):
    ids = change(load_file(files / "data.safetensors")["input_ids"])
    save_file({"input_ids": ids, "labels": ids.clone()}, tmp_path / "data.safetensors")
    argv = [f"{files / 'gpt2'}", "--data", str(tmp_path / "data.safetensors"), *QUICK]
    with pytest.raises(ValueError, match="gpt2 cannot take the batches .*: give `--data` of the types and lengths"):
        main(["gain", *argv, "--output_dir", str(tmp_path / "out")])


def test_the_weights_of_an_adapter_are_its_own(files, tmp_path):
    base = GPT2LMHeadModel.from_pretrained(files / "gpt2")
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    )
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(files / "gpt2")})
    )
    data = str(files / "data.safetensors")
    assert len(load(str(tmp_path), data, None, 4, 2)[1]) == 2
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name.replace("c_attn", "c_proj"): w for name, w in weights.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="lacks 2 of the weights of the adapter .*c_attn.* would be random"):
        load(str(tmp_path), data, None, 4, 2)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="no adapter_config.json that can be read .it is no JSON object"):
        load(str(tmp_path), data, None, 4, 2)


@pytest.mark.parametrize(
    "model, name, wrong, words",
    [
        ("gpt2", "input_ids", 40, "40 tokens in its vocabulary, from 0 to 39"),
        ("gpt2", "labels", -1, "40 tokens in its vocabulary, from 0 to 39"),
        ("classifier", "labels", 2, "2 labels, from 0 to 1"),
    ],
)
def test_ids_that_the_model_does_not_know_are_refused(files, tmp_path, model, name, wrong, words):
    if model == "classifier":
        config = GPT2Config.from_pretrained(files / "gpt2", pad_token_id=0)
        GPT2ForSequenceClassification(config).save_pretrained(files / model)
    batch = load_file(files / "data.safetensors")
    if model == "classifier":
        batch["labels"] = torch.zeros(8, dtype=torch.int64)
    else:
        batch["labels"][:, :3] = -100  # left out by the loss, and no id
    checkpoint, file = str(files / model), str(tmp_path / "a.safetensors")
    save_file(batch, file)
    assert len(load(checkpoint, file, None, 4, 2)[1]) == 2
    batch[name][5] = wrong
    save_file(batch, file)
    with pytest.raises(ValueError, match=f"a.safetensors has the id {wrong} in `{name}`, and .*{model} has {words}"):
        load(checkpoint, file, None, 4, 2)


def test_what_the_extra_brings_is_named_where_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "xsam_hf.analysis.measures", None)
    with pytest.raises(ImportError, match=r"pip install 'xsam_hf\[analysis\]'"):
        main(["toy"])


def lengths(name, call):
    """What is refused of one length, and one that is not."""
    return [(partial(call, wrong), f"`{name}` is {wrong}") for wrong in (0.0, -0.1, math.nan, math.inf)] + [
        (partial(call, 0.1), None)
    ]


def several(name, call):
    """The same of several lengths."""
    wrong = [
        (partial(call, [0.1, one]), f"`{name}` has {one}: give lengths") for one in (0.0, -0.1, math.nan, math.inf)
    ]
    return [*wrong, (partial(call, []), f"`{name}` is empty: give one length"), (partial(call, [0.1]), None)]


def counts(name, least, call):
    """The same of a number of things."""
    return [
        *((partial(call, wrong), f"`{name}` (is )?{wrong}") for wrong in (least - 1, least - 5)),
        (partial(call, least), None),
    ]


@pytest.mark.parametrize("call, sentence", [
    *lengths("rho", lambda x: ascent_sharpness(Surface(Bowl(), BATCHES), x)),
    *lengths("rho", lambda x: m_sharpness(Bowl(), BATCHES, x)),
    *lengths("rho", lambda x: plane(Surface(Bowl(), BATCHES), x, samples=2)),
    *lengths("radius", lambda x: plane(Surface(Bowl(), BATCHES), 0.1, radius=x, samples=2)),
    *lengths("reach", lambda x: landscape(Surface(Bowl(), BATCHES), reach=x, samples=2)),
    *several("rhos", lambda x: direction_gain(Bowl(), BATCHES, x, [0.1])),
    *several("distances", lambda x: direction_gain(Bowl(), BATCHES, [0.1], x)),
    *several("radii", lambda x: average_sharpness(Surface(Bowl(), BATCHES), x, 1)),
    *counts("samples", 2, lambda n: landscape(Surface(Bowl(), BATCHES), samples=n)),
    *counts("samples", 2, lambda n: plane(Surface(Bowl(), BATCHES), 0.1, samples=n)),
    *counts("steps", 1, lambda n: ascent_sharpness(Surface(Bowl(), BATCHES), 0.1, n)),
    *counts("trace_products", 0, lambda n: hessian_spectrum(Surface(Bowl(), BATCHES), 1, trace_products=n)),
    *counts("count", 1, lambda n: hessian_spectrum(Surface(Bowl(), BATCHES), n, trace_products=0)),
    (lambda: direction_gain(Bowl(), BATCHES, [0.1], [0.1], []), "`alphas` is ..: give one finite number or more"),
    (lambda: direction_gain(Bowl(), BATCHES, [0.1], [0.1], [math.nan]), "`alphas` is .nan.: give"),
    (lambda: direction_gain(Bowl(), [], [0.1], [0.1]), "There is no batch"),
    (lambda: m_sharpness(Bowl(), [], 0.1), "There is no batch"),
])  # fmt: skip
def test_numbers_that_measure_nothing_are_refused(call, sentence):
    if sentence is None:
        call()
        return
    with pytest.raises(ValueError, match=sentence):
        call()


def test_no_batch_and_fewer_are_not_taken(tmp_path):
    trainer = build(tmp_path)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"`count` is {wrong}: give a whole number, 1 or more"):
            batches_of(trainer, wrong)
    assert len(batches_of(trainer, 1)) == 1


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        Surface(Bowl(), [])
    with pytest.raises(ValueError, match="is nan"), Surface(Bowl(w=[math.nan] * 6), BATCHES).moving():
        pass
    with pytest.raises(ValueError, match="follows the gradients of earlier updates"):
        arc_profile(Surface(Bowl(), BATCHES), XSAMArguments(perturbation="stale"))
    with (
        pytest.raises(ValueError, match="no loss for these batches"),
        Surface(nn.Linear(1, 1), [{"input": torch.ones(1, 1)}]).moving(),
    ):
        pass
    with pytest.raises(ValueError, match="no measure 'sharp'"):
        SharpnessCallback(None, measures=["sharp"])
    for changes in ({"every": 2.5}, {"every": 0}, {"batches": 0}, {"directions": 1.5}):
        ((name, wrong),) = changes.items()
        with pytest.raises(ValueError, match=f"`{name}` is {wrong}: give a whole number, 1 or more"):
            SharpnessCallback(None, **changes)


@pytest.mark.parametrize(
    "measure, message",
    [
        (lambda surface: average_sharpness(surface, radii=0.5), "`radii` is 0.5: give a list of lengths above 0"),
        (lambda surface: average_sharpness(surface, radii="0.5"), "`radii` is '0.5': give a list of lengths above 0"),
        (lambda surface: average_sharpness(surface, radii=["0.5"]), "`radii` has '0.5': give lengths above 0"),
        (lambda surface: average_sharpness(surface, directions=2.5), "`directions` is 2.5: give a whole number, 1 or"),
        (lambda surface: arc_profile(surface, XSAMArguments(), radii=0.3), "`radii` is 0.3: give a list of lengths"),
        (lambda surface: arc_profile(surface, XSAMArguments(), radii=[]), "`radii` is empty: give one length above 0"),
        (lambda surface: direction_gain(surface.model, BATCHES, 0.1, [1.0]), "`rhos` is 0.1: give a list of lengths"),
        (lambda surface: hessian_spectrum(surface, count=2.5), "`count` is 2.5: give a whole number, 1 or more"),
        (
            lambda surface: hessian_spectrum(surface, trace_products=-1),
            "`trace_products` is -1: give a whole number, 0",
        ),
        (lambda surface: ascent_sharpness(surface, "0.5"), "`rho` is '0.5': give a length above 0"),
        (lambda surface: ascent_sharpness(surface, 0.5, steps=1.5), "`steps` is 1.5: give a whole number, 1 or more"),
        (lambda surface: landscape(surface, samples=5.5), "`samples` is 5.5: give a whole number, 2 or more"),
        (lambda surface: landscape(surface, reach=True), "`reach` is True: give a length above 0"),
    ],
)
def test_lengths_and_counts_that_are_none_are_refused(measure, message):
    with pytest.raises(ValueError, match=message):
        measure(Surface(Bowl(), BATCHES))


@pytest.mark.parametrize(
    "measure, message",
    [
        (lambda: Surface(Bowl(), BATCHES[0]), "`batches` is a dict: give a list of dictionaries"),
        (lambda: Surface(Bowl(), [(torch.ones(3), torch.ones(3))]), "`batches` has a tuple: give a list of"),
        (lambda: hessian_spectrum(Bowl()), "`surface` is a Bowl: give Surface[(]model, batches[)]"),
        (lambda: average_sharpness(Bowl()), "`surface` is a Bowl"),
        (lambda: ascent_sharpness(Bowl(), 0.1), "`surface` is a Bowl"),
        (lambda: landscape(Bowl()), "`surface` is a Bowl"),
        (lambda: plane(Bowl(), 0.1), "`surface` is a Bowl"),
        (lambda: arc_profile(Bowl(), XSAMArguments()), "`surface` is a Bowl"),
        (lambda: arc_profile(Surface(Bowl(), BATCHES), 0.1), "`arguments` is a float: give XSAMArguments[(]rho=0.05"),
    ],
)
def test_what_is_no_surface_is_named(measure, message):
    with pytest.raises(TypeError, match=message):
        measure()


def test_lengths_as_an_array_are_taken():
    surface = Surface(Bowl(), BATCHES)
    lists, arrays = (average_sharpness(surface, radii, directions=2) for radii in ([0.1, 0.5], np.array([0.1, 0.5])))
    assert lists.samples == arrays.samples
    lists, arrays = (arc_profile(surface, XSAMArguments(), radii) for radii in ([0.1, 0.5], np.array([0.1, 0.5])))
    assert lists == arrays


def test_a_callback_of_another_trainer_is_refused(tmp_path):
    trainer, other = build(tmp_path / "a"), build(tmp_path / "b")
    trainer.add_callback(SharpnessCallback(other, every=2))
    with pytest.raises(ValueError, match="made of another trainer, whose model it would measure"):
        trainer.train()
    other.add_callback(SharpnessCallback(other, every=2))
    other.train()
    assert len((tmp_path / "b" / "sharpness.jsonl").read_text().splitlines()) > 0
