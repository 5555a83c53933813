"""The image task: data that is read exactly and safely, figures checked by hand, and a killed run that goes on."""

import gzip
import hashlib
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import ignoring, run_command
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers import TrainingArguments as HFArguments

from tasks import metric, recipes, runs
from tasks.image_classification import archives, data, models, surface
from tasks.image_classification.top_k_accuracy import TopKAccuracy
from tasks.image_classification.train import ImageArguments, TrainingArguments, best_epoch, last_five_epochs, train
from tasks.methods import METHODS, flags, name_of
from xsam_hf import XSAMTrainer, XSAMTrainingArguments


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tasks" / "image_classification" / "train.py"
MODULE = "tasks.image_classification.train"
RECIPES = sorted((SCRIPT.parent / "recipes").glob("*.yaml"))
SHORT = ["--dataset", "digits", "--max_steps", "6", "--per_device_train_batch_size", "500", "--threads", "1"]


def run(output_dir, *flags):
    return run_command(f"{output_dir}.log", MODULE, *SHORT, "--output_dir", output_dir, "--report_to", "none", *flags)


# --- models ----------------------------------------------------------------------------------------------------------


def test_parameter_counts_and_patches():
    vit = models.build("vit-ti", "cifar100")
    assert sum(p.numel() for p in vit.parameters()) == 5_380_132
    shapes = {name: (images.size // images.patch) ** 2 for name, images in data.DATASETS.items()}
    assert shapes == {
        **{"digits": 16, "fashion_mnist": 16, "cifar10": 64, "cifar100": 64, "tiny_imagenet": 64, "imagenet": 196}
    }
    for name, images in data.DATASETS.items():
        model = models.build("vit-small", name)
        x = torch.zeros(2, len(images.mean), images.size, images.size)
        assert model(x).logits.shape == (2, images.classes)
    with pytest.raises(ValueError, match="`model` is 'vit-huge': choose one of vit-ti, vit-small"):
        models.build("vit-huge", "digits")


def test_the_small_resnet_keeps_small_images_large_enough():
    model = models.build("resnet-small", "digits")
    # Stem 9·8 + 16; blocks 2·(9·8·8 + 16), 9·8·16 + 9·16·16 + 8·16 + 3·32 and 9·16·32 + 9·32·32 + 16·32 + 3·64; head 33·10.
    assert sum(p.numel() for p in model.parameters()) == 88 + 1184 + 3680 + 14528 + 330
    for name, edges in {"digits": (8, 4, 2), "fashion_mnist": (14, 7, 4), "cifar100": (16, 8, 4)}.items():
        images = data.DATASETS[name]
        model = models.build("resnet-small", name).eval()
        x = torch.zeros(2, images.channels, images.size, images.size)
        found = model(x, output_hidden_states=True)
        assert found.logits.shape == (2, images.classes)
        assert tuple(state.shape[-1] for state in found.hidden_states[1:]) == edges
        assert [state.shape[1] for state in found.hidden_states] == [8, 8, 16, 32]
    # The new stem is initialised as transformers' convolutions are: He's normal, fan out.
    torch.manual_seed(0)
    stem = torch.cat(
        [
            models.build("resnet-small", "cifar10").resnet.embedder.embedder.convolution.weight.flatten()
            for _ in range(40)
        ]
    )
    assert stem.std().item() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.03)
    with pytest.raises(ValueError, match="`dropout` is 0.1, and resnet-small has no dropout to set"):
        models.build("resnet-small", "digits", 0.1)


def test_a_saved_small_resnet_is_the_same(tmp_path):
    model = models.build("resnet-small", "digits").eval()
    model.save_pretrained(tmp_path)
    again = models.SmallResNetForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(x).logits, again(x).logits)


# --- data ------------------------------------------------------------------------------------------------------------


def fingerprint(split):
    return hashlib.sha256(split.images.numpy().tobytes() + np.asarray(split.labels).tobytes()).hexdigest()[:12]


