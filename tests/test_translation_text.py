"""Tokenisation, BPE and dictionaries: by hand, as Moses' own scripts do it, and against a file of fairseq's."""

import random
from pathlib import Path

import pytest

from tasks.translation.text import Subwords, Tokenizer, join_subwords
from tasks.translation.vocabulary import Vocabulary


FIXTURES = Path(__file__).parent / "fixtures" / "fairseq"


@pytest.mark.parametrize(
    "language, line, tokens",
    [
        # What Moses' tokenizer.perl and lowercase.perl make of these lines.
        (
            "de",
            "Er sagt: „Das ist's“ & [mehr]|so.",
            "er sagt : „ das ist &apos; s “ &amp; &#91; mehr &#93; &#124; so .",
        ),
        ("en", 'I don\'t pay 3,500 for "it", do I?', "i don &apos;t pay 3,500 for &quot; it &quot; , do i ?"),
        ("de", "Der Eintrag falcot.org.", "der eintrag falcot.org ."),
        ("de", "Drucken usw.", "drucken usw ."),
        ("de", "Das A und O.", "das a und o ."),
        ("de", "Am 3. Mai z. B. Herr Dr. Müller ...", "am 3. mai z. b. herr dr. müller ..."),
        ("en", "Well...", "well ..."),
        ("en", "", ""),
    ],
)
def test_tokenising_is_that_of_moses(language, line, tokens):
    assert Tokenizer(language)(line) == tokens


@pytest.mark.parametrize(
    "language, tokens, text",
    [
        # Signs that belong to the word before, to the word after, to both, quotation marks in turn, and every escape.
        ("en", "he said : &quot; yes , &quot; ( or so ) ; 5 % off !", 'he said: "yes," (or so); 5% off!'),
        ("en", "it &apos;s $ 5 at john &apos;s &amp; co .", "it's $5 at john's & co."),
        ("en", "a &lt; b &gt; c &#124; d &#91; 1 &#93;", "a < b > c | d [1]"),
        ("de", "das haus &quot; am see &quot; , usw .", 'das haus "am see", usw.'),
    ],
)
def test_detokenising_is_that_of_moses(language, tokens, text):
    assert Tokenizer(language).undo(tokens) == text


def test_detokenising_undoes_spaces_and_escapes():
    tokenizer = Tokenizer("en")
    assert tokenizer.undo(tokenizer('I don\'t know, "he" said (1 & 2).')) == 'i don\'t know, "he" said (1 & 2).'


def test_merges_by_hand():
    # "ab" 4 times, then "abc" 3 times: two merges; "abd" is never whole.
    subwords = Subwords.learn(["abc abc", "abc abd"], 2)
    assert subwords.codes.splitlines()[1:] == ["a b", "ab c</w>"]
    assert subwords("abc abd cab") == "abc ab@@ d c@@ a@@ b"
    assert join_subwords("abc ab@@ d c@@ a@@ b") == "abc abd cab"
    assert join_subwords("cut@@") == "cut" and join_subwords("a@@b @@ c") == "a@@b c"


def test_vocabulary_by_hand_and_against_fairseqs_file(tmp_path):
    made = Vocabulary.learn(["b a c b", "a b ä"])
    assert made.tokens == ["<s>", "<pad>", "</s>", "<unk>", "b", "a", "c", "ä"]
    assert len(Vocabulary.learn(["b a c b", "a b ä z"])) == 16  # filled up
    assert made.encode("a x b") == [5, 3, 4, 2]
    assert made.decode([2, 5, 3, 4, 2, 6, 1, -100]) == "a <unk> b" and made.decode([3], "<<unk>>") == "<<unk>>"

    file = FIXTURES / "dict.de.txt"
    read = Vocabulary.read(file)
    read.write(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    # fairseq's own order: most frequent first, equals by the alphabet, filled up to a multiple of 8.
    lines = [token for token, count in read.counts.items() for _ in range(count)]
    random.Random(0).shuffle(lines)
    assert Vocabulary.learn(lines).tokens == read.tokens and len(read) % 8 == 0


def test_a_dictionary_without_a_final_line_feed_keeps_its_last_token(tmp_path):
    for content in ("a 3\nb 1", "a 3\nb 1\n"):
        (tmp_path / "dict").write_text(content)
        assert Vocabulary.read(tmp_path / "dict").tokens[4:] == ["a", "b"]


def test_special_symbols_have_one_id_each():
    made = Vocabulary.learn(["<unk> a </s> <pad> <s> <unk> <unk>", "a"])
    assert made.tokens == ["<s>", "<pad>", "</s>", "<unk>", "a", "madeupword0000", "madeupword0001", "madeupword0002"]
    assert made.encode("<s> a <pad> </s> <unk> b") == [0, 4, 1, 2, 3, 3, 2]  # as fairseq's Dictionary.index


@pytest.mark.parametrize("symbol", ["<s>", "<pad>", "</s>", "<unk>"])
def test_a_special_symbol_in_a_dictionary_is_refused_as_in_fairseq(tmp_path, symbol):
    (tmp_path / "dict").write_text(f"a 3\n{symbol} 1\n")
    with pytest.raises(ValueError, match=f"dict, line 2 is '{symbol} 1': {symbol} has an id of its own"):
        Vocabulary.read(tmp_path / "dict")


def test_a_dictionary_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "dict").write_bytes(b"gr\xfcn 3\n")
    with pytest.raises(ValueError, match="dict is not UTF-8 .byte 2."):
        Vocabulary.read(tmp_path / "dict")


@pytest.mark.parametrize("content", ["a ²\n", "a\n", "a x\n", "a 1\na 2\n", " 3\n"])
def test_a_broken_dictionary_is_refused(tmp_path, content):
    (tmp_path / "dict").write_text(content)
    with pytest.raises(ValueError, match="dict, line [12] is"):
        Vocabulary.read(tmp_path / "dict")
