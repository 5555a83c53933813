"""What trackers are told: every number of an update under `train/xsam/`, at its step."""

import sys

import pytest
from toys import train
from transformers import TrainerCallback
from transformers.integrations.integration_utils import rewrite_logs


KEYS = {
    f"train/xsam/{name}"
    for name in (
        "alpha",
        "alpha_at_edge",
        "angle",
        "curvature_share",
        "grad_norm_first",
        "grad_norm_last",
        "passes",
        "search_gain",
        "search_noise",
        "sharpness",
    )
}


def test_all_that_is_logged_is_a_number_under_one_name(tmp_path):
    told = {}

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told[state.global_step] = told.get(state.global_step, {}) | rewrite_logs(logs)

    train(tmp_path, rho=0.3, callbacks=[Reporter()], max_steps=3)
    assert list(told) == [1, 2, 3]
    for entries in told.values():
        assert {name for name in entries if "xsam" in name} == KEYS
        # TensorBoard takes no tensors and no NumPy numbers.
        assert all(type(entries[name]) is float for name in KEYS)


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (file.parent for file in folder.rglob("events.out.tfevents.*"))
    found = EventAccumulator(str(events)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def wandb(folder):
    run = sys.modules["wandb"].run
    found = dict(run.summary)  # the last values
    run.finish()
    assert any(folder.rglob("*.wandb"))
    return {tag: [(found["train/global_step"], value)] for tag, value in found.items()}


def trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("huggingface")
    found = {}
    for entry in SQLiteStorage.get_logs("huggingface", run):
        for name, value in entry.items():
            found.setdefault(name, []).append((entry.get("train/global_step"), value))
    return found


@pytest.mark.parametrize("read", [tensorboard, wandb, trackio], ids=lambda read: read.__name__)
def test_the_trackers_have_what_was_logged(tmp_path, monkeypatch, read):
    """Each is tried where it is installed; none is needed for the rest."""
    name = read.__name__
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip(name)
    run = train(tmp_path / "run", rho=0.3, report_to=name, max_steps=3)
    found = read(tmp_path)
    assert {tag for tag in found if "xsam" in tag} == KEYS
    history = [entry for entry in run.state.log_history if "loss" in entry]
    for tag in KEYS:
        logged = [(entry["step"], entry[tag.removeprefix("train/")]) for entry in history]
        assert len(logged) == 3 and logged[-1][0] == 3
        if name == "wandb":
            logged = logged[-1:]
        assert [step for step, _ in found[tag]] == [step for step, _ in logged]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in logged], rel=1e-6), tag
