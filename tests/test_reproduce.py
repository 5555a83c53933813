"""The paper's tables: every row a command that trains what the paper says, and its numbers beside ours."""

import json
import pickle
import re
from argparse import Namespace

import numpy as np
import pytest

from scripts import reproduce, run_flags, run_seeds
from scripts.cost import Cost, cost, parsed
from scripts.paper import SETTINGS, TABLES, Number, deviations, numbers, slug
from tasks import recipes
from tasks.command import sentence
from tasks.image_classification import train


OPTIONS = {"data": None, "seeds": 1, "settings": None, "examples": None, "epochs": None, "flags": "", "processes": 1}


def options(**changes):
    return Namespace(**{**OPTIONS, **changes})


def every_run():
    found = {}
    for name, table in TABLES.items():
        for cell in reproduce.cells(table, options()):
            found.setdefault(cell.runs[0], []).append((name, cell.setting, cell.row))
    return found


def test_every_number_of_the_paper_has_its_row():
    """By table and setting; and every row of a table of scores its number, but for those whose numbers the text has lost."""
    said = recipes.read(reproduce.ROOT / "scripts" / "paper.yaml")
    assert {name.replace(" ", "-") for name in said} == {
        name for name, table in TABLES.items() if table.rows and name.startswith("table-")
    }
    for name, table in TABLES.items():
        if name.startswith("table-") and table.rows:
            assert list(said[name.replace("-", " ")]) == list(table.rows), name
            for setting, rows in table.rows.items():
                missing = set(rows) - set(numbers(name, setting))
                assert set(numbers(name, setting)) <= set(rows), (name, setting)
                assert missing == ({"SAM", "ASAM", "XSAM"} if name == "table-10" else set()), (name, setting)
    # Tables that show the same training say the same.
    assert numbers("table-2", "cifar100-resnet-18")["XSAM"] == numbers("table-11", "cifar100-resnet-18")["XSAM"]
    assert numbers("table-2", "cifar10-vgg-11")["SGD"] == Number(93.19, 0.11)


def test_every_command_is_read_as_the_paper_has_it():
    runs = every_run()
    assert len({(run.group, run.name) for run in runs}) == len(
        runs
    )  # two rows share a folder only if they share a command
    found = {}
    for run, places in runs.items():
        if places[0][1] != "cifar100-resnet-18" and places[0][2] not in ("XSAM", "WSAM"):
            continue  # as those of ResNet-18, and a parser takes its time
        task, args = parsed(run)
        of = SETTINGS[places[0][1]]
        assert args.rho == 0 or args.perturbation == "asam" or args.rho == of.rho or places[0][0] in (
            "table-12", "figure-3b", "figure-3c"
        ), places  # fmt: skip
        if of.recipe == "cifar-cnn":
            shared = (args.learning_rate, args.weight_decay, args.per_device_train_batch_size, args.num_train_epochs)
            assert (
                shared == (0.05, 1e-3, 125, 200) and args.optim_args == "momentum=0.9" and task.validation_share == 0
            )
        for place in places:
            found[place] = args
    resnet = "cifar100-resnet-18"

    def radii(table, row, setting=resnet):
        args = found[table, setting, row]
        return args.rho, args.ascent_steps, args.alpha, args.rho_max, args.direction, args.perturbation

    assert radii("table-4", "XSAM, k = 3") == (0.15, 3, None, 0.3, "arc", "sam")
    assert radii("table-4", "MSAM+, k = 1")[:5] == (0.15, 1, None, 0.3, "msam+")
    assert radii("table-4", "LSAM, k = 1")[:3] == (0.15, 1, 1.0)
    assert radii("table-12", "XSAM, ρ/k = 0.08") == (0.16, 2, None, 0.25, "arc", "sam")
    assert radii("table-12", "XSAM, ρ/k = 0.12")[:4] == (0.24, 2, None, 0.2)
    assert radii("figure-3c", "WSAM, ρ/k = 0.12")[:3] == (0.24, 2, 0.41)
    assert radii("table-2", "XSAM", "tiny-imagenet-vgg-11")[:4] == (0.2, 1, None, 1.2)
    assert radii("table-11", "WSAM", "cifar100-densenet-121")[:3] == (0.1, 1, 0.75)
    assert radii("table-11", "XSAM+ASAM")[5] == "asam" and radii("table-11", "VaSSO")[5] == "vasso"
    assert radii("figure-3b", "WSAM, ρ = 0.30")[:3] == (0.3, 1, 0.92)
    assert found["figure-4", resnet, "every 5 epochs"].alpha_search_steps == 2000
    assert found["figure-17", resnet, "slope_max"].gradient_scale == "slope_max"
    assert found["wsam-grid", resnet, "α = 0"].alpha == 0 and found["table-2", resnet, "SGD"].rho == 0
    assert found["table-3", "imagenet-resnet-50", "XSAM"].rho_max == 0.3


