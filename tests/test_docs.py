"""The documentation: its Python examples run, its accelerate configs are what they say, and its other facts hold."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import free_port

from tasks.methods import METHODS, flags
from xsam_hf import XSAMArguments, XSAMState, xsam_gradient
from xsam_hf.analysis.checkpoint import load_batches


DOCS = Path(__file__).parents[1] / "docs"
SCRIPTS = Path(__file__).parents[1] / "scripts"
EXAMPLES = {
    page.stem: found
    for page in sorted(DOCS.glob("*.md"))
    if (found := re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
}


def read(page):
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def learns_and_searches(trainer, **_):
    history = trainer.state.log_history
    assert [entry["xsam/passes"] for entry in history if "loss" in entry] == [2.0] * 4
    assert history[-1]["eval_accuracy"] > 0.8


def train(seen, state, told, **_):
    assert seen.loss < 0.4 and state.updates == 5 * 8 + 4 + 8 + 1
    assert 0.9 < told["cosine"] < 1 < told["length"]


def trains_adapters_by_sam(trainer, **_):
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["xsam/alpha"] == 1 and entry["xsam/sharpness"] > 0 for entry in logs)
    assert all("lora_" in name for name, weight in trainer.model.named_parameters() if weight.requires_grad)


def excludes_all_but_the_norms(norms_alone, **_):
    (pattern,) = norms_alone.rho_exclude
    names = ["layer.0.LayerNorm.weight", "layernorm_before.bias", "norm.weight", "query.weight", "classifier.bias"]
    assert [bool(re.search(pattern, name)) for name in names] == [False, False, False, True, True]


def races_each_rho_once(best, rhos, found, tried, **_):
    assert tried[0] == 0  # the plain epoch before the range test
    assert sorted(tried[1:]) == rhos == [found.rho / 2, found.rho, 2 * found.rho]
    assert best.hyperparameters["rho"] in rhos and best.objective > 0


def shows_what_is_reported(saved, loaded, fresh, refused, whole, goes_on, taken, wordpiece, bytes_in_pairs, **_):
    assert torch.equal(loaded, fresh) and not torch.equal(loaded, saved)
    assert "half/checkpoint-4" in str(refused)
    assert not torch.equal(whole, goes_on)
    assert set(taken) == {"lr", "betas", "eps"} and taken["betas"] == (0.9, 0.999)
    assert wordpiece > 1 == bytes_in_pairs


def writes_batches_that_can_be_read(**_):
    batches = load_batches(Path("batches.safetensors"), batch_size=32, batches=4)
    assert [batch["labels"].shape for batch in batches] == [(32,)] * 4


# What a page's examples take for granted.
TRAINER = """
from toys import Classifier, Points, arguments
from xsam_hf import XSAMTrainer
args = arguments("runs", rho=0.0, max_steps=2, eval_strategy="steps", eval_steps=2)
trainer = XSAMTrainer(model_init=lambda: Classifier(), args=args, train_dataset=Points(128), eval_dataset=Points())
"""
TRIED = """
from transformers import TrainerCallback
tried = []
class Tried(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        tried.append(args.rho)
trainer.add_callback(Tried())
"""
GIVEN = {"analysis": TRAINER, "choosing_rho": TRAINER + TRIED}

CHECKS = {
    "analysis": writes_batches_that_can_be_read,
    "quick_start": learns_and_searches,
    "loops": train,
    "language_models": trains_adapters_by_sam,
    "methods": excludes_all_but_the_norms,
    "choosing_rho": races_each_rho_once,
    "upstream": shows_what_is_reported,
}


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(monkeypatch, tmp_path, page):
    module = ModuleType(f"docs_{page}")  # importable, since the Trainer pickles its arguments' class
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for example in [GIVEN.get(page, ""), *EXAMPLES[page]]:
        exec(compile(example, f"docs/{page}.md", "exec"), module.__dict__)
    if page in CHECKS:
        CHECKS[page](**vars(module))


def test_the_tests_that_pages_name_are_there():
    files = {file.name: file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py")}
    tests = set(re.findall(r"^ *def (test_\w+)", "".join(files.values()), re.MULTILINE))
    for page in sorted(DOCS.glob("*.md")):
        text = read(page.stem)
        assert {name for name in re.findall(r"\btest_\w+\.py\b", text)} <= files.keys(), page
        for name, more in re.findall(r"::(test_\w+)(\*?)", text):
            assert name in tests or more and any(test.startswith(name) for test in tests), f"{page}: {name}"
    # What a resumed run owes to its data, with the proof.
    assert "test_augmentation_from_the_processs_stream_" in read("compatibility")


def test_there_are_examples():
    assert set(CHECKS) <= set(EXAMPLES)


def test_the_methods_page_has_every_method_with_its_fields():
    section = read("methods").partition("## Where they climb")[0]
    rows = dict(re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE))
    for name, fields in METHODS.items():
        (row,) = (row for row in rows if f"`{name}`" in row)
        for field, value in fields.items():
            value = f'"{value}"' if isinstance(value, str) else f"{value:g}"
            assert f"`{field}={value}`" in rows[row] or f"`{value}`" in rows[row], flags(name)


def test_gains_are_those_of_the_results():
    results = (DOCS.parent / "RESULTS.md").read_text(encoding="utf-8")
    gains = re.findall(r"\d+\.\d+ ± \d+\.\d+", read("methods") + read("troubleshooting"))
    assert len(gains) == 2 and all(gain in results for gain in gains)
    deviations = [
        float(found)
        for found in re.findall(
            r"^\| [\w.-]+ +\| [\d.]+ ± ([\d.]+)",
            results.partition("residual CNN, SGD")[2].partition("###")[0],
            re.MULTILINE,
        )
    ]
    told = re.search(r"standard deviation of ([\d.]+) to ([\d.]+) points", read("troubleshooting"))
    assert told.groups() == (f"{min(deviations):.1f}", f"{max(deviations):.1f}") and len(deviations) == 7
    shares = re.search(r"a tenth of the batch kept (\d+) %.*?stale\s+ascent (\d+) %", read("methods"), re.DOTALL)
    (fraction,), (stale,) = (
        re.findall(rf"^\| {name} .*?\((\d+)%\)", results, re.MULTILINE) for name in ("fraction.1", "stale-sam")
    )
    assert shares.groups() == (fraction, stale)


@pytest.mark.parametrize("adaptive", [False, True])
def test_migrating_gives_the_gradient_of_the_other_sam(adaptive):
    # As davda54/sam and pytorch_optimizer define it: ε = ρ w² g/‖w g‖ if adaptive, and ρ g/‖g‖ otherwise.
    torch.manual_seed(0)
    matrix, w = torch.randn(5, 5), torch.randn(5, requires_grad=True)

    def gradient():
        loss = (matrix @ w).square().sum().sqrt() + w.pow(4).sum()
        loss.backward()
        return loss.detach()

    gradient()
    scale = w.detach().abs() if adaptive else torch.ones(5)
    step = 0.3 * scale**2 * w.grad / (scale * w.grad).norm()
    w.grad = None
    with torch.no_grad():
        w += step
    gradient()
    expected, w.grad = w.grad, None
    with torch.no_grad():
        w -= step
    fields = dict(
        re.findall(
            r"`(perturbation|asam_eta|asam_scope)=\"?([\w.]+)\"?`", read("migrating").partition("ASAM's authors")[0]
        )
    )
    fields["asam_eta"] = float(fields["asam_eta"])
    arguments = XSAMArguments(rho=0.3, alpha=1.0, **(fields if adaptive else {}))
    xsam_gradient({"w": w}, gradient, lambda: None, arguments, XSAMState())
    assert torch.allclose(w.grad, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name, processes, expected",
    [
        ("ddp", 8, {}),
        ("fsdp2", 8, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        ("fsdp2_64_gpus", 64, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        (
            "hsdp",
            16,
            {
                "FSDP_VERSION": "2",
                "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
                "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
            },
        ),
        ("tp_fsdp2", 8, {"PARALLELISM_CONFIG_TP_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}),
    ],
)
def test_accelerate_takes_the_configs(name, processes, expected):
    file = str(SCRIPTS / "accelerate" / f"{name}.yaml")
    # Another launcher of this machine may be at the default port.
    line = ["--config_file", file, "--main_process_port", f"{free_port()}", "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    environment = prepare_multi_gpu_env(args)
    replicated = name in ("ddp", "tp_fsdp2")
    assert args.num_processes == processes and args.multi_gpu == replicated and args.use_fsdp != replicated
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16" and expected.items() <= environment.items()
    assert ("PARALLELISM_CONFIG_DP_SHARD_SIZE" in environment) == (name in ("hsdp", "tp_fsdp2"))


def test_every_config_is_tested_and_told_of():
    names = {file.stem for file in (SCRIPTS / "accelerate").glob("*.yaml")}
    assert names == {"ddp", "fsdp2", "fsdp2_64_gpus", "hsdp", "tp_fsdp2", "zero2", "zero3"}
    assert all(f"../scripts/accelerate/{name}.yaml" in read("several_gpus") for name in names)
