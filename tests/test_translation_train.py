"""The task as a command: a small recipe from end to end, in one process and in two, saved, resumed and averaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tasks import recipes
from tasks.translation import train as task
from tasks.translation.averaging import average_checkpoints, check_averaging
from tasks.translation.batches import TokenBatchSampler
from tasks.translation.data import load
from tasks.translation.model import TranslationTransformer


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
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
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


PARALLEL = {"num_train_epochs": 2, "max_tokens": 50, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def two_processes(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("parallel") / "out"
    run(*flags(text, output, **PARALLEL), processes=2)
    return output


def weights(folder):
    return load_file(folder / "model.safetensors")


def difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_processes_equal_one_that_accumulates_their_batches(text, two_processes, tmp_path):
    def alone(name, **changes):
        options = {**PARALLEL, "gradient_accumulation_steps": 2, "save_strategy": "no", "threads": 1, **changes}
        return weights(task.train(*parse(*flags(text, tmp_path / name, **options))).parent)

    corpus = load(parse(*flags(text, tmp_path, **PARALLEL))[0])
    train = corpus.splits["train"]
    sides = [[len(ids) for ids in train[name]] for name in ("input_ids", "labels")]
    batches = len(TokenBatchSampler(*sides, max_tokens=PARALLEL["max_tokens"], seed=42))
    assert batches % 2 == 0 and batches >= 6  # an odd number would be cut otherwise for two
    states = [json.loads((two_processes / "trainer_state.json").read_text())]
    one = alone("one")
    states.append(json.loads((tmp_path / "one" / "trainer_state.json").read_text()))
    assert [state["global_step"] for state in states] == [batches, batches]  # two epochs of half as many updates
    found = weights(two_processes)
    assert difference(found, one) <= 1e-6
    # The same sentences in another order, and half of them at a time, are other trainings.
    assert difference(found, alone("another order", data_seed=7)) > 1e-3
    assert difference(found, alone("half the batch", gradient_accumulation_steps=1, max_steps=batches)) > 1e-3


def test_two_processes_train_to_the_same_weights_as_they_do_when_resumed(text, two_processes, tmp_path):
    checkpoint = two_processes / "checkpoint-2"
    assert 0 < json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] < 1  # in the middle of the first
    run(*flags(text, tmp_path, **PARALLEL, resume_from_checkpoint=checkpoint), processes=2)
    assert difference(weights(two_processes), weights(tmp_path)) == 0
    files = [(folder / "test.hypotheses.txt").read_text() for folder in (two_processes, tmp_path)]
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
    average_checkpoints(model, tmp_path, [9, 10, 110], 2)
    for name, tensor in model.state_dict().items():
        if name in state:
            torch.testing.assert_close(tensor, state[name] + 2.5, rtol=0, atol=1e-5)
    assert model.model.decoder.output_projection.weight is model.model.decoder.embed_tokens.weight
    with pytest.raises(ValueError, match="`average_checkpoints` is 4, but .* holds 3 checkpoints of this run"):
        average_checkpoints(model, tmp_path, [8, 9, 10, 110], 4)  # that of step 8 was deleted


def averaged(text, output, **changes):
    """The weights of a run in this process that averages its last two checkpoints, and the mean of those of some steps."""
    task.train(*parse(*flags(text, output, average_checkpoints=2, threads=1, **changes)))

    def mean(*steps):
        states = [weights(output / f"checkpoint-{step}") for step in steps]
        return {name: sum(state[name].double() for state in states).float() / len(steps) for name in states[0]}

    return weights(output), mean


def test_the_average_is_of_this_runs_checkpoints_alone(text, tmp_path):
    stale = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1, "max_steps": 8}
    task.train(*parse(*flags(text, tmp_path, threads=1, **stale)))
    shutil.rmtree(tmp_path / "checkpoint-4")  # the new run writes 2, 4 and 6 beside 1, 3, 5, 7 and 8
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    found, mean = averaged(text, tmp_path, **options)
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")} == set(range(1, 9))
    assert difference(found, mean(4, 6)) == 0
    assert difference(found, mean(7, 8)) > 1e-3 and difference(found, mean(5, 6)) > 1e-3
    # Resumed, it goes on with the checkpoints that it had, and with no others.
    resumed, mean = averaged(text, tmp_path, **options, resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert difference(resumed, found) == 0
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed, mean = averaged(text, tmp_path, **options, resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert difference(resumed, found) == 0


def test_too_few_checkpoints_at_the_end_leave_the_model_saved(text, tmp_path, monkeypatch):
    options = {"average_checkpoints": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "threads": 1}
    real = task.TranslationTrainer.train

    def with_a_lost_checkpoint(trainer, **kwargs):
        real(trainer, **kwargs)
        shutil.rmtree(tmp_path / "checkpoint-2")

    monkeypatch.setattr(task.TranslationTrainer, "train", with_a_lost_checkpoint)
    with pytest.raises(ValueError, match="`average_checkpoints` is 2, but .* holds 1 checkpoints of this run"):
        task.train(*parse(*flags(text, tmp_path, **options)))
    assert difference(weights(tmp_path), weights(tmp_path / "checkpoint-4")) == 0
    assert (tmp_path / "dict.de.txt").is_file()


@pytest.mark.parametrize(
    "enough, changes, words",
    [
        ({}, {"save_strategy": "no"}, "`save_strategy` is no"),
        ({"save_total_limit": 3}, {"save_total_limit": 2}, "`save_total_limit` is 2: raise it to 3"),
        (
            {"save_total_limit": 4, "load_best_model_at_end": True, "eval_strategy": "epoch"},
            {"save_total_limit": 3},
            "`save_total_limit` is 3: raise it to 4",
        ),
        ({"num_train_epochs": 2.5}, {"num_train_epochs": 2}, "the run saves 2 checkpoints"),
        ({"save_strategy": "steps", "max_steps": 21, "save_steps": 10}, {"max_steps": 20}, "saves 2 checkpoints"),
        ({"save_strategy": "steps", "save_steps": 0.4}, {"save_steps": 0.5}, "saves 2 checkpoints"),
    ],
)
def test_an_average_of_more_checkpoints_than_there_will_be_is_refused_before_anything_is_read(
    enough, changes, words, tmp_path
):
    base = {"num_train_epochs": 3, **enough}
    check_averaging(3, parse(*flags("nowhere", tmp_path, **base))[1])
    arguments, training = parse(*flags("nowhere", tmp_path, **{**base, **changes}, average_checkpoints=3))
    check_averaging(0, training)
    with pytest.raises(ValueError, match=f"`average_checkpoints` is 3, but .*{words}"):
        task.train(arguments, training)


def test_the_best_model_is_the_checkpoint_of_the_highest_validation_bleu(text, tmp_path, monkeypatch):
    bleu = iter([10.0, 30.0, 20.0])  # and the loss falls all the time
    real = task.metrics.score
    scripted = lambda *rows: ({**dict.fromkeys(task.metrics.NAMES, 1.0), "bleu_tokenised": next(bleu, 0.0)}, real(*rows)[1])  # noqa: E731  # fmt: skip
    monkeypatch.setattr(task.metrics, "score", scripted)
    options = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "bleu_tokenised"}
    options |= {"greater_is_better": True, "num_train_epochs": 3, "threads": 1}
    task.train(*parse(*flags(text, tmp_path, **options)))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    checkpoints = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found = [difference(weights(tmp_path), weights(checkpoint)) for checkpoint in checkpoints]
    assert found[1] == 0 and found[0] > 1e-4 and found[2] > 1e-4


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
