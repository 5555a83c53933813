"""
The commands of the README, the docs and the tasks' pages run: as they stand, in a copy of the checkout whose recipes train two updates on
little data.
"""

import contextlib
import functools
import importlib
import lzma
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file
from test_trl import SIZE, sentence, tokenizer
from torch.distributed.run import get_args_parser
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification
from translation_toys import contents, pack, pairs

from scripts import cost, find_rho, reproduce, run_seeds, summarize, surfaces
from tasks import recipes
from tasks.text_classification import models
from tasks.translation import sources
from xsam_hf.analysis import toy
from xsam_hf.analysis.measures import MEASURES


ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("tasks/**/README.md"))]
}

# Fields of every recipe of a task.
SHORT = {"max_steps": 2, "alpha_samples": 3, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "threads": 1}
SHORT |= {"dataloader_num_workers": 0, "dataloader_persistent_workers": False}
IMAGES = {**SHORT, "per_device_train_batch_size": 4, "test_examples": 20}
TINY = {
    "image_classification": IMAGES,
    "text_classification": {**SHORT, "per_device_train_batch_size": 4},
    "translation": {**SHORT, "max_tokens": 200, "generation_num_beams": 1},
}
# And of some recipes.
CIFAR = {"eval_strategy": "no", "save_strategy": "no", "per_device_train_batch_size": 2}
LOCAL = {
    "cifar-cnn": {**CIFAR, "dataset": "cifar10", "data_dir": "DATA/cifar10", "test_examples": 10},
    "cifar100-vit-ti": {**CIFAR, "data_dir": "DATA/cifar100", "test_examples": 100},
    "iwslt14-transformer": {"model": "transformer-small"},
}

# Flags behind a command's own, where it has no recipe.
QUICK = "--max_steps 2 --per_device_train_batch_size 4 --use_cpu true --disable_tqdm true --report_to none"
FEWER = {
    "tasks.language_modeling.sft": f"{QUICK} --bf16 false",
    "tasks.text_classification.train": f"{QUICK} --threads 1",
    "tasks.text_classification.train_no_trainer": "--threads 1 --num_train_epochs 1 --alpha_samples 3",
    "xsam_hf.analysis.__main__": "--batches 1 --batch_size 4 --samples 3 --directions 2 --eigenvalues 1",
    "scripts.prepare_iwslt14": "--archive de-en.tgz",
    "scripts.run_seeds": "--seeds 0",
    "scripts.reproduce": "--settings cifar100-resnet-18 --seeds 1 --examples 100",
}
ALL_RUNS = "--model resnet-small --test_examples 100"  # --flags of `reproduce`
ROWS = 3  # of a table

# What only its launcher or installer reads here, and why.
READ = {
    "bash scripts/demo": "trains for minutes; test_scripts.py has its report",
    "bash scripts/test": "these tests are what it runs",
    "pip install": "needs the network; its extras are looked up",
    "export": "sets glibc's variables, which no code of ours reads",
    "torchrun": "wants eight GPUs, and a script of the reader's",
    "accelerate launch --config_file": "wants eight GPUs, and a script of the reader's",
}

# What a page's commands leave behind, and how many of it.
LEFT = {
    "README.md": {
        "runs/*/digits-vit-small/sam/seed-*/result.json": 1,
        "runs/mine/*/seed-0/result.json": 3,
        "results/mine.json": 1,
        "analysis/toy.svg": 1,
    },
    "docs/analysis.md": {
        "analysis/report.html": 1,
        "analysis/*sam/*.json": 12,
        "results/digits-noise-surfaces.json": 1,
        "runs/digits-seen/*/seed-0/checkpoint-2/model.safetensors": 4,
    },
    "docs/choosing_rho.md": {"runs/find_rho/*/*/*/rho.svg": 1},
    "docs/language_models.md": {"runs/sft/*/sam/*/adapter_model.safetensors": 1},
    "docs/reproducing.md": {
        "runs/paper-cifar100-resnet-18-examples-100/*/seed-0/result.json": 3,
        "runs/paper-cifar100-resnet-18-examples-100-epochs-20/*/seed-0/result.json": 3,
    },
    "tasks/image_classification/README.md": {
        "runs/*/digits-vit-small/*/seed-*/result.json": 3,
        "runs/*/cifar*/xsam/seed-*/result.json": 2,
    },
    "tasks/text_classification/README.md": {
        "runs/*/roberta-small/*/seed-*/result.json": 3,
        "runs/*/no-recipe/xsam/seed-*/result.json": 1,
        "runs/*/no_trainer/model.safetensors": 1,
    },
    "tasks/translation/README.md": {
        "runs/*/handbook-small/*/seed-*/result.json": 3,
        "data/iwslt14/checksums.json": 1,
        "runs/*/iwslt14-transformer/xsam/seed-*/result.json": 1,
    },
}