def test_digits_splits_are_fixed_and_disjoint():
    one, other = data.load("digits", seed=0), data.load("digits", seed=7)
    assert {name: len(split) for name, split in one.items()} == {"train": 1293, "validation": 144, "test": 360}
    rows = [{image.numpy().tobytes() for image in split.images} for split in one.values()]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    assert {name: fingerprint(s) for name, s in one.items()} == {name: fingerprint(s) for name, s in other.items()}
    assert [fingerprint(s) for s in one.values()] == FINGERPRINTS
    whole = data.load("digits", validation_share=0)
    assert len(whole["train"]) == 1437 and len(whole["validation"]) == 0
    assert fingerprint(whole["test"]) == fingerprint(one["test"])


FINGERPRINTS = ["bae8dc494c49", "bb814d8f9997", "a2fc2790f951"]


def test_digits_statistics_and_items():
    train = data.load("digits")["train"]
    pixels = train.images.double() / 255
    images = data.DATASETS["digits"]
    assert pixels.mean().item() == pytest.approx(images.mean[0], abs=5e-4)
    assert pixels.std().item() == pytest.approx(images.std[0], abs=5e-4)
    item = train[3]
    assert torch.equal(item["pixel_values"], train.images[3]) and item["labels"] == train.labels[3]


PICTURES = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = [3, 99, 0, 41, 5, 5]


def batch(rows, labels):
    flat = PICTURES[rows].transpose(0, 3, 1, 2).reshape(len(rows), 3072)
    return {b"data": flat, labels: [LABELS[i] for i in rows], b"batch_label": b"a batch"}


@pytest.fixture
def cifar_folder(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, rows in (("train", [0, 1, 2, 3]), ("test", [4, 5])):
        (folder / name).write_bytes(pickle.dumps(batch(rows, b"fine_labels"), protocol=2))
    return folder


def check_pictures(parts):
    (x, y), (x_test, y_test) = parts
    assert (x == PICTURES[:4]).all() and (x_test == PICTURES[4:]).all()
    assert y.tolist() == LABELS[:4] and y_test.tolist() == LABELS[4:]


def test_cifar_archive_folder_and_tar(tmp_path, cifar_folder):
    check_pictures(archives.read("cifar100", cifar_folder))
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(cifar_folder, "cifar-100-python")
    check_pictures(archives.read("cifar100", tmp_path))
    check_pictures(archives.read("cifar100", tmp_path / "cifar-100-python.tar.gz"))
    splits = data.load("cifar100", str(cifar_folder), validation_share=0)
    assert len(splits["train"]) == 4 and splits["test"][0]["pixel_values"].shape == (3, 32, 32)


def test_parquet_folder_as_on_the_hub(tmp_path):
    def rows(indices):
        table = {"img": [Image.fromarray(PICTURES[i]) for i in indices], "fine_label": [LABELS[i] for i in indices]}
        features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.Value("int64")})
        return datasets.Dataset.from_dict(table, features=features)

    (tmp_path / "cifar100").mkdir()
    rows([0, 1, 2, 3]).to_parquet(tmp_path / "cifar100" / "train-00000-of-00001.parquet")
    rows([4, 5]).to_parquet(tmp_path / "cifar100" / "test-00000-of-00001.parquet")
    check_pictures(archives.read("cifar100", tmp_path))
    with pytest.raises(
        ValueError, match="train.* is no parquet file of images: it has the columns img, fine_label, not img and label"
    ):
        archives.read("cifar10", tmp_path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps(Hostile()),
        pickle.dumps({b"data": Hostile()}, protocol=2),
        b"cnumpy\ndtype\n(Vi4\ntRcposix\nsystem\n(Vtouch hostile-was-here\ntR.",
        b"cbuiltins\neval\n(Vopen('hostile-was-here', 'w')\ntR.",
        b"not a pickle",
        pickle.dumps(batch([0], b"fine_labels"), protocol=2)[:100],
        pickle.dumps([1, 2]),
    ],
)
def test_hostile_and_damaged_batches_are_refused_and_not_run(tmp_path, monkeypatch, cifar_folder, payload):
    monkeypatch.chdir(tmp_path)
    (cifar_folder / "train").write_bytes(payload)
    with pytest.raises(ValueError, match="is not a batch of CIFAR"):
        archives.read("cifar100", cifar_folder)
    assert not list(tmp_path.rglob("hostile-was-here"))


