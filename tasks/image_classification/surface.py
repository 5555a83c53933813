"""
What `python -m xsam_hf.analysis` needs to look at a run of this task: its model, and the images and labels that it was trained on.

    python -m xsam_hf.analysis report SGD=runs/.../checkpoint-680 XSAM=runs/.../checkpoint-680 \\
        --trainer tasks/image_classification/surface.py:build
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import TrainingArguments

from tasks import checkpoints
from tasks.image_classification import data, models
from tasks.runs import RESULT
from xsam_hf import XSAMTrainer


def build(checkpoint: str) -> XSAMTrainer:
    """
    A trainer with a checkpoint's weights and the training images of its run, wrong labels included.

    Raises:
        `ValueError`: the folder is no checkpoint of this task.
    """
    of = checkpoints.identity_of(Path(checkpoint))
    if of is None or of.get("task") != "image_classification":
        raise ValueError(f"{checkpoint} is no checkpoint of tasks.image_classification: train with a `save_strategy`.")
    splits = data.load(
        of["dataset"],
        _data_dir(Path(checkpoint)),
        of["validation_share"],
        of["cutout"],
        of["seed"],
        train_examples=of["train_examples"],
        label_noise=of["label_noise"],
        no_aug=bool(of.get("no_aug")),
        **{name: of.get(name) for name in ("cutout_probability", "random_erasing", "padding_mode")},
    )
    model = models.build(of["model"], of["dataset"])
    model.load_state_dict(load_file(Path(checkpoint) / "model.safetensors"))
    args = TrainingArguments(
        output_dir=str(Path(checkpoint).parent),
        per_device_train_batch_size=of["update_batch"],
        seed=of["seed"],
        label_smoothing_factor=of["label_smoothing_factor"],
        report_to="none",
    )
    return XSAMTrainer(model=model, args=args, train_dataset=splits["train"])


def _data_dir(checkpoint: Path) -> str | None:
    """Where the local copy of the data lay, as a finished run tells; a checkpoint does not know. Else the hub, or scikit-learn."""
    results = [
        folder / RESULT for folder in (checkpoint, checkpoint.parent)
    ]  # the run's own folder is a checkpoint too
    for result in filter(Path.is_file, results):
        return json.loads(result.read_bytes())["arguments"].get("data_dir")
    return None
