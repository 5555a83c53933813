"""The scores: by hand, and by sacrebleu's own command line on the files that are written."""

import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
from transformers import EvalPrediction

from tasks.translation.data import DataArguments, from_text, load
from tasks.translation.metrics import NAMES, Scorer, score, table


def scores_of(hypotheses, references):
    return score([(line, line) for line in hypotheses], [(line, line) for line in references])[0]


def test_tokenised_bleu_by_hand():
    # Matches of 1 to 4 words: 8 of 10, 5 of 8, 3 of 6, 1 of 4; ten words against eleven: a brevity penalty of exp(1 - 11/10).
    hypotheses = ["the cat sat on the red mat", "dogs bark loudly"]
    references = ["the cat sat on the mat today .", "dogs bark ."]
    ngrams = []
    for n in range(1, 5):
        matched = total = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            h, r = (
                [tuple(line.split()[i : i + n]) for i in range(len(line.split()) - n + 1)]
                for line in (hypothesis, reference)
            )
            matched += sum(min(h.count(gram), r.count(gram)) for gram in set(h))
            total += len(h)
        ngrams.append((matched, total))
    assert ngrams == [(8, 10), (5, 8), (3, 6), (2, 4)]
    expected = 100 * math.exp(1 - 11 / 10) * (8 / 10 * 5 / 8 * 3 / 6 * 2 / 4) ** 0.25
    assert scores_of(hypotheses, references)["bleu_tokenised"] == pytest.approx(expected, abs=1e-9)


def test_tokenised_bleu_neither_tokenises_nor_smooths_nor_folds_case_and_the_other_does_all_three():
    for hypothesis, reference in [("a very good morning!", "a very good morning !"), ("A b c d", "a b c d")]:
        found = scores_of([hypothesis], [reference])
        assert found["bleu_detokenised"] == pytest.approx(100) and found["bleu_tokenised"] < 100
    three_of_four = scores_of(["a b c x"], ["a b c y"])
    assert three_of_four["bleu_tokenised"] == 0 < three_of_four["bleu_detokenised"]
    same = scores_of(["one two three four five"], ["one two three four five"])
    assert list(same) == list(NAMES) and all(value == pytest.approx(100) for value in same.values())


@pytest.fixture(scope="module")
def corpus():
    return load(DataArguments(bpe_merges=300))


def prediction(corpus, split, change=lambda ids, i: ids):
    """What the Trainer hands over if the model says the reference, changed here and there; start symbol first."""
    rows = [[2, *change(ids[:-1], i), 2] for i, ids in enumerate(corpus.splits[split]["labels"])]
    width = max(map(len, rows))
    return EvalPrediction(np.array([row + [-100] * (width - len(row)) for row in rows]), None)


def test_the_reference_itself_scores_100_in_the_datas_own_order(corpus, tmp_path):
    scorer = Scorer(corpus, "validation", tmp_path)
    found = scorer(prediction(corpus, "validation"))
    assert 99.5 < found["bleu_tokenised"] < 100  # a few parts of words that training never saw
    # Detokenising loses some of the original's spaces and quotation marks.
    assert 80 < found["bleu_detokenised"] < 100 and 90 < found["chrf"] < 100
    by_line = dict(zip(corpus.splits["validation"]["line"], corpus.splits["validation"]["target_tokens"], strict=True))
    written = (tmp_path / "validation.hypotheses.tok.txt").read_text().splitlines()
    expected = [by_line[i] for i in range(len(by_line))]
    different = [line for line, other in zip(written, expected, strict=True) if line != other]
    assert len(different) < 5 and all("<unk>" in line for line in different)
    assert written != corpus.splits["validation"]["target_tokens"]  # the batches came by length


def test_hypotheses_are_detokenised_as_moses_does(tmp_path):
    english = ['"Yes," he said (twice).', "It's 5% of $10, isn't it?", "Well; that is all!"]
    rows = [(f"Zeile {i}", line) for i, line in enumerate(english)]
    made = from_text({"train": rows, "validation": rows, "test": rows}, "de", "en", 50)
    found = Scorer(made, "test", tmp_path)(prediction(made, "test"))
    assert (tmp_path / "test.hypotheses.tok.txt").read_text().splitlines() == [
        "&quot; yes , &quot; he said ( twice ) .",
        "it &apos;s 5 % of $ 10 , isn &apos;t it ?",
        "well ; that is all !",
    ]
    assert (tmp_path / "test.hypotheses.txt").read_text().splitlines() == [line.lower() for line in english]
    assert (tmp_path / "test.references.txt").read_text().splitlines() == english
    assert found["bleu_tokenised"] == pytest.approx(100) == found["bleu_detokenised"]


