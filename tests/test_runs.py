"""Whose result, whose checkpoint: a run goes on from its own and takes over nobody else's; and a finished one leaves its result."""

import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from translation_toys import flags as translation_flags
from translation_toys import write_word_for_word

from tasks import checkpoints, command, identity, ignored, recipes, results, runs, secret
from tasks.image_classification import train as images
from tasks.translation import train as translation


ROOT = Path(__file__).parents[1]
SHORT = {
    "max_steps": 4,
    "per_device_train_batch_size": 500,
    "threads": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
SHORT |= {"save_strategy": "steps", "save_steps": 2, "rho": 0.1, "train_examples": 100, "seed": 1}


def parse(output, **changes):
    line = [part for name, value in {**SHORT, **changes}.items() for part in (f"--{name}", str(value))]
    return recipes.parse((images.ImageArguments, images.TrainingArguments), [*line, "--output_dir", str(output)], "")


def train(output, **changes):
    return json.loads(images.train(*parse(output, **changes)).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder)
    return folder


@pytest.fixture
def killed(finished, tmp_path):
    """A run that was killed after its checkpoint of update 2."""
    shutil.copytree(finished / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    return tmp_path / "run"


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_itself_goes_on(finished, killed):
    # What only writes, shows or hurries is not part of what a run is.
    changes = {"resume_from_checkpoint": "true", "logging_steps": 1, "save_total_limit": 1, "eval_strategy": "steps"}
    changes |= {"eval_steps": 2, "per_device_eval_batch_size": 50, "dataloader_num_workers": 1}
    result = train(killed, **changes)
    whole = json.loads((finished / "result.json").read_text())
    assert result["metrics"] == whole["metrics"] and result["identity"] == whole["identity"]


# A field, another value of it, and what the message says of the two.
OTHERS = [
    ({"alpha": 1}, "its `method` is xsam, this one's sam"),
    ({"rho": 0}, "its `method` is xsam, this one's adamw"),
    ({"rho": 0.2}, "its `rho` is 0.1, this one's 0.2"),
    ({"seed": 2}, "its `seed` is 1, this one's 2"),
    ({"train_examples": 101}, "its `train_data` is [0-9a-f]{12}, this one's [0-9a-f]{12}"),
    ({"label_noise": 0.1}, "its `train_data` is "),
    ({"cutout": 2}, "its `cutout` is 0, this one's 2"),
    ({"model": "vit-ti"}, "its `model` is vit-small, this one's vit-ti"),
    ({"dropout": 0.1}, "its `dropout` is 0.0, this one's 0.1"),
    ({"max_steps": 8}, "its `max_steps` is 4, this one's 8"),
    ({"learning_rate": 1e-3}, "its `learning_rate` is 5e-05, this one's 0.001"),
    ({"per_device_train_batch_size": 250}, "its `update_batch` is 500, this one's 250"),
    ({"lr_scheduler_kwargs": '{"num_cycles": 1}'}, "its `lr_scheduler_kwargs` is "),
    (
        {"accelerator_config": '{"use_seedable_sampler": false}'},
        "its `accelerator_config` is None, this one's {'use_seedable_sampler': False}",
    ),
]


@pytest.mark.parametrize("changes, words", OTHERS, ids=lambda case: next(iter(case)) if isinstance(case, dict) else "")
def test_another_run_does_not_go_on_from_there(killed, changes, words):
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    for flag in ("true", str(killed / "checkpoint-2")):
        with pytest.raises(
            ValueError, match=f"`resume_from_checkpoint` .*checkpoint-2 belongs to another run: {words}"
        ):
            train(killed, resume_from_checkpoint=flag, **changes)
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before


def test_the_same_update_batch_may_be_cut_otherwise_but_for_the_micro_scope(killed, tmp_path):
    halves = {"per_device_train_batch_size": 250, "gradient_accumulation_steps": 2}
    train(killed, resume_from_checkpoint="true", **halves)
    micro = tmp_path / "micro"
    train(micro, ascent_scope="micro")
    shutil.rmtree(micro / "checkpoint-4")
    with pytest.raises(ValueError, match="its `micro_batch` is 500, this one's 250"):
        train(micro, ascent_scope="micro", resume_from_checkpoint="true", **halves)


def test_the_micro_batch_matters_where_batch_norm_sees_it(tmp_path):
    """Its statistics are those of a micro-batch."""
    quarters = {"per_device_train_batch_size": 25, "gradient_accumulation_steps": 4}
    normed = {"model": "resnet-small", "per_device_train_batch_size": 100, "max_steps": 2}
    train(tmp_path / "normed", **normed)
    with pytest.raises(ValueError, match="another run: its `micro_batch` is None, this one's 25"):
        train(tmp_path / "normed", resume_from_checkpoint="true", **{**normed, **quarters})
    assert "micro_batch" not in images.prepare(*parse(tmp_path / "vit", **quarters)).identity


def test_a_killed_run_in_the_folder_of_a_finished_one_gets_none_of_its_scores(finished, tmp_path):
    # README's commands with one output_dir for both: the second is killed before it saves, and resumed.
    folder = shutil.copytree(finished, tmp_path / "both")
    with pytest.raises(ValueError, match="`output_dir` .* holds the result.json of another run: its `method` is xsam"):
        train(folder, alpha=1)
    with pytest.raises(ValueError, match="checkpoint-4 belongs to another run: its `method` is xsam, this one's sam"):
        train(folder, alpha=1, resume_from_checkpoint="true")
    (folder / "result.json").unlink()
    with pytest.raises(ValueError, match="`output_dir` .* holds checkpoint-2 of another run: its `method` is xsam"):
        train(folder, alpha=1)
    assert train(folder)["method"] == "xsam"  # the same run may be made again


def test_a_run_that_does_not_say_what_it_is_is_nobodys(finished, killed):
    state = killed / "checkpoint-2" / "trainer_state.json"
    whole = json.loads(state.read_text())
    del whole["stateful_callbacks"]["RunIdentity"]
    state.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="checkpoint-2 belongs to a run that it does not name"):
        train(killed, resume_from_checkpoint="true")
    shutil.rmtree(killed / "checkpoint-2")
    for content in ("{}", "[]", "no json"):
        (killed / "result.json").write_text(content)
        with pytest.raises(ValueError, match="holds the result.json of a run that it does not name"):
            train(killed)


def test_a_field_that_only_one_version_of_transformers_has_counts_with_its_default(tmp_path):
    _, args = parse(tmp_path)
    ours = {"task": "x", "weight_decay": 0.0}
    runs.compare(ours, {"task": "x"}, "", args)
    runs.compare({"task": "x"}, ours, "", args)
    with pytest.raises(ValueError, match="`weight_decay` is 0.0, this one's 0.1"):
        runs.compare({"task": "x", "weight_decay": 0.1}, {"task": "x"}, "", args)


def test_every_field_of_the_trainers_is_material_or_named_as_immaterial(tmp_path):
    task, args = parse(tmp_path)
    whole = identity.identity_of("images", task, args, {})
    for name in (
        "rho",
        "alpha",
        "seed",
        "learning_rate",
        "lr_scheduler_type",
        "optim",
        "max_steps",
        "weight_decay",
        "bf16",
    ):
        assert name in whole
    assert not set(whole) & identity.IMMATERIAL and "hub_token" not in whole


def test_half_precision_that_the_launcher_asks_for_is_a_part_of_the_run(tmp_path, monkeypatch):
    task, args = parse(tmp_path)
    assert "mixed_precision" not in identity.identity_of("images", task, args, {})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` does
    task, args = parse(tmp_path)
    assert not args.bf16 and identity.identity_of("images", task, args, {})["mixed_precision"] == "bf16"


def test_translation_knows_its_text_and_not_its_place(tmp_path):
    text = write_word_for_word(tmp_path_factory_folder(tmp_path, "text"))
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "threads": 1}

    def run(folder, output, **changes):
        line = translation_flags(folder, output, **{**options, **changes})
        parsed = recipes.parse((translation.TranslationArguments, translation.TrainingArguments), line, "")
        return json.loads(translation.train(*parsed).read_text())

    first = run(text, tmp_path / "run")
    moved = shutil.copytree(text, tmp_path / "moved")
    for folder in ("checkpoint-4", "result.json"):
        path = tmp_path / "run" / folder
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(moved, tmp_path / "run", resume_from_checkpoint="true")["metrics"] == first["metrics"]
    lines = (moved / "train.en").read_text().splitlines()
    (moved / "train.en").write_text("\n".join(["green house .", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match="belongs to another run: its `train_data` is"):
        run(moved, tmp_path / "run", resume_from_checkpoint="true")


def tmp_path_factory_folder(path, name):
    (path / name).mkdir()
    return path / name


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_checkpoint_without_a_part_is_refused(killed, part):
    path = killed / "checkpoint-2"
    (path / part).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2 has no {part}: resume from a whole checkpoint, or start anew"):
        train(killed, resume_from_checkpoint=path)


@pytest.mark.parametrize(
    "part", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["cut", "foreign", "flipped"])
def test_a_part_that_is_cut_off_names_itself(killed, part, damage):
    path = killed / "checkpoint-2" / part
    whole = path.read_bytes()
    middle = whole.index(b"PK", len(whole) // 2) - 200 if part.endswith((".pt", ".pth")) else 0
    damaged = {
        "cut": whole[: len(whole) // 2],
        "foreign": b"<html>404</html>",
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"checkpoint-2/{part} is cut off, damaged or another kind of file"):
        train(killed, resume_from_checkpoint=path.parent)


def test_a_checkpoint_whose_writing_was_cut_off_does_not_stand_in_the_way(finished, killed):
    shutil.copytree(killed / "checkpoint-2", killed / "checkpoint-3")
    (killed / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1')
    found = train(killed, resume_from_checkpoint="true")["metrics"]
    assert found == json.loads((finished / "result.json").read_text())["metrics"]


@pytest.mark.parametrize("step", [3, -1, 99, "two", None, True])
def test_a_checkpoint_of_another_step_than_its_folders_is_refused(killed, step):
    file = killed / "checkpoint-2" / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "global_step": step}))
    with pytest.raises(ValueError, match=f"trainer_state.json says update {step}, which is not its folder's"):
        train(killed, resume_from_checkpoint="true")


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_part_of_another_checkpoint_is_refused(finished, killed, part):
    checkpoints.check_digests(killed / "checkpoint-2")
    shutil.copy(finished / "checkpoint-4" / part, killed / "checkpoint-2" / part)
    with pytest.raises(ValueError, match=f"checkpoint-2/{part} is not the one that was saved in this checkpoint"):
        train(killed, resume_from_checkpoint="true")


def without_digests(checkpoint):
    """As a hostile or an older hand would write it."""
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"]["RunIdentity"]["attributes"].pop("parts")
    file.write_text(json.dumps(state))


def test_the_best_checkpoint_holds_what_was_saved_in_it(tmp_path):
    """Its weights are the ones that are kept and scored."""
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 6}
    train(tmp_path, **best)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) in (tmp_path / "checkpoint-2", tmp_path / "checkpoint-4")
    state["best_model_checkpoint"] = str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    shutil.copy(tmp_path / "checkpoint-4" / "model.safetensors", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-2/model.safetensors is not the one that was saved in this"):
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"), **best)


def test_a_checkpoint_that_lacks_a_weight_is_refused_and_one_too_many_is_not_missed(finished, killed):
    without_digests(killed / "checkpoint-2")
    file = killed / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "surplus": torch.zeros(1)}, file, metadata={"format": "pt"})
    name = sorted(weights)[3]
    del weights[name]
    assert (
        train(killed, resume_from_checkpoint="true")["metrics"]
        == json.loads((finished / "result.json").read_text())["metrics"]
    )
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.safetensors lacks {name}, and 1 of .* weights"):
        train(killed, resume_from_checkpoint=str(file.parent))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize("part", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_part_is_refused_in_a_sentence(killed, part, monkeypatch):
    monkeypatch.chdir(killed)
    without_digests(killed / "checkpoint-2")
    torch.save({"state": Hostile()}, killed / "checkpoint-2" / part)
    with pytest.raises(
        ValueError, match="holds more than tensors, or is damaged, and was not loaded: do not use this folder"
    ):
        train(killed, resume_from_checkpoint="true")
    assert not (killed / "hostile-was-here").exists()


def test_xsams_own_state_is_a_part_too(tmp_path):
    train(tmp_path, perturbation="vasso", alpha=1)
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoint-2" / "xsam_state.safetensors").unlink()
    with pytest.raises(ValueError, match="xsam_state.safetensors is missing or lacks 72 of 72 averages"):
        train(tmp_path, perturbation="vasso", alpha=1, resume_from_checkpoint="true")


def test_the_parts_of_two_processes_and_of_a_scaler_are_looked_for(killed, tmp_path, monkeypatch):
    _, args = parse(tmp_path)
    with pytest.raises(ValueError, match="has no scaler.pt"):
        checkpoints.check_parts(killed / "checkpoint-2", args, scaled=True)
    monkeypatch.setattr(images.TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="has no rng_state_0.pth"):
        checkpoints.check_parts(killed / "checkpoint-2", args)


@pytest.mark.parametrize("flag", ["nowhere", "yes", "checkpoint-2"])
def test_what_to_resume_from_must_be_there(tmp_path, flag):
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` is {flag}, which is no folder"):
        train(tmp_path, resume_from_checkpoint=flag)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        train(tmp_path, resume_from_checkpoint="true")


def test_what_would_end_a_run_later_is_refused_before(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            ValueError, match=f"`output_dir` is {folder}, and {tmp_path / 'file'} is a file: give a folder"
        ):
            train(folder)
    with pytest.raises(ValueError, match="`output_dir` is .*, which cannot be written to .*: give another"):
        train("/proc/nowhere")
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    with pytest.raises(
        ValueError, match="`metric_for_best_model` is bleu: choose one of accuracy, top5_accuracy, loss"
    ):
        train(tmp_path / "run", metric_for_best_model="bleu", **options)
    assert train(tmp_path / "run", metric_for_best_model="eval_top5_accuracy", **options)["diverged"] is False


@pytest.mark.parametrize("delay, said", [(100, 1), (0, 0)])
def test_a_best_model_that_no_evaluation_chose_is_told(tmp_path, monkeypatch, delay, said):
    told = []
    monkeypatch.setattr(runs.logger, "warning", told.append)
    train(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, eval_delay=delay)
    assert [text.startswith("`load_best_model_at_end` is True, and no evaluation") for text in told] == [True] * said


def test_a_training_without_a_single_batch_is_refused(tmp_path):
    """transformers ends it at step 0 with a warning, and the scores would be those of random weights."""
    with pytest.raises(
        ValueError, match="`dataloader_drop_last` is True, and all training examples together do not fill one batch"
    ):
        train(tmp_path, dataloader_drop_last=True)
    assert not (tmp_path / "result.json").exists()
    assert train(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=100)["passes"]["backward"] == 8


def test_the_last_batch_is_dropped_in_training_and_never_in_a_score(tmp_path):
    settings = {"per_device_train_batch_size": 100, "save_strategy": "no"}
    whole, dropped = (
        train(tmp_path / name, dataloader_drop_last=True, per_device_eval_batch_size=size, **settings)
        for name, size in (("whole", 1), ("dropped", 7))
    )
    for split, scores in whole["metrics"].items():
        assert dropped["metrics"][split]["accuracy"] == pytest.approx(scores["accuracy"], abs=1e-9)
    assert dropped["arguments"]["dataloader_drop_last"]


def test_a_best_model_that_nothing_would_tell_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`load_best_model_at_end` is True, but `eval_strategy` is no"):
        train(tmp_path, load_best_model_at_end=True, save_strategy="no")


@pytest.mark.parametrize(
    "optim, given, ignored",
    [
        ("adamw_torch", "lr=5.0", "lr=5.0"),
        ("sgd", "momentun=0.9", "momentun=0.9"),
        ("sgd", "momentum=0.9, lr=1", "lr=1"),
        ("sgd", "weight_decay=0.5", "weight_decay=0.5"),
        ("sgd", "momentum=0.9,nesterov=Ture", "nesterov=Ture"),
        ("rmsprop", "centred=true", "centred=true"),
    ],
)
def test_what_the_optimizer_would_not_be_told_is_refused(tmp_path, optim, given, ignored):
    with pytest.raises(
        ValueError, match=f"`optim_args` is {given}, of which {optim} does not take {ignored}: leave it out"
    ):
        train(tmp_path, optim=optim, optim_args=given)


def test_an_argument_of_the_optimizer_that_is_no_number_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="`optim` sgd with `optim_args` momentum=abc: could not convert string to float: 'abc'"
    ):
        train(tmp_path, optim="sgd", optim_args="momentum=abc")


