"""Local copies of the image data sets: what is not the data set is refused by file and row, and no file runs anything."""

import gzip
import io
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tasks import files
from tasks.image_classification import archives, cifar_pickle, data


ROOT = Path(__file__).parents[1]
PIXELS = np.random.default_rng(1).integers(0, 256, (6, 3072), dtype=np.uint8)
LABELS = [3, 99, 0, 41, 5, 5]


def batch(rows=(0, 1, 2, 3), **changes):
    return {"data": PIXELS[list(rows)], "fine_labels": [LABELS[i] for i in rows], **changes}


def cifar(folder, train, test=None):
    """CIFAR-100's two batches, given as dictionaries or as bytes."""
    folder.mkdir(exist_ok=True)
    for name, content in (("train", train), ("test", batch([4, 5]) if test is None else test)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
    return folder


# --- CIFAR: contents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_every_protocol_are_read(tmp_path, protocol, order):
    content = pickle.dumps({b"data": np.array(PIXELS[:4], order=order), b"fine_labels": LABELS[:4]}, protocol=protocol)
    (x, y), (x_test, _) = archives.read("cifar100", cifar(tmp_path, content))
    assert (x == PIXELS[:4].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)).all() and y.tolist() == LABELS[:4]
    assert x.dtype == np.uint8 and y.dtype == np.int64 and len(x_test) == 2


@pytest.mark.parametrize(
    "content, words",
    [
        (batch(data=PIXELS[:4].astype(np.float32)), "its 'data' is of type 'f4', not of unsigned bytes"),
        (batch(data=PIXELS[:4].astype(np.int8)), "its 'data' is of type 'i1'"),
        (batch(data=PIXELS[:4].astype(np.uint16)), "'u2'"),
        (batch(data=PIXELS[:4].astype(object)), "'O8'"),
        (batch(data=PIXELS[:4, :3071]), r"its 'data' is an array of \(4, 3071\), not 3072 bytes an image"),
        (batch(data=PIXELS[:4].reshape(4, 3, 32, 32)), r"an array of \(4, 3, 32, 32\)"),
        (batch(data=PIXELS[:0], fine_labels=[]), "it asks for __builtin__.bytes"),  # which is how Python 3 writes b""
        (batch(data=PIXELS[:4].tolist()), "its 'data' is a list"),
        (batch(fine_labels=LABELS[:3]), "it has 4 images and 3 labels"),
        (batch(fine_labels=[1, 2, 3, 4, 5]), "it has 4 images and 5 labels"),
        (batch(fine_labels=[1, 2, -1, 4]), "row 2 has the label -1: expected a whole number from 0 to 99"),
        (batch(fine_labels=[1, 100, 3, 4]), "row 1 has the label 100"),
        (batch(fine_labels=[1, 2, 3, 4.0]), "row 3 has the label 4.0|holds the operation 'G'"),
        (batch(fine_labels=[1, None, 3, 4]), "row 1 has the label None"),
        (batch(fine_labels=[True, 2, 3, 4]), "row 0 has the label True"),
        (batch(fine_labels=[1, "2", 3, 4]), "row 1 has the label '2'"),
        (batch(fine_labels=np.arange(4)), "its 'fine_labels' is of type 'i8'"),
        (batch(fine_labels={1: 2}), "a key that is no text"),
        ({"data": PIXELS[:4]}, "it has no 'fine_labels', but 'data'"),
        ({}, "it has no 'data'"),
        (pickle.dumps([1, 2]), "but a list"),
        (b"", "it is cut off"),
        (pickle.dumps(batch(), protocol=2)[:-100], "it is cut off"),
    ],
)
@pytest.mark.parametrize("where", ["train", "test"])
def test_what_is_not_the_data_set_is_refused_by_file_and_row(tmp_path, content, words, where):
    folder = cifar(tmp_path / "c", content) if where == "train" else cifar(tmp_path / "c", batch(), content)
    with pytest.raises(ValueError, match=f"{folder}/{where}.*({words})"):
        archives.read("cifar100", folder)


