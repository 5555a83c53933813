"""Tiny-ImageNet and ImageNet from folders laid out as their archives are: read right, and refused where something is missing."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tasks.image_classification import archives, data, folders
from tasks.image_classification.catalogue import DATASETS
from tasks.image_classification.labelled_images import Pictures


def picture(path, size, level, mode="RGB"):
    """One that is like no other in a corner, and of one level elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.new(mode, size, level if mode == "L" else (level, 255 - level, 0))
    made.paste(Image.effect_noise((16, 16), 100).convert(mode))
    made.save(path, quality=95)


NAMES = [f"n{number:08d}" for number in range(200)]


@pytest.fixture(scope="module")
def whole_tiny(tmp_path_factory):
    """Two training images of each class and 200 of validation, one of them grey; the level of red is the class's number."""
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    for level, name in enumerate(NAMES):
        for i in range(2):
            picture(root / "train" / name / "images" / f"{name}_{i}.JPEG", (64, 64), level)
        boxes = "".join(f"{name}_{i}.JPEG\t0\t0\t62\t62\n" for i in range(2))
        (root / "train" / name / f"{name}_boxes.txt").write_text(boxes)
        picture(root / "val" / "images" / f"val_{level}.JPEG", (64, 64), level, "L" if level == 7 else "RGB")
    (root / "wnids.txt").write_text("\n".join(reversed(NAMES)) + "\n")
    lines = [f"val_{level}.JPEG\t{name}\t0\t32\t44\t62\n" for level, name in enumerate(NAMES)]
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return root


@pytest.fixture
def tiny(whole_tiny, tmp_path):
    link = lambda file, to: os.link(file, to) if file.endswith("JPEG") else shutil.copy(file, to)  # noqa: E731
    return shutil.copytree(whole_tiny, tmp_path / whole_tiny.name, copy_function=link)


def check_tiny(parts):
    (x, y), (x_test, y_test) = parts
    assert x.shape == (400, 64, 64, 3) and x_test.shape == (200, 64, 64, 3)
    assert np.bincount(y).tolist() == [2] * 200 and sorted(y_test) == list(range(200))
    for pixels, labels in ((x, y), (x_test, y_test)):
        assert np.abs(pixels[:, 30, 30, 0].astype(int) - labels).max() <= 3
    grey = x_test[list(y_test).index(7)]
    assert (grey == grey[..., :1]).all() and not (x_test[0] == x_test[0][..., :1]).all()


def cut(file, lines):
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))


def sort(root, level):
    """A validation image into the folder of its class."""
    (root / "val" / NAMES[level]).mkdir()
    (root / "val" / "images" / f"val_{level}.JPEG").rename(root / "val" / NAMES[level] / f"val_{level}.JPEG")
    (root / "val" / "val_annotations.txt").unlink(missing_ok=True)


def test_tiny_imagenets_own_layout_and_that_with_folders_of_classes(tiny):
    check_tiny(archives.read("tiny_imagenet", tiny))
    check_tiny(archives.read("tiny_imagenet", tiny.parent))
    for level in range(200):
        sort(tiny, level)
    check_tiny(archives.read("tiny_imagenet", tiny))
    splits = data.load("tiny_imagenet", str(tiny), validation_share=0.5, random_erasing=0.5)
    shapes = {name: tuple(split[0]["pixel_values"].shape) for name, split in splits.items()}
    assert shapes == dict.fromkeys(("train", "validation", "test"), (3, 32, 32)) and len(splits["validation"]) == 200


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda root: (root / "wnids.txt").unlink(), "which has no wnids.txt: give the folder tiny-imagenet-200"),
        (lambda root: (root / "wnids.txt").write_text("n00000000\n"), "wnids.txt names 1 classes, not 200"),
        (lambda root: [shutil.rmtree(root / "train" / name) for name in NAMES[5:8]],
         "n00000005 has no pictures, and 3 of 200 classes have no folder: unpack the archive anew"),
        (lambda root: (root / "train" / NAMES[3] / "images" / f"{NAMES[3]}_1.JPEG").unlink(),
         "images lacks n00000003_1.JPEG, and 1 of the 2 files of n00000003_boxes.txt: unpack"),
        (lambda root: [(root / "val" / "images" / f"val_{i}.JPEG").unlink() for i in (4, 9)],
         "images lacks val_9.JPEG, and 2 of the 200 files of val_annotations.txt: unpack"),
        (lambda root: (root / "val" / "val_annotations.txt").write_text("a.JPEG\tn1\n"), "line 1 has the class 'n1', which wnids"),
        (lambda root: (root / "val" / "val_annotations.txt").write_text(""), "images has no line in val_annotations.txt"),
        (lambda root: (root / "val" / "val_annotations.txt").open("a").write(f"val_7.JPEG\t{NAMES[8]}\t0\t0\t9\t9\n"),
         "val_annotations.txt, line 201 lists val_7.JPEG a second time, and it would count twice: unpack"),
        (lambda root: cut(root / "val" / "val_annotations.txt", 150), "annotations.txt has no line for .*val_0.JPEG, and 50 pictures would be left out"),
        (lambda root: [sort(root, level) for level in range(200)] and picture(root / "val" / "images" / "val_9.JPEG", (64, 64), 9),
         "val/images/val_9.JPEG is in no folder of a class, and would be left out: sort all pictures"),
        (lambda root: picture(root / "train" / "n00000777" / "images" / "x.JPEG", (64, 64), 9), "x.JPEG is in no folder of a class"),
        (lambda root: (root / "val" / "images" / "val_9.JPEG").unlink() or picture(root / "val" / "images" / "val_9.JPEG", (32, 64), 9),
         "val_9.JPEG is not a picture of Tiny-ImageNet: 32×64 pixels, not 64×64"),
        (lambda root: (root / "val" / "images" / "val_9.JPEG").unlink() or (root / "val" / "images" / "val_9.JPEG").write_bytes(b"no"),
         "val_9.JPEG is not a picture of Tiny-ImageNet: cannot identify"),
    ],
)  # fmt: skip
def test_a_half_unpacked_tiny_imagenet_says_what_is_missing(tiny, damage, words):
    damage(tiny)
    with pytest.raises(ValueError, match=words):
        folders.tiny_imagenet(tiny)


