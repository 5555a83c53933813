"""The preparation of IWSLT14 on a small archive of the same layout, against results written out here."""

import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from translation_toys import FILLERS, contents, pack

from scripts import prepare_iwslt14
from tasks import files
from tasks.translation import iwslt14
from tasks.translation.data import DataArguments, load


ROOT = Path(__file__).parents[1]

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


@pytest.mark.parametrize(
    "damage",
    [
        *("cut", "member", "missing", "not-an-archive", "utf-8", "lines", "nothing", "no-segments", "empty-segments"),
        *("no-training", "short", "long"),
    ],
)
def test_a_bad_archive_is_refused_and_leaves_nothing_behind(tmp_path, damage):
    files, file = contents(), tmp_path / "de-en.tgz"
    words = {
        "cut": "cut off, damaged or no archive",
        "member": "IWSLT14.TED.tst2012.de-en.en.xml not found",
        "missing": "There is no archive",
        "not-an-archive": "cut off, damaged or no archive",
        "utf-8": "cut off, damaged or no archive .train.tags.de-en.de: 'utf-8' codec",
        "lines": "train.tags.de-en: 71 German and 72 English lines",
        "nothing": "train.tags.de-en.de, .* not found",
        "no-segments": "IWSLT14.TED.tst2011.de-en: no text in it; the archive is damaged, or another",
        "empty-segments": "IWSLT14.TED.tst2011.de-en: no text in it",
        "no-training": "train.tags.de-en: no text in it",
        "short": "valid has no pairs, of 1 that are left of train.tags.de-en after cleaning",
        "long": "train has no pairs, of 0 that are left",
    }[damage]
    if damage == "member":
        files.pop("IWSLT14.TED.tst2012.de-en.en.xml")
    if damage == "lines":
        files["train.tags.de-en.en"] += "one line more\n"
    if damage == "nothing":
        files = {"README": "another archive"}
    segments = {"no-segments": "<doc></doc>\n", "empty-segments": '<seg id="1"> </seg>\n<seg id="2"></seg>\n'}
    if damage in segments:
        files |= {f"IWSLT14.TED.tst2011.de-en.{language}.xml": segments[damage] for language in ("de", "en")}
    training = {"no-training": "<url>x</url>\n", "short": "ein haus\n", "long": "wort " * 200 + "\n"}
    if damage in training:
        files |= {f"train.tags.de-en.{language}": training[damage] for language in ("de", "en")}
    if damage != "missing":
        pack(file, files)
    data = file.read_bytes() if file.exists() else b""
    if damage == "cut":
        file.write_bytes(data[: len(data) * 2 // 3])
    if damage == "not-an-archive":
        file.write_bytes(b"<html>404</html>")
    if damage == "utf-8":
        pack(file, {**files, "train.tags.de-en.de": b"gr\xfcn"})
    with pytest.raises(ValueError, match=words):
        iwslt14.prepare(file, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not files_of(tmp_path / "out")


def test_a_folder_is_no_archive_and_nobody_is_told_to_delete_it(tmp_path):
    with pytest.raises(
        ValueError,
        match=f"^{tmp_path} is a folder, and an archive is expected: give the .tar.gz or .tgz file itself.$",
    ):
        iwslt14.prepare(tmp_path, tmp_path / "out")


def test_the_script_says_what_is_wrong_in_one_line(archive, tmp_path):
    def run(*arguments):
        line = [sys.executable, ROOT / "scripts" / "prepare_iwslt14.py", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [str(part) for part in line], capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    wrong = run("out", "--archive", tmp_path / "nowhere.tgz")
    assert wrong.returncode == 2 and wrong.stderr.strip() == f"error: There is no archive {tmp_path / 'nowhere.tgz'}."
    right = run("out", "--archive", archive)
    assert right.returncode == 0 and "train.de 64" in right.stdout and "test.en 15" in right.stdout
    assert f"SHA-256 {hashlib.sha256(archive.read_bytes()).hexdigest()}" in right.stdout
    assert "train has 64 pairs, fairseq's has 160239: this is another archive than IWSLT14's." in right.stdout


def test_a_file_in_the_folders_place_is_refused_before_anything_is_fetched(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "out"):
        with pytest.raises(ValueError, match=f"The folder is {folder}, and {file} is a file: give a folder"):
            prepare_iwslt14.main([str(folder)])


# --- the download ----------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A server of one file on this machine; `ranges`, `length`: whether it knows ranges and tells the length."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.ranges, self.length, self.breaks_off, self.asked = content, True, True, None, []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(self.server.content):
            return self.send_error(416)
        part = self.server.content[start:]
        self.send_response(206 if start else 200)
        if self.server.length:
            self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: self.server.breaks_off])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(archive, monkeypatch):
    with Server(archive.read_bytes()) as running:
        monkeypatch.setattr(iwslt14, "URL", f"http://127.0.0.1:{running.server_port}/de-en.tgz")
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_the_archive_comes_encrypted():
    assert iwslt14.URL == "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path, server, ranges):
    file, size = tmp_path / "data" / "de-en.tgz", len(server.content)
    server.breaks_off, server.ranges = 100, ranges
    with pytest.raises(ValueError, match=f"broke off after 100 of {size} bytes: the same command goes on"):
        iwslt14.download(file)
    assert [path.name for path in file.parent.iterdir()] == ["de-en.tgz.part"]
    server.breaks_off = None
    iwslt14.download(file)
    assert server.asked == [None, "bytes=100-"]
    assert file.read_bytes() == server.content and [path.name for path in file.parent.iterdir()] == ["de-en.tgz"]


def test_a_server_need_not_tell_the_length(tmp_path, server):
    server.length = False
    iwslt14.download(tmp_path / "de-en.tgz")
    assert (tmp_path / "de-en.tgz").read_bytes() == server.content


def test_a_part_of_another_file_is_thrown_away(tmp_path, server):
    (tmp_path / "de-en.tgz.part").write_bytes(bytes(len(server.content) + 5))
    with pytest.raises(ValueError, match="could not be fetched .*416"):
        iwslt14.download(tmp_path / "de-en.tgz")
    iwslt14.download(tmp_path / "de-en.tgz")
    assert (tmp_path / "de-en.tgz").read_bytes() == server.content


def test_no_server_is_a_sentence(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(iwslt14, "URL", f"http://127.0.0.1:{free.getsockname()[1]}/x")
    with pytest.raises(ValueError, match="could not be fetched .*refused.*: try again, or .* --archive"):
        iwslt14.download(tmp_path / "de-en.tgz")
    assert not list(tmp_path.iterdir())


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1 << 20)
    bomb = tmp_path / "bomb.tgz"
    for name, where in (("train.tags.de-en.de", "in"), ("another", "beside"), ("x" * 3, "in its headers")):
        with tarfile.open(bomb, "w:gz", format=tarfile.PAX_FORMAT) as archive:
            member = tarfile.TarInfo(f"de-en/{name}")
            if where == "in its headers":
                member.pax_headers = {"comment": "0" * (3 << 20)}
            member.size = 3 << 20
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        assert bomb.stat().st_size < 1 << 15
        with pytest.raises(ValueError, match="bomb.tgz is cut off, damaged or no archive .*more than 1 MiB"):
            iwslt14.read_archive(bomb)