@pytest.fixture
def cifar(tmp_path):
    """CIFAR-100's archive with 48 images."""
    folder = tmp_path / "data" / "cifar100"
    folder.mkdir(parents=True)
    for name, n in (("train", 40), ("test", 8)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [i % 100 for i in range(n)]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}, protocol=2))
    return folder.parent


# A row of each kind; every_row.py, beside this file, starts all of them. The small model takes the place of the paper's, but for three rows.
STARTED = [
    ("table-2", "SGD", "resnet-small", 2, 2),
    ("table-4", "MSAM+, k = 3", "resnet-small", 8, 8),
    ("table-11", "XSAM+ASAM", "resnet-small", 4 + 3, 4),
    ("table-11", "VaSSO", "resnet-small", 4, 4),
    ("figure-4", "every 100 updates", "resnet-small", 4 + 3, 4),
    ("figure-17", "slope_max", "resnet-small", 4 + 3 + 2, 4),
    ("figure-3c", "WSAM, ρ/k = 0.12", "resnet-small", 6, 6),
    ("table-2", "XSAM", "resnet-18", 4 + 3, 4),
]


@pytest.mark.parametrize("table, row, model, forward, backward", STARTED)
def test_a_row_trains(table, row, model, forward, backward, cifar, tmp_path, monkeypatch):
    setting = "cifar100-resnet-18"
    small = (
        f"--model {model} --max_steps 2 --per_device_train_batch_size 2 --alpha_samples 3 --threads 1 --save_strategy no "
        "--dataloader_num_workers 0 --dataloader_persistent_workers false --use_cpu true --disable_tqdm true --eval_strategy no"
    )
    chosen = options(data=cifar, settings=[setting], flags=small)
    cell = next(cell for cell in reproduce.cells(TABLES[table], chosen) if cell.row == row)
    monkeypatch.chdir(reproduce.ROOT)
    argv = [*cell.runs[0].command[2:], "--output_dir", str(tmp_path / "run")]
    result = json.loads(
        train.train(*recipes.parse((train.ImageArguments, train.TrainingArguments), argv, "")).read_text()
    )
    assert (result["passes"]["forward"], result["passes"]["backward"]) == (forward, backward)
    assert not result["diverged"] and result["model"] == model


# --- the table ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    recipe = tmp_path / "tasks" / "image_classification" / "recipes" / "cifar-cnn.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("rho: 0.15\n")
    return tmp_path


