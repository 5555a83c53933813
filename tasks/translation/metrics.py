"""Scores of translations, and the files that they can be checked with."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from transformers import EvalPrediction

from tasks import metric
from tasks.files import write_whole
from tasks.translation.corpus import Corpus
from tasks.translation.text import join_subwords
from tasks.translation.translation_scores import TranslationScores


NAMES = {
    "bleu_tokenised": "as fairseq-generate counts, tokenised lower-case text, BPE removed",
    "bleu_detokenised": "sacreBLEU, running text without regard to case",
    "chrf": "chrF2, running text without regard to case",
}


def score(
    hypotheses: list[tuple[str, str]], references: list[tuple[str, str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """
    The scores of [`TranslationScores`] by `evaluate`, and their signatures, both by the names in `NAMES`.

    Args:
        hypotheses, references (`list[tuple[str, str]]`): tokenised lines without BPE, and running text.
    """
    columns = {"predictions": hypotheses, "references": references}
    columns = {name: [text for _, text in rows] for name, rows in columns.items()} | {
        f"tokenised_{name}": [tokens for tokens, _ in rows] for name, rows in columns.items()
    }
    found = metric.compute(TranslationScores, **columns)
    return {name: found[name] for name in NAMES}, {name: found[f"{name}_signature"] for name in NAMES}


class Scorer:
    """
    `compute_metrics` of one held-out set; writes hypotheses, references and scores in the data's own order.

    `NAME.hypotheses.tok.txt` and `NAME.references.tok.txt` are tokenised, `NAME.hypotheses.txt` and `NAME.references.txt`
    are running text, `NAME.scores.json` has the scores with their signatures.

    Args:
        corpus ([`Corpus`]): gives vocabulary and detokenisation.
        split (`str`): validation or test.
        folder (`Path`, *optional*): where the files go; not given on all processes but the first.
    """

    def __init__(self, corpus: Corpus, split: str, folder: Path | None):
        self.corpus, self.split, self.folder = corpus, split, folder
        self.sources, self.references = lines(corpus.splits[split], "source"), lines(corpus.splits[split], "target")
        self.hypotheses: list[tuple[str, str]] = []
        self.scores: dict[str, float] = {}
        self.signatures: dict[str, str] = {}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        order = self.corpus.splits[self.split]["line"]
        by_line = {}
        # Several processes fill up their last batch with sentences that were there before: `order` is the shorter one.
        for line, ids in zip(order, prediction.predictions, strict=False):
            tokenised = join_subwords(self.corpus.target_vocabulary.decode(ids.tolist()))
            by_line[line] = (tokenised, self.corpus.target_tokenizer.undo(tokenised))
        self.hypotheses = [by_line[line] for line in range(len(order))]
        self.scores, self.signatures = score(self.hypotheses, self.references)
        if self.folder is not None:
            self.write(self.folder)
        return self.scores

    def copy_of_source(self) -> dict[str, float]:
        """The scores of leaving every sentence untranslated, the least that a model has to beat."""
        return score(self.sources, self.references)[0]

    def write(self, folder: Path) -> None:
        """Writes the five files."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("hypotheses", self.hypotheses), ("references", self.references)):
            for kind, column in ((".tok", 0), ("", 1)):
                text = "".join(f"{row[column]}\n" for row in rows)
                write_whole(folder / f"{self.split}.{name}{kind}.txt", text)
        rows = {name: {"score": self.scores[name], "signature": self.signatures[name]} for name in NAMES}
        write_whole(folder / f"{self.split}.scores.json", json.dumps(rows, indent=2) + "\n")

    def samples(self, count: int) -> str:
        """Some translations, evenly spread over the set, for reading."""
        step = max(1, len(self.references) // count)
        rows = zip(self.sources, self.hypotheses, self.references, strict=True)
        chosen = [[text for _, text in row] for row in rows][::step][:count]
        return "\n\n".join(f"  source      {s}\n  hypothesis  {h}\n  reference   {r}" for s, h, r in chosen)


def table(scores: dict[str, dict], copied: dict[str, dict], signatures: dict[str, str]) -> str:
    """Each split's scores and those of its source copied, a line each, and under them which convention is which."""
    rows = list(scores.items()) + [(f"{split}, source copied", values) for split, values in copied.items()]
    text = [f"{'':27}" + "".join(f"{name:>18}" for name in NAMES)]
    text += [f"{name:27}" + "".join(f"{values[key]:18.2f}" for key in NAMES) for name, values in rows]
    return "\n".join([*text, "", *(f"{name}: {NAMES[name]} [{signatures[name]}]" for name in NAMES)])


def lines(split: Dataset, side: str) -> list[tuple[str, str]]:
    """Tokenised and running text of a side, in the data's own order, white space made single: one line each."""
    rows = sorted(zip(split["line"], split[f"{side}_tokens"], split[f"{side}_text"], strict=True))
    return [(tokens, " ".join(text.split())) for _, tokens, text in rows]
