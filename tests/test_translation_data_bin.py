"""fairseq's binary data sets: those that fairseq wrote, those written here byte by byte, and damaged ones."""

import struct
from pathlib import Path

import pytest

from tasks.translation import fairseq_format
from tasks.translation.data import DataArguments, load
from tasks.translation.data_bin import data_bin_prefix, read_binary, read_dictionaries


FIXTURES = Path(__file__).parent / "fixtures" / "fairseq"


def test_binary_data_and_dictionaries_read_back_to_the_text():
    vocabularies = read_dictionaries(FIXTURES, "de", "en")
    prefix = data_bin_prefix(FIXTURES, "test", "de", "en")
    assert prefix == data_bin_prefix(FIXTURES, "test", "en", "de") == FIXTURES / "test.de-en"
    assert data_bin_prefix(FIXTURES, "valid", "de", "en") is None
    for language, vocabulary in zip(("de", "en"), vocabularies, strict=True):
        sentences = read_binary(Path(f"{prefix}.{language}"))
        text = (FIXTURES / f"test.{language}").read_text().splitlines()
        assert sentences == [vocabulary.encode(line) for line in text]
        known = [i for i, ids in enumerate(sentences) if 3 not in ids]
        assert 0 < len(known) < len(text)  # some have <unk>
        assert [vocabulary.decode(sentences[i]) for i in known] == [text[i] for i in known]


@pytest.mark.parametrize(
    "code, form, largest", [(8, "H", 65535), (4, "i", 2**31 - 1), (5, "q", 2**40), (3, "h", 2**15 - 1)]
)
def test_every_width_of_numbers_is_read(tmp_path, code, form, largest):
    sentences = [[5, 4, 2], [2], [largest, 7, 256, 2]]
    flat, width = sum(sentences, []), struct.calcsize(f"<{form}")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, code, 3) + struct.pack("<3i", 3, 1, 4)
    (tmp_path / "x.idx").write_bytes(index + struct.pack("<3q", 0, 3 * width, 4 * width))
    (tmp_path / "x.bin").write_bytes(struct.pack(f"<{len(flat)}{form}", *flat))
    assert read_binary(tmp_path / "x") == sentences


def test_damaged_binary_data_is_refused(tmp_path):
    index, data = (FIXTURES / f"test.de-en.de.{kind}" for kind in ("idx", "bin"))
    file = tmp_path / "test.de-en.de"

    def read(new_index, new_data):
        Path(f"{file}.idx").write_bytes(new_index)
        Path(f"{file}.bin").write_bytes(new_data)
        return read_binary(file)

    index, data = index.read_bytes(), data.read_bytes()
    assert len(read(index, data)) == 24
    for new_index, new_data, words in [
        (b"TNTIDX\0\0" + index[8:], data, "--dataset-impl mmap"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], data, "--dataset-impl mmap"),
        (index[:-8], data, "cut off"),
        (index[:17], data, "has 17 bytes, less than its header: it is cut off"),
        (index[:25], data, "has 25 bytes, less than its header: it is cut off"),
        (index, data[:-2], "do not belong together"),
    ]:
        with pytest.raises(ValueError, match=words):
            read(new_index, new_data)


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


def test_an_id_that_is_not_in_the_dictionary_is_refused(tmp_path):
    for file in FIXTURES.glob("test.de-en.*"):
        for split in ("train", "valid", "test"):
            (tmp_path / file.name.replace("test", split)).write_bytes(file.read_bytes())
    ids = [i for line in read_binary(FIXTURES / "test.de-en.en") for i in line]
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


# --- damage that keeps the sizes right -------------------------------------------------------------------------------

SENTENCES = [[5, 4, 2], [6, 2], [7, 5, 5, 2]]