def finish(root, run, accuracy, last=None, best=None, seconds=3600.0, corrupted=None):
    folder = root / run.folder
    folder.mkdir(parents=True)
    (folder / "request.json").write_bytes(run.request)
    metrics = {"test": {"accuracy": accuracy}}
    metrics |= {
        split: {"accuracy": value} for split, value in (("last_five_epochs", last), ("best_epoch", best)) if value
    }
    method = run.name.partition("-")[0]
    result = {
        "task": "image_classification", "dataset": "cifar100", "model": "resnet-18", "method": method, "metrics": metrics,
        "passes": {"forward": 4, "backward": 4}, "seconds": seconds, "seed": run.seed, "device": "cpu", "threads": 1,
        "versions": {}, "diverged": False,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    if corrupted is not None:
        (folder / "corruptions.json").write_text(json.dumps({"groups": dict.fromkeys(reproduce.GROUPS, corrupted)}))


def lines_of(table, found):
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in reproduce.show(table, TABLES[table], found).splitlines()
    ]
    return {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_table_has_both_ways_to_choose_an_epoch_and_the_distance_in_standard_deviations(root):
    found = reproduce.cells(TABLES["table-2"], options(settings=["cifar100-resnet-18"], seeds=5))
    sgd, sam, xsam = found
    for run, accuracy in zip(sam.runs[:3], (0.80, 0.81, 0.82), strict=True):
        finish(root, run, accuracy, accuracy - 0.001, accuracy + 0.001)
    finish(root, xsam.runs[0], 0.8110)
    lines = lines_of("table-2", found)
    # The paper's 80.93 ± .11; ours 81 ± 1: (81 - 80.93) / √((1 + .0121) / 2) = .098.
    assert lines["SAM"]["last epoch"] == "81.00 ± 1.00 (+0.1 s)" and lines["SAM"]["seeds"] == "3 of 5"
    assert lines["SAM"]["last five epochs"] == "80.90 ± 1.00 (-0.0 s)"
    assert lines["SAM"]["best epoch"] == "81.10 ± 1.00 (+0.2 s)" and lines["SAM"]["paper"] == "80.93 ± 0.11"
    assert lines["XSAM"]["last epoch"] == "81.10 (-2.0 s)" and lines["XSAM"]["best epoch"] == ""  # 81.24 ± .07
    assert lines["SGD"]["seeds"] == "0 of 5" and lines["SGD"]["last epoch"] == ""
    assert deviations(81.0, 1.0, Number(80.93, 0.11)) == pytest.approx(0.09838, abs=1e-4)
    assert deviations(81.0, None, Number(81.1, 0.0)) is None and deviations(81.0, None, Number(81.1)) is None


def test_a_run_that_diverged_has_no_mean(root):
    found = reproduce.cells(TABLES["table-2"], options(settings=["cifar100-resnet-18"], seeds=1))
    finish(root, found[0].runs[0], 0.5)
    result = root / found[0].runs[0].folder / "result.json"
    result.write_text(result.read_text().replace('"diverged": false', '"diverged": true'))
    assert lines_of("table-2", found)["SGD"]["last epoch"] == "diverged"


def edit(root, run, name="result.json", **changes):
    file = root / run.folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"dataset": "digits"},
            "result.json is a result with dataset digits, and its request.json asks for dataset cifar100",
        ),
        ({"method": "xsam"}, "result.json is a result with method xsam, and its request.json asks for method sam"),
        ({"arguments": {"rho": 0.4}}, "a result with rho 0.4, and its request.json asks for rho 0.15"),
        (
            {"metrics": {"test": {"loss": 1.0}}},
            "runs/paper-cifar100-resnet-18/sam-rho-0.15: There is no metric accuracy: choose",
        ),
        ({"metrics": {"test": {"accuracy": None}}}, "sam-rho-0.15: SAM, seed 0 has diverged (test accuracy None)"),
        ({"metrics": {"test": {"accuracy": 80}}}, "its test accuracy is 80, and a number from 0 to 1 is expected"),
        ({"metrics": None}, "result.json is damaged"),
    ],
)
def test_a_run_of_something_else_is_no_row_of_the_table(root, changes, words):
    (root / "tasks/image_classification/recipes/cifar-cnn.yaml").write_text("dataset: cifar100\n")
    found = reproduce.cells(TABLES["table-2"], options(settings=["cifar100-resnet-18"], seeds=1))
    finish(root, found[1].runs[0], 0.8)
    edit(root, found[1].runs[0], arguments={"rho": 0.15, "alpha": 1.0})
    result = json.loads((root / found[1].runs[0].folder / "result.json").read_text())
    result.pop("diverged")  # which an older one lacks
    (root / found[1].runs[0].folder / "result.json").write_text(json.dumps(result))
    assert lines_of("table-2", found)["SAM"]["last epoch"].startswith("80.00")
    edit(root, found[1].runs[0], **changes)
    with pytest.raises(ValueError) as refused:
        reproduce.show("table-2", TABLES["table-2"], found)
    assert words in sentence(refused.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"groups": {"noise": 0.5}},
            "corruptions.json has no group blur, and the paper's table is of CIFAR-100-C: delete it",
        ),
        (
            {"made_by": "a library"},
            "corruptions.json has scores on images of a library, and the paper's table is of CIFAR-100-C",
        ),
        (
            {"groups": dict.fromkeys(reproduce.GROUPS, 50)},
            "corruptions.json is damaged (its share of corrupted images, noise, is 50",
        ),
        ({"groups": dict.fromkeys(reproduce.GROUPS, "x")}, "corruptions.json is damaged"),
        ({"groups": None}, "corruptions.json is damaged"),
    ],
)
def test_scores_on_other_corrupted_images_are_not_the_papers(root, changes, words):
    found = reproduce.cells(TABLES["table-15"], options(settings=["cifar100-resnet-18"], seeds=1))
    run = next(cell for cell in found if cell.row == "SAM").runs[0]
    finish(root, run, 0.8, corrupted=0.5)
    edit(root, run, "corruptions.json", made_by="CIFAR-100-C")
    assert lines_of("table-15", found)["SAM"]["noise"] == "50.00 (paper 25.58)"
    edit(root, run, "corruptions.json", **changes)
    with pytest.raises(ValueError) as refused:
        reproduce.show("table-15", TABLES["table-15"], found)
    assert words in sentence(refused.value)