@pytest.mark.parametrize(
    "schedule, given, words",
    [
        (
            "linear",
            {"num_cycles": 3},
            "and `lr_scheduler_type` linear does not take it .*unexpected keyword argument 'num_cycles'",
        ),
        ("cosine", {"num_cycles": "x"}, "and `lr_scheduler_type` cosine does not take it"),
        ("constant", {"num_cycles": 3}, "and `lr_scheduler_type` constant reads none: leave it out"),
        ("constant_with_warmup", {"num_cycles": 3}, "and `lr_scheduler_type` constant_with_warmup reads none"),
    ],
)
def test_what_the_schedule_would_not_be_told_is_refused(tmp_path, schedule, given, words):
    with pytest.raises(ValueError, match=f"`lr_scheduler_kwargs` is {given}, {words}"):
        train(tmp_path, lr_scheduler_type=schedule, lr_scheduler_kwargs=json.dumps(given))


def test_what_nothing_reads_is_warned_of(tmp_path, monkeypatch):
    def told(**changes):
        said = []
        monkeypatch.setattr(ignored.logger, "warning", said.append)
        task, args = parse(tmp_path, **changes)
        ignored.check(images.prepare(task, args).trainer)
        return said

    adam = {"adam_beta1": 0.5, "adam_epsilon": 0.1}
    assert not told(**adam, asam_eta=0.5, perturbation="asam", lr_scheduler_type="cosine", warmup_steps=2)
    assert not told(lr_scheduler_type="cosine", lr_scheduler_kwargs='{"num_cycles": 3}')
    assert told(optim="adamw_torch", optim_target_modules=["attention"]) == [
        "`optim_target_modules` is ['attention'], and `optim` adamw_torch does not read it."
    ]
    assert told(**adam, optim="sgd", asam_eta=0.5, lr_scheduler_type="constant", warmup_steps=2) == [
        "`adam_beta1` is 0.5, and `optim` sgd does not read it.",
        "`adam_epsilon` is 0.1, and `optim` sgd does not read it.",
        "`warmup_steps` is 2.0, and `lr_scheduler_type` constant does not read it.",
    ]
    assert told(direction="lsam", ascent_steps=1) == [
        "With one ascent step `direction` lsam is SAM: give `ascent_steps` 2 or more."
    ]
    assert not told(direction="lsam+", ascent_steps=1) and not told(direction="msam", ascent_steps=2)


