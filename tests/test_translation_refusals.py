"""What the translation task says about inputs that it does not take."""

import json
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from translation_toys import pairs, write

from tasks.translation import fairseq_format as fairseq
from tasks.translation import sources
from tasks.translation.data import DataArguments, load
from tasks.translation.text import Subwords
from tasks.translation.vocabulary import Vocabulary


FIXTURES = Path(__file__).parent / "fixtures" / "fairseq"
CHECKPOINT = FIXTURES / "checkpoint.pt"
FIRST, OUTPUT = "encoder.layers.0.fc1.weight", "decoder.output_projection.weight"


def test_lines_that_are_not_parallel_are_refused(tmp_path):
    write(tmp_path, "train", pairs(5))
    (tmp_path / "train.en").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"train.de has 5 lines and .en has 2: they are not parallel"):
        load(DataArguments(dataset=str(tmp_path)))
    (tmp_path / "train.en").write_bytes(b"gr\xfcn\n" * 5)
    with pytest.raises(ValueError, match="train.en is not UTF-8"):
        load(DataArguments(dataset=str(tmp_path)))
    (tmp_path / "train.en").unlink()
    with pytest.raises(ValueError, match="train.en is missing"):
        load(DataArguments(dataset=str(tmp_path)))


def test_only_the_line_feed_ends_a_line(tmp_path):
    (tmp_path / "text").write_bytes("a\u2028b\x0bc\r\nlast".encode())
    assert sources.read_lines(tmp_path / "text") == ["a\u2028b\x0bc\r", "last"]


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"text": ["a"]}, r"has the columns \['text'\]: expected `translation`, or `de` and `en`"),
        ({"translation": [{"de": "a", "fr": "b"}]}, "no text in en; are `source_language` .de."),
        ({"de": [None, None], "en": ["b", "c"]}, "no text in de; are `source_language` .de."),
        ({"translation": [None, None]}, "no text in de; are `source_language` .de."),
        ({"translation": ['{"de": "a", "en": "b"}', "a - b"]}, "row 1 has the `translation` 'a - b': expected JSON"),
        ({"translation": ["5"]}, "row 0 has the `translation` '5': expected JSON"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, words):
    with pytest.raises(ValueError, match=words):
        sources.column_pairs(Dataset.from_dict(columns), "de", "en")


EMPTY = {
    "csv": "de,en\na,b\n,c\nd,N/A\ne,f\n",
    "csv of translations": 'translation\n"{""de"": ""a"", ""en"": ""b""}"\n""\n"{""de"": ""d""}"\n"{""de"": ""e"", ""en"": ""f""}"\n',
    "jsonl": '{"translation": {"de": "a", "en": "b"}}\n{"translation": null}\n{"translation": {"de": "d", "en": null}}\n'
    '{"translation": {"de": "e", "en": "f"}}\n',
}


@pytest.mark.parametrize("kind", EMPTY)
def test_rows_without_text_are_left_out_of_training_and_refused_elsewhere(tmp_path, kind, monkeypatch):
    ending = kind.split()[0]
    (tmp_path / f"train.{ending}").write_text(EMPTY[kind])
    warnings = []
    monkeypatch.setattr(sources.logger, "warning", warnings.append)
    found = sources.from_datasets(str(tmp_path / f"train.{ending}"), None, "de", "en")
    # Two pairs are left, of which the first is for validation.
    assert (found["validation"], found["train"]) == ([("a", "b")], [("e", "f")])
    assert warnings == ["2 of 4 training pairs have no text in one language and are left out."]

    for name in ("validation", "test"):
        (tmp_path / f"{name}.{ending}").write_text(EMPTY[kind])
    with pytest.raises(ValueError, match="row 1 of a split for validation or test has no text in one language"):
        sources.from_datasets(str(tmp_path), None, "de", "en")