# --- CIFAR: hostile files --------------------------------------------------------------------------------------------


def op(name, *parts):
    return getattr(pickle, name) + b"".join(parts)


def glob(module, name):
    return op("GLOBAL", module.encode(), b"\n", name.encode(), b"\n")


def text(value):
    return op("BINUNICODE", struct.pack("<I", len(value)), value.encode())


DTYPE = glob("numpy", "dtype") + op("MARK") + text("O8") + op("NEWFALSE") + op("NEWTRUE") + op("TUPLE") + op("REDUCE")
# An array of object pointers whose bytes are ours to choose.
FORGED = (
    glob("numpy.core.multiarray", "_reconstruct")
    + op("MARK") + glob("numpy", "ndarray") + op("BININT1", b"\0") + op("TUPLE1") + text("b") + op("TUPLE") + op("REDUCE")
    + op("MARK") + op("BININT1", b"\1") + op("BININT1", b"\1") + op("TUPLE1") + DTYPE
    # BUILD of the dtype: version, byte order, ..., and flags that say there are no objects in it.
    + op("MARK") + op("BININT1", b"\3") + text("|") + op("NONE") * 3 + op("BININT1", b"\x08") * 2 + op("BININT1", b"\0")
    + op("TUPLE") + op("BUILD")
    + op("NEWFALSE") + op("SHORT_BINBYTES", b"\x08", b"\x41" * 8) + op("TUPLE") + op("BUILD")
)  # fmt: skip
DEEP = op("EMPTY_TUPLE") + op("TUPLE1") * 2_000_000
HOSTILE = {
    "object pointers": op("EMPTY_DICT")
    + op("MARK")
    + text("data")
    + FORGED
    + text("fine_labels")
    + op("EMPTY_LIST")
    + op("SETITEMS"),
    "a tuple that overflows the stack": op("EMPTY_DICT") + DEEP + op("NONE") + op("SETITEM"),
    "the same among others": op("EMPTY_DICT")
    + op("MARK")
    + text("a")
    + op("NONE")
    + DEEP
    + op("NONE")
    + op("SETITEMS"),
    "a set of them": op("EMPTY_SET") + op("MARK") + DEEP + op("ADDITEMS"),
    "state of a class": glob("numpy", "ndarray") + op("EMPTY_DICT") + op("BUILD"),
    "state of a function": glob("_codecs", "encode") + op("EMPTY_DICT") + op("BUILD"),
    "defaults of a function": glob("_codecs", "encode")
    + (
        op("NONE")
        + op("EMPTY_DICT")
        + text("__defaults__")
        + text("rot13")
        + op("TUPLE1")
        + op("SETITEM")
        + op("TUPLE2")
    )
    + op("BUILD"),
    "a place in the memo that is gigabytes away": op("EMPTY_DICT") + op("LONG_BINPUT", b"\xff\xff\xff\x7f"),
    "more bytes than there are": op("BINBYTES8", struct.pack("<Q", 1 << 40)),
    "a text of gigabytes": op("BINUNICODE8", struct.pack("<Q", 1 << 33)) + b"x",
    "another module": glob("os", "system") + text("touch hostile-was-here") + op("TUPLE1") + op("REDUCE"),
    "a dotted name": op("PROTO", b"\4") + text("numpy") + text("f2py.os.system") + op("STACK_GLOBAL"),
    "another codec": glob("_codecs", "encode") + op("MARK") + text("x") + text("rot13") + op("TUPLE") + op("REDUCE"),
    "an extension": op("EXT1", b"\1"),
    "a persistent object": op("BINPERSID"),
    "a new object": glob("numpy", "ndarray") + op("EMPTY_TUPLE") + op("NEWOBJ"),
    "numbers as text": op("LONG", b"9" * 5000 + b"L\n"),
    "lists in lists": op("EMPTY_LIST") * 100_000 + op("APPEND") * 99_999,
}


