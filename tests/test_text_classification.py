"""Text classification: files are read exactly, a run leaves what the other tasks' leave; its loop without the Trainer; trl's script."""

import gzip
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from processes import in_ranks
from safetensors.torch import load_file, save_file
from test_trl import SIZE, sentence, tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel, RobertaConfig

from tasks import recipes, tables
from tasks.language_modeling import sft
from tasks.text_classification import data, models, train, train_no_trainer
from xsam_hf import XSAMArguments


TASK = Path(train.__file__).parent
FLAGS = ["--max_steps", "4", "--logging_steps", "1", "--max_seq_length", "16", "--threads", "1", "--use_cpu", "true", "--disable_tqdm", "true"]  # fmt: skip
FLAGS += ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]


def parse(*flags):
    recipe = str(TASK / "recipes" / "roberta-small.yaml")
    return recipes.parse(train.ARGUMENTS, [recipe, *FLAGS, *map(str, flags)], "", "runs/text_classification")


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """The texts that README.md makes to try the task, 120 of them."""
    folder = tmp_path_factory.mktemp("texts")
    (code,) = re.findall(r"python -c '(.*?)' > languages.tsv", (TASK / "README.md").read_text(encoding="utf-8"))
    made = subprocess.run([sys.executable, "-c", code], cwd=TASK.parents[1], capture_output=True, check=True)
    lines = made.stdout.decode("utf-8").splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 1000
    (folder / "languages.tsv").write_text("".join(lines[:121]), encoding="utf-8")
    return folder / "languages.tsv"


