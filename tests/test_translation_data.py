"""All the inputs that the translation task takes, and what it says about the ones it does not."""

import json
import lzma
import random
from pathlib import Path

import pandas
import pytest
from datasets import Dataset

from tasks.translation import fairseq, sources
from tasks.translation.data import DataArguments, load
from tasks.translation.text import Subwords, Tokenizer, join_subwords
from tasks.translation.vocabulary import Vocabulary


FIXTURES = Path(__file__).parent / "fixtures" / "fairseq"


def pairs(count=60):
    """German-looking and English-looking lines, all different."""
    chance = random.Random(0)
    german, english = ("Haus", "Baum", "grün", "Straße", "ist"), ("house", "tree", "green", "street", "is")
    made = []
    for i in range(count):
        chosen = [chance.randrange(5) for _ in range(chance.randint(2, 9))]
        number = " ".join(str(i))  # digit by digit: no token that only a held-out line has
        made.append(tuple(f"{number} {' '.join(words[c] for c in chosen)}." for words in (german, english)))
    return made


def write(folder, name, rows, languages=("de", "en")):
    folder.mkdir(exist_ok=True)
    for language, lines in zip(languages, zip(*rows, strict=True), strict=True):
        (folder / f"{name}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def texts(split):
    rows = sorted(zip(split["line"], split["source_text"], split["target_text"], strict=True))
    return [(source, target) for _, source, target in rows]


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_the_handbook_is_real_and_split_by_position():
    splits = sources.handbook("de", "en")
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert sizes == {"train": 4441, "validation": 247, "test": 247}
    everything = [pair for rows in splits.values() for pair in rows]
    assert len({german for german, _ in everything}) == len(everything)  # no sentence in two splits
    lines = lzma.decompress(sources.HANDBOOK.read_bytes()).decode().splitlines()
    assert splits["validation"][1] == tuple(lines[20].split("\t")) and splits["test"][1] == tuple(
        lines[30].split("\t")
    )
    assert ("Hierdurch wird eine doppelte Ausführung durch anacron und cron vermieden.",
            "This avoids their double execution by anacron and cron.") in everything  # fmt: skip
    assert sources.handbook("en", "de")["test"][0] == splits["test"][0][::-1]
    with pytest.raises(ValueError, match="handbook is German and English, not fr and en"):
        sources.handbook("fr", "en")
    for name in ("README.md", "LICENSE"):
        assert (
            "ShareAlike" in (sources.HANDBOOK.parent / name).read_text()
            or "CC-BY-SA-3.0" in (sources.HANDBOOK.parent / name).read_text()
        )


def test_ding_takes_first_alternatives_of_three_words_or_more(tmp_path, monkeypatch):
    file = tmp_path / "de-en"
    file.write_text(
        "# comment :: comment\n"
        "Aal {m} (auf der Karte) [cook.] | der grüne Aal; Aal grün | Aal :: eel (on a menu) | the green eel; green eel | Eel\n"
        "der grüne Aal :: the eel twice\n"
        "das A und O [ugs.] :: the nuts and bolts [coll.] <nuts>\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(sources, "DING", file)
    found = sources.ding("de", "en")
    assert [pair for rows in found.values() for pair in rows] == [
        ("das A und O", "the nuts and bolts"),
        ("der grüne Aal", "the green eel"),
    ]
    monkeypatch.setattr(sources, "DING", tmp_path / "nothing")
    with pytest.raises(ValueError, match="apt-get install trans-de-en"):
        sources.ding("de", "en")


def test_raw_text_of_any_pair_is_tokenised_encoded_and_readable_again(tmp_path):
    rows = pairs()
    write(tmp_path, "train", [*rows[:40], ("", "empty source"), ("leeres Ziel", "  ")], ("xx", "yy"))
    write(tmp_path, "valid", rows[40:50], ("xx", "yy"))
    write(tmp_path, "test", [*rows[50:], ("", "")], ("xx", "yy"))
    corpus = load(DataArguments(dataset=str(tmp_path), source_language="xx", target_language="yy", bpe_merges=20))
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 40, "validation": 10, "test": 11}
    assert texts(corpus.splits["train"]) == rows[:40] and texts(corpus.splits["test"]) == [*rows[50:], ("", "")]
    for row in corpus.splits["validation"]:
        assert row["target_tokens"] == Tokenizer("yy")(row["target_text"])
        assert join_subwords(corpus.target_vocabulary.decode(row["labels"])) == row["target_tokens"]
        assert join_subwords(corpus.source_vocabulary.decode(row["input_ids"])) == row["source_tokens"]
        assert row["input_ids"][-1] == row["labels"][-1] == 2
    lengths = [len(ids) for ids in corpus.splits["test"]["input_ids"]]
    assert lengths == sorted(lengths)  # held-out sets come by length

    corpus.save(tmp_path / "saved", "xx", "yy")
    assert Vocabulary.read(tmp_path / "saved" / "dict.xx.txt").tokens == corpus.source_vocabulary.tokens
    assert Subwords.read(tmp_path / "saved" / "code")("grün") == corpus.subwords("grün")


def test_train_alone_is_split(tmp_path):
    rows = pairs(100)
    write(tmp_path, "train", rows)
    corpus = load(DataArguments(dataset=str(tmp_path), bpe_merges=20))
    assert texts(corpus.splits["validation"]) == rows[::20] and texts(corpus.splits["test"]) == rows[10::20]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "csv-columns", "folder"])