REFUSING = """
import resource
import sys
from pathlib import Path
from tasks.image_classification import archives

# What torch's libraries take (more than this where they are built for CUDA 13) is not counted.
taken = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, [taken + (2 << 30)] * 2)
for folder in map(Path, sys.argv[1:]):
    try:
        archives.read("cifar100", folder)
        print(folder, "was read")
    except ValueError as error:
        print(error, flush=True)
"""


def test_hostile_batches_are_refused_in_two_gigabytes_of_memory(tmp_path):
    """In a process of its own: what these did was a crash, or all of the machine's memory."""
    names = [cifar(tmp_path / str(i), content + op("STOP")).name for i, content in enumerate(HOSTILE.values())]
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, *names],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, f"{[*HOSTILE][len(said)]}: {done.stderr[-2000:]}"
    for name, number, sentence in zip(HOSTILE, names, said, strict=True):
        assert sentence.startswith(f"{number}/train is not a batch of CIFAR"), name
    assert not list(tmp_path.rglob("hostile-was-here"))


@pytest.mark.parametrize("kind", [name for name in HOSTILE if name.startswith(("state of", "defaults of"))])
def test_only_arrays_and_their_kinds_have_a_state(kind):
    before = cifar_pickle._encode.__defaults__
    with pytest.raises(ValueError, match="it sets the state of something that is no array"):
        cifar_pickle.unpickle(HOSTILE[kind] + op("STOP"), "train")
    assert cifar_pickle._encode.__defaults__ == before == ("latin1",) and cifar_pickle._Array.state is None


def test_object_pointers_are_no_array():
    """Only its kind is read of a dtype, and no array is made of another one than bytes."""
    with pytest.raises(ValueError, match="its 'data' is of type 'O8', not of unsigned bytes"):
        cifar_pickle.unpickle(HOSTILE["object pointers"] + op("STOP"), "train")


def test_after_a_hostile_batch_whole_ones_are_still_read(tmp_path):
    for content in HOSTILE.values():
        with pytest.raises(ValueError):
            archives._batch(content + op("STOP"), "fine_labels", data.DATASETS["cifar100"], "x")
    assert cifar_pickle._encode.__defaults__ == ("latin1",) and cifar_pickle._Array.state is None
    archives.read("cifar100", cifar(tmp_path, batch()))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    folder = cifar(tmp_path / "cifar-100-python", batch())
    file = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder, "cifar-100-python")
    archives.read("cifar100", file)
    monkeypatch.setattr(files, "LARGEST", 1 << 14)
    with pytest.raises(
        ValueError, match="cifar-100-python.tar.gz is cut off, damaged or no archive .*unpacks to more than"
    ):
        archives.read("cifar100", file)
    monkeypatch.setattr(archives, "LARGEST", 1 << 12)
    with pytest.raises(ValueError, match="train is not a batch of CIFAR: it has more than"):
        archives.read("cifar100", folder)


@pytest.mark.parametrize("damage", ["cut", "foreign", "twice", "missing"])
def test_a_damaged_archive_names_itself(tmp_path, damage):
    folder, file = cifar(tmp_path / "cifar-100-python", batch()), tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(folder / "train", "cifar-100-python/train")
        if damage != "missing":
            archive.add(folder / "test", "cifar-100-python/test")
        if damage == "twice":
            archive.add(folder / "test", "elsewhere/train")
    if damage in ("cut", "foreign"):
        file.write_bytes(file.read_bytes()[:5000] if damage == "cut" else b"<html>404</html>")
    words = {"twice": "it holds train twice", "missing": "test not found in it"}.get(damage, "damaged or no archive")
    with pytest.raises(ValueError, match=f"cifar-100-python.tar.gz .*{words}"):
        archives.read("cifar100", file)