@pytest.fixture(scope="module")
def finished(languages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.train(*parse("--train_file", languages, "--test_file", shutil.copy(languages, folder.parent / "test.tsv"), "--output_dir", folder))  # fmt: skip
    return folder


def test_a_run_leaves_its_result_and_a_model_that_knows_its_labels(finished, languages):
    result = json.loads((finished / "result.json").read_text())
    assert (result["task"], result["dataset"], result["model"]) == ("text_classification", "languages", "roberta")
    assert result["method"] == "xsam" and result["passes"]["forward"] == 4 * 2 + 21 and result["passes"]["backward"] == 8  # fmt: skip
    assert set(result["metrics"]) == {"validation", "test"}
    model, words = (kind.from_pretrained(finished) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    assert model.config.id2label == {0: "de", 1: "en"}
    texts, labels = zip(*(line.split("\t") for line in languages.read_text("utf-8").splitlines()[1:]), strict=True)
    with torch.no_grad():
        logits = model.eval()(**words(list(texts), truncation=True, max_length=16, padding=True, return_tensors="pt")).logits  # fmt: skip
    right = [model.config.id2label[i] == label for i, label in zip(logits.argmax(1).tolist(), labels, strict=True)]
    assert result["metrics"]["test"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert "| rho | 0.05 |" in (finished / "README.md").read_text()


def test_a_run_goes_on_exactly_and_another_is_refused(finished, languages, tmp_path):
    shutil.copytree(finished / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    flags = ["--train_file", shutil.copy(languages, tmp_path), "--test_file", languages, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "true"]  # fmt: skip
    with pytest.raises(ValueError, match="another run: its `rho` is 0.05, this one's 0.1"):
        train.train(*parse(*flags, "--rho", "0.1"))
    train.train(*parse(*flags))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", finished))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_saved_classifier_keeps_the_order_of_its_labels(languages, tmp_path):
    config = RobertaConfig(vocab_size=99, id2label={0: "en", 1: "de"}, label2id={"en": 0, "de": 1}, **models.NEW)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    models.tokenizer(None, ["a b"]).save_pretrained(tmp_path)
    setup = train.prepare(*parse("--train_file", languages, "--model_name_or_path", tmp_path, "--output_dir", tmp_path / "run"))  # fmt: skip
    assert setup.trainer.model.config.id2label == {0: "en", 1: "de"}
    first = data.load(parse("--train_file", languages)[0]).splits["train"]["label"]
    assert setup.splits["train"]["labels"][:9] == [{"en": 0, "de": 1}[name] for name in first[:9]]
    assert models.order(str(tmp_path), ["de", "en", "fr"]) == ["de", "en", "fr"]
    assert models.order(str(tmp_path), ["DE", "EN"]) == ["EN", "DE"]
    with pytest.raises(ValueError, match="has the labels de, en, and `train_file` 0, 1: which is which is not known"):
        models.order(str(tmp_path), ["0", "1"])
    settings = tmp_path / "config.json"
    whole = json.loads(settings.read_text())
    settings.write_text(json.dumps({**whole, "label2id": {"en": 1, "de": 0}}))
    with pytest.raises(ValueError, match="has a `label2id` in its config.json that is not its `id2label` turned"):
        models.order(str(tmp_path), ["de", "en"])
    settings.write_text(
        json.dumps({**whole, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    )
    assert models.order(str(tmp_path), ["de", "en"]) == ["de", "en"]
    settings.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="`dropout` is 0.1, and .* has its own"):
        train.prepare(*parse("--train_file", languages, "--model_name_or_path", tmp_path, "--dropout", "0.1"))


# --- files -----------------------------------------------------------------------------------------------------------


def load(tmp_path, name, content, **changes):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return data.load(data.DataArguments(str(tmp_path / name), **{"validation_share": 0.0, **changes}))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", '\ufefftext,id,label\n"a, ""b""\nc",1,10\nnull,2,2\nNA,3,2\n'),
        ("a.tsv", 'text\tlabel\n"a, b\t10\nnull\t2\nNA\t2\n'),
        ("a.json", '[{"text": "a, \\"b\\"\\nc", "label": 10}, {"text": "null", "label": 2}, {"text": "NA", "label": "2"}]'),
        ("a.jsonl", '{"text": "a, \\"b\\"\\nc", "label": "10"}\n{"text": "null", "label": 2, "x": "\u2028"}\n\n{"text": "NA", "label": 2}\n'),
    ],
)  # fmt: skip
def test_files_are_read_as_they_stand(tmp_path, name, content):
    corpus = load(tmp_path, name, content)
    text = '"a, b' if name == "a.tsv" else 'a, "b"\nc'
    assert corpus.splits["train"].to_dict() == {"text": [text, "null", "NA"], "label": ["10", "2", "2"]}
    assert corpus.names == ["2", "10"] and list(corpus.splits) == ["train"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "a", "ends on .txt: give a file in .csv, .tsv, .json, .jsonl"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,label\na,b,c\n", "line 2 has 3 fields, and the header 2"),
        ("a.csv", "text,label\na\n", "line 2 has 1 fields, and the header 2"),
        ("a.csv", "text,text\na,b\n", "a column of its header, text, text, is there twice"),
        ("a.csv", 'text,label\n"a,b\n', "unexpected end of data"),
        ("a.csv", "text,class\na,b\n", "row 1 has no column 'label', but 'text', 'class': see `label_column_name`"),
        ("a.csv", "text, label\na, b\n", "row 1 has no column 'label', but 'text', ' label': see `label_column_name`"),
        (
            "a.csv",
            "sentence,label\na,b\n",
            "row 1 has no column 'text', but 'sentence', 'label': see `text_column_names`",
        ),
        ("a.csv", "text,label\na,1\n,2\n", 'row 2: its text is "", which is no text'),
        ("a.csv", b"text,label\n\xff,1\n", "cannot be read: 'utf-8' codec"),
        ("a.csv", "text;label\na;1\n", "its header is text;label, which ';' divides and not ','"),
        ("a.csv", "text\tlabel\na\t1\n", r"which '\\t' divides and not ','"),
        ("a.tsv", "text,label\na,1\n", r"its header is text,label, which ',' divides and not '\\t'"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "it is in UTF-16: save it as UTF-8"),
        ("a.csv", gzip.compress(b"text,label\na,1\n", mtime=0), "it is compressed by gzip: unpack it"),
        ("a.csv", "text,label\na,1.0\nb,2.5\n", "has the label '1.0', and a label is a name or a whole number"),
        ("a.csv", "text,label\na,3\nb,2.5\n", "has the label '2.5', and a label is a name or a whole number"),
        ("a.csv", "text,label\na,1\nb,1\n", "has one label only, 1"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', "its label is 0.5, which is no label"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "its label is null, which is no label"),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', r'its text is \["a"\], which is no text'),
        ("a.jsonl", '{"text": "a", "label": 1\n', "cannot be read"),
        ("a.json", '["a"]', "expected objects"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"', "line 2: "),
        (
            "a.jsonl",
            '{"text": "a", "text": "b", "label": 1}\n',
            "line 1: an object has a key twice: text, text, label",
        ),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', r'row 1: its text is "\\ud800", which is no text'),
        ("a.csv", "text,label\na,no\nb,no \n", "has the labels 'no' and 'no ', which would be two classes"),
        ("a.csv", "text,label\na,no\nb,No\n", "has the labels 'No' and 'no', which would be two classes"),
        ("a.csv", "text,label\na,sch\u00f6n\nb,scho\u0308n\n", "which would be two classes"),
        (
            "a.csv",
            "text,label\na,no\nb,no\u200b\n",
            r"has the labels 'no' and 'no\\u200b', which would be two classes",
        ),
        ("a.csv", "text,label\na,1\ntext,label\nb,2\n", "row 2 is its header again"),
        ("a.csv", "text,label\na,1\nb,01\n", "has the labels '01' and '1', which would be two classes"),
        (
            "a.json",
            json.dumps([{"text": ["a word"] * 999, "label": ["b"]}]),
            r'row 1: its text is \["a word", .{68}…, which is no text',
        ),
        ("a.jsonl", json.dumps({"word " * 999: "a"}), r"has no column 'text', but '(word ){15}wor…: see"),
        ("a.csv", f"text,label\na,{'b' * 999}\nb,{'B' * 999}\n", "has the labels 'B{78}… and 'b{78}…, which would"),
        ("a.csv", "text,label\na,1\nb,1.0\n", "has the labels '1' and '1.0', which would be two classes"),
        ("a.csv", "text,label\na,+1\nb,1\n", r"has the labels '\+1' and '1', which would be two classes"),
        ("a.csv", "text,label\na,1E+2\nb,100\n", r"has the labels '100' and '1E\+2', which would be two classes"),
        (
            "a.jsonl",
            '{"text": "a", "label": true}\n{"text": "b", "label": 1}\n',
            "has the labels '1' and 'True', which would be two classes",
        ),
    ],
)
def test_files_that_are_not_whole_are_refused(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        load(tmp_path, name, content)


def test_labels_that_are_other_numbers_are_classes(tmp_path):
    labels = ["10000000000000001", "10000000000000000", "1_0", "10", "nan", "inf", "-1", "True", "sNaN"]
    rows = "".join(f"text,{label}\n" * 2 for label in labels)
    assert set(load(tmp_path, "a.csv", f"text,label\n{rows}").names) == set(labels)


def test_a_long_text_is_a_text(tmp_path):
    corpus = load(tmp_path, "a.csv", f"text,label\n{'a ' * 100_000},1\nb,0\n")
    assert len(corpus.splits["train"]["text"][0]) == 200_000


def test_texts_that_were_trained_on_are_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    rows = [f"text {i},{i % 2}\n" for i in range(20)]
    (tmp_path / "copy.csv").write_text(
        "text,label\n" + "".join(rows[:3]) + "".join(f"other {row}" for row in rows[:17])
    )
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows[1:]), test_file=str(tmp_path / "copy.csv"))
    assert not said
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows), test_file=str(tmp_path / "copy.csv"))
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows * 2), validation_share=0.1)
    (tmp_path / "doubled.csv").write_text(
        "text,label\n" + "other,0\n" * 3 + "".join(f"other {row}" for row in rows[:17])
    )
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows), test_file=str(tmp_path / "doubled.csv"))
    (tmp_path / "doubled.csv").write_text(
        "text,label\n" + "other,0\n" * 4 + "".join(f"other {row}" for row in rows[:16])
    )
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows), test_file=str(tmp_path / "doubled.csv"))
    assert [text.partition(" texts are ")[0] for text in said] == [
        "3 of the 20 test",
        "4 of the 4 validation",
        "3 of the 20 test",
    ]


