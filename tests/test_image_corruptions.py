"""Scores on corrupted images: the right files, the paper's groups, and a trained model read back."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from scripts.paper import numbers
from tasks.image_classification import corruptions, models


def write(folder, n=50, classes=10):
    """Images of five severities, n in all, of one level but for the last pixel, which counts them."""
    labels = np.arange(n) % classes
    for at, name in enumerate(corruptions.NAMES):
        x = np.full((n, 32, 32, 3), at, np.uint8)
        x[:, -1, -1, :2] = np.stack(np.divmod(np.arange(n), 256), axis=1)
        np.save(folder / f"{name}.npy", x)
    np.save(folder / "labels.npy", labels)


def test_the_groups_are_those_that_make_the_papers_overall_means():
    assert len(set(corruptions.NAMES)) == 19
    for setting in ("cifar100-resnet-18", "cifar10-resnet-18", "cifar100-densenet-121", "cifar10-densenet-121"):
        for cell in numbers("table-15", setting).values():
            weighed = sum(len(names) * cell[group].mean for group, names in corruptions.GROUPS.items()) / 19
            assert weighed == pytest.approx(cell["corrupted"].mean, abs=0.006)


def test_groups_are_means_of_their_corruptions(tmp_path):
    write(tmp_path)
    # The level of a file's pixels is its number, 0 to 18.
    level = lambda x, labels: float(x[0, 0, 0, 0]) / 18  # noqa: E731
    found, half = corruptions.score(corruptions.stored("cifar10", tmp_path), level, lambda *of: level(*of) / 2)
    groups = {"noise": 1.5 / 18, "blur": 6 / 18, "weather": 10 / 18, "digital": 15 / 18, "corrupted": 0.5}
    assert found["groups"] == pytest.approx(groups)
    assert half["groups"] == pytest.approx({name: share / 2 for name, share in groups.items()})
    assert list(found["corruptions"]) == list(corruptions.NAMES)


class Movable:
    """A function in a model's place."""

    def __init__(self, forward):
        self.to = lambda device: forward


class Fixed(nn.Module):
    """Its logits are the values of the first pixels."""

    def forward(self, pixel_values):
        return type("Output", (), {"logits": pixel_values[:, 0, 0, :4].float()})


def test_an_image_is_right_if_its_logit_is_above_all_others():
    x = np.zeros((4, 32, 32, 3), np.uint8)
    x[0, 0, 2], x[1, 0, 1], x[2, 0, 3] = 9, 9, 9  # the last one is a tie
    right = corruptions.accuracy(Fixed(), torch.device("cpu"), batch=3)
    assert right(x, np.array([2, 0, 3, 0])) == 0.5


@pytest.mark.parametrize("name", ["vit-small", "resnet-small"])
def test_a_finished_run_is_scored(tmp_path, name, capsys):
    run, data = tmp_path / "seed-0", tmp_path / "CIFAR-10-C"
    data.mkdir()
    write(data)
    model = models.build(name, "cifar10")
    model.save_pretrained(run)
    (run / "result.json").write_text(json.dumps({"dataset": "cifar10"}))
    corruptions.main([str(run), "--data_dir", str(data)])
    found = json.loads((run / corruptions.FILE).read_text())
    model.eval()
    x = torch.from_numpy(np.load(data / "saturate.npy")).movedim(3, 1)
    assert (x[:, :, 0] == 18).all()
    expected = (model(x).logits.argmax(1) == torch.arange(50) % 10).float().mean().item()
    assert found["corruptions"]["saturate"] == pytest.approx(expected) and found["made_by"] == "CIFAR-10-C"
    assert capsys.readouterr().out.startswith(f"{run}: noise ")


