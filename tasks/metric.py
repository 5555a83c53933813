"""The metrics of `evaluate`, computed without a cache."""

from __future__ import annotations

import tempfile

import evaluate


def compute(metric: type[evaluate.Metric], **columns) -> dict:
    """
    What a metric makes of predictions and references, in memory.

    `evaluate.load` copies the metric's module and keeps a folder in the user's cache; where it cannot be written to, that would
    cost a finished training its scores.
    """
    with tempfile.TemporaryDirectory() as folder:
        return metric(keep_in_memory=True, cache_dir=folder).compute(**columns)