@pytest.mark.parametrize("shared, told", [(1, False), (2, True)])
def test_texts_that_are_chosen_by_and_scored_are_said(tmp_path, monkeypatch, shared, told):
    said = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    for name, texts in (("train", range(9)), ("validation", range(10, 20)), ("test", range(20 - shared, 40))):
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\n" + "".join(f"text {i}\t{i % 2}\n" for i in texts))
    files = {f"{name}_file": str(tmp_path / f"{name}.tsv") for name in ("train", "validation", "test")}
    data.load(data.DataArguments(**files))
    assert said == ["2 of the 22 test texts are validation texts too: what is chosen by the one is chosen by the other."] * told  # fmt: skip


@pytest.mark.parametrize("columns", [["text", "text"], ["text", "label"]])
def test_a_column_is_a_text_or_the_label(columns):
    with pytest.raises(ValueError, match="each has to be a column of its own"):
        data.DataArguments("a.csv", text_column_names=columns)


def test_a_saved_model_is_whole_or_refused(tmp_path):
    def refused(words, names=("en", "de")):
        with pytest.raises(ValueError, match=words):
            models.build(str(tmp_path), models.tokenizer(str(tmp_path), ["a b"]), list(names), 16, None)

    tokens = models.tokenizer(None, ["a b"])
    config = RobertaConfig(
        vocab_size=len(tokens), id2label={0: "en", 1: "de"}, label2id={"en": 0, "de": 1}, **models.NEW
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    models.build(str(tmp_path), models.tokenizer(str(tmp_path), ["a b"]), ["en", "de"], 16, None)
    refused("tells 2 labels apart, and `train_file` has 3", ["en", "de", "fr"])
    settings = tmp_path / "config.json"
    written = settings.read_text()
    for changes, words in (
        (
            {"problem_type": "regression"},
            "has `problem_type` regression in its config.json, and texts have one label each",
        ),
        ({"problem_type": "multi_label_classification"}, "has `problem_type` multi_label_classification"),
        ({"hidden_size": "x"}, "cannot be loaded: .*'hidden_size' expected int, got str"),
        ({"model_type": "vit"}, "is a vit, of which transformers makes no classifier of texts"),
        (
            {"model_type": "my", "auto_map": {"AutoConfig": "code.Config"}},
            "cannot be loaded: it brings code of its own, which is not executed",
        ),
    ):
        settings.write_text(json.dumps({**json.loads(written), **changes}))
        refused(words)
    settings.write_text(written)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    for damaged in ({**whole, name: torch.zeros(2, 2)}, {key: part for key, part in whole.items() if key != name}):
        save_file(damaged, file, metadata={"format": "pt"})
        refused(f"lacks 1 of the weights that its config.json asks for, {name}")
    file.write_bytes(file.read_bytes()[:500])
    refused(f"`model_name_or_path` {tmp_path} cannot be loaded")
    (tmp_path / "tokenizer.json").unlink()
    refused("knows 0% of the tokens of the training texts")
    with pytest.raises(ValueError, match="`model_name_or_path` is /nowhere, which is no folder"):
        models.tokenizer("/nowhere", ["a b"])


def test_tokens_that_the_model_does_not_know_are_refused_before_training(languages, tmp_path):
    config = RobertaConfig(vocab_size=99, id2label={0: "en", 1: "de"}, label2id={"en": 0, "de": 1}, **models.NEW)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    models.tokenizer(None, ["a b"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The tokenizer of .* makes token [0-9]+ of a text, and the model knows 99"):
        train.train(
            *parse("--train_file", languages, "--model_name_or_path", tmp_path, "--output_dir", tmp_path / "run")
        )


def test_a_text_that_is_longer_than_the_models_positions_is_refused(languages, tmp_path):
    words = models.tokenizer(None, languages.read_text("utf-8").splitlines())
    pad = words.pad_token_id
    config = RobertaConfig(vocab_size=len(words), pad_token_id=pad, max_position_embeddings=pad + 1 + 8, **models.NEW)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    flags = [
        "--train_file",
        languages,
        "--model_name_or_path",
        tmp_path,
        "--output_dir",
        tmp_path / "run",
        "--eval_strategy",
        "no",
    ]
    train.train(*parse(*flags, "--max_seq_length", "8", "--max_steps", "1"))
    with pytest.raises(
        ValueError, match="`max_seq_length` lets a text have 9 tokens, and .* has positions for 8: give 8"
    ):
        train.train(*parse(*flags, "--max_seq_length", "9", "--output_dir", tmp_path / "other"))


def test_what_a_saved_model_says_beside_its_weights_is_part_of_a_run(languages, finished, tmp_path):
    model = shutil.copytree(finished, tmp_path / "model")
    flags = ["--train_file", languages, "--model_name_or_path", model, "--output_dir", tmp_path / "run"]
    train.train(*parse(*flags, "--max_steps", "2"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match="belongs to another run: its `model_files` is [0-9a-f]{12}, this one's"):
        train.train(*parse(*flags, "--max_steps", "2", "--resume_from_checkpoint", "true"))


def test_a_quotation_mark_that_swallows_rows_is_told(tmp_path):
    rows = [f"text number {i},{i % 2}\n" for i in range(9)]
    rows[1], rows[7] = f'"{rows[1]}', 'the last",1\n'
    with pytest.raises(ValueError, match="a.csv cannot be read: row 2 has 5 lines in its text that look like rows"):
        load(tmp_path, "a.csv", "text,label\n" + "".join(rows))
    poem = '"a line\nof a poem\nwith no comma\nand one, with one\nand an end",1\n'
    assert len(load(tmp_path, "a.csv", "text,label\nb,0\n" + poem).splits["train"]) == 2


@pytest.mark.parametrize("header", ["\ufefftext,label", "Text,Label"])
def test_a_second_header_is_no_row(tmp_path, header):
    with pytest.raises(ValueError, match="a.csv, row 2 is its header again"):
        load(tmp_path, "a.csv", f"text,label\na,1\n{header}\nb,0\n")


def test_labels_that_come_once_each_are_no_labels(tmp_path):
    rows = [f"text {i},{i}\n" for i in range(60)]
    with pytest.raises(ValueError, match=r"has 60 labels for 60 texts: is `label_column_name` \(label\) right"):
        load(tmp_path, "a.csv", "text,label\n" + "".join(rows))
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows * 2))


def test_lost_characters_are_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(tables.logger, "warning", said.append)
    rows = [f"text {i},{i % 2}\n" for i in range(199)]
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows) + "sch\ufffdn,1\n")
    assert not said
    load(tmp_path, "a.csv", "text,label\n" + "".join(rows[:50]) + "sch\ufffdn,1\n")
    assert [text.partition(": ")[2].partition(",")[0] for text in said] == [
        "1 of 51 texts have lost characters (U+FFFD)"
    ]