def test_a_training_file_beside_its_copy_is_refused(tmp_path):
    for name in ("train", "validation", "test"):  # the last two are the same, and no pair counts twice in any of them
        (tmp_path / f"{name}.jsonl").write_text('{"de": "a", "en": "b"}\n' * (2 if name == "train" else 1))
    assert len(sources.from_datasets(str(tmp_path), None, "de", "en")["train"]) == 2
    (tmp_path / "train (1).jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    with pytest.raises(
        ValueError, match=r"train \(1\).jsonl and .*train.jsonl are the same, and their pairs would count"
    ):
        sources.from_datasets(str(tmp_path), None, "de", "en")


BESIDE = ("README.md", "LICENSE", "fetch.py", ".hidden.en", "notes.txt")


@pytest.mark.parametrize("others", [("val.de", "val.en"), ("test2016.de.gz",), ("more.en",)])
def test_text_that_would_not_be_read_is_refused(tmp_path, others):
    write(tmp_path, "train", pairs(40))
    for name in BESIDE:
        (tmp_path / name).write_text("")
    assert len(sources.parallel_folder(tmp_path, "de", "en")["test"]) == 2
    for name in others:
        (tmp_path / name).write_text("a\n")
    with pytest.raises(
        ValueError, match=f"holds {', '.join(others)}, which would not be read: call held-out sets valid"
    ):
        sources.parallel_folder(tmp_path, "de", "en")
    # Beside held-out sets there may be others.
    for name in ("valid", "test"):
        write(tmp_path, name, pairs(5))
    assert len(sources.parallel_folder(tmp_path, "de", "en")["test"]) == 5


@pytest.mark.parametrize("name", ["valid.en", "test.en"])
def test_a_held_out_file_in_one_language_alone_is_no_sign_of_none(tmp_path, name):
    write(tmp_path, "train", pairs(40))
    (tmp_path / name).write_text("a\n")
    with pytest.raises(ValueError, match="valid.de is missing: a folder of text has train, valid and test"):
        sources.parallel_folder(tmp_path, "de", "en")


ROWS = "".join(json.dumps({"de": german, "en": english}) + "\n" for german, english in pairs(40))


@pytest.mark.parametrize("held_out", [(), ("validation", "test")])
@pytest.mark.parametrize("other", ["holdout.jsonl", "final.csv", "parts/more.jsonl.gz", "corpus.json"])
def test_tables_that_would_not_be_read_are_refused(tmp_path, held_out, other):
    kind = other.partition(".")[2].removesuffix(".gz").replace("csv", "jsonl")
    for name in ("train", *held_out):
        (tmp_path / f"{name}.{kind}").write_text(ROWS)
    for name in (*BESIDE, "checksums.json", "dataset_infos.json", "dict.de.txt", ".cache/x.jsonl", "tmp/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}" if name.endswith("json") else "")
    sources.from_datasets(str(tmp_path), None, "de", "en")
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("")
    with pytest.raises(ValueError, match=f"holds {other}, which would not be read: call held-out sets validation"):
        sources.from_datasets(str(tmp_path), None, "de", "en")
    # The folder itself can say what is read.
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: x\n  data_files: train.{kind}\n---\n")
    sources.from_datasets(str(tmp_path), None, "de", "en")


@pytest.mark.parametrize(
    "names, told", [(("corpus", "final"), True), (("part-1", "part-2"), False), (("train-a", "train-b"), False)]
)
def test_files_whose_names_say_no_split_are_told(tmp_path, caplog, names, told):
    for name, rows in zip(names, (ROWS, ROWS[: len(ROWS) // 2].rpartition("\n")[0]), strict=True):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    sources.from_datasets(str(tmp_path), None, "de", "en")
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"No file of {tmp_path} (corpus.jsonl, final.jsonl ...) says which split it is: all are taken as one, of which parts are held out."] * told  # fmt: skip


def test_a_comma_that_makes_another_field_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("de,en\nja, gut,yes\nnein, gut,no\n")  # pandas reads " gut" and "yes"
    with pytest.raises(ValueError, match="`dataset` has rows with more fields than its header"):
        sources.from_datasets(str(tmp_path / "train.csv"), None, "de", "en")


DOUBLE = '{"de": "a", "de": "b", "en": "c"}'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("train.csv", "de,de,en\n" + "a,b,c\n" * 3, "`dataset` has the column de twice"),  # pandas reads de.1
        ("train.json", f"[{DOUBLE}, {DOUBLE}]", "train.json cannot be read: an object has a key twice: de, de, en"),
        ("train.json", f'[{{"translation": {DOUBLE}}}]', "train.json cannot be read: an object has a key twice"),
        ("train.jsonl", f"{DOUBLE}\n" * 3, "train.jsonl could not be read: .*specified twice"),
        ("train.csv", "de,en\na,b\nde,en\nc,d\n", "`dataset` row 1 is its header again"),
        ("train.jsonl", '{"translation": {"de": "de", "en": "en"}}\n', "`dataset` row 0 is its header again"),
    ],
)
def test_a_column_or_a_header_that_is_there_twice_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    for dataset in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=words.replace("train.jsonl could", ".* could")):
            sources.from_datasets(str(dataset), None, "de", "en")


