"""
Starts every row of the paper's tables and figures for two updates, on small data of the right layout: what test_reproduce.py does with a
row of each kind.

    python tests/every_row.py                 # two minutes of one CPU core
    python tests/every_row.py SETTING ...     # some of scripts/paper.py's settings

The CNNs are `resnet-small`, ViT-Ti and the Transformer are themselves, with two images or 64 tokens a batch.
"""

import contextlib
import io
import json
import os
import pickle
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import reproduce
from scripts.cost import parsed
from scripts.paper import SETTINGS, TABLES
from scripts.run_seeds import Run
from tasks.image_classification import train as images
from tasks.translation import train as translation


UPDATES = 2
SHARED = f"--max_steps {UPDATES} --alpha_samples 3 --save_strategy no --use_cpu true --disable_tqdm true --eval_strategy no --threads 1"
IMAGES = f"{SHARED} --per_device_train_batch_size 2 --dataloader_num_workers 0 --dataloader_persistent_workers false"
TRANSLATION = f"{SHARED} --max_tokens 64 --load_best_model_at_end false"


def make_data(folder: Path) -> None:
    """A few examples of each data set, laid out as `reproduce --data` wants them."""
    draw = np.random.default_rng(0)
    for name, files, key, classes in (
        ("cifar10", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "labels", 10),
        ("cifar100", ["train", "test"], "fine_labels", 100),
    ):
        (folder / name).mkdir(parents=True)
        for file in files:
            pixels = draw.integers(0, 256, (20, 3072), dtype=np.uint8)
            batch = {"data": pixels, key: [i % classes for i in range(20)]}
            (folder / name / file).write_bytes(pickle.dumps(batch, protocol=2))

    def picture(file: Path, size: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)

    tiny = folder / "tiny-imagenet-200"
    names = [f"n{label:08d}" for label in range(200)]
    for name in names:
        picture(tiny / "train" / name / "images" / f"{name}_0.JPEG", 64)
        (tiny / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        picture(tiny / "val" / "images" / f"val_{name}.JPEG", 64)
    (tiny / "wnids.txt").write_text("\n".join(names) + "\n")
    (tiny / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{name}.JPEG\t{name}\t0\t32\t44\t62\n" for name in names)
    )
    for label in range(1000):
        for part in ("train", "val"):
            picture(folder / "imagenet" / part / f"n{label:08d}" / f"{part}_{label}.JPEG", 48)
    text = folder / "iwslt14"
    text.mkdir()
    words = {"de": "das ist ein haus und ein baum".split(), "en": "this is a house and a tree".split()}
    for language, known in words.items():
        (text / f"dict.{language}.txt").write_text("".join(f"{word} 9\n" for word in dict.fromkeys(known)))
        for split in ("train", "valid", "test"):
            lines = [" ".join(known[: 2 + i % 6]) for i in range(24)]
            (text / f"{split}.{language}").write_text("\n".join(lines) + "\n")


def rows_of(setting: str, data: Path) -> dict[Run, str]:
    """The run of each row of a setting, made once, and the first table that shows it."""
    of, rows = SETTINGS[setting], {}
    flags = TRANSLATION if of.task == "translation" else IMAGES
    if of.task == "image_classification" and "vit" not in setting:
        flags += " --model resnet-small"
    options = Namespace(data=data, seeds=1, settings=[setting], examples=None, epochs=None, flags=flags, processes=1)
    for name, table in TABLES.items():
        for cell in reproduce.cells(table, options):
            rows.setdefault(cell.runs[0], f"{name}, {cell.row}")
    return rows


def main(settings: Sequence[str]) -> None:
    started, count = time.process_time(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder / "data")
        os.chdir(reproduce.ROOT)
        for setting in settings or SETTINGS:
            rows = rows_of(setting, folder / "data")
            for run, row in rows.items():
                task, args = parsed(run)
                args.output_dir = str(folder / str(count))
                module = translation if run.task == "translation" else images
                with contextlib.redirect_stdout(io.StringIO()):
                    result = json.loads(Path(module.train(task, args)).read_text())
                if result["diverged"] or result["passes"]["backward"] < UPDATES:
                    sys.exit(f"{setting}: {row}: {result['passes']}, diverged: {result['diverged']}")
                count += 1
            print(f"{setting}: {len(rows)} rows", flush=True)
    print(f"{count} rows, {UPDATES} updates each, {time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main(sys.argv[1:])