def commands_of(text):
    """The words of each command of a page, with its block's variables in their places."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words and re.fullmatch(r"[A-Z]=.*", words[0]):
                variables[words[0][0]] = words[0][2:]
            elif words:
                yield words


COMMANDS = {page: list(commands_of(text)) for page, text in PAGES.items()}


def check(words):
    """What cannot run here, as far as what would read it goes."""
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[:2] == ["pip", "install"]:
        config = ConfigParser()
        config.read(ROOT / "setup.cfg")
        known = config["options.extras_require"]
        for word in words[2:]:
            if re.search(rf"^{re.escape(word)}>", known["checkout"], re.MULTILINE):
                continue
            (extra,) = re.fullmatch(r"\.(?:\[(\w+)\])?", word).groups()
            assert extra is None or extra in known, word
    elif words[0] == "torchrun":
        get_args_parser().parse_args(words[1:])
    elif words[0] == "accelerate":
        assert Path(launch_command_parser().parse_args(words[2:]).config_file).is_file()


def call(module, *argv):
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    importlib.import_module(module).main(list(argv))


def run(words):
    """Runs a command in this process, as `python -m` or `scripts/run` would in its own."""
    if any(shlex.join(words).startswith(known) for known in READ):
        return check(words)
    if words[:2] == ["python", "-c"]:
        code, into, file = words[2:]
        assert into == ">"
        with open(file, "w") as out:
            return subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.module
        words = ["python", "-m", args.training_script, *args.training_script_args]
    if words[:2] == ["python", "-m"]:
        package = importlib.util.find_spec(words[2]).submodule_search_locations
        module, argv = words[2] + (".__main__" if package else ""), words[3:]
    elif words[0] == "scripts/run":
        module, argv = f"scripts.{words[1]}", words[2:]
    else:
        raise ValueError("it is none of the kinds that this test knows: give it a way to run, or a place in READ.")
    argv = [filled(word) for word in argv]
    if not argv[0].endswith(".yaml") and argv != ["toy"]:
        place = argv.index("--") if "--" in argv else len(argv)
        argv[place:place] = shlex.split(FEWER.get(module, ""))
    if module == "scripts.reproduce":
        flags = [word.partition("=")[2] for word in argv if word.startswith("--flags=")]
        argv.append(f"--flags={' '.join([*flags, ALL_RUNS])}")
    call(module, *argv)


def filled(word):
    """`sam=…` is the last checkpoint of seed 0 of the run of that name, the page's own where others' have one too."""
    name, equals, value = word.partition("=")
    if value != "…":
        return word
    return (
        f"{name}={max(Path('runs').glob(f'*/{name}/seed-0/checkpoint-*'), key=lambda folder: folder.stat().st_mtime)}"
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with short recipes, and beside them the files of the reader's that the pages name."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("scripts", "xsam_hf"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tasks", folder / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in (folder / "tasks").glob("*/recipes/*.yaml"):
        fields = {**recipes.read(recipe), **TINY[recipe.parts[-3]], **LOCAL.get(recipe.stem, {})}
        YAML(typ="safe").dump(fields, recipe)
    lines = "".join(f"{german}\t{english}\n" for german, english in pairs())
    handbook = sources.HANDBOOK.relative_to(ROOT)
    (folder / handbook).write_bytes(lzma.compress(lines.encode()))
    draw = np.random.default_rng(0)
    for name, files, key, classes in (
        ("cifar10", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "labels", 10),
        ("cifar100", ["train", "test"], "fine_labels", 100),
    ):
        (folder / "DATA" / name).mkdir(parents=True)
        for file in files:
            pixels = draw.integers(0, 256, (2 * classes, 3072), dtype=np.uint8)
            images = {"data": pixels, key: [*range(classes)] * 2}
            (folder / "DATA" / name / file).write_bytes(pickle.dumps(images, protocol=2))
    pack(folder / "de-en.tgz", contents())

    texts = [f"{english}\t{len(english) % 2}\n" for _, english in pairs()]
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("".join(["sentence\tlabel\n", *texts]))
    words = models.tokenizer(None, texts)
    classifier = RobertaForSequenceClassification(RobertaConfig(vocab_size=len(words), **models.NEW))
    for name in ("bert-base-uncased", "runs/a/checkpoint-500", "runs/b/checkpoint-500"):
        classifier.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
        torch.nn.init.normal_(classifier.classifier.out_proj.weight)  # so that no two are the same
    ids = torch.randint(len(words), (128, 9))
    save_file({"input_ids": ids, "labels": torch.arange(128) % 2}, folder / "batches.safetensors")
    (mine,) = re.findall(r"`mine.py`.*?```python\n(.*?)```", PAGES["docs/analysis.md"], re.DOTALL)
    data = "import torch\ndataset = [{'input_ids': torch.arange(9) + i, 'labels': i % 2} for i in range(128)]\n"
    (folder / "mine.py").write_text(data + mine)

    for name in ("TEXTS", "results"):
        (folder / name).mkdir()
    (folder / "TEXTS" / "train.csv").write_text("text\n" + "".join(f"{sentence(i, 6)}\n" for i in range(16)))
    GPT2LMHeadModel(GPT2Config(**SIZE)).save_pretrained(folder / "MODEL")
    tokenizer().save_pretrained(folder / "MODEL")
    return folder


class Here:
    """Trains in this process, and stands for the one that `run_seeds` and `reproduce` fork their runs from (test_starter.py)."""

    def __init__(self, *_):
        self.close = lambda: None

    def start(self, command, log):
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                call(*command)
        except Exception as error:
            raise AssertionError(f"{shlex.join(command)}: {error}") from error
        return SimpleNamespace(poll=lambda: 0, returncode=0)


def unseen(figure, file, **_):
    """Stands for the drawing of shapes and letters, which takes seconds a figure. test_analysis.py has it."""
    if isinstance(file, Path):
        file.write_text("<svg/>")
    else:
        file.write("<svg/>")


@pytest.mark.parametrize("page", [page for page, commands in COMMANDS.items() if commands])
def test_commands_run(checkout, monkeypatch, page):
    for module in (cost, find_rho, reproduce, run_seeds, summarize, surfaces):
        monkeypatch.setattr(module, "ROOT", checkout)
    monkeypatch.setattr(sources, "HANDBOOK", checkout / sources.HANDBOOK.relative_to(ROOT))
    monkeypatch.setattr(reproduce, "cells", lambda *args, all_of=reproduce.cells: all_of(*args)[:ROWS])
    for name in ("descend", "basins"):
        monkeypatch.setattr(toy, name, functools.partial(getattr(toy, name), steps=2))
    for name in ("plane", "landscape"):  # as many passes as all others; test_analysis.py has each
        monkeypatch.delitem(MEASURES, name)
    monkeypatch.setattr(Figure, "savefig", unseen)
    monkeypatch.setattr(run_seeds, "Starter", Here)
    monkeypatch.chdir(checkout)
    for words in COMMANDS[page]:
        try:
            run(words)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error
    left = LEFT.get(page, {})
    assert {pattern: len(list(checkout.glob(pattern))) for pattern in left} == left
    for example in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL) if page.startswith("tasks/") else []:
        folder = next(checkout.glob("runs/*/digits-vit-small/xsam/seed-*"))
        names = {"images": [Image.new("L", (8, 8), 128)] * 3}
        exec(example.replace("runs/...", str(folder)), names)
        assert names["logits"].shape == (3, 10)


def test_every_reason_is_of_a_command():
    lines = [shlex.join(words) for commands in COMMANDS.values() for words in commands]
    assert all(any(line.startswith(known) for line in lines) for known in READ)
    assert set(LEFT) <= set(PAGES)


def test_every_block_is_of_a_kind_that_is_run():
    """By this file or test_docs.py, and README's Python by test_package.py. The one block without a kind is a row of a table."""
    kinds = [
        (page, kind)
        for page, text in PAGES.items()
        for kind in re.findall(r"^```(\w*)\n.*?^```$", text, re.DOTALL | re.MULTILINE)
    ]
    assert {kind for _, kind in kinds} == {"bash", "python", ""}
    assert [page for page, kind in kinds if not kind] == ["docs/upstream.md"]