def test_a_column_of_another_name_may_end_on_a_number(tmp_path):
    (tmp_path / "train.csv").write_text("de,en,id,id.1,en.2\n" + "a,b,1,2,c\n" * 3)
    assert sources.from_datasets(str(tmp_path), None, "de", "en")["train"] == [("a", "b")] * 2


def test_a_prepared_folder_without_its_source_dictionary_is_not_prepared_again(tmp_path):
    write(tmp_path, "train", pairs())
    arguments = DataArguments(dataset=str(tmp_path), bpe_merges=20)
    assert len(load(arguments).splits["train"]) > 0  # raw text
    for sign in ("code", "checksums.json", "dict.en.txt"):
        (tmp_path / sign).write_text("")
        with pytest.raises(ValueError, match=f"holds {sign}, as a prepared folder does, but dict.de.txt is missing"):
            load(arguments)
        (tmp_path / sign).unlink()
    (tmp_path / "tmp").mkdir()
    with pytest.raises(ValueError, match="holds tmp, as a prepared folder does, but dict.de.txt is missing"):
        load(arguments)


@pytest.mark.parametrize("there", [["train.de", "train.en"], ["train.de-en.de.idx", "train.de-en.en.idx"]])
def test_another_source_language_names_the_file_that_is_missing(tmp_path, there):
    for name in there:
        (tmp_path / name).write_text("")
    for languages in (("fr", "en"), ("fr", "it")):
        with pytest.raises(ValueError, match=f"holds {', '.join(there)}, but train.fr is missing"):
            load(DataArguments(str(tmp_path), None, *languages))
    (tmp_path / "dict.en.txt").write_text("")
    with pytest.raises(ValueError, match="dict.fr.txt is missing.*is `source_language` fr right"):
        load(DataArguments(str(tmp_path), source_language="fr"))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"dataset": "no/such/thing"}, "'no/such/thing', which is neither handbook nor ding"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"bpe_merges": 0}, "`bpe_merges` is 0"),
        ({"source_language": "en"}, "are both 'en'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        load(DataArguments(**fields))


def test_a_sentence_that_is_too_long_for_the_model_is_refused(tmp_path):
    write(tmp_path, "train", [*pairs(30), ("lang " * 1100, "long")])
    with pytest.raises(
        ValueError,
        match=r"Pair \d of the \w+ split of `dataset` has 4401 and \d tokens, and the model has 1024 positions",
    ):
        load(DataArguments(dataset=str(tmp_path), bpe_merges=60))


# --- checkpoints of fairseq's ----------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_hostile_pickle_is_refused(tmp_path):
    trap, file = tmp_path / "trap", tmp_path / "checkpoint.pt"
    state = {"args": None, "cfg": {"model": Namespace()}, "model": {}, "extra_state": Hostile(trap)}
    torch.save(state, file)
    with pytest.raises(ValueError, match="run code"):
        fairseq.read_checkpoint(file)
    assert not trap.exists()
    torch.load(file, weights_only=False)  # the same file does its harm where it is trusted
    assert trap.exists()

    file.write_bytes(pickle.dumps(state))
    with pytest.raises(ValueError, match="was not loaded"):
        fairseq.read_checkpoint(file)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda d: d["cfg"]["model"].__setattr__("encoder_normalize_before", True),
            "`encoder_normalize_before` = True",
        ),
        (lambda d: d["cfg"]["model"].__setattr__("share_all_embeddings", True), "`share_all_embeddings` = True"),
        (lambda d: d["model"].pop("encoder.layers.1.fc1.weight"), "model.encoder.layers.1.fc1.weight"),
        (lambda d: d["model"].update(extra=torch.zeros(1)), "model.extra"),
        (lambda d: d["model"].pop("decoder.embed_tokens.weight"), "has no decoder.embed_tokens.weight"),
        (
            lambda d: d["model"].update({"decoder.embed_tokens.weight": torch.zeros(32, 16)}),
            r"model.decoder.embed_tokens.weight is \(32, 16\), and its arguments ask for \(32, 32\)",
        ),
        (lambda d: d["cfg"]["model"].__delattr__("encoder_layers"), "has no encoder_layers"),
        (lambda d: d.pop("model"), "no `model` entry"),
        (lambda d: d.pop("cfg"), "neither `cfg` nor `args`"),
    ],
)
def test_another_model_is_refused(tmp_path, change, words):
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(CHECKPOINT, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=words):
        fairseq.read_checkpoint(tmp_path / "other.pt")