@pytest.mark.parametrize("given", ["beta=1,,x", "momentum", "=0.9"])
def test_arguments_of_the_optimizer_have_a_name_and_a_value(tmp_path, given):
    with pytest.raises(ValueError, match="`optim_args` is .* is not of the form name=value"):
        train(tmp_path, optim="sgd", optim_args=given)


@pytest.mark.parametrize("name, value", [("eval_steps", 0.0), ("eval_delay", -3.0)])
def test_an_evaluation_that_never_was_meant_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        parse(tmp_path, **{name: value})


def test_half_precision_that_a_cpu_passes_over_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`fp16` is True, and a CPU would go on in float32"):
        train(tmp_path, fp16=True)


def test_a_full_disk_is_told_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    for error in (SafetensorError("I/O error: No space left on device"), RuntimeError("PytorchStreamWriter failed")):

        def main(argv, error=error):
            raise error

        with pytest.raises(SystemExit) as ended:
            command.run(main)
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"error: a file could not be read or written ({error}): is it damaged, or the disk full?\n"  # fmt: skip
    with pytest.raises(RuntimeError, match="another"):
        command.run(lambda argv: (_ for _ in ()).throw(RuntimeError("another")))


def test_what_the_optimizer_is_told_changes_the_run(tmp_path):
    given = {"optim": "sgd", "max_steps": 2, "learning_rate": 0.1, "save_strategy": "no"}
    plain = train(tmp_path / "plain", **given)
    told = train(tmp_path / "told", optim_args="momentum=0.9,nesterov=yes", **given)
    assert plain["metrics"] != told["metrics"]


