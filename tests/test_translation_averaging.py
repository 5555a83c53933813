"""The mean of the last checkpoints, and the best of them: of this run, and not of another in the same folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from translation_toys import difference, flags, parse, weights, write_word_for_word

from tasks.translation import train as task
from tasks.translation.averaging import average_checkpoints, check_averaging
from tasks.translation.model import build


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_word_for_word(tmp_path_factory.mktemp("text"))


def test_the_average_is_the_mean_of_the_last_checkpoints(tmp_path):
    model = build("transformer-small", 16, 16)
    model.save_pretrained(tmp_path)
    state = weights(tmp_path)
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


def averaged(text, output, count=2, **changes):
    """The weights of a run in this process that averages its last checkpoints, and the mean of those of some steps."""
    task.train(*parse(*flags(text, output, average_checkpoints=count, threads=1, **changes)))

    def mean(*steps):
        states = [weights(output / f"checkpoint-{step}") for step in steps]
        return {name: (sum(state[name].double() for state in states) / len(steps)).float() for name in states[0]}

    return weights(output), mean


def test_the_average_is_of_this_runs_checkpoints_alone(text, tmp_path, monkeypatch):
    # Nor does the task begin in such a folder: see test_runs.py.
    monkeypatch.setattr(task.runs, "refuse_other_runs", lambda *arguments: None)
    stale = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1, "max_steps": 8}
    task.train(*parse(*flags(text, tmp_path, threads=1, **stale)))
    shutil.rmtree(tmp_path / "checkpoint-4")  # the new run writes 2, 4 and 6 beside 1, 3, 5, 7 and 8
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    found, mean = averaged(text, tmp_path, **options)
    assert {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")} == set(range(1, 9))
    assert difference(found, mean(4, 6)) == 0
    assert difference(found, mean(7, 8)) > 1e-3 and difference(found, mean(5, 6)) > 1e-3
    # Resumed, it goes on with the checkpoints that it had, and with no others.
    resumed, mean = averaged(text, tmp_path, 3, **options, resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert difference(resumed, mean(2, 4, 6)) == 0 and difference(resumed, mean(3, 4, 6)) > 1e-3


def test_a_checkpoint_with_other_weights_is_not_averaged(text, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    averaged(text, tmp_path, **options)
    shutil.copy(tmp_path / "checkpoint-4" / "model.safetensors", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-2/model.safetensors is not the one that was saved in this"):
        averaged(text, tmp_path, **options, resume_from_checkpoint=tmp_path / "checkpoint-4")


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