def test_another_direction_is_refused(tmp_path):
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint["cfg"]["model"].source_lang, checkpoint["cfg"]["model"].target_lang = "en", "de"
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="translates from en to de: give --source_language en --target_language de"):
        fairseq.to_hugging_face(tmp_path / "other.pt", CHECKPOINT.parent, tmp_path / "out", ("de", "en"))
    assert not (tmp_path / "out").exists()


def test_dictionaries_of_another_model_are_refused(tmp_path):
    for name in ("de", "en"):
        Vocabulary.learn(["a b"]).write(tmp_path / f"dict.{name}.txt")
    with pytest.raises(ValueError, match="8 tokens with the special ones, the model of .* 56"):
        fairseq.to_hugging_face(CHECKPOINT, tmp_path, tmp_path / "out", ("de", "en"))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda d: setattr(d["cfg"]["model"], "encoder_layers", 10**9),
            "`encoder_layers` = 1000000000, and a number from 1 to 65536",
        ),
        (
            lambda d: setattr(d["cfg"]["model"], "encoder_layers", 5),
            "ask for 5 layers in the encoder, and it has weights of 2",
        ),
        (lambda d: setattr(d["cfg"]["model"], "decoder_ffn_embed_dim", 65536), "decoder layers that are 65536 wide"),
        (lambda d: setattr(d["cfg"]["model"], "encoder_embed_dim", "32"), "`encoder_embed_dim` = '32'"),
        (
            lambda d: setattr(d["cfg"]["model"], "max_target_positions", 10**12),
            "`max_target_positions` = 1000000000000",
        ),
        (
            lambda d: setattr(d["cfg"]["model"], "encoder_attention_heads", 5),
            "arguments of no transformer_iwslt_de_en|not a transformer",
        ),
        (lambda d: setattr(d["cfg"]["model"], "activation_fn", "sin"), "arguments of no transformer_iwslt_de_en"),
        (lambda d: d.update(model=[1]), "no `model` entry with weights"),
        (
            lambda d: d["model"].update({"encoder.layers.0.fc1.weight": 5}),
            "encoder.layers.0.fc1.weight is a int, not a tensor",
        ),
        (lambda d: setattr(d["cfg"]["model"], "dropout", 7.0), "`dropout` = 7.0, and a number from 0 to below 1"),
        (lambda d: d["model"].update({FIRST: d["model"][FIRST].long()}), f"{FIRST} is no plain tensor"),
        (lambda d: d["model"].update({FIRST: d["model"][FIRST].to_sparse()}), f"{FIRST} is no plain tensor"),
        (lambda d: d["model"].update({FIRST: d["model"][FIRST].to("meta")}), f"{FIRST} is no plain tensor"),
        (lambda d: d["model"].update({FIRST: d["model"][FIRST] / 0}), f"numbers in {FIRST} that are not finite"),
        (
            lambda d: d["model"].update({OUTPUT: d["model"][OUTPUT] + 1}),
            "has an output projection that is not the decoder's embedding",
        ),
    ],
)
def test_arguments_that_do_not_fit_the_weights_are_refused_before_a_model_is_made(tmp_path, change, words):
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(CHECKPOINT, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=words):
        fairseq.read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", None])
