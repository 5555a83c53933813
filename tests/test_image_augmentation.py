"""What happens to an image on its way into the model: varied with its batch, and normalised there, by numbers."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from scipy.stats import chi2_contingency, chisquare
from torch.utils.data import BatchSampler, DataLoader
from torchvision import transforms
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForImageClassification, default_data_collator

from tasks.image_classification import data, models, pixels, train
from tasks.image_classification.augmentation import Augmentation, resized
from tasks.image_classification.catalogue import DATASETS
from tasks.image_classification.labelled_images import Split
from xsam_hf import XSAMTrainer, XSAMTrainingArguments


CIFAR = DATASETS["cifar100"]
GREY = DATASETS["fashion_mnist"]
TINY = DATASETS["tiny_imagenet"]


def split(n=64, images=CIFAR, seed=0, alike=False, **options):
    pictures = np.random.default_rng(0).integers(0, 256, (n, *images.shape), dtype=np.uint8)
    if alike:
        pictures[:] = pictures[0]
    return Split(pictures, np.arange(n) % images.classes, Augmentation(images, **options), seed)


def stacked(items):
    return torch.stack([item["pixel_values"] for item in items])


# --- the same image, whoever fetches it --------------------------------------------------------------------------------


def test_an_image_depends_on_seed_epoch_and_index_alone():
    one = split(alike=True)
    stream = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole = stacked(one.__getitems__(range(64)))
    assert whole.dtype == torch.uint8 and whole.shape == (64, 3, 32, 32)
    assert torch.equal(torch.stack([one[i]["pixel_values"] for i in range(64)]), whole)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    for batch in (shuffled[:40], shuffled[40:], [5], [7, 7]):
        assert torch.equal(stacked(one.__getitems__(batch)), whole[batch])
    # A longer data set that begins with the same images; another object.
    assert torch.equal(stacked(split(90, alike=True).__getitems__(range(64))), whole)
    # Its own, which nobody else writes into.
    one[0]["pixel_values"].zero_()
    assert torch.equal(one[0]["pixel_values"], whole[0])
    assert torch.equal(stream[0], torch.get_rng_state()) and (stream[1] == np.random.get_state()[1]).all()

    seen = {image.numpy().tobytes() for image in whole}
    assert len(seen) > 40  # of 64 out of 162 there are, equal chances: 53 on average
    for other in (split(alike=True, seed=1), split(alike=True)):
        other.epoch.fill_(0 if other.seed else 1)
        assert (stacked(other.__getitems__(range(64))) != whole).any(dim=(1, 2, 3)).sum() > 56
    swapped = split(alike=True, seed=1), split(alike=True, seed=2)
    swapped[0].epoch.fill_(2), swapped[1].epoch.fill_(1)
    assert not torch.equal(*(stacked(of.__getitems__(range(64))) for of in swapped))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_processes_fetch_the_same_images(workers):
    one, expected = split(40), {}
    for epoch in (0, 1):
        one.epoch.fill_(epoch)
        expected[epoch] = stacked(one.__getitems__(range(40)))
    assert not torch.equal(expected[0], expected[1])
    sampler = BatchSampler(range(40), 10, drop_last=False)
    shards = [
        BatchSamplerShard(sampler, 2, process) for process in (0, 1)
    ]  # what accelerate gives each of two processes
    for batches, rows in ((sampler, range(40)), (shards[0], [*range(10), *range(20, 30)])):
        fetched = split(40)
        loader = DataLoader(
            fetched,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=default_data_collator,
        )
        for epoch in (0, 1):
            fetched.epoch.fill_(epoch)
            found = list(loader)
            assert torch.equal(torch.cat([batch["pixel_values"] for batch in found]), expected[epoch][list(rows)])
            assert torch.cat([batch["labels"] for batch in found]).tolist() == list(rows)


def test_a_core_makes_fifty_thousand_images_a_second():
    one = split(5000)
    batches = np.random.default_rng(0).permutation(5000)[: 19 * 256].reshape(19, 256).tolist()

    def rate():
        start = time.thread_time()  # other processes on this machine do not count
        for batch in batches:
            default_data_collator(one.__getitems__(batch))
        return 19 * 256 / (time.thread_time() - start)

    assert max(rate() for _ in range(8)) >= 50_000


# --- the right image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [CIFAR, GREY], ids=["cifar100", "fashion_mnist"])
def test_crops_are_windows_of_the_padded_image(images):
    pictures = np.random.default_rng(0).integers(0, 256, (300, *images.shape), dtype=np.uint8)
    augmentation = Augmentation(images)
    found = stacked(Split(pictures, np.zeros(300, int), augmentation, 3).__getitems__(range(300))).numpy()
    edge = (images.padding, images.padding)
    padded = np.pad(pictures, ((0, 0), edge, edge, (0, 0)), mode=images.padding_mode)
    for i, (top, left, _, _, flip, *_) in enumerate(augmentation.draw(3, 0, 300)):
        window = padded[i, top : top + images.size, left : left + images.size]
        assert (found[i] == (window[:, ::-1] if flip else window).transpose(2, 0, 1)).all()
    if images is GREY:  # black at the edge, and not the image again
        assert (found[:, 0, 0] == 0).all(-1).any()


def test_images_that_are_not_varied_are_as_they_are():
    splits = data.load("digits", seed=4)
    for part in splits.values():
        assert torch.equal(stacked(part.__getitems__(range(len(part)))), part.images)
    blanked = data.load("digits", seed=4, cutout=3)["train"]
    assert torch.equal(blanked.images, splits["train"].images) and blanked.fingerprint == splits["train"].fingerprint
    changed = (stacked(blanked.__getitems__(range(1000))) != blanked.images[:1000]).sum((1, 2, 3))
    assert changed.max() <= 9 and changed.float().mean() > 5


def test_no_aug_leaves_out_the_crops_and_flips_of_a_data_set(monkeypatch):
    pictures, labels = (
        np.random.default_rng(0).integers(0, 256, (400, *GREY.shape), dtype=np.uint8),
        np.arange(200) % 10,
    )
    monkeypatch.setattr(data, "_read", lambda *_: ((pictures[:200], labels), (pictures[200:], labels)))
    plain, varied = (data.load("fashion_mnist", no_aug=no_aug)["train"] for no_aug in (True, False))
    everything = range(len(plain))
    assert torch.equal(stacked(plain.__getitems__(everything)), plain.images)
    assert not torch.equal(stacked(varied.__getitems__(everything)), varied.images)
    assert torch.equal(plain.images, varied.images) and plain.fingerprint == varied.fingerprint


def test_the_fingerprint_is_that_of_the_images_without_padding():
    one = split(images=GREY)
    plain = Split(one.images.permute(0, 2, 3, 1).numpy(), one.labels)
    assert one.fingerprint == plain.fingerprint and one.padded.shape[-1] == 32 and plain.padded.shape[-1] == 28


def blanks(n, images=CIFAR, **options):
    """Which pixels of n white images are blank, (n, H, W), and the images."""
    white = Split(np.full((n, *images.shape), 255, np.uint8), np.zeros(n, int), Augmentation(images, **options))
    found = stacked(white.__getitems__(range(n)))
    return (found != 255).all(1), found


def test_cutout_blanks_a_square_around_any_pixel_to_the_mean():
    n, edge = 4000, 8
    blank, found = blanks(n, cutout=edge)
    rows, columns = blank.any(2), blank.any(1)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :])
    # Normalised it is 0 within half a byte.
    level = pixels.normalize(found, CIFAR).movedim(1, 3)[blank]
    assert (level.abs() <= torch.tensor([0.5 / 255 / std for std in CIFAR.std])).all() and level.abs().max() > 0
    for of in (rows, columns):
        # Centres 0 to 3 leave 4 to 7 of 8 at the first edge, and 29 to 31 leave 7 to 5 at the last.
        last, count = 31 - of.flip(1).int().argmax(1), of.sum(1)
        centres = torch.where(of[:, 0], last - edge // 2 + 1, of.int().argmax(1) + edge // 2)
        assert chisquare(torch.bincount(centres, minlength=32)).pvalue > 1e-3
        assert torch.equal(count, 8 - (4 - centres).clamp(min=0) - (centres - 28).clamp(min=0))
    assert (
        torch.corrcoef(torch.stack([of.int().argmax(1) for of in (rows, columns)]).double())[0, 1].abs() < 4 / n**0.5
    )
    half = blanks(n, cutout=edge, cutout_probability=0.5)[0].any(2).any(1).float().mean().item()
    assert half == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    assert not blanks(100)[0].any() and blanks(100, cutout=64)[0].all()


# --- rectangles, as torchvision draws and resizes them -------------------------------------------------------------------


def same_distribution(ours, theirs):
    edges = np.histogram_bin_edges(np.concatenate([ours, theirs]), bins=12)
    counts = np.array([np.histogram(of, edges)[0] for of in (ours, theirs)])
    return chi2_contingency(counts[:, counts.sum(0) > 10]).pvalue > 1e-4


@pytest.mark.parametrize("share", [(0.8, 1.0), (0.08, 1.0)])
def test_crops_are_distributed_as_torchvisions(share):
    n = 3000
    images = dataclasses.replace(TINY, crop_share=share)
    top, left, height, width, flip = Augmentation(images).draw(0, 0, n).T[:5]
    picture = torch.zeros(3, 64, 64)
    theirs = np.array([transforms.RandomResizedCrop.get_params(picture, share, (3 / 4, 4 / 3)) for _ in range(n)]).T
    for ours, other in zip((top, left, height, width, height * width), (*theirs, theirs[2] * theirs[3]), strict=True):
        assert same_distribution(ours, other)
    assert (top + height <= 64).all() and (left + width <= 64).all() and flip.mean() == pytest.approx(0.5, abs=0.05)
    assert not same_distribution(height, np.random.default_rng(0).integers(height.min(), 65, n))  # it can tell


def test_erased_rectangles_are_distributed_as_torchvisions():
    n = 2000
    blank, _ = blanks(n, TINY, random_erasing=0.5)
    rows, columns = blank.any(2), blank.any(1)
    erased = rows.any(1)
    assert erased.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    ours = [of.sum(1)[erased].numpy() for of in (rows, columns)] + [
        of.int().argmax(1)[erased].numpy() for of in (rows, columns)
    ]
    picture = torch.zeros(3, 32, 32)
    theirs = [transforms.RandomErasing.get_params(picture, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(n)]
    top, left, height, width, _ = zip(*theirs, strict=True)
    for one, other in zip(ours, (height, width, top, left), strict=True):
        assert same_distribution(one, np.array(other))
    assert not same_distribution(ours[0], np.random.default_rng(0).integers(2, 25, n))


def test_rectangles_are_resized_as_torchvision_does():
    stored = np.random.default_rng(0).integers(0, 256, (40, 3, 64, 64), dtype=np.uint8)
    boxes = [(0, 0, 64, 64), (5, 9, 55, 52), (0, 20, 20, 40), (40, 3, 24, 32), (60, 0, 4, 64)] * 8
    found = resized(stored, tuple(np.array(boxes).T), 32)
    for image, picture, (top, left, height, width) in zip(found, stored, boxes, strict=True):
        theirs = v2.functional.resized_crop(
            torch.from_numpy(picture), top, left, height, width, [32, 32], antialias=True
        )
        assert np.abs(image.astype(int) - theirs.numpy()).max() <= 1
    varied = Split(stored.transpose(0, 2, 3, 1), np.zeros(40, int), Augmentation(TINY), 0)
    assert stacked(varied.__getitems__(range(40))).shape == (40, 3, 32, 32) and varied.images.shape == (40, 3, 64, 64)


# --- chances -------------------------------------------------------------------------------------------------------------


N = 50_000


@pytest.fixture(scope="module")
def draws():
    augmentation = Augmentation(CIFAR, 8)
    drawn = [0, 1, 4, 5, 6]  # row, column, flipped, the blank square's first row and column
    shift = [0, 0, 0, 4, 4]  # from its centre
    return {
        (seed, epoch): augmentation.draw(seed, epoch, N)[:, drawn] + shift for seed in (0, 1) for epoch in (0, 1, 2)
    }


def test_all_crops_and_flips_are_equally_likely(draws):
    for top, left, flip, row, column in (of.T for of in draws.values()):
        cells = np.bincount((top * 9 + left) * 2 + flip, minlength=162)
        assert len(cells) == 162 and chisquare(cells).pvalue > 1e-3
        assert chisquare(np.bincount(row * 32 + column, minlength=1024)).pvalue > 1e-3


def test_neighbours_have_nothing_to_do_with_each_other(draws):
    def independent(a, b):
        table = np.histogram2d(a, b, bins=(a.max() + 1, b.max() + 1))[0]
        return chi2_contingency(table).pvalue > 1e-4 and abs(np.corrcoef(a, b)[0, 1]) < 4 / N**0.5

    here = draws[0, 0]
    for column in range(5):
        for distance in (1, 2, 256):
            assert independent(here[:-distance, column], here[distance:, column])
        for other in ((0, 1), (0, 2), (1, 0), (1, 1)):
            assert independent(here[:, column], draws[other][:, column])
        for second in range(column):
            assert independent(here[:, column], here[:, second])
    assert not independent(here[:, 0], (here[:, 0] + (here[:, 1] == 0)) % 9)  # it would see a ninth that is shifted


# --- normalisation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", DATASETS.values(), ids=DATASETS)
def test_normalisation_is_torchvisions(images):
    x = torch.randint(0, 256, (16, images.channels, images.size, images.size), dtype=torch.uint8)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean, images.std)])
    before = x.clone()
    found = pixels.normalize(x, images)
    assert torch.equal(found, torch.stack([reference(image) for image in x])) and torch.equal(x, before)
    assert pixels.normalize(found, images) is found
    with pytest.raises(ValueError, match="`pixel_values` are torch.int64: give bytes"):
        pixels.normalize(x.long(), images)
    tolerance = 2e-6
    if images.resize is not None:  # what is scored, the middle of what is stored, within a level
        x = torch.randint(0, 256, (4, images.stored or 300, images.stored or 300, 3), dtype=torch.uint8).movedim(3, 1)
        middle = data._middle(x.movedim(1, 3).numpy(), images)
        found, tolerance = (
            pixels.normalize(torch.from_numpy(middle).movedim(3, 1), images),
            1.01 / 255 / min(images.std),
        )
    prepared = pixels.processor(images)(
        images=[image.permute(1, 2, 0).numpy() for image in x], input_data_format="channels_last", return_tensors="pt"
    )
    assert torch.allclose(prepared["pixel_values"], found, atol=tolerance)


def test_a_model_takes_bytes_and_keeps_nothing_of_it():
    torch.manual_seed(0)
    model = models.build("vit-small", "cifar10").eval()
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    normalized = pixels.normalize(x, DATASETS["cifar10"])
    expected = model(normalized).logits
    for compiled in (model, torch.compile(model, backend="eager")):
        assert torch.equal(compiled(pixel_values=x).logits, expected)
    assert torch.equal(model(x).logits, expected) and not torch.allclose(model(x.float()).logits, expected, atol=1e-2)
    assert not list(model.buffers()) and model.state_dict().keys() == dict(model.named_parameters()).keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x).logits, model(normalized).logits)


def test_training_evaluation_checkpoints_and_from_pretrained_see_the_same_pixels(tmp_path):
    splits = data.load("digits")
    small, held_out = (torch.utils.data.Subset(splits[name], range(64)) for name in ("train", "validation"))
    labels = splits["train"].labels[:64]

    def run(normalized, folder):
        torch.manual_seed(0)
        model = models.build("vit-small", "digits")
        args = XSAMTrainingArguments(
            str(tmp_path / folder), max_steps=3, per_device_train_batch_size=32, per_device_eval_batch_size=50, report_to="none",
            use_cpu=True, disable_tqdm=True, save_steps=2, seed=0,
        )  # fmt: skip
        if normalized:  # as a data set of floats, which the model gets as they are
            made = pixels.normalize(splits["train"].images[:64], DATASETS["digits"])
            data_set = [{"pixel_values": x, "labels": int(y)} for x, y in zip(made, labels, strict=True)]
        else:
            data_set = small
        processor = pixels.processor(DATASETS["digits"])
        trainer = XSAMTrainer(
            model, args, train_dataset=data_set, processing_class=processor, compute_metrics=train.score
        )
        trainer.train()
        trainer.save_model()
        return trainer

    floats, ours = run(True, "floats"), run(False, "bytes")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("floats", "bytes"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    predicted = ours.predict(held_out)
    assert ours.evaluate(held_out)["eval_loss"] == pytest.approx(predicted.metrics["test_loss"], abs=1e-6)
    assert np.array_equal(floats.predict(held_out).predictions, predicted.predictions)
    for folder in (tmp_path / "bytes", tmp_path / "bytes" / "checkpoint-2"):
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        pictures = [image.permute(1, 2, 0).numpy() for image in splits["validation"].images[:64]]
        inputs = processor(images=pictures, input_data_format="channels_last", return_tensors="pt")
        logits = model(**inputs).logits.detach().numpy()
        close = np.abs(logits - predicted.predictions).max() < 1e-4
        assert close == (folder.name == "bytes")  # the checkpoint is an update behind