def cifar10(folder, lengths=(1, 1, 1, 1, 1, 1)):
    folder.mkdir()
    for number, length in enumerate(lengths, 1):
        content = {"data": PIXELS[:length] + np.uint8(number), "labels": list(range(length))}
        name = f"data_batch_{number}" if number < 6 else "test_batch"
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_batch_that_is_there_twice_is_named(tmp_path, name):
    folder = cifar10(tmp_path / "cifar-10-batches-py")
    cifar(tmp_path / "cifar-100-python", batch())  # another data set may lie beside it
    (folder / f"{name}.old").write_bytes(b"")
    assert len(archives.read("cifar10", tmp_path)[0][1]) == 5 and len(archives.read("cifar100", tmp_path)[0][1]) == 4
    cifar10(tmp_path / "a-backup")
    for file in (tmp_path / "a-backup").iterdir():
        if file.name != name:
            file.unlink()
    with pytest.raises(ValueError, match=f"holds .*a-backup/{name} and {folder}/{name}, of which one would be read"):
        archives.read("cifar10", tmp_path)


def test_batches_that_would_be_passed_over_or_are_short_are_named(tmp_path):
    folder = cifar10(tmp_path / "whole", (2, 2, 2, 2, 2, 3))
    assert [len(y) for _, y in archives.read("cifar10", folder)] == [10, 3]
    (folder / "data_batch_6").write_bytes((folder / "data_batch_1").read_bytes())
    with pytest.raises(ValueError, match=f"{folder}/data_batch_6 is no part of cifar10, and would be passed over"):
        archives.read("cifar10", folder)
    folder = cifar10(tmp_path / "short", (2, 2, 1, 2, 2, 2))
    with pytest.raises(
        ValueError, match=f"{folder}/data_batch_3 has 1 images, and the other batches 2: fetch it again"
    ):
        archives.read("cifar10", folder)


def test_an_archive_beside_its_own_batches_is_read_and_beside_others_refused(tmp_path):
    folder = cifar10(tmp_path / "cifar-10-batches-py")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-py")
    assert len(archives.read("cifar10", tmp_path)[0][1]) == 5
    (folder / "data_batch_2").write_bytes((folder / "data_batch_1").read_bytes())
    with pytest.raises(
        ValueError, match="data_batch_2 is not the one in .*cifar-10-python.tar.gz, which would be read"
    ):
        archives.read("cifar10", tmp_path)
    assert len(archives.read("cifar10", tmp_path / "cifar-10-python.tar.gz")[0][1]) == 5


# --- parquet ---------------------------------------------------------------------------------------------------------


def picture(size=(32, 32), mode="RGB", kind="PNG"):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


GOOD = [picture() for _ in range(3)]