# --- a run that diverged ---------------------------------------------------------------------------------------------


def test_a_run_that_diverged_says_so_and_scores_nothing(tmp_path, capsys):
    result = train(tmp_path, learning_rate=1e30, rho=0, optim="sgd", max_grad_norm=0)
    assert result["diverged"] is True
    for split in ("validation", "test"):
        assert result["metrics"][split] == {"accuracy": 0.0, "top5_accuracy": 0.0, "loss": None}
    assert (
        "The run diverged, and its scores mean nothing: the final loss is validation nan, test nan."
        in capsys.readouterr().err
    )
    assert "NaN" not in (tmp_path / "result.json").read_text()
    # Its log shows where.
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any(
        math.isnan(value) for entry in history for name, value in entry.items() if name in ("loss", "train_loss")
    )


def test_a_run_that_did_not_diverge_says_that(finished):
    assert json.loads((finished / "result.json").read_text())["diverged"] is False


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_names_that_say_secret():
    secrets = (
        "hub_token",
        "push_to_hub_token",
        "api_key",
        "key",
        "--hub-token",
        "wandb_api_key",
        "password",
        "client_secret",
        "HF_TOKEN",
    )
    assert all(map(secret.is_secret, secrets))
    harmless = (
        "max_tokens",
        "keyboard",
        "monkey",
        "metric_for_best_model",
        "tokenizer",
        "include_num_input_tokens_seen",
        "keys",
    )
    assert not any(map(secret.is_secret, harmless))