def test_hours_of_several_machines_are_not_compared(root):
    found = reproduce.cells(TABLES["table-1"], options(settings=["cifar100-resnet-18"], seeds=2))
    runs = [run for cell in found for run in cell.runs]
    for run in runs:
        finish(root, run, 0.8, seconds=3600.0)
    told = [lines_of("table-1", found)["XSAM"]]
    edit(root, runs[-1], device="cuda:0")  # one of XSAM's
    told.append(lines_of("table-1", found)["XSAM"])
    edit(root, runs[-2], device="cuda:0")  # both
    told.append(lines_of("table-1", found)["XSAM"])
    assert [line["hours"].split()[0] if line["hours"] else "" for line in told] == ["1.00", "", "1.00"]
    assert [line["× SAM (paper)"] for line in told] == ["1.000 (1.013)", "(1.013)", "(1.013)"]


def test_hours_and_corruptions_are_the_same_trainings_in_other_units(root):
    chosen = {"settings": ["cifar100-resnet-18"], "seeds": 1}
    hours, corrupted = (reproduce.cells(TABLES[name], options(**chosen)) for name in ("table-1", "table-15"))
    assert {cell.runs for cell in hours} < {cell.runs for cell in corrupted}
    finish(root, hours[0].runs[0], 0.8, seconds=2 * 3600.0, corrupted=0.5)
    finish(root, hours[1].runs[0], 0.8, seconds=2.1 * 3600.0)
    lines = lines_of("table-1", hours)
    # 2.43 / 2.40 = 1.0125 in the paper.
    assert lines["XSAM"]["× SAM (paper)"] == "1.050 (1.013)" and lines["SAM"]["hours"] == "2.00"
    lines = lines_of("table-15", corrupted)
    assert lines["SAM"]["noise"] == "50.00 (paper 25.58)" and lines["SAM"]["corrupted"] == "50.00 (paper 51.45)"
    assert lines["XSAM"]["noise"] == "(paper 25.44)"
    hessian = lines_of("table-16", reproduce.cells(TABLES["table-16"], options()))
    assert hessian["SAM"]["λ_1"] == "(paper 36.15)" and hessian["XSAM"]["λ_1/λ_5"] == "(paper 1.59)"


def test_passes_are_counted_as_the_runs_make_them():
    def counted(table, row, setting="cifar100-resnet-18", **changes):
        chosen = options(settings=[setting], **changes)
        run = next(cell for cell in reproduce.cells(TABLES[table], chosen) if cell.row == row).runs[0]
        task, args = parsed(run)
        return cost(SETTINGS[setting], args, task)

    # 400 updates an epoch; 10,000 test images are 80 batches of 125.
    assert counted("table-2", "SGD") == Cost(80_000, 80_000, 0, 16_000)
    assert counted("table-2", "XSAM") == Cost(80_000, 160_000, 200 * 21, 16_000)
    assert counted("table-4", "XSAM, k = 3").passes == 4 * 80_000 and counted("table-4", "MSAM, k = 2").searches == 0
    assert counted("figure-4", "every 100 updates").searches == 800 * 21
    assert counted("figure-17", "slope_max").searches == 200 * 21 + 80_000
    part = counted("table-2", "XSAM", examples=1000, epochs=2, flags="--test_examples 250")
    assert part == Cost(16, 32, 42, 4)
    assert part.hours((3600, 360)) == pytest.approx(32 + 4.6)
    # 1,100 updates an epoch of 160,239 pairs.
    assert counted("table-3", "SAM", "iwslt14-transformer", epochs=1).updates == 1100
    assert counted("table-3", "SAM", "iwslt14-transformer", examples=16_024, epochs=2).updates == 2 * 111


