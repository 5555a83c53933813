"""Top-1 and top-5 accuracy and cross-entropy of logits, as a metric module for `evaluate.load`: no hub is asked."""

import datasets
import evaluate
import numpy as np
from scipy.special import log_softmax


class TopKAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Shares of examples whose label's logit is above all others, or above all but four; mean cross-entropy. "
            "Ties and logits that are not finite count as wrong.",
            citation="",
            inputs_description="predictions: logits (N, classes); references: labels (N,)",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        logits, labels = np.array(predictions, dtype=np.float64), np.array(references)
        right = logits[np.arange(len(labels)), labels]
        # Labels that are not behind the right one: all of them in a row of equal logits, as of a model that knows nothing.
        rank = (logits >= right[:, None]).sum(axis=1) - 1
        rank[~np.isfinite(logits).all(axis=1)] = 5  # a comparison with NaN is false
        return {
            "accuracy": float((rank < 1).mean()),
            "top5_accuracy": float((rank < 5).mean()),
            # Without label smoothing, whatever training uses.
            "loss": float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean()),
        }