def test_the_loop_has_no_score_for_a_plateau(tmp_path):
    with pytest.raises(ValueError, match="`lr_scheduler_type` is reduce_lr_on_plateau, which follows a score"):
        train_no_trainer.LoopArguments(output_dir=str(tmp_path), lr_scheduler_type="reduce_lr_on_plateau")


def test_the_loop_refuses_what_would_train_nothing(tmp_path):
    for name, value in (("num_train_epochs", 0), ("max_grad_norm", -1.0), ("learning_rate", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}` is {value}"):
            train_no_trainer.LoopArguments(**{name: value})
    with pytest.raises(ValueError, match="--learning_rate.*: invalid finite float value: 'inf'"):
        train_no_trainer.main(["--train_file", "a.csv", "--learning_rate", "inf"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`output_dir` is .*file is a file"):
        train_no_trainer.main(["--train_file", "a.csv", "--output_dir", str(tmp_path / "file")])


def test_the_loop_takes_no_tie_and_no_nan_for_right():
    logits = torch.tensor([[2.0, 1.0], [1.0, 1.0], [torch.nan, torch.nan], [0.0, torch.inf], [0.0, 1.0]])
    right = train_no_trainer.is_right(logits, torch.tensor([0, 0, 0, 1, 0]))
    assert right.tolist() == [True, False, False, False, False]


def test_splits(tmp_path):
    rows = "".join(f"text {i},{'yes' if i % 4 else 'no'}\n" for i in range(80))
    corpus = load(tmp_path, "a.csv", "text,label\n" + rows, validation_share=0.25)
    train_texts, held_out = (corpus.splits[name] for name in ("train", "validation"))
    assert sorted(train_texts["label"]) == ["no"] * 15 + ["yes"] * 45
    assert sorted(held_out["label"]) == ["no"] * 5 + ["yes"] * 15
    assert not set(train_texts["text"]) & set(held_out["text"])
    with pytest.raises(ValueError, match="has the label 'odd' once, and texts of each label are held out"):
        load(tmp_path, "a.csv", "text,label\n" + rows + "z,odd\n", validation_share=0.25)
    with pytest.raises(ValueError, match="`validation_share` is 0.3, and `validation_file` is given"):
        load(tmp_path, "a.csv", "text,label\n" + rows, validation_share=0.3, validation_file=str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match="`validation_share` is 0.9999, of 80 training texts"):
        load(tmp_path, "a.csv", "text,label\n" + rows, validation_share=0.9999)
    (tmp_path / "b.csv").write_text("text,label\na,yes\nb,no \n")
    with pytest.raises(ValueError, match="`test_file` .*b.csv, row 2: its label is 'no ', which no training text"):
        load(tmp_path, "a.csv", "text,label\n" + rows, test_file=str(tmp_path / "b.csv"))
    with pytest.raises(ValueError, match="are the same"):
        load(tmp_path, "a.csv", "text,label\n" + rows, test_file=str(tmp_path / "." / "a.csv"))
    with pytest.raises(ValueError, match="`train_file` is missing"):
        data.DataArguments()


def test_pairs_are_two_segments(tmp_path):
    corpus = load(tmp_path, "a.csv", "premise,hypothesis,label\na,b,0\nb,a b,1\n", text_column_names=["premise", "hypothesis"])  # fmt: skip
    encoded = corpus.encode(models.tokenizer(None, ["a b"]), 16)["train"]
    start, end = 2, 3
    assert [[token for token in row if token in (start, end)] for row in encoded["input_ids"]] == [
        [start, end, end, end]
    ] * 2
    assert [len(row) for row in encoded["input_ids"]] == [6, 7] and encoded["labels"] == [0, 1]


# --- without the Trainer, and trl's script ---------------------------------------------------------------------------


def loop(languages, folder, **method):
    torch.set_num_threads(1)
    changes = {"rho": 0.05, "num_train_epochs": 1, "learning_rate": 0.003, "output_dir": str(folder), **method}
    task = parse("--train_file", languages)[0]
    return train_no_trainer.train(task, train_no_trainer.LoopArguments(**changes), Accelerator(cpu=True))


def test_the_loop_without_the_trainer(languages, tmp_path, capsys):
    ends = []
    for name, method in {"plain": {"rho": 0.0}, "sam": {"alpha": 1.0}, "xsam": {}}.items():
        assert 0 <= loop(languages, tmp_path / name, **method) <= 1
        (rise,) = re.findall(r"sharpness (-?[\d.]+)", capsys.readouterr().out)
        assert (float(rise) > 0) == (name != "plain")
        words, model = (kind.from_pretrained(tmp_path / name) for kind in (AutoTokenizer, AutoModelForSequenceClassification))  # fmt: skip
        assert words("a")["input_ids"] and model.config.label2id == {"de": 0, "en": 1}
        ends.append(model.classifier.out_proj.weight.flatten().tolist())
    assert all(one != other for i, one in enumerate(ends) for other in ends[:i])


def test_the_loop_does_not_write_over_a_run_of_the_trainer(languages, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the result.json of another run"):
        loop(languages, tmp_path)


def test_the_loop_in_two_processes(languages, tmp_path):
    def work(rank, report):
        updates, scored = [], []
        update, gather = train_no_trainer.xsam_gradient, Accelerator.gather_for_metrics
        train_no_trainer.xsam_gradient = lambda *args, **kw: updates.append(update(*args, **kw)) or updates[-1]
        Accelerator.gather_for_metrics = lambda self, right: scored.append(gather(self, right)) or scored[-1]
        accuracy = loop(languages, tmp_path / "run", alpha_samples=61, per_device_train_batch_size=8)
        assert accuracy == torch.cat(scored).float().mean()
        report(
            json.dumps([len(updates), updates[-1].alpha, updates[-1].grad_norm_last.item(), len(torch.cat(scored))])
        )

    (one, first), (other, second) = in_ranks(work)
    assert (one, other) == (0, 0), first + second
    assert first == second  # the finer grid tells the two apart if each of them searches alone
    updates, _, _, scored = json.loads(first)
    assert updates == 7 and scored == 12  # 108 texts in shares of 54, and each of those held out once


@pytest.fixture
def fine_tune(tmp_path):
    """trl's script on a tiny model and sixteen texts."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SIZE)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()

    def train(*more, texts=None):
        texts = texts or [{"text": sentence(i, 4 + i % 5)} for i in range(16)]
        lines = texts if isinstance(texts, str) else "".join(json.dumps(row) + "\n" for row in texts)
        (tmp_path / "data" / "train.jsonl").write_text(lines)
        flags = ["--dataset_name", tmp_path / "data", "--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run", "--use_peft", "true"]  # fmt: skip
        flags += ["--lora_target_modules", "all-linear", "--max_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "4"]  # fmt: skip
        flags += ["--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--rho", "0.01", "--method", "sam"]  # fmt: skip
        return sft.train(*recipes.parse(sft.ARGUMENTS, list(map(str, [*flags, *more])), ""))

    return train


def test_trls_script_trains_adapters(fine_tune, tmp_path):
    trainer = fine_tune()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["xsam/alpha"] == 1 and entry["xsam/sharpness"] > 0 for entry in logs)
    assert XSAMArguments.of(trainer.args).rho == 0.01
    assert any("lora_B" in name for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))
    trainer.create_model_card("name", None, "points")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert {"xsam", "sharpness-aware", "points", "trl"} <= set(card.data.tags) and "| rho | 0.01 |" in card.text
    with pytest.raises(ValueError, match="`dataset_name` is missing: give a folder, or a name of the hub"):
        sft.train(*recipes.parse(sft.ARGUMENTS, ["--bf16", "false", "--use_cpu", "true"], ""))


def test_trls_script_goes_on_from_its_own_run_alone(fine_tune, tmp_path):
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    whole = fine_tune(*saving)
    resumed = fine_tune(
        "--output_dir", tmp_path / "again", "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-1"
    )
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "run"))
    assert whole.state.global_step == resumed.state.global_step == 2
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="checkpoint-2 belongs to another run: its `method` is sam, this one's xsam"):
        fine_tune("--method", "xsam", "--resume_from_checkpoint", "true")
    with pytest.raises(ValueError, match="holds checkpoint-1 of another run: its `train_data` is"):
        fine_tune(texts=[{"text": "w1 w2 w3"}] * 8)


@pytest.mark.parametrize(
    "texts, flags, words",
    [
        ([{"text": ""}] * 4, [], "No token of the training texts is to be predicted"),
        ([{"text": "w1 w2"}, {"text": None}], [], "data, train, row 1 has None as text"),
        ([{"say": "w1 w2"}], [], "data, train has the columns say: trl expects text"),
        ('{"text": "w1', [], "`dataset_name` is .*, which `datasets` could not load: (JSON parse error|Unmatched)"),
        ([{"text": "w1 w2"}], ["--dataset_train_split", "all"], "`dataset_train_split` is all, and .* has train"),
        ([{"text": "w1 w2"}], ["--eval_strategy", "epoch"], "`dataset_test_split` is test, and .* has train"),
        ([{"text": "w1 w2"}], ["--dataset_streaming", "true"], "`dataset_streaming` is True, and this script has no use"),
        ([{"text": "w1 w2"}], ["--model_name_or_path", "/no/such/model"], "`model_name_or_path` is .*, which does not exist"),
        ([{"text": "w1 w2"}], ["--attn_implementation", "none"], "attn_implementation=.none"),
        ([{"text": "w1 w2"}], ["--use_peft", "false"], "`lora_target_modules` is .*, and `use_peft` is False"),
        ([{"text": "w1 w2"}], ["--completion_only_loss", "true"], "`completion_only_loss` is True, and .* train has no completions"),
        ([{"text": "w1 w2"}, {"text": "w1 " * 40}], [], "training text has 41 tokens, and the model 16 positions"),
    ],
)  # fmt: skip
def test_trls_script_refuses(fine_tune, texts, flags, words):
    with pytest.raises(ValueError, match=words):
        fine_tune(*flags, texts=texts)


def test_trls_script_refuses_the_tokenizer_of_another_model(fine_tune, tmp_path):
    GPT2LMHeadModel(GPT2Config(**SIZE | {"vocab_size": 9})).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="The tokenizer of .*model makes token 10 of a text, and the model knows 9"):
        fine_tune(texts=[{"text": "w1 w8"}])


def test_trls_script_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, sft.__name__)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(sft.__name__, run_name="__main__")
    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*trl.*: this command needs `pip install trl peft`.\n", capsys.readouterr().err)
    with pytest.raises(ImportError, match="trl"):
        runpy.run_module(sft.__name__)