@pytest.mark.parametrize("kind", ["data-bin", "prepared"])
def test_an_unknown_word_never_matches_an_unknown_word(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    for language in ("de", "en"):
        (folder / f"dict.{language}.txt").write_text("a 1\nb 1\nc 1\nd 1\n")
        for name in ("train", "valid", "test"):
            if kind == "prepared":
                (folder / f"{name}.{language}").write_text("a b c d <unk>\n")
                continue
            index = b"MMIDIDX\0\0" + struct.pack("<QBQiq", 1, 8, 1, 6, 0)
            (folder / f"{name}.de-en.{language}.idx").write_bytes(index)
            (folder / f"{name}.de-en.{language}.bin").write_bytes(struct.pack("<6H", 4, 5, 6, 7, 3, 2))
    made = load(DataArguments(dataset=str(folder)))
    assert made.splits["test"]["labels"][0] == [4, 5, 6, 7, 3, 2]
    scorer = Scorer(made, "test", tmp_path)
    found = scorer(prediction(made, "test"))
    assert (scorer.hypotheses[0][0], scorer.references[0][0]) == ("a b c d <unk>", "a b c d <<unk>>")
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 quadruples match.
    assert found["bleu_tokenised"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_rows_that_processes_repeat_at_the_end_do_not_count(corpus):
    made = prediction(corpus, "test", lambda ids, i: ids if i % 3 else ids[1:])
    once = Scorer(corpus, "test", None)(made)
    assert (
        Scorer(corpus, "test", None)(EvalPrediction(np.concatenate([made.predictions, made.predictions[:5]]), None))
        == once
    )


def test_scores_are_those_of_sacrebleus_command_line(corpus, tmp_path):
    scorer = Scorer(corpus, "test", tmp_path)
    found = scorer(prediction(corpus, "test", lambda ids, i: ids[::-1] if i % 4 == 0 else ids[i % 3 :]))
    assert 10 < found["bleu_tokenised"] < 95

    def command(kind, *options):
        references, hypotheses = (str(tmp_path / f"test.{name}{kind}.txt") for name in ("references", "hypotheses"))
        line = [
            sys.executable,
            "-m",
            "sacrebleu",
            references,
            "-i",
            hypotheses,
            *options,
            "--format",
            "json",
            "-w",
            "6",
        ]
        answers = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
        return answers if isinstance(answers, list) else [answers]

    (tokenised,) = command(".tok", "--tokenize", "none", "--smooth-method", "none", "--force")
    detokenised, chrf = command("", "-m", "bleu", "chrf", "--lowercase", "--chrf-lowercase")
    for name, answer in zip(NAMES, (tokenised, detokenised, chrf), strict=True):
        assert found[name] == pytest.approx(answer["score"], abs=1e-5), name
        assert scorer.signatures[name] == answer["signature"], name
    stored = json.loads((tmp_path / "test.scores.json").read_text())
    assert stored["chrf"] == {"score": found["chrf"], "signature": scorer.signatures["chrf"]}


def test_copying_the_source_is_scored_and_the_conventions_are_named(corpus, tmp_path):
    scorer = Scorer(corpus, "test", tmp_path)
    scores = {"test": scorer(prediction(corpus, "test"))}
    copied = {"test": scorer.copy_of_source()}
    assert copied["test"]["bleu_tokenised"] == pytest.approx(6.50, abs=0.01)
    text = table(scores, copied, scorer.signatures)
    assert f"{scores['test']['chrf']:.2f}" in text.splitlines()[1] and "6.50" in text.splitlines()[2]
    for words in ("fairseq-generate", "BPE removed", "tok:none", "sacreBLEU", "case:lc", "tok:13a", "chrF2"):
        assert words in text
    assert scorer.samples(10).count("hypothesis") == 10