def test_files_of_datasets_with_a_translation_column(tmp_path, kind):
    rows = pairs(60)
    translations = [{"de": german, "en": english} for german, english in rows]
    data = Dataset.from_dict({"translation": translations})
    name = str(tmp_path / f"data.{kind.split('-')[0]}")
    if kind == "json":
        data.to_json(name)
    elif kind == "csv":
        pandas.DataFrame({"translation": [json.dumps(row) for row in translations]}).to_csv(name, index=False)
    elif kind == "csv-columns":
        pandas.DataFrame(translations).to_csv(name, index=False)
    elif kind == "parquet":
        data.to_parquet(name)
    else:
        name = str(tmp_path / "folder")
        (tmp_path / "folder").mkdir()
        for split, part in (("train", range(40)), ("validation", range(40, 50)), ("test", range(50, 60))):
            data.select(part).to_json(f"{name}/{split}.json")
    corpus = load(DataArguments(dataset=name, bpe_merges=20))
    expected = rows[50:] if kind == "folder" else rows[10::20]
    assert texts(corpus.splits["test"]) == expected


def test_a_data_bin_folder_is_read_without_fairseq(tmp_path):
    for split in ("train", "valid", "test"):
        for language in ("de", "en"):
            for kind in ("idx", "bin"):
                data = (FIXTURES / f"test.de-en.{language}.{kind}").read_bytes()
                (tmp_path / f"{split}.de-en.{language}.{kind}").write_bytes(data)
    for language in ("de", "en"):
        (tmp_path / f"dict.{language}.txt").write_bytes((FIXTURES / f"dict.{language}.txt").read_bytes())
    corpus = load(DataArguments(dataset=str(tmp_path)))
    text = (FIXTURES / "test.en").read_text().splitlines()
    rows = sorted(zip(corpus.splits["test"]["line"], corpus.splits["test"]["target_tokens"], strict=True))
    known = set(corpus.target_vocabulary.tokens)
    # Unknown words are marked so that no hypothesis can match them.
    expected = [" ".join(word if word in known else "<<unk>>" for word in line.split()) for line in text]
    assert [tokens for _, tokens in rows] == expected and any("<<unk>>" in line for line in expected)

    (tmp_path / "valid.de-en.en.idx").unlink()
    with pytest.raises(ValueError, match="valid.de-en.en.idx is missing"):
        load(DataArguments(dataset=str(tmp_path)))
    for file in tmp_path.glob("valid.*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no valid.de-en data"):
        load(DataArguments(dataset=str(tmp_path)))


def test_merges_and_vocabularies_come_from_the_training_pairs_alone(tmp_path):
    rows = pairs()
    write(tmp_path, "train", rows)
    # "qq" is frequent in the held-out sets, and training has neither the letter nor the sign.
    write(tmp_path, "valid", [("qq qq qq ξ", "qq qq ξ")] * 30)
    write(tmp_path, "test", [("qq ξ", "qq qq")] * 30)
    corpus = load(DataArguments(dataset=str(tmp_path), bpe_merges=20))
    assert len(corpus.subwords.codes.splitlines()) == 21 and "q" not in corpus.subwords.codes
    for vocabulary, side in ((corpus.source_vocabulary, "source"), (corpus.target_vocabulary, "target")):
        trained = {
            token for line in corpus.splits["train"][f"{side}_tokens"] for token in corpus.subwords(line).split()
        }
        assert {token for token, count in vocabulary.counts.items() if count} == trained
    assert corpus.splits["validation"]["input_ids"][0] == [3] * 7 + [2]  # q@@ q q@@ q q@@ q ξ


def test_an_id_that_is_not_in_the_dictionary_is_refused(tmp_path):
    for file in FIXTURES.glob("test.de-en.*"):
        for split in ("train", "valid", "test"):
            (tmp_path / file.name.replace("test", split)).write_bytes(file.read_bytes())
    ids = [i for line in fairseq.read_binary(FIXTURES / "test.de-en.en") for i in line]
    for language in ("de", "en"):
        (tmp_path / f"dict.{language}.txt").write_bytes((FIXTURES / f"dict.{language}.txt").read_bytes())
    lines = (tmp_path / "dict.en.txt").read_text().splitlines(keepends=True)
    (tmp_path / "dict.en.txt").write_text("".join(lines[: max(ids) - 3]))  # the largest one is the last
    load(DataArguments(dataset=str(tmp_path)))
    (tmp_path / "dict.en.txt").write_text("".join(lines[: max(ids) - 4]))
    with pytest.raises(
        ValueError, match=rf"train.de-en.en.bin has the token id {max(ids)}, dict.en.txt {max(ids)} tokens"
    ):
        load(DataArguments(dataset=str(tmp_path)))


# --- what is refused -------------------------------------------------------------------------------------------------


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
        ValueError, match=r"Pair \d of a split of `dataset` has 4401 and \d tokens, and the model has 1024 positions"
    ):
        load(DataArguments(dataset=str(tmp_path), bpe_merges=60))