def parquet(folder, name, pictures=GOOD, labels=(1, 2, 3), label=None):
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({"img": list(pictures), "fine_label": list(labels)})
    if label is not None:
        table = table.cast_column("fine_label", label)
    table.to_parquet(folder / f"{name}.parquet")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"labels": [1.0, 2.0, 3.0]}, "row 0 has the label 1.0"),
        ({"labels": [1, None, 3]}, "row 1 has the label None"),
        ({"labels": ["1", "2", "3"]}, "row 0 has the label '1'"),
        ({"labels": [1, 2, 100]}, "row 2 has the label 100: expected a whole number from 0 to 99"),
        ({"labels": [-1, 2, 3]}, "row 0 has the label -1"),
        ({"labels": [True, False, True]}, "row 0 has the label True"),
        ({"labels": [[1], [2], [3]]}, r"row 0 has the label \[1\]"),
        (
            {"pictures": [GOOD[0], picture((28, 28)), GOOD[0]]},
            "row 1 is not an image of the data set: 28×28 pixels in mode RGB",
        ),
        ({"pictures": [GOOD[0], GOOD[0], picture((32, 33))]}, "row 2 .*32×33 pixels"),
        ({"pictures": [picture(mode="L"), GOOD[0], GOOD[0]]}, "row 0 .*mode L, not 32×32 in RGB"),
        ({"pictures": [picture(mode="RGBA"), GOOD[0], GOOD[0]]}, "mode RGBA"),
        ({"pictures": [picture((20000, 20000), "1"), GOOD[0], GOOD[0]]}, "row 0 is not an image"),
        (
            {"pictures": [{"bytes": b"<html>", "path": None}, GOOD[0], GOOD[0]]},
            "row 0 is not an image of the data set",
        ),
        ({"pictures": [{"bytes": GOOD[0]["bytes"][:40], "path": None}, GOOD[0], GOOD[0]]}, "row 0 is not an image"),
        (
            {"pictures": [GOOD[0], {"bytes": None, "path": "picture.png"}, GOOD[0]]},
            "row 1 .* no picture, but the path",
        ),
        ({"pictures": [GOOD[0], None, GOOD[0]]}, "row 1 is not an image of the data set"),
        ({"pictures": [1.5, 2.5, 3.5]}, "is no parquet file of images"),
        ({"pictures": [], "labels": []}, "is no parquet file of images|holds no images|has the columns"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_that_are_not_of_the_data_set_are_refused(tmp_path, changes, words, split):
    for name in ("train", "test"):
        parquet(tmp_path, name, **(changes if name == split else {}))
    with pytest.raises(ValueError, match=f"{split}.parquet.*({words})"):
        archives.read("cifar100", tmp_path)


def test_class_labels_are_whole_numbers(tmp_path):
    names = datasets.ClassLabel(names=[f"class {i}" for i in range(100)])
    for name in ("train", "test"):
        parquet(tmp_path, name, label=names)
    (x, y), _ = archives.read("cifar100", tmp_path)
    assert x.shape == (3, 32, 32, 3) and y.tolist() == [1, 2, 3]


def test_files_that_name_the_classes_in_another_order_are_refused(tmp_path):
    names = [f"class {i}" for i in range(100)]
    parquet(tmp_path, "train", label=datasets.ClassLabel(names=names))
    parquet(tmp_path, "test")  # which says nothing of names
    archives.read("cifar100", tmp_path)
    parquet(tmp_path, "test", label=datasets.ClassLabel(names=[*names[:98], "class 99", "class 98"]))
    with pytest.raises(
        ValueError, match="Class 98 is class 99 in .*test.parquet, and class 98 in .*train.parquet: take"
    ):
        archives.read("cifar100", tmp_path)


@pytest.mark.parametrize(
    "train, test",
    [
        ("train-00000-of-00001", "test-00000-of-00001"),
        ("cifar100/train/0000", "cifar100/test/0000"),
        ("CIFAR_Train", "my.test"),
    ],
)
def test_the_split_is_a_word_of_the_name(tmp_path, train, test):
    for name, labels in ((train, [1, 1, 1]), (test, [2, 2, 2])):
        path = tmp_path / name
        parquet(path.parent, path.name, labels=labels)
    (_, y), (_, y_test) = archives.read("cifar100", tmp_path)
    assert set(y) == {1} and set(y_test) == {2}
    for other in ("latest", "contest-trained", "validation-00000-of-00001"):
        parquet(tmp_path, other, labels=[9, 9, 9])
        with pytest.raises(ValueError, match=f"{other}.parquet says neither train nor test, and would be passed over"):
            archives.read("cifar100", tmp_path)
        (tmp_path / f"{other}.parquet").unlink()


def test_a_half_unpacked_archive_says_what_is_missing(tmp_path):
    (cifar(tmp_path / "c", batch()) / "test").unlink()
    with pytest.raises(ValueError, match="test is missing in .*, which holds other parts of cifar100: unpack"):
        archives.read("cifar100", tmp_path)


def test_a_name_that_merely_contains_the_word_is_no_split(tmp_path):
    parquet(tmp_path, "train-latest")
    with pytest.raises(ValueError, match="no files of cifar100 were found"):
        archives.read("cifar100", tmp_path)
    parquet(tmp_path, "train-and-test")
    with pytest.raises(ValueError, match="train-and-test.parquet says both train and test"):
        archives.read("cifar100", tmp_path)


def test_a_file_of_several_is_not_taken_for_all(tmp_path):
    parquet(tmp_path, "test-00000-of-00001")
    for number in (0, 2):
        parquet(tmp_path, f"train-0000{number}-of-00003", labels=[number] * 3)
    with pytest.raises(
        ValueError, match="train-00000-of-00003.parquet is one of 3 files, and train-00001-of-00003.parquet is missing"
    ):
        archives.read("cifar100", tmp_path)
    parquet(tmp_path, "train-00001-of-00003")
    assert len(archives.read("cifar100", tmp_path)[0][1]) == 9


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_that_is_there_twice_is_named(tmp_path, split):
    for name in ("train", "test"):
        parquet(tmp_path, name)
    archives.read("cifar100", tmp_path)
    (tmp_path / f"{split}-copy.parquet").write_bytes((tmp_path / f"{split}.parquet").read_bytes())
    with pytest.raises(ValueError, match=f"{split}-copy.parquet and .*{split}.parquet are the same"):
        archives.read("cifar100", tmp_path)
    parquet(tmp_path, f"{split}-copy", labels=[4, 5, 6])
    assert len(archives.read("cifar100", tmp_path)[split == "test"][1]) == 6


@pytest.mark.parametrize(
    "name", ["train-b.PARQUET", "train-b.parquet.part", "train-b.parquet.gz", "train-b.parquet (1)"]
)
def test_a_file_that_does_not_end_as_it_should_is_named(tmp_path, name):
    for split in ("train", "test"):
        parquet(tmp_path, split)
    # Beside what the hub's client and others leave.
    for other in ("train.parquet.md5", ".cache/huggingface/download/train.parquet.metadata", "parquet.md"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("")
    archives.read("cifar100", tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="train-b.* does not end on .parquet, and would be passed over: rename it"):
        archives.read("cifar100", tmp_path)


@pytest.mark.parametrize("other", ["cifar-100-python/train", "cifar-100-python.tar.gz"])
def test_parquet_files_beside_another_form_of_the_data_set_are_refused(tmp_path, other):
    for split in ("train", "test"):
        parquet(tmp_path / "cifar100" / split, "0000")
    archives.read("cifar100", tmp_path)
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds parquet files, and {tmp_path}/{other} of cifar100 as well: move one"):
        archives.read("cifar100", tmp_path)


def test_a_file_in_place_of_its_folder_is_not_called_damaged(tmp_path):
    parquet(tmp_path, "train")
    with pytest.raises(ValueError, match="`data_dir` is .*train.parquet, a file: give the folder that holds"):
        archives.read("cifar100", tmp_path / "train.parquet")


def test_a_parquet_file_without_rows_says_so(tmp_path):
    parquet(tmp_path, "train")
    datasets.Dataset.from_dict({"img": GOOD, "fine_label": [1, 2, 3]}).select([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="test.parquet holds no images"):
        archives.read("cifar100", tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>404</html>", None])
def test_a_file_that_is_no_parquet_names_itself(tmp_path, content):
    parquet(tmp_path, "test")
    parquet(tmp_path, "train")
    file = tmp_path / "train.parquet"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(ValueError, match=f"{file} is no parquet file of images"):
        archives.read("cifar100", tmp_path)


def test_a_cache_that_cannot_be_written_to_is_not_needed(tmp_path):
    for name in ("train", "test"):
        parquet(tmp_path, name)
    (tmp_path / "file").write_text("")
    blocked = dict.fromkeys(
        ("HF_HOME", "HF_DATASETS_CACHE", "HOME", "XDG_CACHE_HOME"), str(tmp_path / "file" / "cache")
    )
    code = "from pathlib import Path; from tasks.image_classification import archives; print(archives.read('cifar100', Path('.'))[0][0].shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**blocked, "PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == "(3, 32, 32, 3)", done.stderr[-2000:]


# --- idx -------------------------------------------------------------------------------------------------------------


def idx(values, kind=8):
    return gzip.compress(struct.pack(f">HBB{values.ndim}I", 0, kind, values.ndim, *values.shape) + values.tobytes())


def fashion(folder, **changes):
    rng = np.random.default_rng(0)
    for split, n in (("train", 5), ("t10k", 3)):
        images, labels = rng.integers(0, 146, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8)
        for kind, content in (("images-idx3", idx(images)), ("labels-idx1", idx(labels))):
            key = f"{split}_{kind[:6]}"
            content = changes.get(key, content)
            if content is not None:
                (folder / f"{split}-{kind}-ubyte.gz").write_bytes(content)
    return folder


def test_whole_idx_files_are_read(tmp_path):
    (x, y), (x_test, y_test) = archives.read("fashion_mnist", fashion(tmp_path))
    assert (x.shape, x_test.shape, y.tolist(), y_test.tolist()) == (
        (5, 28, 28, 1),
        (3, 28, 28, 1),
        [0, 1, 2, 3, 4],
        [0, 1, 2],
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_labels": idx(np.arange(4, dtype=np.uint8))}, r"train-labels.*\(4,\), and .*train-images.* 5 images"),
        ({"t10k_labels": idx(np.arange(4, dtype=np.uint8))}, r"t10k-labels.*\(4,\), and .*t10k-images.* 3 images"),
        ({"train_labels": idx(np.full(5, 10, np.uint8))}, "train-labels.* row 0 has the label 10"),
        ({"t10k_labels": idx(np.full(3, 255, np.uint8))}, "t10k-labels.* row 0 has the label 255"),
        (
            {"train_images": idx(np.zeros((5, 32, 32), np.uint8))},
            r"train-images.*\(5, 32, 32\): expected images of 28×28",
        ),
        ({"train_images": idx(np.zeros((5, 784), np.uint8))}, r"\(5, 784\)"),
        ({"train_images": idx(np.zeros((0, 28, 28), np.uint8))}, r"\(0, 28, 28\)"),
        ({"train_images": idx(np.zeros((5, 28, 28), np.uint8), kind=9)}, "not a whole idx file of unsigned bytes"),
        ({"train_images": gzip.compress(b"\0\0\x08\xff" + b"\xff" * 1020)}, "not a whole idx file"),
        ({"train_images": gzip.compress(b"\0\0\x08")}, "not a whole idx file"),
        ({"train_images": b"<html>"}, "not a whole idx file"),
        ({"t10k_images": None}, "t10k-images-idx3-ubyte.gz is missing"),
        ({"train_labels": None}, "train-labels-idx1-ubyte.gz is missing"),
    ],
)
def test_idx_files_that_are_not_the_data_set_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        archives.read("fashion_mnist", fashion(tmp_path, **changes))


def test_an_idx_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1 << 20)
    bomb = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 1 << 14, 28, 28) + bytes((1 << 14) * 784))
    assert len(bomb) < 1 << 15
    with pytest.raises(ValueError, match="train-images.*unpacks to more than 1 MiB"):
        archives.read("fashion_mnist", fashion(tmp_path, train_images=bomb))