def test_a_checkpoint_that_is_cut_off_names_itself(tmp_path, content):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(CHECKPOINT.read_bytes()[:20000] if content is None else content)
    with pytest.raises(ValueError, match=f"{file} was not loaded"):
        fairseq.read_checkpoint(file)


@pytest.mark.parametrize("content", ["no merges at all\n", "#version: 0.2\na b c d\n", "#version: x\n"])
def test_a_file_of_merges_that_is_none_names_itself(tmp_path, content):
    file = tmp_path / "code"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} is not a file of BPE merges"):
        Subwords.read(file)


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"de": ["a"], "en": "b"}', r"row 0 has \['a'\] in de: expected text"),
        ('{"de": "a", "en": 5}', "row 0 has 5 in en: expected text"),
        ('{"translation": {"de": {"x": "a"}, "en": "b"}}', "row 0 has {'x': 'a'} in de: expected text"),
        (json.dumps({"de": ["a"] * 999, "en": ["b"]}), r"row 0 has \['a', .{73}… in de: expected text"),
        (json.dumps({"translation": "word" * 999}), "row 0 has the `translation` 'wordword.{70}…: expected JSON"),
        ('{"de": "a"\n', "could not be read: .*(JSON|decoding object)"),
    ],
)
def test_cells_that_are_no_text_are_refused(tmp_path, row, words):
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 30)
    with pytest.raises(ValueError, match=words):
        load(DataArguments(dataset=str(tmp_path / "train.jsonl")))


@pytest.mark.parametrize("name, language", [("test", "en"), ("valid", "de")])
def test_a_held_out_set_without_text_on_one_side_is_refused(tmp_path, name, language):
    for split in ("train", "valid", "test"):
        write(tmp_path, split, pairs(10))
    load(DataArguments(dataset=str(tmp_path), bpe_merges=20))
    (tmp_path / f"{name}.{language}").write_text("\n \n" * 5)
    with pytest.raises(
        ValueError,
        match=f"The {name}.* split of `dataset` has no text in the (source|target) language: all of its 10 sentences",
    ):
        load(DataArguments(dataset=str(tmp_path), bpe_merges=20))


def test_a_text_too_short_to_learn_merges_from_is_refused(tmp_path):
    """subword-nmt ends the program there."""
    for name in ("train", "valid", "test"):
        write(tmp_path, name, [("ab", "cd")])
    with pytest.raises(ValueError, match="No two letters come together twice in the training text of `dataset`"):
        load(DataArguments(dataset=str(tmp_path), bpe_merges=10))


def test_more_beams_than_tokens_are_refused_before_they_fill_the_memory(tmp_path):
    from tasks import recipes
    from tasks.translation import train

    write(tmp_path, "train", pairs())
    line = ["--dataset", str(tmp_path), "--bpe_merges", "20", "--generation_num_beams", "100000"]
    line += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--report_to", "none"]
    with pytest.raises(
        ValueError, match="`generation_num_beams` is 100000, and a hypothesis can begin with .* tokens only"
    ):
        train.train(*recipes.parse((train.TranslationArguments, train.TrainingArguments), line, ""))


def test_a_quotation_mark_that_swallows_rows_is_told(tmp_path):
    rows = [f"ja {i},yes {i}\n" for i in range(40)]
    file = tmp_path / "train.csv"
    file.write_text("de,en\n" + "".join(rows) + f"{'a ' * 100_000},long\n")
    assert len(sources.from_datasets(str(file), None, "de", "en")["train"]) == 36
    rows[3], rows[30] = f'"{rows[3]}', 'ja 30","yes"\n'
    file.write_text("de,en\n" + "".join(rows))
    for where in (file, tmp_path):
        with pytest.raises(
            ValueError, match="train.csv cannot be read: row 4 has 26 lines in its de that look like rows"
        ):
            sources.from_datasets(str(where), None, "de", "en")