def test_files_beside_the_pictures_of_a_class_that_would_be_passed_over_or_count_twice_are_refused(tiny):
    def lay(places, name, source=None):
        for place in places:
            file = tiny / place / name
            file.write_bytes(b"x" if source is None else (tiny / place / source).read_bytes())
            yield file
            file.unlink()

    train, val = f"train/{NAMES[3]}/images", "val/images"
    for place in (train, val):
        for name in (
            *("README", "notes.md", "x.txt", "x.JPEG.md5", "MD5SUMS", "Thumbs.db"),
            ".DS_Store",
            ".x.JPEG.tmp",
            "._x.JPEG",
        ):
            (tiny / place / name).write_bytes(b"x")
    check_tiny(folders.tiny_imagenet(tiny))
    for name in ("x.jfif", "x.JPEG.1", "x.JPEG.crdownload", "x.gif", "x", "x.tar"):
        for file in lay((train, val), name):
            with pytest.raises(
                ValueError, match=f"^{file} does not end on .JPEG or the like, and would be passed over"
            ):
                folders.tiny_imagenet(tiny)
    first = f"{NAMES[3]}_0.JPEG"
    for end in (" (1).JPEG", "(2).JPEG", " - Copy.JPEG", " copy.JPEG", " copy 2.JPEG", ".jpg"):
        for file in lay([train], first.replace(".JPEG", end), first):
            with pytest.raises(ValueError, match=f"{re.escape(str(file))}.* are the same, and their pictures would"):
                folders.tiny_imagenet(tiny)
    for _ in lay([train], f"{NAMES[3]}_0 (1).JPEG", f"{NAMES[3]}_1.JPEG"):  # another picture
        assert len(folders.tiny_imagenet(tiny)[0][1]) == 401


# --- ImageNet ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for label in range(1000):
        for part in ("train", "val"):
            (root / part / f"n{label:08d}").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for label in range(1000):
        for part in ("train", "val"):
            file = root / part / f"n{label:08d}" / f"{part}_{label}.JPEG"
            if label < 3:
                Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(file)
            else:
                file.write_bytes(b"")  # never opened
    return root


def test_imagenet_is_read_one_by_one_and_varied_by_seed_epoch_and_index(imagenet):
    splits = data.load("imagenet", str(imagenet), validation_share=0, seed=5)
    train, test = splits["train"], splits["test"]
    assert len(train) == len(test) == 1000 and train.labels.tolist() == list(range(1000))
    stream = torch.get_rng_state()
    first = [train[i]["pixel_values"] for i in range(3)]
    assert torch.equal(torch.get_rng_state(), stream)
    assert {tuple(x.shape) for x in first} == {(3, 224, 224)} and first[0].dtype == torch.uint8
    again = data.load("imagenet", str(imagenet), validation_share=0, seed=5)["train"]
    assert torch.equal(again[2]["pixel_values"], first[2]) and again[2]["labels"] == 2
    again.epoch.fill_(1)
    other = data.load("imagenet", str(imagenet), validation_share=0, seed=6)["train"]
    assert not torch.equal(again[2]["pixel_values"], first[2]) and not torch.equal(other[2]["pixel_values"], first[2])
    twice = Pictures(train.files[[2, 2]], train.labels[[2, 2]], DATASETS["imagenet"], varied=True)
    assert not torch.equal(twice[0]["pixel_values"], twice[1]["pixel_values"])
    with Image.open(test.files[1]) as stored:
        scored = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(stored)
    assert torch.equal(test[1]["pixel_values"], scored)
    assert train.fingerprint != test.fingerprint and train.fingerprint == other.fingerprint
    with pytest.raises(ValueError, match="train_7.JPEG is not a picture: .* Fetch it again"):
        train[7]
    part = data.load("imagenet", str(imagenet), validation_share=0, label_noise=0.1)
    assert len(part["wrong_labels"]) == 100 and part["wrong_labels"][0]["labels"] == part["wrong_labels"].labels[0]


