"""The preparation of IWSLT14 on a small archive of the same layout, against results written out here."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from translation_toys import FILLERS, contents, pack

from tasks.translation import iwslt14
from tasks.translation.data import DataArguments, load


SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_iwslt14"

EXPECTED_HEAD = [
    # Seven tokens and seven; Moses cuts tags as it cuts other signs, and escapes them.
    ("&lt; speaker &gt; anna muster &lt; / speaker &gt;", "&lt; speaker &gt; anna muster &lt; / speaker &gt;"),
    ("anna muster : das haus", "anna muster : the house"),
    ("ein haus &amp; mehr .", "a house &amp; more ."),
    ("das ist das haus .", "this is the house ."),
    ("eins zwei drei vier", "one two three four five six"),
    (" ".join(["wort"] * 175), " ".join(["word"] * 175)),
]


@pytest.fixture
def archive(tmp_path):
    return pack(tmp_path / "de-en.tgz", contents())


def read(folder, name):
    return (folder / name).read_bytes().decode().removesuffix("\n").split("\n")


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_the_result_is_the_one_written_out_here(archive, tmp_path):
    out = tmp_path / "out"
    iwslt14.prepare(archive, out)
    kept = EXPECTED_HEAD + FILLERS
    # Line 23, 46, ... of the cleaned text, counted from 1.
    expected = {"valid": [kept[22], kept[45]], "train": [pair for i, pair in enumerate(kept, 1) if i not in (23, 46)]}
    expected["test"] = []
    for name in ("ted.dev2010", "tedx.dev2012", "ted.tst2010", "ted.tst2011", "ted.tst2012"):
        expected["test"] += [
            (f"das ist {name} im haus &apos; .", f"this isn &apos;t {name} ."),
            (f"{name} &lt; 3", f"{name} &lt; 3"),
            ("", ""),  # the test sets are not cleaned
        ]
    for split, pairs in expected.items():
        for side, language in enumerate(("de", "en")):
            assert read(out, f"tmp/{split}.{language}") == [pair[side] for pair in pairs]
            undone = [line.replace("@@ ", "") for line in read(out, f"{split}.{language}")]
            assert undone == [pair[side] for pair in pairs]


def test_merges_are_joint_and_dictionaries_are_separate(archive, tmp_path):
    out = tmp_path / "out"
    iwslt14.prepare(archive, out)
    code = read(out, "code")
    assert code[0] == "#version: 0.2"
    # "wort" and "word", 175 times each, and one "more": 351 times "or". German alone would begin with "w o".
    assert code[1:3] == ["o r", "w or"]
    dictionaries = [read(out, f"dict.{language}.txt") for language in ("de", "en")]
    assert dictionaries[0][0] == "wort 175" and dictionaries[1][0] == "word 175"
    for language, lines in zip(("de", "en"), dictionaries, strict=True):
        tokens = " ".join(read(out, f"train.{language}")).split()
        counted = sorted(
            {token: tokens.count(token) for token in tokens}.items(), key=lambda item: (-item[1], item[0])
        )
        assert lines[: len(counted)] == [f"{token} {count}" for token, count in counted]
        assert (len(lines) + 4) % 8 == 0 and all(line.startswith("madeupword") for line in lines[len(counted) :])


def test_bpe_is_learnt_from_train_alone_with_ten_thousand_merges(tmp_path, monkeypatch):
    files = contents()
    for language in ("de", "en"):
        # The fillers of lines 23 and 46 of the cleaned text, which go to the validation set.
        lines = files[f"train.tags.de-en.{language}"].split("\n")
        first = lines.index(FILLERS[0][0 if language == "de" else 1])
        for line in (23, 46):
            lines[first + line - 1 - len(EXPECTED_HEAD)] = "quux " * 170
        files[f"train.tags.de-en.{language}"] = "\n".join(lines)
    asked, real = [], iwslt14.Subwords.learn
    monkeypatch.setattr(iwslt14.Subwords, "learn", lambda lines, merges: asked.append(merges) or real(lines, merges))
    iwslt14.prepare(pack(tmp_path / "de-en.tgz", files), tmp_path / "out")
    assert asked == [10000]
    assert read(tmp_path / "out", "tmp/valid.de") == [" ".join(["quux"] * 170)] * 2
    # More often than "wort" in train, were the validation set counted.
    assert "q u" not in read(tmp_path / "out", "code") and "o r" in read(tmp_path / "out", "code")
    assert "quux" not in (tmp_path / "out" / "dict.de.txt").read_text()
    assert read(tmp_path / "out", "valid.de")[0].startswith("q@@ u@@ u@@ x ")


def test_the_typographic_apostrophe_is_replaced_in_the_test_sets_alone(tmp_path):
    files = contents()
    files["train.tags.de-en.en"] = files["train.tags.de-en.en"].replace("This is the house.", "This isn’t it.")
    iwslt14.prepare(pack(tmp_path / "de-en.tgz", files), tmp_path / "out")
    texts = {name: (tmp_path / "out" / "tmp" / f"{name}.en").read_text() for name in ("train", "test")}
    assert texts["train"].count("this isn ’ t it .") == 1 and "&apos;" not in texts["train"]
    assert texts["test"].count("this isn &apos;t") == 5 and "’" not in texts["test"]


@pytest.mark.parametrize("damage", [b'{"archive": "12', b"[]", b"\xff\xfe"])
def test_a_damaged_record_is_made_again(archive, tmp_path, damage, capsys):
    iwslt14.prepare(archive, tmp_path / "out")
    first = {name: path.read_bytes() for name, path in files_of(tmp_path / "out").items()}
    (tmp_path / "out" / "checksums.json").write_bytes(damage)
    iwslt14.prepare(archive, tmp_path / "out")
    assert "checksums.json is damaged: everything is made again." in capsys.readouterr().out
    assert {name: path.read_bytes() for name, path in files_of(tmp_path / "out").items()} == first


def test_the_task_takes_what_was_prepared(archive, tmp_path):
    iwslt14.prepare(archive, tmp_path / "out")
    corpus = load(DataArguments(dataset=str(tmp_path / "out")))
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 64, "validation": 2, "test": 15}
    rows = sorted(
        zip(*(corpus.splits["test"][name] for name in ("line", "target_tokens", "target_text")), strict=True)
    )
    assert rows[0][1:] == ("this isn &apos;t ted.dev2010 .", "this isn't ted.dev2010.")
    assert corpus.subwords("wort") == "wort"


def test_what_is_there_and_intact_is_kept_and_the_rest_made_again(archive, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    iwslt14.prepare(archive, out)
    first = {name: path.read_bytes() for name, path in files_of(out).items()}
    with monkeypatch.context() as patched:
        patched.setattr(iwslt14, "tokenised", lambda contents: pytest.fail("tokenised again"))
        iwslt14.prepare(archive, out)
        assert "complete" in capsys.readouterr().out
        (out / "train.en").unlink()
        (out / "valid.de").write_text("cut o")
        (out / "dict.de.txt").write_text("")
        iwslt14.prepare(archive, out)  # the tokenised text is kept
    assert {name: path.read_bytes() for name, path in files_of(out).items()} == first

    other = contents()
    other["train.tags.de-en.de"] = other["train.tags.de-en.de"].replace("nummer", "zimmer")
    iwslt14.prepare(pack(tmp_path / "other.tgz", other), out)
    assert any("zimmer" in line for line in read(out, "tmp/train.de"))
    assert (
        json.loads((out / "checksums.json").read_text())["train.de"]
        == hashlib.sha256((out / "train.de").read_bytes()).hexdigest()
    )


def test_an_interruption_leaves_no_half_file_and_the_next_run_finishes(archive, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    iwslt14.prepare(archive, whole)
    real, calls = Path.write_bytes, []

    def interrupted(path, data):
        if path.name == "valid.en.part" and path.parent == out:
            real(path, data[:5])
            raise KeyboardInterrupt
        calls.append(path.name)
        return real(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            iwslt14.prepare(archive, out)
    assert calls and not [name for name in files_of(out) if name.endswith(".part") or name == "valid.en"]
    iwslt14.prepare(archive, out)
    assert {n: p.read_bytes() for n, p in files_of(out).items()} == {
        n: p.read_bytes() for n, p in files_of(whole).items()
    }


@pytest.mark.parametrize("damage", ["cut", "member", "missing", "not-an-archive", "utf-8", "lines", "nothing"])
def test_a_bad_archive_is_refused_and_leaves_nothing_behind(tmp_path, damage):
    files, file = contents(), tmp_path / "de-en.tgz"
    words = {
        "cut": "cut off, damaged or no archive",
        "member": "IWSLT14.TED.tst2012.de-en.en.xml not found",
        "missing": "There is no archive",
        "not-an-archive": "cut off, damaged or no archive",
        "utf-8": "cut off, damaged or no archive",
        "lines": "train.tags.de-en: 71 German and 72 English lines",
        "nothing": "train.tags.de-en.de, .* not found",
    }[damage]
    if damage == "member":
        files.pop("IWSLT14.TED.tst2012.de-en.en.xml")
    if damage == "lines":
        files["train.tags.de-en.en"] += "one line more\n"
    if damage == "nothing":
        files = {"README": "another archive"}
    if damage != "missing":
        pack(file, files)
    data = file.read_bytes() if file.exists() else b""
    if damage == "cut":
        file.write_bytes(data[: len(data) * 2 // 3])
    if damage == "not-an-archive":
        file.write_bytes(b"<html>404</html>")
    if damage == "utf-8":
        with tarfile.open(file, "w:gz") as archive:
            member = tarfile.TarInfo("de-en/train.tags.de-en.de")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"gr\xfcn"))
    with pytest.raises(ValueError, match=words):
        iwslt14.prepare(file, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not files_of(tmp_path / "out")


def test_the_script_says_what_is_wrong_in_one_line(archive, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
        )

    wrong = run("out", "--archive", tmp_path / "nowhere.tgz")
    assert wrong.returncode == 1 and wrong.stderr.strip() == f"error: There is no archive {tmp_path / 'nowhere.tgz'}."
    right = run("out", "--archive", archive)
    assert right.returncode == 0 and "train.de 64" in right.stdout and "test.en 15" in right.stdout


def test_a_download_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch, archive):
    data = archive.read_bytes()

    class Answer(io.BytesIO):
        headers = {"Content-Length": str(len(data))}

    file = tmp_path / "data" / "de-en.tgz"
    monkeypatch.setattr(iwslt14.urllib.request, "urlopen", lambda url, timeout: Answer(data[:100]))
    with pytest.raises(ValueError, match=f"broke off after 100 of {len(data)} bytes"):
        iwslt14.download(file)
    assert not list(file.parent.iterdir())
    monkeypatch.setattr(iwslt14.urllib.request, "urlopen", lambda url, timeout: Answer(data))
    iwslt14.download(file)
    assert file.read_bytes() == data and [path.name for path in file.parent.iterdir()] == ["de-en.tgz"]

    def offline(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr(iwslt14.urllib.request, "urlopen", offline)
    with pytest.raises(
        ValueError, match="could not be fetched .no route.: fetch it elsewhere and give it as --archive"
    ):
        iwslt14.download(file)
    assert file.read_bytes() == data