def test_idx_files(tmp_path):
    def write(name, values):
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (tmp_path / name).write_bytes(gzip.compress(header + values.tobytes()))

    x = np.random.default_rng(2).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    y = np.array([1, 0, 9, 3, 3], dtype=np.uint8)
    for split, rows in (("train", slice(0, 3)), ("t10k", slice(3, 5))):
        write(f"{split}-images-idx3-ubyte.gz", x[rows])
        write(f"{split}-labels-idx1-ubyte.gz", y[rows])
    splits = data.load("fashion_mnist", str(tmp_path), validation_share=0)
    assert (splits["train"].images[:, 0].numpy() == x[:3]).all() and list(splits["test"].labels) == [3, 3]
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    for damaged in (
        whole[:-20],
        gzip.compress(gzip.decompress(whole)[:-1]),
        b"",
        gzip.compress(b"\0\0\x09\x01\0\0\0\0"),
    ):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole idx file"):
            data.load("fashion_mnist", str(tmp_path))


def test_a_fifth_of_the_training_labels_is_wrong_and_no_other():
    clean, noisy = data.load("digits"), data.load("digits", label_noise=0.2, seed=1)
    wrong = clean["train"].labels != noisy["train"].labels
    assert wrong.sum() == round(0.2 * len(wrong)) and set(noisy["train"].labels) == set(range(10))
    for split in ("validation", "test"):
        assert (clean[split].labels == noisy[split].labels).all()
    again = data.load("digits", label_noise=0.2, seed=2)
    assert (again["train"].labels == noisy["train"].labels).all()


def test_the_wrong_labels_are_a_split_of_their_own():
    clean, noisy = data.load("digits"), data.load("digits", label_noise=0.3)
    wrong = clean["train"].labels != noisy["train"].labels
    split = noisy["wrong_labels"]
    assert len(split) == wrong.sum() == 388 and "wrong_labels" not in clean
    assert (split.labels == noisy["train"].labels[wrong]).all() and (
        split.labels != clean["train"].labels[wrong]
    ).all()
    assert torch.equal(split.images, clean["train"].images[torch.from_numpy(wrong)])
    first = int(np.flatnonzero(wrong)[0])
    assert torch.equal(split[0]["pixel_values"], noisy["train"][first]["pixel_values"])


def test_a_part_of_the_training_images_has_equal_shares_of_the_classes():
    part, whole = data.load("digits", train_examples=100), data.load("digits")
    counts = np.bincount(part["train"].labels)
    assert counts.sum() == 100 and counts.min() >= 9
    everything = {image.numpy().tobytes() for image in whole["train"].images}
    assert {image.numpy().tobytes() for image in part["train"].images} <= everything
    assert len(part["validation"]) == len(whole["validation"]) and len(part["test"]) == len(whole["test"])