def test_secrets_in_mappings_and_on_command_lines_are_replaced_by_their_names():
    found = secret.without_secrets(
        {"a": 1, "hub_token": "s3", "b": {"api_key": "s3", "c": [{"password": "s3"}]}, "key": None}
    )
    assert found == {
        "a": 1,
        "hub_token": "<hub_token>",
        "b": {"api_key": "<api_key>", "c": [{"password": "<password>"}]},
        "key": None,
    }
    line = ["--rho", "1", "--hub_token", "s3", "--hub-token=s3", "--max_tokens", "5", "--api_key", "--seed", "1"]
    shown = [
        "--rho",
        "1",
        "--hub_token",
        "<hub_token>",
        "--hub-token=<hub-token>",
        "--max_tokens",
        "5",
        "--api_key",
        "--seed",
        "1",
    ]
    assert secret.without_secret_flags(line) == shown


def test_a_token_is_in_no_file_of_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "another")
    train(tmp_path, hub_token="hf_s3cret", resume_from_checkpoint="false")
    assert os.environ["HF_TOKEN"] == "hf_s3cret"  # where the hub's client looks for it
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"result.json", "README.md", "training_args.bin"} <= {path.name for path in written}
    for path in written:
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        assert not any(b"hf_s3cret" in content for content in contents), path
    assert "hf_s3cret" not in "".join(capfd.readouterr())