# --- flags that a data set has no use for ----------------------------------------------------------------------------


def test_digits_come_from_nowhere_else(tmp_path):
    with pytest.raises(ValueError, match="`data_dir` is .*, but digits come with scikit-learn: leave it out"):
        data.load("digits", str(tmp_path))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"validation_share": 0.001}, "`validation_share` is 0.001, of 1437 training images"),
        ({"validation_share": float("nan")}, "`validation_share` is nan"),
        ({"train_examples": 1290}, "`train_examples` is 1290, of 1293 training images"),
    ],
)
def test_shares_that_leave_a_class_out_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        data.load("digits", **changes)


def test_images_that_come_again_where_they_are_scored_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10

    def load(train, test):
        files = {
            "train_images": train,
            "train_labels": labels[: len(train)],
            "t10k_images": test,
            "t10k_labels": labels[:5],
        }
        return data.load(
            "fashion_mnist", str(fashion(tmp_path, **{name: idx(kept) for name, kept in files.items()})), 0.25
        )

    assert len(load(pixels, rng.integers(0, 256, (5, 28, 28), dtype=np.uint8))["train"]) == 30
    # A few are in the data sets themselves.
    few = np.concatenate([pixels[:36], pixels[:4]])
    load(few, rng.integers(0, 256, (5, 28, 28), dtype=np.uint8))
    with pytest.raises(ValueError, match="1 of the 5 test images are training images too"):
        load(pixels, np.concatenate([pixels[7:8], rng.integers(0, 256, (4, 28, 28), dtype=np.uint8)]))
    with pytest.raises(
        ValueError, match="20 of the 40 training images are copies of others, .*: is a file there twice"
    ):
        load(np.concatenate([pixels[:20]] * 2), rng.integers(0, 256, (5, 28, 28), dtype=np.uint8))
    with pytest.raises(ValueError, match="1 of the 5 test images are copies of others, and would count twice"):
        load(pixels, rng.integers(0, 256, (5, 28, 28), dtype=np.uint8)[[0, 1, 2, 3, 3]])
    with pytest.raises(
        ValueError, match="all 40 training images are the same picture: were they read or made wrongly"
    ):
        load(np.zeros_like(pixels), rng.integers(0, 256, (5, 28, 28), dtype=np.uint8))