def test_pictures_written_anew_under_the_same_names_are_other_data(tmp_path):
    files = [tmp_path / "n00000000" / f"{i}.JPEG" for i in range(3)]
    for i, file in enumerate(files):
        picture(file, (40, 30), i)

    def print_of(places):
        return Pictures(np.array(places, dtype=object), np.zeros(3, np.int64), DATASETS["imagenet"]).fingerprint

    first = print_of(files)
    moved = shutil.copytree(tmp_path / "n00000000", tmp_path / "elsewhere" / "n00000000")
    assert print_of([moved / file.name for file in files]) == first
    picture(files[1], (30, 30), 1)
    assert print_of(files) != first


def test_imagenets_pictures_that_count_twice_or_not_at_all_are_refused(imagenet, tmp_path):
    link = lambda part: shutil.copytree(imagenet / part, tmp_path / part, copy_function=os.link)  # noqa: E731
    link("train"), link("val")
    (tmp_path / "val" / "n99999999").mkdir()
    (tmp_path / "val" / "labels.txt").write_text("")
    (tmp_path / "val" / "n00000000" / "n00000000_1.JPEG").write_bytes(b"")
    assert len(folders.imagenet(tmp_path)[1][1]) == 1001
    for stray in ("n99999999/x.JPEG", "ILSVRC2012_val_00000293.JPEG"):
        (tmp_path / "val" / stray).write_bytes(b"")
        with pytest.raises(
            ValueError, match=f"{tmp_path}/val/{stray} is in no folder of a class, and would be left out"
        ):
            folders.imagenet(tmp_path)
        (tmp_path / "val" / stray).unlink()
    shutil.rmtree(tmp_path / "val")
    shutil.copytree(tmp_path / "train", tmp_path / "val", copy_function=os.link)
    with pytest.raises(ValueError, match="1000 of the 1000 files of val are in train too .n00000000/train_0.JPEG."):
        folders.imagenet(tmp_path)


def test_a_part_of_imagenet_says_what_is_missing(tmp_path):
    def refused(words):
        with pytest.raises(ValueError, match=words):
            folders.imagenet(tmp_path)

    refused("which has no folder train: give the one with ImageNet's train and val")
    for label in range(999):
        (tmp_path / "train" / f"n{label:08d}").mkdir(parents=True)
    refused("which has no folder val")
    (tmp_path / "val").mkdir()
    refused("train has folders of 999 classes, not 1000: unpack all of its archives")
    (tmp_path / "train" / "n00000999").mkdir()
    refused("val has no folder for each class: sort its pictures")
    (tmp_path / "val" / "n00000000").mkdir()
    refused("train/n00000000 has no pictures: unpack the archive anew")


def test_what_plays_no_part_is_refused(tmp_path):
    for changes, words in [
        (
            {"name": "imagenet"},
            "`dataset` imagenet is read from folders of its pictures: give their folder as `data_dir`",
        ),
        ({"name": "imagenet", "cutout": 16}, "`cutout` and `random_erasing` are for images that fit into memory"),
        ({"name": "digits", "random_erasing": 1.5}, "`random_erasing` is 1.5: give a share"),
        ({"name": "digits", "cutout_probability": 0.5}, "`cutout_probability` is 0.5, and `cutout` 0"),
        ({"name": "digits", "cutout": 2, "random_erasing": 0.5}, "`cutout` is 2 and `random_erasing` 0.5: give one"),
        ({"name": "digits", "padding_mode": "reflect"}, "`padding_mode` is reflect, and these images are not padded"),
        ({"name": "cifar10", "padding_mode": "mirror"}, "`padding_mode` is mirror: give constant or reflect"),
        ({"name": "digits", "test_examples": 360}, "`test_examples` is 360: give 10 or more and fewer than the 360"),
    ]:
        with pytest.raises(ValueError, match=words):
            data.load(**changes)
    part, whole = data.load("digits", test_examples=100), data.load("digits")
    assert len(part["test"]) == 100 and np.bincount(part["test"].labels).min() >= 9
    assert len(part["train"]) == len(whole["train"]) and part["train"].fingerprint == whole["train"].fingerprint
    assert DATASETS["tiny_imagenet"].edge == 64 and DATASETS["cifar10"].edge == 32