def test_several_processes_share_an_updates_batch(monkeypatch):
    started = []
    monkeypatch.setattr(reproduce, "run_or_exit", lambda runs, jobs, launch: started.append((runs, launch)))
    reproduce.main(["table-3", "--settings", "cifar100-vit-ti", "--processes", "4", "--seeds", "1"])
    runs, launch = started[0]
    assert launch == ["-m", "accelerate.commands.launch", "--num_processes", "4"]
    assert [run.flags.split()[-2:] for run in runs] == [["--per_device_train_batch_size", "64"]] * 2
    translation = reproduce.cells(TABLES["table-3"], options(settings=["iwslt14-transformer"], processes=2))[0].runs[0]
    assert translation.flags.endswith("--max_tokens 2048")


def test_runs_are_named_by_what_they_are_and_made_once():
    assert slug("--method xsam --rho 0.15 --rho_max 0.3") == "xsam-rho-0.15-rho_max-0.3"
    assert all(re.fullmatch(run_flags.NAME, run.name) for run in every_run())
    shared = [
        {run for cell in reproduce.cells(TABLES[t], options()) for run in cell.runs} for t in ("table-2", "table-11")
    ]
    assert len(shared[0] & shared[1]) == 4  # SAM and XSAM of two settings
    runs = reproduce.once(reproduce.cells(TABLES["table-4"], options(seeds=2)))
    assert len(runs) == 2 * 16 and [run.seed for run in runs] == [0] * 16 + [1] * 16  # of 18 rows two more are SAM
    part = reproduce.cells(TABLES["table-4"], options(examples=500, epochs=3))[0].runs[0]
    assert part.group == "paper-cifar100-resnet-18-examples-500-epochs-3"
    assert "--train_examples 500 --num_train_epochs 3" in part.flags


@pytest.mark.parametrize(
    "argv, words",
    [
        (["table-99"], "there is no 'table-99': choose one of table-1"),
        ([], "a table is missing: --list names all"),
        (["2", "--seeds", "0"], "--seeds starts at 1"),
        (["2", "--examples", "-5"], "--examples starts at 1"),
        (["2", "--processes", "4"], "--processes is 4, and cifar10-vgg-11 has batches of 125, which do not divide so"),
        (["figure-3a"], "figure-3a is not made of trainings: python -m xsam_hf.analysis toy makes it"),
        (["2", "--settings", "cifar100-vit-ti"], "table-2 has no setting cifar100-vit-ti: it has cifar10-vgg-11"),
        (["3"], "imagenet-resnet-50 needs a local copy of its data: give the folder that holds imagenet as --data"),
        (
            ["2", "--data", "tests"],
            "--data is tests, which has no cifar10, and cifar10-vgg-11 is trained or scored on it",
        ),
        (["2", "--data", "/nowhere", "--dry-run"], "--data is /nowhere, which has no cifar10"),
        (["15"], "The corrupted images are local files: give the folder that holds CIFAR-100-C as --data"),
        (["2", "--flags", "--seed 7"], "--seed stands in --flags, and this script gives it to each run"),
        (["2", "--flags", "--rho 0.3"], "--rho stands in --flags, and some runs have a value of their own for it"),
        (["2", "--epochs", "3", "--flags", "--num_train_epochs 5"], "--num_train_epochs stands in --flags"),
        (["2", "--epochs", "3", "--flags=--num-train-epochs=5"], "--num_train_epochs stands in --flags"),
        (["2", "--flags", "--no_such 7"], "there is no flag --no_such"),
        (["2", "--flags", "'"], "--flags cannot be taken apart"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(argv, words, monkeypatch):
    monkeypatch.setattr(reproduce, "run_or_exit", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr(reproduce, "plan", lambda *_: pytest.fail("it takes times"))
    with pytest.raises(ValueError) as refused:
        reproduce.main(argv)
    assert words in sentence(refused.value)


@pytest.mark.parametrize("table, data", [("2", []), ("3", []), ("15", []), ("2", ["--data"])])
def test_a_dry_run_needs_no_data_but_a_folder_that_is_named(table, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "plan", lambda *_: "the plan")
    for name in ("cifar10", "cifar100"):
        (tmp_path / name).mkdir()
    settings = ["--settings", *[name for name in TABLES[f"table-{table}"].rows if "tiny" not in name]] if data else []
    reproduce.main([table, "--dry-run", *data, *[str(tmp_path) for _ in data], *settings])
    assert capsys.readouterr().out.startswith("the plan")


def test_the_list_names_every_table_and_figure(capsys):
    reproduce.main(["--list", "--seeds", "5"])
    told = capsys.readouterr().out
    assert all(f"| {name} " in told for name in TABLES)
    assert re.search(r"table-2 +\| Test accuracy, one ascent step +\| 135 ", told)