@pytest.mark.parametrize("name", ["vit-small", "resnet-small", "resnet-18"])
def test_a_model_of_another_data_set_than_the_runs_is_refused(tmp_path, name):
    (tmp_path / "result.json").write_text(json.dumps({"dataset": "cifar10"}))
    for dataset, told in (
        ("cifar100", "tells 100 classes apart"),
        ("fashion_mnist", "takes images of 1 channels"),
        ("cifar10", None),
    ):
        models.build(name, dataset).save_pretrained(tmp_path)
        if told is None:
            assert corruptions.load(tmp_path)[1] == dataset
            continue
        with pytest.raises(
            ValueError, match=f"^{tmp_path}'s result.json says cifar10, and its model {told}: they are of two runs"
        ):
            corruptions.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": 28}))
    if name != "vit-small":  # of which the weights do not fit
        with pytest.raises(ValueError, match="its model takes images of 28 pixels"):
            corruptions.load(tmp_path)


def test_images_are_corrupted_here_by_the_library_and_always_alike(monkeypatch):
    """With a stand-in that has the library's signature and its two ways to draw."""

    def corrupt(image, severity=1, corruption_name=None, corruption_number=-1, **seeded):
        assert ("seed" in seeded) == (corruption_name in ("impulse_noise", "glass_blur"))
        drawn = np.random.default_rng(seeded["seed"]).integers(256) if seeded else np.random.randint(256)
        return np.full_like(image, drawn) if severity > 1 else image

    monkeypatch.setitem(sys.modules, "imagecorruptions", types.SimpleNamespace(corrupt=corrupt))
    test = np.arange(2 * 32 * 32 * 3, dtype=np.uint64).astype(np.uint8).reshape(2, 32, 32, 3), np.array([4, 7])
    stream = np.random.get_state()[1].copy()
    first, again = (dict(corruptions.made(test)) for _ in range(2))
    assert list(first) == list(corruptions.NAMES) and (np.random.get_state()[1] == stream).all()
    for name, (x, labels) in first.items():
        assert x.shape == (10, 32, 32, 3) and labels.tolist() == [4, 7] * 5
        assert (x[:2] == test[0]).all() and (x == again[name][0]).all() and len({int(of[0, 0, 0]) for of in x[2:]}) > 1
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ValueError, match="`--made` needs the package imagecorruptions-imaug"):
        next(corruptions.made(test))


def test_several_runs_are_scored_on_images_that_are_made_once(tmp_path, monkeypatch):
    made, pixels = [], np.repeat(np.arange(40, dtype=np.uint8), 32 * 32 * 3).reshape(40, 32, 32, 3)

    def corrupt(image, severity=1, corruption_name=None, corruption_number=-1, **seeded):
        made.append((int(image[0, 0, 0]), severity, corruption_name))
        return image

    monkeypatch.setitem(sys.modules, "imagecorruptions", types.SimpleNamespace(corrupt=corrupt))
    monkeypatch.setattr(corruptions.archives, "read", lambda *of: (None, (pixels, np.arange(40) % 10)))
    datasets = {"one": "cifar10", "other": "cifar10", "foreign": "cifar100"}
    # Their logits are highest for class 0, and nowhere.
    models = {"one": lambda x: x * 0 + torch.eye(10)[0], "other": lambda x: x * 0, "foreign": None}
    model = lambda name: lambda pixel_values: type("Output", (), {"logits": models[name](pixel_values[:, 0, 0, :10])})  # noqa: E731
    for name in datasets:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(corruptions, "load", lambda folder: (Movable(model(folder.name)), datasets[folder.name]))
    runs = [str(tmp_path / name) for name in ("one", "other")]
    corruptions.main([*runs, "--data_dir", "DATA", "--made", "--test_examples", "20"])
    assert len(made) == len(set(made)) == 19 * 5 * 20  # two of every class, drawn once
    found = [json.loads((tmp_path / name / corruptions.FILE).read_text()) for name in ("one", "other")]
    assert [of["groups"]["corrupted"] for of in found] == [pytest.approx(0.1), 0]
    assert {of["test_examples"] for of in found} == {20} and {of["made_by"] for of in found} == {
        "imagecorruptions-imaug"
    }
    with pytest.raises(ValueError, match="Some runs were trained on cifar10, and some on cifar100"):
        corruptions.main([*runs, str(tmp_path / "foreign"), "--data_dir", "DATA", "--made"])
    with pytest.raises(ValueError, match="`test_examples` is for `--made`"):
        corruptions.main([*runs, "--data_dir", "DATA", "--test_examples", "20"])
    with pytest.raises(ValueError, match="`test_examples` is 9: give 10 or more and fewer than the 40"):
        corruptions.main([*runs, "--data_dir", "DATA", "--made", "--test_examples", "9"])