def binary(folder, sentences=SENTENCES, sizes=None, starts=None, code=8, form="H", name="x"):
    """A file pair whose index says what it is told to."""
    flat, width = sum(sentences, []), struct.calcsize(f"<{form}")
    sizes = [len(ids) for ids in sentences] if sizes is None else sizes
    starts = (
        [width * sum(len(ids) for ids in sentences[:i]) for i in range(len(sentences))] if starts is None else starts
    )
    index = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, code, len(sizes)) + struct.pack(f"<{len(sizes)}i", *sizes)
    (folder / f"{name}.idx").write_bytes(index + struct.pack(f"<{len(starts)}q", *starts))
    (folder / f"{name}.bin").write_bytes(struct.pack(f"<{len(flat)}{form}", *flat))
    return folder / name


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"starts": [0, 10, 6]},
            "places sentence 1 at byte 10, and the sizes of those before it at 6",
        ),  # two that trade places
        ({"starts": [0, 0, 0]}, "places sentence 1 at byte 0"),
        ({"starts": [0, 6, 11]}, "places sentence 2 at byte 11"),  # half a token
        ({"starts": [-6, 6, 10]}, "places sentence 0 at byte -6"),
        ({"starts": [0, 6, 1 << 62]}, "places sentence 2 at byte"),
        ({"sizes": [3, -2, 8], "starts": [0, 6, 10]}, "gives sentence 1 -2 tokens"),
        ({"sizes": [3, 0, 6], "starts": [0, 6, 6]}, "gives sentence 1 0 tokens"),
        ({"sizes": [2**31 - 1] * 3, "starts": [0, 2**32 - 2, 2**33 - 4]}, "do not belong together"),
        (
            {"sizes": [2, 3, 4], "starts": [0, 4, 10]},
            r"sentence 0 is \[5, 4\]: expected tokens from 0 and one end symbol",
        ),
        ({"sentences": [[5, 4], [6, 2]]}, r"sentence 0 is \[5, 4\]"),
        ({"sentences": [[5, 2], [6, 2, 5, 2]]}, r"sentence 1 is \[6, 2, 5, 2\]"),
        ({"sentences": [[5, 2], [6, -3, 2]], "code": 4, "form": "i"}, r"sentence 1 is \[6, -3, 2\]"),
        ({"sentences": [[5, 2], [-2]], "code": 2, "form": "b"}, r"sentence 1 is \[-2\]"),
        ({"sentences": [[5, 2], [0, 5, 2]]}, r"sentence 1 is \[0, 5, 2\]: <s> .0. and <pad> .1. never stand inside"),
        ({"sentences": [[5, 1, 2], [5, 2]]}, r"sentence 0 is \[5, 1, 2\]: <s> .0. and <pad>"),
        ({"code": 4, "starts": [0, 12, 20]}, "do not belong together"),  # bytes of another width
        ({"code": 6}, "not of fairseq's mmap form"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, changes, words):
    assert read_binary(binary(tmp_path)) == SENTENCES
    with pytest.raises(ValueError, match=f"{tmp_path}/x.(idx|bin).*{words}"):
        read_binary(binary(tmp_path, **changes))


def test_an_unknown_token_may_stand_inside_of_a_sentence(tmp_path):
    assert read_binary(binary(tmp_path, [[5, 3, 2], [3, 2]])) == [[5, 3, 2], [3, 2]]


def test_half_a_token_at_the_end_is_refused(tmp_path):
    prefix = binary(tmp_path)
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes() + b"\0")
    with pytest.raises(ValueError, match="x.bin has 19 bytes, its index 9 tokens of 2"):
        read_binary(prefix)


def data_bin(folder, dictionary):
    for language in ("de", "en"):
        (folder / f"dict.{language}.txt").write_bytes(dictionary)
        for split in ("train", "valid", "test"):
            binary(folder, name=f"{split}.de-en.{language}")
    return folder


def test_a_byte_order_mark_is_no_part_of_a_token(tmp_path):
    plain = load(DataArguments(dataset=str(data_bin(tmp_path, b"a 3\nb 2\nc 1\nd 1\n"))))
    marked = load(DataArguments(dataset=str(data_bin(tmp_path, b"\xef\xbb\xbfa 3\nb 2\nc 1\nd 1\n"))))
    assert marked.source_vocabulary.tokens == plain.source_vocabulary.tokens
    assert marked.splits["train"]["source_tokens"] == plain.splits["train"]["source_tokens"] == ["b a", "c", "d b b"]


WORDS = [f"w{i:02d}" for i in range(14)]
TIMES = [40, 33, 27, 20, 17, 14, 12, 9, 8, 8, 5, 3, 2, 2]  # of each in the training text


