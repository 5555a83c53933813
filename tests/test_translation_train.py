"""The task as a command: a small recipe from end to end, in one process and in two, saved, resumed and averaged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tasks import recipes
from tasks.translation import train as task
from tasks.translation.data import load
from tasks.translation.model import TranslationTransformer
from tasks.translation.trainer import average_checkpoints


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "tasks" / "translation" / "recipes").glob("*.yaml"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def parse(*argv):
    return recipes.parse((task.TranslationArguments, task.TrainingArguments), [str(a) for a in argv], "")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sixty short pairs of a toy language, word for word, raw text."""
    folder = tmp_path_factory.mktemp("text")
    words = [("rot", "red"), ("grün", "green"), ("Haus", "house"), ("Baum", "tree"), ("alt", "old")]
    rows = [[words[(i * k) % 5] for k in range(1, 3 + i % 4)] for i in range(60)]
    for side, language in enumerate(("de", "en")):
        lines = [" ".join(pair[side] for pair in row) + " ." for row in rows]
        for name, part in (("train", slice(40)), ("valid", slice(40, 50)), ("test", slice(50, 60))):
            (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines[part]))
    return folder


def flags(text, output, **changes):
    values = {
        "dataset": text, "output_dir": output, "bpe_merges": 30, "max_tokens": 100, "dropout": 0.0, "num_train_epochs": 2,
        "rho": 0.05, "optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": 1e-3, "use_cpu": True, "report_to": "none",
        "save_strategy": "epoch", "generation_num_beams": 2, "per_device_eval_batch_size": 4, "label_smoothing_factor": 0.1,
        "disable_tqdm": True, **changes,
    }  # fmt: skip
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def run(*arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29561"]
    command = [*launcher, ROOT / "tasks/translation/train.py", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run(*flags(text, output))


def test_a_run_prints_and_leaves_what_it_promises(finished, text):
    output, printed = finished
    result = json.loads((output / "result.json").read_text())
    assert (result["task"], result["method"], result["model"]) == ("translation", "xsam", "transformer-small")
    names = {"bleu_tokenised", "bleu_detokenised", "chrf"}
    for split in ("validation", "test"):
        assert result["metrics"][split].keys() == names | {"loss"} and result["copied_source"][split].keys() == names
        scores = json.loads((output / f"{split}.scores.json").read_text())
        assert {name: row["score"] for name, row in scores.items()} == {n: result["metrics"][split][n] for n in names}
        assert len((output / f"{split}.hypotheses.txt").read_text().splitlines()) == 10
    assert (output / "test.references.txt").read_text() == (text / "test.en").read_text()
    assert result["passes"]["forward"] > result["passes"]["backward"] > 0 and result["signatures"].keys() == names
    assert result["arguments"]["rho"] == 0.05 and result["arguments"]["max_tokens"] == 100
    assert printed.count("  hypothesis  ") == 10 and "test, source copied" in printed
    assert all(signature in printed for signature in result["signatures"].values())


def test_the_saved_model_scores_the_same_when_it_is_given_as_model(finished, text, tmp_path):
    output, _ = finished
    first = json.loads((output / "result.json").read_text())["metrics"]["test"]
    arguments, training = parse(
        *flags(text, tmp_path / "again", model=output, learning_rate=0, rho=0, num_train_epochs=1, save_strategy="no")
    )
    again = json.loads(task.train(arguments, training).read_text())["metrics"]["test"]
    assert again == pytest.approx(first)
    with pytest.raises(ValueError, match=f"`model` {output} has .* tokens, `dataset` .*: give the data"):
        arguments, _ = parse(*flags(text, tmp_path, model=output, bpe_merges=1))
        task.build_model(arguments, load(arguments))


def test_two_processes_train_to_the_same_weights_as_they_do_when_resumed(text, tmp_path):
    options = {"num_train_epochs": 2, "max_tokens": 24, "save_strategy": "steps", "save_steps": 3}
    run(*flags(text, tmp_path / "whole", **options), processes=2)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    steps = json.loads((checkpoints[0] / "trainer_state.json").read_text())
    assert 0 < steps["epoch"] < 1  # in the middle of the first epoch
    run(*flags(text, tmp_path / "resumed", **options, resume_from_checkpoint=checkpoints[0]), processes=2)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    files = [(tmp_path / name / "test.hypotheses.txt").read_text() for name in ("whole", "resumed")]
    assert files[0] == files[1] and len(files[0].splitlines()) == 10


def test_the_average_is_the_mean_of_the_last_checkpoints(finished, tmp_path):
    output, _ = finished
    model = TranslationTransformer.from_pretrained(output)
    state = {name: tensor.clone() for name, tensor in load_file(output / "model.safetensors").items()}
    for step, shift in ((9, 100.0), (10, 1.0), (110, 4.0)):  # by number, not by name
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(
            {name: tensor + shift for name, tensor in state.items()},
            tmp_path / f"checkpoint-{step}" / "model.safetensors",
        )
    average_checkpoints(model, tmp_path, 2)
    for name, tensor in model.state_dict().items():
        if name in state:
            torch.testing.assert_close(tensor, state[name] + 2.5, rtol=0, atol=1e-5)
    assert model.model.decoder.output_projection.weight is model.model.decoder.embed_tokens.weight
    with pytest.raises(ValueError, match="`average_checkpoints` is 4, but .* holds 3 checkpoints"):
        average_checkpoints(model, tmp_path, 4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_the_command_line_comes_first(recipe, tmp_path):
    fields = yaml.safe_load(recipe.read_text())
    fields = {name: value for name, value in fields.items() if name not in ("bf16", "fp16")}
    arguments, training = parse(recipe, "--use_cpu", "--output_dir", tmp_path, "--learning_rate", "0.5")
    assert training.learning_rate == 0.5 and str(tmp_path) == training.output_dir
    assert arguments.dataset == fields["dataset"] and training.rho == fields["rho"]
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.98) and training.max_grad_norm == 0


def test_the_papers_recipe_has_the_papers_values(tmp_path):
    arguments, training = parse(
        ROOT / "tasks/translation/recipes/iwslt14-transformer.yaml", "--use_cpu", "--output_dir", tmp_path
    )
    assert (training.rho, training.rho_max, training.weight_decay, training.label_smoothing_factor) == (
        0.15,
        0.45,
        0.3,
        0.1,
    )
    assert (training.num_train_epochs, arguments.max_tokens, training.alpha) == (300, 4096, None)
    assert (training.metric_for_best_model, training.greater_is_better) == ("bleu_tokenised", True)


@pytest.mark.parametrize(
    "flag, value, words",
    [("dropout", 1.0, "`dropout` is 1.0"), ("threads", 0, "`threads` is 0"), ("average_checkpoints", -1, "-1")],
)
def test_values_out_of_range_are_refused_before_anything_is_read(flag, value, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        parse(f"--{flag}", value, "--output_dir", tmp_path, "--use_cpu")
