"""Top-1 and top-5 accuracy and cross-entropy of logits, as a metric module for `evaluate.load`: no hub is asked."""

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax


class TopKAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Shares of examples whose label has the highest, or one of the five highest, logits; mean cross-entropy.",
            citation="",
            inputs_description="predictions: logits (N, classes); references: labels (N,)",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        logits, labels = np.array(predictions, dtype=np.float64), np.array(references)
        rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)  # labels ahead of the right one
        return {
            "accuracy": float((rank < 1).mean()),
            "top5_accuracy": float((rank < 5).mean()),
            # Without label smoothing, whatever training uses.
            "loss": float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()),
        }
