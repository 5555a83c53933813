"""Promise 4: a run resumed at any step equals the uninterrupted one, bit for bit, α and its searches included."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import Classifier, Points, arguments, train, weights_of
from transformers import Trainer

from xsam_hf import XSAMTrainer
from xsam_hf.trainer.callback import XSAMCallback
from xsam_hf.trainer.checkpoint import load_average, save_average


STEPS = 12  # 3 epochs of 4 updates
SETTINGS = {
    "num_train_epochs": 3,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "cosine",
    "save_strategy": "steps",
    "save_steps": 1,
    "rho": 0.5,
}
VARIANTS = {
    "every epoch": {},
    "every 5 updates": {"alpha_search_steps": 5},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ascent_steps": 2},
    "vasso": {"perturbation": "vasso"},
    "stale": {"perturbation": "stale"},
    "fsam, schedule": {"perturbation": "fsam", "sharpness_start": 0.2, "sharpness_every": 2, "direction": "msam+"},
    "schedule, fraction": {"sharpness_every": 3, "ascent_fraction": 0.5},
    "micro": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ascent_scope": "micro"},
}


def model():
    return Classifier(dropout=0.3, batch_norm=True)


def searches(directory):
    lines = (directory / "xsam_search.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", params=VARIANTS)
def whole(request, tmp_path_factory):
    """The uninterrupted run, which saves at every step."""
    directory = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    run = train(directory, model(), **SETTINGS, **VARIANTS[request.param])
    return directory, run, VARIANTS[request.param]


@pytest.mark.parametrize("restore_flag", [False, True])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_at_every_step_is_bitwise(tmp_path, whole, step, restore_flag):
    directory, uninterrupted, variant = whole
    checkpoint = directory / f"checkpoint-{step}"
    # The killed run had gone on: its file holds later searches, and a line that the kill cut off.
    (tmp_path / "xsam_search.jsonl").write_text((directory / "xsam_search.jsonl").read_text() + '{"step": 3, "al')
    run = train(
        tmp_path,
        model(),
        resume=str(checkpoint),
        restore_callback_states_from_checkpoint=restore_flag,
        **{**SETTINGS, "save_strategy": "no"},
        **variant,
    )
    assert run.state.global_step == STEPS
    for name, value in uninterrupted.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name
    assert run._xsam_callback.xsam == uninterrupted._xsam_callback.xsam
    ours, theirs = (r._xsam_callback.xsam.average for r in (run, uninterrupted))
    assert bool(ours) == (variant.get("perturbation") in ("vasso", "fsam", "stale"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert searches(tmp_path) == searches(directory)
    assert sum(isinstance(c, XSAMCallback) for c in run.callback_handler.callbacks) == 1


def test_the_test_would_notice_a_lost_alpha(tmp_path, whole):
    directory, uninterrupted, variant = whole
    if "sharpness_every" in variant:
        return  # no α, or a new one is searched before the saved one is used
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(directory / "checkpoint-6", checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["XSAMCallback"]["attributes"]["xsam"]
    assert saved["alpha"] == next(line["alpha"] for line in reversed(searches(directory)) if line["step"] < 6)
    saved["alpha"] = 0.3
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    run = train(tmp_path, model(), resume=str(checkpoint), **{**SETTINGS, "save_strategy": "no"}, **variant)
    assert not torch.equal(weights_of(run), weights_of(uninterrupted))


def test_the_test_would_notice_a_lost_average(tmp_path):
    whole = train(tmp_path / "whole", model(), **SETTINGS, perturbation="vasso")
    file = tmp_path / "whole" / "checkpoint-5" / "xsam_state.safetensors"
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}, file)
    run = train(tmp_path / "again", model(), resume=str(file.parent), **SETTINGS, perturbation="vasso")
    assert not torch.equal(weights_of(run), weights_of(whole))


def test_a_lost_average_is_refused(tmp_path):
    settings = {**SETTINGS, **VARIANTS["vasso"]}
    train(tmp_path, model(), **settings)
    file = tmp_path / "checkpoint-5" / "xsam_state.safetensors"
    whole = load_file(file)
    for damage, words in (
        (lambda: file.unlink(), "is missing or lacks"),
        (lambda: save_file({k: t for k, t in whole.items() if k != "first.bias"}, file), "lacks 1 of 6 averages"),
        (lambda: file.write_bytes(b"12345678{"), "xsam_state.safetensors is damaged"),
    ):
        damage()
        with pytest.raises(ValueError, match=f"{words}.* resume from another checkpoint"):
            train(tmp_path / "again", model(), resume=str(file.parent), **settings)


def test_a_checkpoint_of_ours_that_lacks_our_state_is_refused(tmp_path):
    train(tmp_path, model(), **SETTINGS)
    file = tmp_path / "checkpoint-5" / "trainer_state.json"
    whole = json.loads(file.read_text())

    def resume_without(change):
        state = json.loads(json.dumps(whole))
        change(state["stateful_callbacks"])
        file.write_text(json.dumps(state))
        train(tmp_path / "again", model(), resume=str(file.parent), **SETTINGS)

    for change, words in (
        (
            lambda callbacks: callbacks.pop("XSAMCallback"),
            "was written by XSAM, and its trainer_state.json lacks XSAM's own state",
        ),
        (
            lambda callbacks: callbacks["XSAMCallback"]["attributes"]["xsam"].pop("alpha"),
            "lacks alpha of XSAM's own state",
        ),
        (lambda callbacks: callbacks["XSAMCallback"].pop("attributes"), "lacks alpha, .* of XSAM's own state"),
    ):
        with pytest.raises(ValueError, match=words):
            resume_without(change)
    resume_without(lambda callbacks: None)


def test_averages_of_other_weights_are_refused(tmp_path):
    train(tmp_path, model(), **SETTINGS, perturbation="vasso")
    weights = {**dict(model().named_parameters()), "first.weight": torch.zeros(2, 2)}
    with pytest.raises(
        ValueError,
        match="xsam_state.safetensors belongs to another model, in which 'first.weight' .* the run that wrote it",
    ):
        load_average(tmp_path / "checkpoint-5", weights)
    del weights["first.weight"]
    with pytest.raises(ValueError, match="'first.weight'"):
        load_average(tmp_path / "checkpoint-5", weights)


def test_another_perturbations_average_is_refused(tmp_path):
    train(tmp_path, model(), **SETTINGS, max_steps=2, perturbation="vasso")
    checkpoint = str(tmp_path / "checkpoint-2")
    for other in ("fsam", "stale"):
        with pytest.raises(ValueError, match=f"`perturbation` is '{other}', .* was made by 'vasso'"):
            train(tmp_path / "again", model(), resume=checkpoint, **SETTINGS, perturbation=other)
    train(tmp_path / "again", model(), resume=checkpoint, **SETTINGS, perturbation="sam")  # which has none


def test_averages_of_weights_that_are_not_perturbed_any_more_stay_as_they_are(tmp_path):
    train(tmp_path, model(), **SETTINGS, perturbation="vasso")
    saved = load_average(tmp_path / "checkpoint-5", dict(model().named_parameters()))
    run = train(tmp_path / "again", model(), resume=str(tmp_path / "checkpoint-5"), **SETTINGS, perturbation="vasso", rho_exclude=["first"])  # fmt: skip
    average = run._xsam_callback.xsam.average
    assert {name for name in saved if torch.equal(saved[name], average[name])} == {"first.weight", "first.bias"}


def test_a_dozen_averages_come_back_each_to_its_weight(tmp_path):
    average = {f"layer.{i}": torch.full((2,), float(i)) for i in range(12)}
    save_average(average, tmp_path, write=True)
    again = load_average(tmp_path, dict(reversed(average.items())))
    assert again.keys() == average.keys() and all(torch.equal(again[name], average[name]) for name in average)


def test_a_checkpoint_of_the_plain_trainer_can_be_continued_and_saved(tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key != "rho"}
    train(tmp_path, model(), trainer=Trainer, **settings)
    run = train(tmp_path, model(), resume=str(tmp_path / "checkpoint-6"), **SETTINGS)
    assert run.state.global_step == STEPS
    assert [line["step"] for line in searches(tmp_path)] == [6, 8]  # at once, for there is no α yet, then every epoch
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["XSAMCallback"]["attributes"]["xsam"]["updates"] == STEPS


def test_a_checkpoint_of_ours_can_be_continued_by_the_plain_trainer(tmp_path):
    train(tmp_path, model(), **SETTINGS)
    settings = {key: value for key, value in SETTINGS.items() if key != "rho"}
    for flag in (False, True):
        run = train(
            tmp_path,
            model(),
            trainer=Trainer,
            resume=str(tmp_path / "checkpoint-6"),
            restore_callback_states_from_checkpoint=flag,
            **settings,
        )
        assert run.state.global_step == STEPS


def test_rho_zero_resumes_as_the_plain_trainer_does(tmp_path):
    settings = {**SETTINGS, "rho": 0.0}
    whole = train(tmp_path / "whole", model(), **settings)
    again = train(tmp_path / "again", model(), resume=str(tmp_path / "whole" / "checkpoint-5"), **settings)
    assert torch.equal(weights_of(whole), weights_of(again))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    run = train(tmp_path, model(), **SETTINGS)
    again = XSAMTrainer(model=model(), args=arguments(tmp_path, **SETTINGS), train_dataset=Points())
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights_of(run), weights_of(again))
    assert len(searches(tmp_path)) == 3


def test_an_average_of_an_earlier_run_in_the_same_folder_is_not_resumed(tmp_path):
    # With the schedule XSAM is off until the sixth update: no average in checkpoint-4, and none of the first run's stays there.
    late = {**SETTINGS, "perturbation": "vasso", "alpha": 1.0, "sharpness_start": 0.5}
    whole = train(tmp_path / "whole", model(), **late)
    train(tmp_path / "again", model(), **{**late, "sharpness_start": 0.0, "max_steps": 5})
    assert (tmp_path / "again" / "checkpoint-4" / "xsam_state.safetensors").is_file()
    train(tmp_path / "again", model(), **late)
    assert not (tmp_path / "again" / "checkpoint-4" / "xsam_state.safetensors").exists()
    resumed = train(tmp_path / "again", model(), resume=str(tmp_path / "again" / "checkpoint-4"), **late)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    # `rho` 0 is a run without one too.
    train(tmp_path / "again", model(), **{**late, "rho": 0.0})
    assert not list((tmp_path / "again").glob("checkpoint-*/xsam_state.safetensors"))


def test_an_average_outlasts_a_checkpoint_between_two_ascents(tmp_path):
    settings = {**SETTINGS, "perturbation": "vasso", "sharpness_every": 4}
    whole = train(tmp_path / "whole", model(), **settings)
    # Resumed at 5, saved at 6 before the next ascent, resumed there.
    train(tmp_path / "again", model(), resume=str(tmp_path / "whole" / "checkpoint-5"), **settings)
    resumed = train(tmp_path / "more", model(), resume=str(tmp_path / "again" / "checkpoint-6"), **settings)
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_an_average_of_another_checkpoint_is_refused(tmp_path):
    settings = {**SETTINGS, "max_steps": 6}
    for name in ("vasso", "stale", "sam"):
        train(tmp_path / name, model(), **settings, perturbation=name)
    file = tmp_path / "vasso" / "checkpoint-5" / "xsam_state.safetensors"
    whole = file.read_bytes()

    def resume(name, other):
        at = tmp_path / name / "checkpoint-5"
        if other is not None:
            shutil.copy(other, at / file.name)
        return train(tmp_path / "again", model(), resume=str(at), **settings, perturbation=name)

    for name, other, sentence in (
        (
            "vasso",
            tmp_path / "vasso" / "checkpoint-4" / file.name,
            "says `update` 4, and trainer_state.json beside it 5",
        ),
        (
            "vasso",
            tmp_path / "stale" / "checkpoint-5" / file.name,
            "says `perturbation` stale, and .* beside it vasso",
        ),
        ("sam", tmp_path / "vasso" / "checkpoint-4" / file.name, "has 6 averages, of which .* counts 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            resume(name, other)
    file.write_bytes(whole)
    resume("vasso", None)
    save_file(load_file(file), file)  # as earlier versions wrote it
    resume("vasso", None)