def test_other_secrets_are_in_no_result_either(tmp_path, monkeypatch):
    real = images.TrainingArguments.to_dict
    monkeypatch.setattr(images.TrainingArguments, "to_dict", lambda args: {**real(args), "some_api_key": "s3cret"})
    result = train(tmp_path)
    assert result["arguments"]["some_api_key"] == "<some_api_key>" and "some_api_key" not in result["identity"]
    assert "s3cret" not in (tmp_path / "result.json").read_text()


def test_a_result_holds_the_tasks_arguments_and_the_trainers_without_secrets(tmp_path):
    @dataclass
    class Task:
        dataset: str = "digits"
        api_key: str = "s3cret"

    args = parse(tmp_path, hub_strategy="end")[-1]
    args.hub_token = "hf_s3cret"
    trainer = SimpleNamespace(args=args)
    path = results.write_result(trainer, results.CostMeter(), Task(), {}, metrics={"test": {"loss": 1.0}})
    found = json.loads(path.read_text())["arguments"]
    assert found["dataset"] == "digits" and found["api_key"] == "<api_key>"
    assert found["hub_strategy"] == "end" and found["hub_token"] == "<hub_token>" and found["rho"] == 0.1
    assert "s3cret" not in path.read_text()


# --- the result is always left ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_word_for_word(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("task", ["image_classification", "translation"])
def test_a_finished_training_leaves_its_result_wherever_it_runs(tmp_path, text, task):
    """Without git, without the metadata of a package, with caches that cannot be written to, in an ASCII locale."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.metadata as m\nreal = m.version\n"
        "def version(name):\n    if name == 'xsam_hf': raise m.PackageNotFoundError(name)\n    return real(name)\n"
        "m.version = version\n"
    )
    (tmp_path / "file").write_text("")
    blocked = str(tmp_path / "file" / "cache")  # a folder that nobody can make, root included
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))},
        **dict.fromkeys(("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "XDG_CACHE_HOME"), blocked),
        "MPLCONFIGDIR": blocked, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": str(hidden),
        "PYTHONPATH": f"{hidden}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    output = tmp_path / "grün"
    if task == "translation":
        line = translation_flags(text, output, max_steps=2, save_strategy="no")
    else:
        line = [part for name, value in SHORT.items() for part in (f"--{name}", str(value))] + [
            "--output_dir",
            str(output),
        ]
    command = [sys.executable, "-m", f"tasks.{task}.train", *line]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((output / "result.json").read_text())
    assert (
        result["git_commit"] is None and result["versions"]["xsam_hf"] is None and result["versions"]["transformers"]
    )
    assert result["metrics"]["test"]["loss"] > 0


def test_a_commit_is_known_in_a_checkout(tmp_path, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    assert len(results.git_commit().removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", str(tmp_path))
    assert results.git_commit() is None


def test_numbers_that_json_has_no_word_for_are_null():
    assert results._finite({"a": [1.5, math.nan], "b": {"c": -math.inf}, "d": "nan", "e": 3}) == {
        "a": [1.5, None], "b": {"c": None}, "d": "nan", "e": 3,
    }  # fmt: skip


def test_a_saved_model_that_lacks_weights_is_refused(text, tmp_path):
    def run(**changes):
        line = translation_flags(text, tmp_path / "again", max_steps=1, save_strategy="no", **changes)
        return recipes.parse((translation.TranslationArguments, translation.TrainingArguments), line, "")

    task, args = run()
    args.output_dir = str(tmp_path / "first")
    translation.train(task, args)
    saved = tmp_path / "first"
    file = saved / "model.safetensors"
    whole = load_file(file)
    for change, words in (
        (
            lambda: save_file(
                {k: t for k, t in whole.items() if "layers.0.fc1.bias" not in k}, file, {"format": "pt"}
            ),
            "layers.0.fc1.bias",
        ),
        (lambda: file.write_bytes(file.read_bytes()[:1000]), "holds no model of this task"),
        (lambda: file.unlink(), "holds no model of this task"),
        (
            lambda: (saved / "config.json").write_text('{"model_type": "vit"}'),
            "its config.json is of a model of type vit, not fsmt",
        ),
        (lambda: (saved / "config.json").write_text("{"), "holds no model of this task"),
    ):
        change()
        with pytest.raises(ValueError, match=words):
            translation.train(*run(model=saved))
    assert torch.isfinite(whole["model.encoder.layers.0.fc1.bias"]).all()