def counted(folder, lines=None, times=TIMES, joined=False):
    """A data set whose dictionary is made of its training text, as fairseq-preprocess does, or says what it is told to."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [[i + 4, 2] for i, n in enumerate(TIMES) for _ in range(n)]
    for language in ("de", "en"):
        for split in ("train", "valid", "test"):
            binary(folder, text, name=f"{split}.de-en.{language}")
        own = [f"{word} {n * (1 + joined)}" for word, n in zip(WORDS, times, strict=True)]
        own += ["madeupword0000 0", "madeupword0001 0"]
        (folder / f"dict.{language}.txt").write_text(
            "\n".join(own if lines is None or language == "en" else lines(own))
        )
    return folder


def test_a_dictionary_that_was_sorted_anew_is_refused(tmp_path):
    folder = counted(tmp_path / "sorted", lambda own: sorted(own, reverse=True))
    with pytest.raises(ValueError, match=r"dict.de.txt, line 3 .'w11 3'. has a higher count than the lines before"):
        load(DataArguments(dataset=str(folder)))
    for language in ("de", "en"):
        lines = (FIXTURES / f"dict.{language}.txt").read_text().splitlines()
        (folder / f"dict.{language}.txt").write_text("\n".join(sorted(lines)))
    with pytest.raises(ValueError, match="dict.de.txt, line .* most frequent first: has it been sorted"):
        fairseq_format.to_hugging_face(FIXTURES / "checkpoint.pt", folder, tmp_path / "model", ("de", "en"))
    # A language's tag that was added after the padding.
    tagged = counted(tmp_path / "tagged", lambda own: [*own, "__de__ 1"])
    assert load(DataArguments(dataset=str(tagged))).source_vocabulary.tokens[-1] == "__de__"


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("lost, told", [(0, 1), (5, 6), (8, 10), (12, 14)])  # at the end of lines with one count
def test_a_dictionary_that_lost_a_line_is_refused(tmp_path, lost, told, joined):
    folder = counted(tmp_path, lambda own: own[:lost] + own[lost + 1 :], joined=joined)
    times = [n * (1 + joined) for n in TIMES]
    counts = [*times[:lost], *times[lost + 1 :], 0]
    words = f"dict.de.txt, line {told}: .* is counted {counts[told - 1]} times, and its id comes {times[told - 1]} times in .*train.de-en.de.bin"
    with pytest.raises(ValueError, match=words):
        load(DataArguments(dataset=str(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"joined": True},
        {"times": [100] * 14},  # no counts at all
        {"times": [n + 7 for n in TIMES]},  # another text's
        {"times": [40, 33, 27, 20, 17, *range(13, 4, -1)]},  # a chance
    ],
)
def test_a_dictionary_of_this_text_or_of_another_is_taken(tmp_path, caplog, changes):
    assert load(DataArguments(dataset=str(counted(tmp_path, **changes)))).source_vocabulary.tokens[4:18] == WORDS
    told = [record.getMessage() for record in caplog.records if "counts other text than" in record.getMessage()]
    assert len(told) == 2 * ("times" in changes)


def test_exchanged_dictionaries_are_refused(tmp_path):
    folder, times = counted(tmp_path), [30, *TIMES[1:]]
    (tmp_path / "dict.en.txt").write_text(
        "".join(f"e{i} {n}\n" for i, n in enumerate([*sorted(times, reverse=True), 0, 0]))
    )
    text = [[i + 4, 2] for i, n in enumerate(sorted(times, reverse=True)) for _ in range(n)]
    for split in ("train", "valid", "test"):
        binary(folder, [*text, *[[2]] * 10], name=f"{split}.de-en.en")
    load(DataArguments(dataset=str(folder)))
    (tmp_path / "dict.de.txt").rename(tmp_path / "kept")
    (tmp_path / "dict.en.txt").rename(tmp_path / "dict.de.txt")
    (tmp_path / "kept").rename(tmp_path / "dict.en.txt")
    with pytest.raises(
        ValueError, match="dict.de.txt counts the words of .*train.de-en.en.bin: are the two .* exchanged"
    ):
        load(DataArguments(dataset=str(folder)))


def test_training_text_that_would_not_be_read_is_named(tmp_path, caplog):
    folder = counted(tmp_path)
    binary(folder, name="valid1.de-en.de")  # which fairseq scores if it is told to
    load(DataArguments(dataset=str(folder)))
    assert not caplog.records
    binary(folder, name="train.en-de.en")
    load(DataArguments(dataset=str(folder)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} holds train.en-de.en beside train.de-en, and they are not read."
    ]
    binary(folder, name="train1.de-en.de")
    with pytest.raises(
        ValueError, match="holds train1.de-en.de, which would not be read: make one train.de-en of all"
    ):
        load(DataArguments(dataset=str(folder)))


def test_an_empty_dictionary_is_refused(tmp_path):
    for content, words in ((b"", " is empty"), (b"\xef\xbb\xbf", " is empty"), (b"\n", ", line 1 is ''")):
        with pytest.raises(ValueError, match=f"dict.de.txt{words}"):
            load(DataArguments(dataset=str(data_bin(tmp_path, content))))


def test_text_that_its_dictionary_does_not_know_is_refused_with_the_share(tmp_path, caplog):
    """Prepared text, whose tokens are looked up here, and a data set in which fairseq has looked them up."""
    for language in ("de", "en"):
        (tmp_path / f"dict.{language}.txt").write_text("a 4\nb 1\n")
        for name, line in (("train", "a b a a b"), ("valid", "a"), ("test", "a")):
            (tmp_path / f"{name}.{language}").write_text(f"{line}\n")
    load(DataArguments(dataset=str(tmp_path)))
    (tmp_path / "train.de").write_text("a b a a b\n" * 20)
    (tmp_path / "train.en").write_text("a b a a b\n" * 19 + "a b a a x\n")  # a hundredth
    load(DataArguments(dataset=str(tmp_path)))
    assert not caplog.records
    (tmp_path / "train.de").write_text("a b a a b\n")
    (tmp_path / "train.en").write_text("a b a a x\n")  # a fifth
    load(DataArguments(dataset=str(tmp_path)))
    (told,) = caplog.records
    assert "20% of the en tokens of train are not in dict.en.txt; one that is made of them" in told.getMessage()
    (tmp_path / "train.en").write_text("a b x x b\n")
    with pytest.raises(
        ValueError, match="40% of the en tokens of train are not in dict.en.txt, and at most 20% may be"
    ):
        load(DataArguments(dataset=str(tmp_path)))
    (tmp_path / "bin").mkdir()
    folder = data_bin(tmp_path / "bin", b"a 3\nb 2\nc 1\nd 1\n")
    binary(folder, [[5, 3, 2], [6, 2], [3, 5, 5, 2]], name="train.de-en.de")
    with pytest.raises(ValueError, match="33% of the de tokens of train are not in dict.de.txt"):
        load(DataArguments(dataset=str(folder)))


def test_the_dictionary_of_the_other_language_is_refused(tmp_path):
    """The fixture's two languages have no word in common."""
    for split in ("train", "valid", "test"):
        for language in ("de", "en"):
            words = (FIXTURES / f"test.{language}").read_text()
            (tmp_path / f"{split}.{language}").write_text(words)
    for language, other in (("de", "en"), ("en", "de")):
        (tmp_path / f"dict.{language}.txt").write_bytes((FIXTURES / f"dict.{other}.txt").read_bytes())
    with pytest.raises(ValueError, match="100% of the de tokens of train are not in dict.de.txt"):
        load(DataArguments(dataset=str(tmp_path)))


@pytest.mark.parametrize("symbol", ["<s>", "<pad>", "</s>", "<unk>"])
def test_a_special_symbol_in_prepared_text_is_refused(tmp_path, symbol):
    for language in ("de", "en"):
        (tmp_path / f"dict.{language}.txt").write_text("a 4\nb 1\n")
        for name in ("train", "valid", "test"):
            (tmp_path / f"{name}.{language}").write_text("a b a b\na b a b a b\n")
    (tmp_path / "valid.en").write_text(f"a b\na {symbol} b\n")
    if symbol == "<unk>":
        assert load(DataArguments(dataset=str(tmp_path))).splits["validation"]["labels"] == [[4, 5, 2], [4, 3, 5, 2]]
        return
    with pytest.raises(ValueError, match=f"{tmp_path}/valid.en, line 2 has <s>, <pad> or </s> in it"):
        load(DataArguments(dataset=str(tmp_path)))