def test_files_that_are_not_what_they_are_called_are_refused(tmp_path):
    write(tmp_path, 500, 100)
    read = lambda dataset="cifar100": list(corruptions.stored(dataset, tmp_path))  # noqa: E731
    assert len(read()) == 19
    for labels, told in (
        (np.arange(500) % 10, "has no label 10, and 90 of the 100 classes of cifar100 are missing: is it CIFAR-100-C"),
        (np.arange(500) % 99, "has no label 99, and 1 of the 100 classes"),
        (np.sort(np.arange(500) % 100), "does not hold the same labels 5 times, once for each severity"),
        (np.arange(499) % 100, "does not hold the same labels 5 times"),
        (np.arange(100), "does not hold the same labels 5 times"),
    ):
        np.save(tmp_path / "labels.npy", labels)
        with pytest.raises(ValueError, match=f"{tmp_path}/labels.npy {told}"):
            read()
    write(tmp_path)
    assert len(read("cifar10")) == 19
    (tmp_path / "fog.npy").write_bytes((tmp_path / "snow.npy").read_bytes())
    with pytest.raises(ValueError, match="fog.npy and .*snow.npy are the same, and their images would count twice"):
        read("cifar10")


def test_a_file_that_broke_off_in_its_allocated_place_is_refused(tmp_path):
    write(tmp_path, 500)
    read = lambda: list(corruptions.stored("cifar10", tmp_path))  # noqa: E731
    whole = np.load(tmp_path / "fog.npy")
    x = whole.copy()
    x[100:150] = x[:50]  # as grey images are under saturate
    np.save(tmp_path / "fog.npy", x)
    assert len(read()) == 19
    x = whole.copy()
    x[200:] = 0
    np.save(tmp_path / "fog.npy", x)
    with pytest.raises(
        ValueError, match=f"^{tmp_path}/fog.npy: 299 of its 500 images are copies of others: it broke off"
    ):
        read()


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path)

    def refused(words, call=lambda: list(corruptions.stored("cifar10", tmp_path))):
        with pytest.raises(ValueError, match=words):
            call()

    (tmp_path / "fog.npy").write_bytes((tmp_path / "fog.npy").read_bytes()[:-5])
    refused("fog.npy is cut off, damaged or no array")
    np.savez(tmp_path / "archive", np.zeros(1))
    (tmp_path / "archive.npz").replace(tmp_path / "fog.npy")
    refused("fog.npy is cut off, damaged or no array")
    np.save(tmp_path / "fog.npy", np.zeros((9, 32, 32, 3), np.uint8))
    refused(r"fog.npy holds uint8 of \(9, 32, 32, 3\), and labels.npy 50 labels")
    (tmp_path / "fog.npy").unlink()
    refused("lacks fog.npy, and 1 of 20 files: give the folder CIFAR-10-C")
    np.save(tmp_path / "fog.npy", np.full((50, 32, 32, 3), 99, np.uint8))
    for labels, told in (
        (np.arange(10) * 9, "row 2 has the label 18"),
        (np.arange(10) * 0.9, "row 0 has the label 0.0"),  # which would be cut to whole numbers
        (np.arange(10) < 5, "row 0 has the label True"),
        (np.array(["1"] * 10), "row 0 has the label '1'"),
    ):
        np.save(tmp_path / "labels.npy", labels)
        refused(f"labels.npy, {told}: expected a whole number from 0 to 9")
    refused("is not a finished run of image classification", lambda: corruptions.load(tmp_path))
    (tmp_path / "result.json").write_text('{"dataset": "digits"}')
    refused(
        "was trained on digits, and there are corrupted images of cifar10 and cifar100 only",
        lambda: corruptions.load(tmp_path),
    )