def test_bad_input_is_named(tmp_path):
    for changes, message in [
        ({"name": "mnist"}, "`dataset` is 'mnist': choose one of digits"),
        ({"name": "digits", "validation_share": 1.0}, "`validation_share` is 1.0"),
        ({"name": "digits", "label_noise": 1.0}, "`label_noise` is 1.0: give a share"),
        ({"name": "digits", "label_noise": 0.0003}, "`label_noise` is 0.0003, less than one of 1293 labels"),
        ({"name": "digits", "train_examples": 9}, "`train_examples` is 9: give 10 or more and fewer than the 1293"),
        ({"name": "digits", "train_examples": 5000}, "`train_examples` is 5000: give 10"),
        ({"name": "digits", "cutout": 9}, "`cutout` is 9.*8 pixels"),
        (
            {"name": "digits", "cutout": 2, "no_aug": True},
            "`no_aug` leaves the images as they are: leave it out, or `cutout`",
        ),
        ({"name": "cifar10", "data_dir": "/nowhere"}, "`data_dir` is /nowhere, which does not exist"),
        ({"name": "cifar10", "data_dir": str(tmp_path)}, "no files of cifar10 were found"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.load(**changes)


def test_as_many_images_as_classes_are_all_taken():
    images = data.DATASETS["digits"]
    with pytest.raises(ValueError, match="`test_examples` is 9: leave it out, with the 10 there are, of 10 classes"):
        data.equal_shares("test", 9, np.arange(10), np.arange(10), images)
    with pytest.raises(ValueError, match="`test_examples` is 9: give 10 or more and fewer than the 20 there are"):
        data.equal_shares("test", 9, np.arange(20), np.arange(20) % 10, images)


def test_noise_for_embeddings_of_words_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`neftune_noise_alpha` is 5.0, and it is noise for the embeddings of words"):
        train(*recipes.parse((ImageArguments, TrainingArguments), ["--neftune_noise_alpha", "5", "--output_dir", str(tmp_path)], ""))  # fmt: skip
    assert not list(tmp_path.iterdir())


# --- figures ---------------------------------------------------------------------------------------------------------


def test_metric_by_hand():
    loaded = evaluate.load(str(SCRIPT.with_name("top_k_accuracy.py")), keep_in_memory=True)
    logits = np.tile(np.arange(8.0), (4, 1))  # the last class is ahead of all others, the first behind seven
    scores = loaded.compute(predictions=logits, references=[7, 6, 3, 0])
    assert scores["accuracy"] == 0.25 and scores["top5_accuracy"] == 0.75
    log_sum = np.log(np.exp(np.arange(8.0)).sum())
    assert scores["loss"] == pytest.approx(np.mean([log_sum - value for value in (7, 6, 3, 0)]))


@pytest.mark.parametrize("classes", [8, 3])
def test_ties_and_numbers_that_are_not_finite_count_as_wrong(classes):
    def score(*rows):
        return metric.compute(TopKAccuracy, predictions=np.array(rows), references=[classes - 1] * len(rows))

    right = np.arange(float(classes))
    assert score(right)["accuracy"] == score(right)["top5_accuracy"] == 1
    for value in (np.nan, np.inf, -np.inf, 0.0):
        found = score(np.full(classes, value), np.full(classes, value))
        assert found["accuracy"] == 0 and found["top5_accuracy"] == (0 if value or classes > 5 else 1), value
    for place in (0, classes - 1):
        for value in (np.nan, np.inf, -np.inf):
            row = right.copy()
            row[place] = value
            assert score(row)["accuracy"] == 0 == score(row)["top5_accuracy"]
    tied = right.copy()
    tied[0] = tied[-1]
    assert score(tied)["accuracy"] == 0 and score(tied)["top5_accuracy"] == 1  # ahead of all but one
    assert score(tied, right)["accuracy"] == 0.5
    assert np.isnan(score(np.full(classes, np.nan))["loss"])


# --- recipes and flags -----------------------------------------------------------------------------------------------


def parse(*argv):
    return recipes.parse((ImageArguments, TrainingArguments), argv, "")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_and_hold_differences_only(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    task, args = parse(str(recipe), "--output_dir", str(tmp_path))
    bare_task, bare = parse("--output_dir", str(tmp_path))
    for key, value in values.items():
        found = getattr(task, key, None) if hasattr(task, key) else getattr(args, key)
        found = getattr(found, "value", found)
        # The Trainer turns "none" into an empty list.
        assert key == "output_dir" or found == ([] if key == "report_to" else value), key


def test_cifar100_recipe_is_the_papers():
    task, args = parse(str(SCRIPT.parent / "recipes" / "cifar100-vit-ti.yaml"))
    assert (args.rho, args.rho_max, args.alpha, args.ascent_steps) == (0.9, 0.9, None, 1)
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2) == (1e-3, 0.3, 0.9, 0.999)
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.label_smoothing_factor) == (300, 256, 0.1)
    assert (task.dataset, task.model, task.cutout, args.max_grad_norm) == ("cifar100", "vit-ti", 0, 0)
    assert args.optim.value.startswith("adamw_torch")


def test_the_command_line_comes_before_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rho: 0.3\nmodel: vit-ti\nlearning_rate: 1.0e-4\n")
    task, args = parse(str(recipe), "--rho", "0.7")
    assert (args.rho, args.learning_rate, task.model, task.dataset) == (0.7, 1e-4, "vit-ti", "digits")
    recipe.write_text("rho: 0.3\nrhoo: 0.4\n")
    with pytest.raises(ValueError, match="unknown fields: rhoo"):
        parse(str(recipe))
    with pytest.raises(ValueError, match="There is no recipe nowhere.yaml"):
        parse("nowhere.yaml")


def test_methods_are_named_sets_of_flags(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rho: 0.3\nalpha_max: 3\n")
    for method, values in METHODS.items():
        task, args = parse(str(recipe), "--method", method, "--output_dir", str(tmp_path))
        wanted = {"rho": 0.3, "alpha_max": 3, **values}
        assert {name: getattr(args, name) for name in wanted} == wanted
        assert name_of(args) == ("adamw" if method == "sgd" else method)
        told = capsys.readouterr().err.strip()
        assert told == f"--method {method} stands for: {flags(method) or 'nothing beyond the recipe'}"
        # The flags that are printed do the same.
        assert parse(str(recipe), *flags(method).split(), "--output_dir", str(tmp_path))[1].to_dict() == args.to_dict()
    _, args = parse(str(recipe), "--rho", "0.7", "--method", "msam+", "--ascent_steps", "4")
    assert (args.rho, args.ascent_steps, args.direction) == (0.7, 4, "msam+")
    with pytest.raises(ValueError, match="`method` is 'sma': choose one of sgd, sam"):
        parse("--method", "sma")


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, method, forward, backward",
    [
        (["--rho", "0"], "adamw", 6, 6),
        (["--rho", "0", "--optim", "sgd"], "sgd", 6, 6),
        (["--alpha", "1"], "sam", 12, 12),
        (["--alpha", "1.7", "--ascent_steps", "2"], "wsam", 18, 18),
        ([], "xsam", 12 + 2 * 21, 12),
    ],
)
def test_result_and_model_card(tmp_path, flags, method, forward, backward):
    output = run(tmp_path, *flags)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == method
    # 1,293 images make three batches of 500, 500 and 293; both searches fall on the first batch of an epoch.
    examples = {6: 2 * 1293, 12: 4 * 1293, 18: 6 * 1293, 54: 4 * 1293 + 42 * 500}
    assert result["passes"] == {
        "forward": forward,
        "backward": backward,
        "forward_examples": examples[forward],
        "backward_examples": examples[backward],
    }
    assert (result["task"], result["dataset"], result["model"]) == ("image_classification", "digits", "vit-small")
    assert (
        (result["threads"], result["mixed_precision"]) == (1, "no") and result["seed"] == 42 and result["seconds"] > 0
    )
    assert result["versions"]["torch"] == torch.__version__
    assert result["arguments"]["max_steps"] == 6 and result["arguments"]["dataset"] == "digits"
    for split, n in (("validation", 144), ("test", 360)):
        scores = result["metrics"][split]
        assert (scores["accuracy"] * n) == pytest.approx(round(scores["accuracy"] * n))
        assert scores["accuracy"] <= scores["top5_accuracy"] and f" {round(scores['accuracy'], 4)}\n" in output
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("loss" in entry or "train_loss" in entry for entry in history)
    card = (tmp_path / "README.md").read_text()
    assert ("| rho | 0.05 |" in card) == (method in ("sam", "wsam", "xsam"))
    assert re.search(r"base_model|tags:", card)


def test_test_and_wrong_labels_over_training(tmp_path):
    watched = ["--eval_splits", "test", "wrong_labels", "--eval_strategy", "steps", "--eval_steps", "2"]
    noise = ["--label_noise", "0.3", "--model", "resnet-small", "--learning_rate", "0.01"]
    run(tmp_path, "--rho", "0", *watched, *noise)
    result = json.loads((tmp_path / "result.json").read_text())
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    accuracies = [entry["eval_test_accuracy"] for entry in history if "eval_test_accuracy" in entry]
    learnt = [entry["eval_wrong_labels_accuracy"] for entry in history if "eval_wrong_labels_accuracy" in entry]
    assert len(accuracies) == len(learnt) == 3
    assert (result["metrics"]["test"]["accuracy"], result["metrics"]["wrong_labels"]["accuracy"]) == (
        accuracies[-1],
        learnt[-1],
    )
    assert result["metrics"]["best_epoch"]["accuracy"] == max(accuracies)
    assert set(result["metrics"]) == {"validation", "test", "wrong_labels", "best_epoch"}
    assert "wrong_labels_data" not in result["identity"] and "eval_splits" not in result["identity"]


def test_the_best_epoch_is_the_first_of_the_highest_test_accuracy():
    history = [{"epoch": 1.0, "loss": 2.0}] + [
        {"epoch": e, "eval_test_accuracy": a, "eval_test_top5_accuracy": 1.0, "eval_test_loss": e}
        for e, a in ((1.0, 0.5), (2.0, 0.9), (3.0, 0.9), (4.0, 0.7))
    ]
    assert best_epoch(history) == {"accuracy": 0.9, "top5_accuracy": 1.0, "loss": 2.0, "epoch": 2.0}
    assert best_epoch(history[:1]) == {}


def test_the_last_five_epochs_are_those_at_the_end_and_whole():
    scored = [
        {"epoch": e, "eval_test_accuracy": e / 10, "eval_test_top5_accuracy": 1.0, "eval_test_loss": 2 * e}
        for e in range(1, 8)
    ]
    part = {"epoch": 2.5, "eval_test_accuracy": 9.0, "eval_test_top5_accuracy": 9.0, "eval_test_loss": 9.0}
    history = [{"epoch": 7.0, "loss": 1.0}, part, *scored]
    assert last_five_epochs(history) == pytest.approx({"accuracy": 0.5, "top5_accuracy": 1.0, "loss": 10.0})
    assert last_five_epochs(history[:6]) == {} == last_five_epochs([])


@pytest.mark.parametrize("other", ["eval_accuracy", "eval_wrong_labels_accuracy"])
def test_a_run_that_scored_the_test_images_in_a_part_of_its_epochs_has_no_best_one(other):
    scored = [
        {"epoch": float(e), "eval_test_accuracy": e / 10, "eval_test_top5_accuracy": 1.0, "eval_test_loss": e}
        for e in range(1, 9)
    ]
    others = [{"epoch": float(e), other: 0.5} for e in range(1, 9)]
    beside = [{"epoch": 8.0, "test_accuracy": 0.8}]  # the final scores
    assert best_epoch([*scored, *others, *beside])["epoch"] == 8
    assert last_five_epochs([*scored, *others, *beside])["accuracy"] == pytest.approx(0.6)
    late = [*others[:3], *scored[3:], *beside]
    assert best_epoch(late) == {} and last_five_epochs(late)["accuracy"] == pytest.approx(0.6)
    early = [*scored[:6], *others[6:], *beside]
    assert best_epoch(early) == {} == last_five_epochs(early)


def test_every_weight_decays_where_that_is_asked_for(tmp_path, monkeypatch):
    class Started(Exception):
        pass

    def start(trainer, identity):
        raise Started(trainer)

    monkeypatch.setattr(runs, "start", start)
    for scope, biases in (([], 0), (["--weight_decay_scope", "all"], 10)):
        flags = [*SHORT, "--model", "resnet-small", "--weight_decay", "0.1", "--output_dir", str(tmp_path), *scope]
        with pytest.raises(Started) as started:
            train(*parse(*flags))
        trainer = started.value.args[0]
        trainer.create_optimizer()
        decaying = [p for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]]
        # Of one dimension are the weights of nine BatchNorms, which decay by default too, and the biases of these and of the head.
        assert sum(len(p.shape) == 1 for p in decaying) == 9 + biases, scope
    with pytest.raises(ValueError, match="`weight_decay_scope` is some: give all, or leave it out"):
        parse("--weight_decay_scope", "some")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--eval_splits", "training"], "`eval_splits` is training: choose among validation, test, wrong_labels"),
        (["--eval_splits", "test", "test"], "`eval_splits` is test test: choose among .*, each once."),
        (
            ["--eval_splits", "wrong_labels", "--eval_strategy", "epoch"],
            "`label_noise` is 0.0, so there is no wrong_labels to evaluate",
        ),
        (
            ["--validation_share", "0", "--eval_strategy", "epoch"],
            "`validation_share` is 0.0, so there is no validation to evaluate on",
        ),
        (
            ["--eval_splits", "test", "--metric_for_best_model", "accuracy"],
            "the best model is chosen by validation alone, so leave one of them out",
        ),
    ],
)
def test_what_cannot_be_watched_is_refused(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train(*parse(*SHORT, "--output_dir", str(tmp_path), *flags))


KILL = ["--max_steps", "12", "--save_strategy", "steps", "--save_steps", "2", "--rho", "0.1", "--dropout", "0.1"]


def final_weights(folder):
    return load_file(folder / "model.safetensors")


# The command, which waits for the signal once checkpoint 4 is written.
WAITING = """
import signal
from tasks.command import run
from tasks.image_classification import data, train

class Waiting(train.EpochCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            print("checkpoint 4 is written", flush=True)
            signal.pause()

train.EpochCallback = Waiting
run(train.main)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, *KILL)
    return folder


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_exactly(tmp_path, whole, sent):
    killed = tmp_path / "killed"
    with ignoring(signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, *SHORT, "--report_to", "none", "--output_dir", str(killed), *KILL],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    with process.stdout as output:
        assert any("checkpoint 4 is written" in line for line in output)
        process.send_signal(sent)
        process.wait(900)
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 128 + signal.SIGINT}[sent]
    assert (killed / "checkpoint-4").exists() and not (killed / "checkpoint-6").exists()
    assert not (killed / "result.json").exists()
    run(killed, *KILL, "--resume_from_checkpoint", "true")
    for name, value in final_weights(whole).items():
        assert torch.equal(value, final_weights(killed)[name]), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["passes"] == results[1]["passes"]
    lines = [(folder / "xsam_search.jsonl").read_text() for folder in (whole, killed)]
    assert lines[0] == lines[1] and lines[0].count("\n") == 4


def test_crops_of_a_resumed_run_are_those_of_the_uninterrupted_one(tmp_path, cifar_folder):
    # Augmented images, resumed inside and at the end of an epoch, with and without workers.
    big = np.random.default_rng(3).integers(0, 256, (40, 3072), dtype=np.uint8)
    for name, pixels in (("train", big), ("test", 255 - big)):
        content = {b"data": pixels, b"fine_labels": [i % 100 for i in range(40)]}
        (cifar_folder / name).write_bytes(pickle.dumps(content, protocol=2))
    flags = [
        "--dataset",
        "cifar100",
        "--data_dir",
        str(cifar_folder),
        "--validation_share",
        "0",
        "--save_strategy",
        "steps",
    ]
    flags += ["--save_steps", "1", "--per_device_train_batch_size", "10", "--max_steps", "8", "--rho", "0.1"]
    run(tmp_path / "whole", *flags)
    run(tmp_path / "workers", *flags, "--dataloader_num_workers", "2")
    reference = final_weights(tmp_path / "whole")
    assert all(torch.equal(value, reference[name]) for name, value in final_weights(tmp_path / "workers").items())
    for step in (3, 4):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        run(tmp_path / f"again-{step}", *flags, "--resume_from_checkpoint", str(checkpoint))
        assert all(torch.equal(v, reference[n]) for n, v in final_weights(tmp_path / f"again-{step}").items()), step


class Augmented(torch.utils.data.Dataset):
    """Points with noise: of the process's own stream, or of one that depends on the index alone."""

    def __init__(self, own):
        self.own = own

    def __len__(self):
        return 16

    def __getitem__(self, i):
        generator = None if self.own else torch.Generator().manual_seed(i)
        return {
            "x": torch.full((2,), float(i)) + torch.randn(2, generator=generator),
            "labels": torch.tensor(float(i % 2)),
        }


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


@pytest.mark.parametrize("trainer, arguments", [(Trainer, HFArguments), (XSAMTrainer, XSAMTrainingArguments)])
@pytest.mark.parametrize("own", [True, False])
def test_augmentation_from_the_processs_stream_resumes_otherwise_in_the_plain_trainer_too(
    tmp_path, trainer, arguments, own
):
    def train(resume=None):
        args = arguments(
            str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=1, report_to="none",
            use_cpu=True, disable_tqdm=True, learning_rate=0.01,
        )  # fmt: skip
        run = trainer(model=Line(), args=args, train_dataset=Augmented(own))
        run.train(resume_from_checkpoint=resume)
        return run.model.layer.weight.detach().clone()

    whole, again = train(), train(str(tmp_path / "checkpoint-3"))
    assert torch.equal(whole, again) == (not own)


def test_two_processes(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "-m",
        MODULE,
        *SHORT,
    ]
    flags = ["--report_to", "none", "--use_cpu", "true", "--output_dir"]
    done = subprocess.run([*launch, *flags, str(tmp_path / "two"), "--per_device_train_batch_size", "250"], cwd=ROOT,
                          capture_output=True, text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one")
    two, one = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert two["processes"] == 2
    assert all(two["passes"][name] == one["passes"][name] for name in ("forward", "backward"))
    assert sum(len(line) > 0 for line in (tmp_path / "two" / "xsam_search.jsonl").read_text().splitlines()) == 2


def test_the_analysis_opens_a_checkpoint_with_its_runs_images(tmp_path):
    model = models.build("resnet-small", "digits")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    of = {"task": "image_classification", "dataset": "digits", "model": "resnet-small", "validation_share": 0.25, "cutout": 0,
          "seed": 3, "train_examples": None, "label_noise": 0.3, "update_batch": 64, "label_smoothing_factor": 0.0}  # fmt: skip
    state = {"stateful_callbacks": {"RunIdentity": {"attributes": {"whole": of}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    trainer = surface.build(str(tmp_path))
    assert all(torch.equal(w, trainer.model.state_dict()[name]) for name, w in model.state_dict().items())
    splits = data.load("digits", validation_share=0.25, label_noise=0.3)
    assert trainer.train_dataset.fingerprint == splits["train"].fingerprint and trainer.args.train_batch_size == 64
    assert splits["train"].fingerprint != data.load("digits", validation_share=0.25)["train"].fingerprint
    with pytest.raises(ValueError, match="no checkpoint of tasks.image_classification"):
        surface.build(str(tmp_path / "nowhere"))
