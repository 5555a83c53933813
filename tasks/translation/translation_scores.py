"""A metric for `evaluate.load`: BLEU in fairseq's and in sacreBLEU's convention, and chrF, each with its signature."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF


_DESCRIPTION = """
`bleu_tokenised`: fairseq's convention, on tokenised lower-case text with BPE removed. Not comparable between tokenisations.
`bleu_detokenised`: sacreBLEU's own tokenisation of running text, without regard to case. `chrf`: on the same text.
"""


class TranslationScores(evaluate.Metric):
    """
    Corpus scores of one hypothesis against one reference each, in percent.

    Args of `compute`:
        predictions, references (`list[str]`): running text.
        tokenised_predictions, tokenised_references (`list[str]`): the same, tokenised and in lower case, without BPE.

    Returns:
        `dict`: `bleu_tokenised`, `bleu_detokenised`, `chrf`, and the signature of each under its name + `_signature`.
    """

    def _info(self):
        names = ("predictions", "references", "tokenised_predictions", "tokenised_references")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="https://aclanthology.org/W18-6319",
            features=datasets.Features({name: datasets.Value("string") for name in names}),
        )

    def _compute(self, predictions, references, tokenised_predictions, tokenised_references):
        # Without smoothing, as fairseq: a corpus without any 4-gram in common scores 0.
        tokenised = BLEU(tokenize="none", smooth_method="none", force=True)
        running = {"bleu_detokenised": BLEU(lowercase=True), "chrf": CHRF(lowercase=True)}
        scores = {"bleu_tokenised": tokenised.corpus_score(tokenised_predictions, [tokenised_references]).score}
        scores |= {name: m.corpus_score(predictions, [references]).score for name, m in running.items()}
        metrics = {"bleu_tokenised": tokenised, **running}
        return scores | {f"{name}_signature": str(metric.get_signature()) for name, metric in metrics.items()}