def test_a_class_without_images_is_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    pixels = np.random.default_rng(0).integers(0, 146, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 9
    data.load("fashion_mnist", str(fashion(tmp_path, train_images=idx(pixels), train_labels=idx(labels))), 0)
    assert said == [
        "No training image is of class 9, and 1 of 10 have none.",
        "No test image is of class 3, and 7 of 10 have none.",
    ]


def test_pixels_of_another_data_set_are_warned_about(tmp_path, monkeypatch):
    """MNIST's files have the names and the form of Fashion-MNIST's."""
    said = []
    monkeypatch.setattr(data.logger, "warning", lambda text: said.append(text) if "pixels" in text else None)
    rng = np.random.default_rng(0)

    def load(train, test):
        parts = {"train_images": (rng.random((40, 28, 28)) < train), "t10k_images": (rng.random((3, 28, 28)) < test)}
        labels = {"train_labels": idx(np.arange(40, dtype=np.uint8) % 10)}
        images = {name: idx(pixels.astype(np.uint8) * 255) for name, pixels in parts.items()}
        data.load("fashion_mnist", str(fashion(tmp_path, **images, **labels)), 0)
        return [text.partition(" mean")[0] for text in said]

    assert load(0.286, 0.286) == []
    assert load(0.131, 0.286) == ["The training pixels'"]
    assert "and that of fashion_mnist [0.286]: is it that data set?" in said[0]
    assert load(0.286, 0.714) == ["The training pixels'", "The test pixels'"]
    data.load("digits")
    assert len(said) == 2


def test_red_and_blue_exchanged_in_one_split_are_warned_about(monkeypatch):
    said = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    right = np.round(np.broadcast_to(data.DATASETS["cifar10"].mean, (4, 32, 32, 3)) * 255).astype(np.uint8)
    grey = np.full_like(right, 120)
    data._warn_of_another_data_set("cifar10", training=right, test=grey)
    assert said == []
    data._warn_of_another_data_set("cifar10", training=right, test=right[..., ::-1])
    assert said == ["The test images are more blue than red, and those of cifar10 more red: are the two exchanged?"]
    data._warn_of_another_data_set("digits", training=grey[..., :1] * 0 + 78)
    assert len(said) == 1


def test_more_test_images_than_training_images_are_warned_about(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(data.logger, "warning", lambda text: said.append(text) if "exchanged" in text else None)
    draw = lambda n: idx(np.random.default_rng(n).integers(0, 146, (n, 28, 28), dtype=np.uint8))  # noqa: E731
    labels = idx(np.arange(5, dtype=np.uint8))
    data.load("fashion_mnist", str(fashion(tmp_path, t10k_images=draw(5), t10k_labels=labels)), 0)
    assert not said
    labels = idx(np.arange(6, dtype=np.uint8))
    data.load("fashion_mnist", str(fashion(tmp_path, t10k_images=draw(6), t10k_labels=labels)), 0)
    assert said == ["There are 5 training images and 6 test images: are the two exchanged?"]
