"""All the inputs that the translation task takes."""

import json
import lzma

import pandas
import pytest
from datasets import Dataset
from translation_toys import pairs, texts, write

from tasks.translation import sources
from tasks.translation.checks import (
    refuse_copied_side,
    refuse_swapped,
    warn_of_lost,
    warn_of_other_text,
    warn_of_repetitions,
)
from tasks.translation.data import DataArguments, load
from tasks.translation.text import Subwords, Tokenizer, join_subwords
from tasks.translation.vocabulary import Vocabulary


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


def test_a_part_of_the_training_pairs_is_spread_evenly_and_teaches_its_own_subwords(tmp_path):
    rows = pairs(100)
    write(tmp_path, "train", [*rows[:90], ("", "left out before the part is taken")])
    write(tmp_path, "valid", rows[90:95])
    write(tmp_path, "test", rows[95:])

    def part(examples, folder=tmp_path, **more):
        return load(DataArguments(dataset=str(folder), train_examples=examples, **more))

    found = part(20, bpe_merges=20)
    assert texts(found.splits["train"]) == [rows[i * 90 // 20] for i in range(20)]
    assert [len(found.splits[name]) for name in ("validation", "test")] == [5, 5]
    assert texts(part(90, bpe_merges=20).splits["train"]) == rows[:90]
    whole = part(None, bpe_merges=20)
    assert found.fingerprints["train"] != whole.fingerprints["train"]
    assert found.target_vocabulary.counts != whole.target_vocabulary.counts
    with pytest.raises(ValueError, match="`train_examples` is 91, and there are 90 training pairs: give 90 or fewer"):
        part(91, bpe_merges=20)
    with pytest.raises(ValueError, match="`train_examples` is 0: give 1 or more, or leave it out"):
        part(0)

    # Of prepared data the dictionaries stay as they are.
    whole.save(tmp_path / "prepared", "de", "en")
    for name, split in zip(("train", "valid", "test"), ("train", "validation", "test"), strict=True):
        encoded = [
            [whole.subwords(line) for line in whole.splits[split][f"{side}_tokens"]] for side in ("source", "target")
        ]
        write(tmp_path / "prepared", name, zip(*encoded, strict=True))
    few = part(30, tmp_path / "prepared")
    assert few.splits["train"]["labels"] == whole.splits["train"]["labels"][::3]
    assert few.target_vocabulary.counts == whole.target_vocabulary.counts
    code = tmp_path / "prepared" / "code"
    assert few.subwords.codes == code.read_text()
    code.write_text("".join(code.read_text().splitlines(True)[:10]))
    with pytest.raises(ValueError, match=r"code splits \d+ of 180 lines of train otherwise than they are"):
        part(30, tmp_path / "prepared")
    code.unlink()
    assert part(30, tmp_path / "prepared").subwords is None


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_prepared_text_of_which_a_file_is_not_cut_is_refused(tmp_path, name):
    rows = [*[("haus", "house")] * 19, ("maus", "mouse")] * 15
    for split in ("train", "valid", "test"):
        write(tmp_path, split, rows)
    corpus = load(DataArguments(dataset=str(tmp_path), bpe_merges=6))
    corpus.save(tmp_path, "de", "en")
    cut = [tuple(map(corpus.subwords, pair)) for pair in rows]
    for split in ("train", "valid", "test"):
        write(tmp_path, split, cut)
    load(DataArguments(dataset=str(tmp_path)))
    write(tmp_path, name, [(german, "mouse" if "m@@" in english else english) for german, english in cut])
    told = {"valid": "validation"}.get(name, name)
    with pytest.raises(ValueError, match=rf"code splits 15 of 600 lines of {told} otherwise than they are"):
        load(DataArguments(dataset=str(tmp_path)))


def test_scored_pairs_that_are_trained_on_are_told(tmp_path, caplog):
    rows = pairs(100)
    write(tmp_path, "train", rows[:60])
    write(tmp_path, "valid", [*rows[60:79], rows[0]])
    write(tmp_path, "test", [*rows[79:97], *rows[:3]])
    warn_of_repetitions(load(DataArguments(dataset=str(tmp_path), bpe_merges=20)).splits)
    assert [record.getMessage() for record in caplog.records] == [
        "3 of the 21 pairs of test are training pairs too, and scores of them mean little."
    ]


@pytest.mark.parametrize("shared, told", [(2, False), (3, True), (20, True)])
def test_pairs_of_validation_and_test_that_are_the_same_are_told(tmp_path, caplog, shared, told):
    rows = pairs(100)
    write(tmp_path, "train", rows[:40])
    write(tmp_path, "valid", rows[40:60])
    write(tmp_path, "test", [*rows[40 : 40 + shared], *rows[60:90]])
    warn_of_repetitions(load(DataArguments(dataset=str(tmp_path), bpe_merges=20)).splits)
    assert [record.getMessage() for record in caplog.records] == [
        f"{shared} of the {30 + shared} pairs of test are pairs of validation too: what is chosen by the one is chosen by the other."
    ] * told


@pytest.mark.parametrize("copies, told", [(20, False), (21, True)])
def test_text_that_is_the_same_in_both_languages_is_told(tmp_path, caplog, copies, told):
    rows = pairs(100)
    write(tmp_path, "train", [*((german, german) for german, _ in rows[:copies]), *rows[copies:40]])
    write(tmp_path, "valid", rows[40:60])
    write(tmp_path, "test", rows[60:])
    warn_of_repetitions(load(DataArguments(dataset=str(tmp_path), bpe_merges=20)).splits)
    assert [record.getMessage() for record in caplog.records] == [
        "21 of the 40 pairs of train have the same text in both languages: is one of its files a copy?"
    ] * told


def test_text_that_is_cut_already_is_refused_where_running_text_is_expected(tmp_path):
    rows = pairs(100)
    arguments = DataArguments(dataset=str(tmp_path), bpe_merges=20)

    def read(name, changed):
        for split, part in (("train", rows), ("valid", rows), ("test", rows)):
            write(tmp_path, split, changed if split == name else part)
        return load(arguments)

    marks = ["das ha@@ us", "ha@@", "▁das ▁haus", "das ist &apos;s", "l&apos; eau", "&quot; das &quot;"]
    for mark in marks:
        for name, side, told in (("train", 0, "de of the train"), ("test", 1, "en of the test")):
            marked = lambda n, side=side, mark=mark: [  # noqa: E731
                tuple(mark if number == side and i < n else text for number, text in enumerate(pair))
                for i, pair in enumerate(rows)
            ]
            read(name, marked(2))
            with pytest.raises(
                ValueError, match=f"3 of the 100 lines in {told} split of `dataset` have marks such as"
            ):
                read(name, marked(3))
    write(tmp_path, "test", [("das ist &apos;s", "it &apos;s"), *rows[:9]])  # one line of ten
    write(tmp_path, "train", rows)
    load(arguments)
    # What a text about such things may hold.
    for mark in ("a@@b @@ c", "mail@@example", "Tom&apos;s &quot;house&quot;", "x@ y"):
        read("train", [(mark, english) for _, english in rows])


def test_held_out_text_of_the_other_language_is_refused(tmp_path):
    words = [(f"ja{i} nein{i % 7}", f"yes{i} no{i % 7}") for i in range(60)]
    rows = [
        (f"{german} {other}", f"{english} {translation}")
        for (german, english), (other, translation) in zip(words, words[1:] + words[:1], strict=True)
    ]
    arguments = DataArguments(dataset=str(tmp_path), bpe_merges=20)
    for name in ("train", "valid", "test"):
        write(tmp_path, name, rows)
    refuse_swapped(load(arguments).splits, ("de", "en"))
    write(tmp_path, "test", [pair[::-1] for pair in rows])
    with pytest.raises(
        ValueError, match="test split.*text in de of which.*in de knows 0% of the words, and that in en 100%"
    ):
        refuse_swapped(load(arguments).splits, ("de", "en"))
    # One side alone, and half of it: the reference is in the source's language.
    write(tmp_path, "test", [*rows[:30], *((german, german) for german, _ in rows[30:])])
    refuse_swapped(load(arguments).splits, ("de", "en"))
    write(tmp_path, "test", [*rows[:20], *((german, german) for german, _ in rows[20:])])
    with pytest.raises(
        ValueError, match="text in en of which the training text in en knows 33% of the words, and that in de 67%"
    ):
        refuse_swapped(load(arguments).splits, ("de", "en"))


def test_a_file_under_another_splits_name_is_refused(tmp_path):
    rows = pairs(120)
    arguments = DataArguments(dataset=str(tmp_path), bpe_merges=20)
    for name, of in (("train", rows[:80]), ("valid", rows[80:100]), ("test", rows[100:])):
        write(tmp_path, name, of)
    refuse_copied_side(load(arguments).splits, ("de", "en"))
    (tmp_path / "test.de").write_bytes((tmp_path / "valid.de").read_bytes())
    words = (
        "100% of the lines in de of the test split of `dataset` are those of validation, and 0% in the other language"
    )
    with pytest.raises(ValueError, match=words):
        refuse_copied_side(load(arguments).splits, ("de", "en"))
    write(tmp_path, "test", rows[80:100])  # both sides: told as a repetition
    refuse_copied_side(load(arguments).splits, ("de", "en"))


def test_text_of_another_encoding_is_told(tmp_path, caplog):
    rows = pairs(120)
    for name, of in (("train", rows[:80]), ("valid", rows[80:100]), ("test", rows[100:])):
        write(tmp_path, name, of)
    corpus = load(DataArguments(dataset=str(tmp_path), bpe_merges=20))
    caplog.clear()
    warn_of_lost(corpus.splits, ("de", "en"))
    assert not caplog.records
    write(tmp_path, "test", [(f"Ã¼ {german}", english) for german, english in rows[100:]])
    write(tmp_path, "valid", [(german, f"{english} \ufffd") for german, english in rows[80:100]])
    corpus = load(DataArguments(dataset=str(tmp_path), bpe_merges=20))
    caplog.clear()
    warn_of_lost(corpus.splits, ("de", "en"))
    told = [record.getMessage() for record in caplog.records]
    assert "validation in en: 20 of 20 texts have lost characters" in told[0]
    assert any("of the de tokens of test are unknown" in text for text in told)


def test_ids_of_another_dictionary_and_words_in_another_order_are_told(caplog):
    splits = load(DataArguments(train_examples=800, bpe_merges=300)).splits
    largest = max(max(ids) for split in splits.values() for ids in split["labels"])

    def changed(**columns):
        return {
            **splits,
            "test": splits["test"].map(lambda row: {name: of(row[name]) for name, of in columns.items()}),
        }

    def other_dictionary(ids):  # of equal size; the special symbols stay
        return [i if i < 4 else 4 + (i - 4) * 7 % (largest - 3) for i in ids]

    for test, told in [
        (splits, []),
        (changed(labels=other_dictionary), ["en of test"]),
        (changed(input_ids=lambda ids: [*ids[-2::-1], ids[-1]]), ["de of test"]),
        ({**splits, "train": splits["train"].select([*range(30)] * 10)}, []),  # ten times the same: no part is aside
    ]:
        caplog.clear()
        warn_of_other_text(test, ("de", "en"))
        found = [
            record.getMessage().partition("neighbouring tokens in ")[2].partition(",")[0] for record in caplog.records
        ]
        assert found == told


def test_pairs_without_text_in_one_language_are_told(tmp_path, caplog):
    rows = pairs(60)
    write(tmp_path, "train", [*rows[:39], ("a", " ")])
    write(tmp_path, "valid", [*rows[40:48], ("", "b"), ("a", "")])
    write(tmp_path, "test", rows[50:])
    corpus = load(DataArguments(dataset=str(tmp_path), bpe_merges=20))
    assert [len(corpus.splits[name]) for name in ("train", "validation", "test")] == [39, 10, 10]
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 40 pairs of train have no text in one language and are left out.",
        "2 of 10 pairs of validation have no text in one language and are scored as they are.",
    ]
    # Prepared text is trained on as it is.
    corpus.save(tmp_path, "de", "en")
    for name in ("train", "valid", "test"):
        lines = [(tmp_path / f"{name}.{language}").read_text().splitlines() for language in ("de", "en")]
        encoded = [[corpus.subwords(line.lower()) for line in side] for side in lines]
        write(tmp_path, name, zip(*encoded, strict=True))
    (tmp_path / "code").unlink()
    caplog.clear()
    load(DataArguments(dataset=str(tmp_path)))
    assert [text for text in caplog.messages if "no text in one language" in text] == [
        "1 of 40 pairs of train have no text in one language and are trained on as they are.",
        "2 of 10 pairs of validation have no text in one language and are scored as they are.",
    ]


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
        (tmp_path / "folder" / "tmp").mkdir(parents=True)  # no sign of a prepared folder where there is no train.de
        for split, part in (("train", range(40)), ("validation", range(40, 50)), ("test", range(50, 60))):
            data.select(part).to_json(f"{name}/{split}.json")
    corpus = load(DataArguments(dataset=name, bpe_merges=20))
    expected = rows[50:] if kind == "folder" else rows[10::20]
    assert texts(corpus.splits["test"]) == expected


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
