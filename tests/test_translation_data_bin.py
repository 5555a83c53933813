"""fairseq's binary data sets: those that fairseq wrote, those written here byte by byte, and damaged ones."""

import struct
from pathlib import Path

import pytest

from tasks.translation import fairseq_format as fairseq
from tasks.translation.data import DataArguments, load


FIXTURES = Path(__file__).parent / "fixtures" / "fairseq"


def test_binary_data_and_dictionaries_read_back_to_the_text():
    vocabularies = fairseq.read_dictionaries(FIXTURES, "de", "en")
    prefix = fairseq.data_bin_prefix(FIXTURES, "test", "de", "en")
    assert prefix == fairseq.data_bin_prefix(FIXTURES, "test", "en", "de") == FIXTURES / "test.de-en"
    assert fairseq.data_bin_prefix(FIXTURES, "valid", "de", "en") is None
    for language, vocabulary in zip(("de", "en"), vocabularies, strict=True):
        sentences = fairseq.read_binary(Path(f"{prefix}.{language}"))
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
    assert fairseq.read_binary(tmp_path / "x") == sentences


def test_damaged_binary_data_is_refused(tmp_path):
    index, data = (FIXTURES / f"test.de-en.de.{kind}" for kind in ("idx", "bin"))
    file = tmp_path / "test.de-en.de"

    def read(new_index, new_data):
        Path(f"{file}.idx").write_bytes(new_index)
        Path(f"{file}.bin").write_bytes(new_data)
        return fairseq.read_binary(file)

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
