"""Recipes and flags: what is written is what is trained, and everything else is refused by name."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from processes import run_command

from tasks import command, recipes
from tasks.image_classification.train import ImageArguments, TrainingArguments
from xsam_hf import XSAMArguments
from xsam_hf.unread import unread


ROOT = Path(__file__).parents[1]


@pytest.fixture
def parse(tmp_path):
    def parsed(recipe, *argv):
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe, encoding="utf-8")
        return recipes.parse((ImageArguments, TrainingArguments), [str(file), *argv], "", "runs/image_classification")

    return parsed


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, words",
    [
        # YAML 1.1 makes 0, 1, 90, 8 and a day of these.
        ("rho: no", "--rho: invalid finite float value: 'no'"),
        ("alpha: yes", "--alpha: invalid finite float value: 'yes'"),
        ("alpha: on", "'on'"),
        ("rho: 1:30", "'1:30'"),
        ("rho: 2024-01-01", "`rho` is 2024-01-01, a date in YAML: put it in quotes"),
        ("%YAML 1.1\n---\nseed: 010", "a line begins with %"),
        # Twice, in nested mappings too.
        ("rho: 0.1\nseed: 1\nrho: 0.2", 'found duplicate key "rho"'),
        ("lr_scheduler_kwargs: {a: 1, a: 2}", 'found duplicate key "a"'),
        ("seed: &one 1\nlogging_steps: *one", "a line has an alias (*name): write out what it stands for"),
        # Of another type than the field's.
        ("seed: 1.5", "--seed: invalid int value: '1.5'"),
        ("seed: 1e3", "--seed: invalid int value: '1000.0'"),
        ("seed: true", "`seed` is true: give a number"),
        ("rho: false", "`rho` is false: give a number"),
        ("output_dir: 2024", "`output_dir` is the int 2024 in YAML, and text is expected: put it in quotes"),
        ("output_dir: true", "`output_dir` is the bool True"),
        ("model: 0x10", "`model` is the int 16"),
        ("bf16: 3", "--bf16: Truthy value expected: got 3"),
        ("bf16: off", "Truthy value expected: got off"),
        ("rho: .nan", "invalid finite float value: 'nan'"),
        ("learning_rate: 1e999", "invalid finite float value: 'inf'"),
        ("rho: [0.1, 0.2]", "`rho` is a list: give one value"),
        ("rho: {a: 1}", "`rho` is a mapping: give one value"),
        ('eval_splits: [validation, --rho, "0.9"]', "`eval_splits` has '--rho', which would be a flag"),
        ("lr_scheduler_kwargs: {num_cycles: .nan}", "`lr_scheduler_kwargs` is {'num_cycles': nan}, which is no JSON"),
        ("lr_scheduler_kwargs: {a: 2024-01-01}", "which is no JSON"),
        ("output_dir: {a: 1}", "`output_dir` is a mapping: give one value"),
        ("method: [sam, xsam]", "`method` is ['sam', 'xsam']: choose one of sgd, sam"),
        ("method: {a: 1}", "`method` is {'a': 1}: choose one of"),
        ("method: 1", "`method` is 1: choose one of"),
        ("rho_exclude: [[bias]]", "a list in YAML"),
        ("rho:", "`rho` has no value: give one, or leave the line out for 0.05"),
        ("save_strategy: ~", "`save_strategy` has no value"),
        ("optim: adam", "--optim: invalid choice: 'adam'"),
        # No field, or no recipe at all.
        ("rhoo: 0.1", "has unknown fields: rhoo"),
        ("help: true", "has unknown fields: help"),
        ("- rho", "expected lines of the form `field: value`"),
        ("7: 8", "expected lines of the form `field: value`"),
        ("rho: 0.1: 2", "mapping values are not allowed here"),
        ("rho: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("rho: 0.1\n---\nrho: 0.2", "expected a single document"),
        ("a: " + "[" * 3000, "is not a recipe in YAML"),
        # Kept with the results.
        ("hub_token: hf_secret", "`hub_token` is a secret, and a recipe is kept with the results"),
    ],
)
def test_what_yaml_would_make_something_else_of_is_refused(parse, recipe, words):
    with pytest.raises(ValueError) as refused:
        parse(recipe)
    said = command.sentence(refused.value)
    assert "recipe.yaml" in said and words in said and "hf_secret" not in said
    assert "suppress" not in said  # ruamel's advice about keys that are there twice


def test_a_recipe_in_another_encoding_is_refused(tmp_path):
    for encoding, byte in [("utf-16", 0), ("latin-1", 12)]:
        (tmp_path / "a.yaml").write_bytes("run_name: Größe".encode(encoding))
        with pytest.raises(ValueError, match=f"a.yaml is not in UTF-8 [(]byte {byte}[)]: save it as UTF-8"):
            recipes.read(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes("run_name: Größe".encode())
    assert recipes.read(tmp_path / "a.yaml") == {"run_name": "Größe"}


@pytest.mark.parametrize(
    "recipe, name, value",
    [
        ("rho: 1e-3", "rho", 0.001),
        ("rho: 3e-2\n", "rho", 0.03),
        ("seed: 010", "seed", 10),
        ("seed: 0o10", "seed", 8),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("num_train_epochs: 0.5", "num_train_epochs", 0.5),
        ("save_strategy: no", "save_strategy", "no"),
        ('output_dir: "2024"', "output_dir", "2024"),
        ("bf16: false", "bf16", False),
        ("use_cpu: true", "use_cpu", True),
        ("alpha: null", "alpha", None),
        ("alpha:", "alpha", None),
        ("report_to: none", "report_to", []),
        ("rho_exclude: [bias, norm]", "rho_exclude", ["bias", "norm"]),
        ("rho_exclude: bias", "rho_exclude", ["bias"]),
        ("lr_scheduler_kwargs: {num_cycles: 2, rate: 1e-3}", "lr_scheduler_kwargs", {"num_cycles": 2, "rate": 0.001}),
        ("\ufeffseed: 3", "seed", 3),
        ("# nothing else", "rho", 0.05),
        ("", "seed", 42),
    ],
)
def test_yaml_1_2_is_read_as_it_stands(parse, recipe, name, value):
    _, args = parse(recipe)
    found = getattr(args, name)
    assert getattr(found, "value", found) == value and type(getattr(found, "value", found)) is type(value)


@pytest.mark.parametrize("name", ["lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "accelerator_config"])
def test_mappings_are_mappings_however_their_field_is_annotated(parse, name):
    """`dict | str | None` and `dict[str, Any] | str | None`."""
    given = {"dispatch_batches": None} if name == "accelerator_config" else {"use_reentrant": False}
    args = parse(f"{name}: {json.dumps(given)}")[-1]
    found = getattr(args, name)
    assert given.items() <= (found if isinstance(found, dict) else found.to_dict()).items()
    for value in ("{bad", "[1]", "1") if name != "accelerator_config" else ("{bad",):
        with pytest.raises(ValueError, match=f"`{name}` is .*(which is no JSON|give a mapping in JSON)"):
            parse("", f"--{name}", value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"rho: \x00", None])
def test_a_file_that_is_no_text_is_no_recipe(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="recipe.yaml"):
        recipes.read(file)


@pytest.mark.parametrize("given", ["digits-vit-small", "recipes/digits-vit-smal.yaml"])
def test_a_recipe_that_is_not_there_is_told_from_the_one_meant(monkeypatch, given):
    monkeypatch.chdir(ROOT)
    meant = "There is no recipe .*: did you mean tasks/image_classification/recipes/digits-vit-small.yaml[?]"
    with pytest.raises(ValueError, match=meant):
        recipes.read(Path(given))


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--metho", "sam"], "there is no flag --metho; did you mean --method? --help"),
        (["--see", "3"], "there is no flag --see"),
        (["--lr", "0.1"], "there is no flag --lr. --help"),
        (["--rho", "nan"], "--rho: invalid finite float value: 'nan'"),
        (["--learning_rate", "-inf"], "--learning_rate/--learning-rate: expected one argument"),
        (["--learning_rate=-inf"], "invalid finite float value: '-inf'"),
        (["--seed", "1.5"], "--seed: invalid int value"),
        (["--learning_rate", "-1e-3"], "`learning_rate` is -0.001: give 0 or more"),
        (["--learning_rate", "-.5"], "`learning_rate` is -0.5: give 0 or more"),
        (["--warmup_steps", "1.5"], "`warmup_steps` is 1.5: give a whole number of updates"),
        (["--seed", "-1"], "`seed` is -1: give a whole number from 0"),
        (["--seed", "4294967296"], "`seed` is 4294967296"),
        (["other.yaml"], "other.yaml comes too late: a recipe is the first argument"),
        (["--rho", "0.1", "0.2"], "'0.2' is not expected there"),
        (["--hub_tokn", "hf_secret"], "there is no flag --hub_tokn; did you mean --hub_token?"),
        (["--hub_tokn=hf_secret"], "there is no flag --hub_tokn; did you mean --hub_token?"),
        (["--lr_scheduler_kwargs", "{a}"], "`lr_scheduler_kwargs` is {a}, which is no JSON"),
        (["--gradient_accumulation_steps", "0"], "`gradient_accumulation_steps` is 0: give 1 or more"),
        (["--num_train_epochs", "0"], "`num_train_epochs` is 0.0"),
        (["--max_steps", "0"], "`max_steps` is 0"),
        (["--save_total_limit", "0"], "`save_total_limit` is 0"),
        (["--label_smoothing_factor", "1"], "`label_smoothing_factor` is 1.0"),
        (["--prediction_loss_only", "true"], "`prediction_loss_only` is True, but the scores need all predictions"),
        (
            ["--accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 4}}'],
            "`accelerator_config` has num_steps: give `gradient_accumulation_steps`",
        ),
        (["--do_train", "false"], "`do_train` is False, but this script always trains and scores all splits"),
        (["--do_predict", "false"], "`do_predict` is False"),
        (["--label_names", "labels"], "`label_names` is ['labels']"),
        (["--batch_eval_metrics", "true"], "`batch_eval_metrics` is True"),
        (["--eval_do_concat_batches", "false"], "`eval_do_concat_batches` is False"),
        (["--threads", "100000"], "`threads` is 100000: give 1 to"),
        (["--threads", "0"], "`threads` is 0"),
        (["--dropout", "1"], "`dropout` is 1.0"),
        (["--method", "sma"], "`method` is 'sma': choose one of"),
    ],
)
def test_a_flag_that_is_wrong_is_named(parse, argv, words):
    with pytest.raises(ValueError) as refused:
        parse("rho: 0.1", *argv)
    said = command.sentence(refused.value)
    assert words in said and "hf_secret" not in said and len(said) < 500


def test_a_recipe_of_another_task_is_refused():
    """Its fields may all be those of the Trainer."""
    recipe = Path("tasks", "text_classification", "recipes", "roberta-small.yaml").absolute()
    classes = (ImageArguments, TrainingArguments)
    with pytest.raises(
        ValueError, match="is a recipe of the task text_classification, not of image_classification: run"
    ):
        recipes.parse(classes, [str(recipe)], "", "runs/image_classification")
    recipes.parse(classes, [str(recipe)], "", "runs/mine")


def test_deepspeed_without_its_package_is_refused(parse, monkeypatch):
    monkeypatch.setattr("tasks.arguments.is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match="`deepspeed` is zero.json, and the package is not installed: pip install"):
        parse("rho: 0.1", "--deepspeed", "zero.json")


def test_a_file_of_arguments_beside_the_script_plays_no_part(parse, tmp_path, monkeypatch):
    (tmp_path / "train.args").write_text("--rho 0.9")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert parse("seed: 1")[1].rho == 0.05


# --- methods ---------------------------------------------------------------------------------------------------------


def test_a_method_is_a_field_of_recipes(parse, capsys):
    _, args = parse("method: sam\nrho: 0.2")
    assert (args.alpha, args.rho) == (1.0, 0.2)
    assert "--method sam stands for: --alpha=1.0" in capsys.readouterr().err
    # The command line's replaces it, flags and all.
    _, args = parse("method: sam\nrho: 0.2", "--method", "asam")
    assert (args.alpha, args.perturbation) == (1.0, "asam")
    _, args = parse("method: sam\nrho: 0.2", "--method", "xsam")
    assert args.alpha is None
    _, args = parse("method: sam", "--method", "sgd")
    assert args.rho == 0 and args.alpha is None


@pytest.mark.parametrize(
    "recipe, argv, name",
    [
        ("method: sam\nalpha: 1.5", [], "wsam"),
        ("method: sgd\nrho: 0.1", [], "xsam"),
        ("method: xsam", ["--alpha", "1"], "sam"),
        ("", ["--method", "sam", "--rho", "0"], "adamw"),
        ("direction: lsam\nascent_steps: 2", ["--method", "xsam"], "lsam"),
    ],
)
def test_a_run_is_not_called_what_it_is_not(parse, recipe, argv, name):
    with pytest.raises(
        ValueError, match=f"`method` is .*, but with the other fields the run would be {name}: leave out"
    ):
        parse(recipe, *argv)


def test_tuning_a_method_leaves_it_that_method(parse):
    assert parse("", "--method", "wsam", "--alpha", "0.5")[1].alpha == 0.5
    assert parse("method: lsam\nascent_steps: 3")[1].ascent_steps == 3
    assert parse("method: sgd\noptim: sgd")[1].rho == 0


def test_folders_differ_by_recipe_method_and_seed(parse):
    folders = [
        parse(recipe, *argv)[1].output_dir
        for recipe, argv in [
            ("rho: 0.1", []),
            ("rho: 0.1", ["--seed", "7"]),
            ("rho: 0.1", ["--alpha", "1"]),
            ("method: asam", []),
            ("rho: 0", []),
            ("rho: 0.1", ["--method", "sgd"]),
        ]
    ]
    start = "runs/image_classification/recipe"
    names = ["xsam/seed-42", "xsam/seed-7", "sam/seed-42", "asam/seed-42", "adamw/seed-42", "sgd/seed-42"]
    assert folders == [f"{start}/{name}" for name in names]
    for recipe, argv in [("output_dir: there", []), ("", ["--output_dir", "there"]), ("", ["--output-dir=there"])]:
        assert parse(recipe, *argv)[1].output_dir == "there"


@pytest.mark.parametrize("recipe, argv", [("", ["--output_dir", ""]), ("", ["--data_dir= "]), ("model: ''", [])])
def test_an_empty_value_is_refused(parse, recipe, argv):
    with pytest.raises(ValueError, match="`(output_dir|data_dir|model)` is empty: give a value, or leave it out"):
        parse(recipe, *argv)


def test_no_recipe_of_ours_fixes_its_folder():
    for recipe in (ROOT / "tasks").glob("*/recipes/*.yaml"):
        assert "output_dir" not in recipes.read(recipe)


def test_a_recipe_gives_no_field_of_the_method_that_nothing_reads():
    names = {field.name for field in fields(XSAMArguments)}
    for recipe in (ROOT / "tasks").glob("*/recipes/*.yaml"):
        given = {name: value for name, value in recipes.read(recipe).items() if name in names}
        assert given and not unread(XSAMArguments(**given)), recipe


# --- the commands ----------------------------------------------------------------------------------------------------

COMMANDS = {
    "image": ["-m", "tasks.image_classification.train"],
    "translation": ["-m", "tasks.translation.train"],
    **{name: [f"scripts/{name}.py"] for name in ("run_seeds", "summarize", "prepare_iwslt14", "convert_fairseq")},
}


def run(*arguments, **environment):
    line = [sys.executable, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_in_one_sentence_with_status_2(name):
    done = run(*COMMANDS[name], "--no_such_flag", "hf_secret")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and len(lines) == 1
    assert lines[0].startswith("error: ") and lines[0].endswith(".") and "hf_secret" not in lines[0]


def test_every_command_is_run_so():
    begins = 'if __name__ == "__main__":\n'
    for file in [*(ROOT / "scripts").glob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        code, found, end = file.read_text(encoding="utf-8").partition(begins)
        if found and file.name != "make_fairseq_golden.py":  # runs where nothing of ours is installed
            ours = re.search(r"^from tasks.command import .*\brun\b", code, re.MULTILINE)
            assert ours and end == "    run(main)\n", file


@pytest.mark.parametrize("name", ["image", "summarize"])
def test_the_traceback_is_there_for_those_who_ask(name):
    done = run(*COMMANDS[name], "nowhere.yaml", "--traceback")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and lines[0] == "Traceback (most recent call last):" and len(lines) > 5
    assert lines[-1].startswith("error: ") and "nowhere.yaml" in lines[-1]


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(argv):
        raise TypeError("a fault")

    with pytest.raises(TypeError):
        command.run(main)


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ValueError("what,\n  where,\n and what to do."), 2, "error: what, where, and what to do."),
        (NotImplementedError("not this"), 2, "error: not this"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: [Errno 2] No such file or directory: 'x'"),
        (ValueError(), 2, "error: ValueError"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_what_counts_as_a_refusal(monkeypatch, capsys, error, status, said):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        command.run(main)
    assert ended.value.code == status and capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--report_to", "wandb_is_no_such_logger"], "wandb_is_no_such_logger"),
        (["--lr_scheduler_kwargs", json.dumps({"bogus": 1})], "bogus"),
    ],
)
def test_what_transformers_stumbles_over_is_a_sentence_too(tmp_path, flags, words):
    line = ["tasks.image_classification.train", "--output_dir", tmp_path, "--report_to", "none", "--max_steps", "2"]
    said = run_command(f"{tmp_path}.log", *line, *flags, status=2)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said and len(lines) == 1 and words in lines[0]
