"""The scripts, with a task that takes milliseconds and a Python that only notes what it was asked for."""

import argparse
import fcntl
import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from processes import ignoring

from scripts import (
    benchmark,
    buried,
    demo,
    epoch_cost,
    group,
    growth,
    run_flags,
    run_seeds,
    study,
    summarize,
    summary,
    surfaces,
    sweep,
    table,
)
from scripts import report as report_script
from tasks import command, files, identity


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"

# Notes every call; obeys --then, and otherwise leaves what a real task leaves.
TASK = """
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path

if __name__ != "__main__":  # what imports it wants what it imports
    raise ImportError

parser = argparse.ArgumentParser()
parser.add_argument("recipe")
parser.add_argument("--seed", type=int)
parser.add_argument("--output_dir", type=Path)
parser.add_argument("--resume_from_checkpoint")
parser.add_argument("--rho", type=float, default=0.05)
parser.add_argument("--alpha", type=float)
parser.add_argument("--num_train_epochs", type=float, default=2)
parser.add_argument("--then", default="finish")
parser.add_argument("--method")
parser.add_argument("--ascent_fraction", type=float, default=1)
args, _ = parser.parse_known_args()
if args.method == "sgd":
    args.rho = 0
if args.method in ("sam", "stale-sam"):
    args.alpha = 1
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")

if args.then == "die" and not args.resume_from_checkpoint:
    for number in (2, 10, 11, 12):
        (args.output_dir / f"checkpoint-{number}").mkdir()
    for number, state in ((2, "{}"), (10, "{}"), (12, '{"epoch": 1')):
        (args.output_dir / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    os.kill(os.getpid(), signal.SIGKILL)
if args.then == "sleep":
    worker = subprocess.Popen(["sleep", "60"])
    (args.output_dir / "pids").write_text(f"{os.getpid()} {worker.pid}")
    time.sleep(60)
if args.then == "nothing":
    sys.exit()

passes = int(10 * args.num_train_epochs) * (2 if args.rho and args.method != "stale-sam" else 1)
accuracy = 0.9 + 0.01 * args.seed
result = {
    "task": "fake", "dataset": "digits", "model": "tiny", "method": {}, "metrics": {"test": {"accuracy": accuracy}},
    "passes": {"forward": passes, "backward": passes}, "seconds": 1.0, "seed": args.seed, "device": "cpu",
    "threads": int(os.environ.get("OMP_NUM_THREADS", 0)), "arguments": {}, "versions": {"torch": "2"}, "git_commit": None,
}
history = [{"step": s, "epoch": s, "loss": 1 / s, "eval_accuracy": 0.1 * s} for s in range(1, 4)]
if "label_noise" in Path(args.recipe).read_text():  # learns the wrong labels without rho; half of them at rho .25
    learnt = max(0, 1 - 2 * args.rho)
    accuracy = 0.95 - 0.2 * learnt - 0.1 * max(0, args.rho - 0.5) + 0.01 * (args.seed * (2 if args.rho else 1) % 3)
    for s, entry in enumerate(history, 1):
        entry |= {"eval_test_accuracy": accuracy, "eval_wrong_labels_accuracy": learnt * s / 3}
    result["arguments"] = {"rho": args.rho}
    result["metrics"] = {
        "test": {"accuracy": accuracy}, "validation": {"accuracy": accuracy}, "wrong_labels": {"accuracy": learnt},
        "best_epoch": {"accuracy": 0.9 + 0.001 * (args.seed % 100)},
    }
    for kind in ("forward", "backward"):
        result["passes"][f"{kind}_examples"] = passes * (1 + args.ascent_fraction) / 2 if args.rho else passes
(args.output_dir / "trainer_state.json").write_text(json.dumps({"log_history": history}))
if args.rho and args.alpha is None:
    search = {"step": 1, "epoch": 0.1, "alphas": [0, 1, 2], "losses": [None, 1.5, 1.8], "alpha": 2, "angle": 1, "rho_max": 1}
    (args.output_dir / "xsam_search.jsonl").write_text((json.dumps(search) + "\\n") * 2)
(args.output_dir / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with a tiny task, which the scripts take for theirs."""
    for task, recipe, text in (
        ("fake", "tiny", "num_train_epochs: 2\n"),
        ("image_classification", "digits-noise-resnet-small", "num_train_epochs: 2\nlabel_noise: 0.3\nrho: 0.1\n"),
    ):
        recipes = tmp_path / "tasks" / task / "recipes"
        recipes.mkdir(parents=True)
        (recipes / f"{recipe}.yaml").write_text(text)
        (recipes.parent / "train.py").write_text(TASK)
    for shared in (ROOT / "tasks").glob("*.py"):
        shutil.copy(shared, tmp_path / "tasks")
    shutil.copytree(SCRIPTS, tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "xsam_hf").symlink_to(SCRIPTS.parent / "xsam_hf")
    monkeypatch.setattr(run_seeds, "ROOT", tmp_path)
    monkeypatch.setattr(summarize, "ROOT", tmp_path)
    return tmp_path


def script(root, name, *arguments, **options):
    """Runs a script as `scripts/run` does, without the set-up."""
    environment = {**os.environ, "PYTHONPATH": str(root), **options.pop("env", {})}
    line = [sys.executable, str(root / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        line, cwd=options.pop("cwd", root), env=environment, capture_output=True, text=True, timeout=120
    )


def refusal(main, *arguments):
    with pytest.raises(ValueError) as refused:
        main([str(argument) for argument in arguments])
    return command.sentence(refused.value)


def make_run(name="SAM", seed=0, flags=""):
    return run_seeds.Run("fake", "tiny", "group", name, seed, flags)


def calls(root):
    path = root / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make_row(name, *values, forward=10, backward=10):
    return table.Row(name, dict(enumerate(values)), forward, backward, 1.0)


# --- the table -------------------------------------------------------------------------------------------------------


def test_mean_and_std_are_those_of_a_sample():
    row = make_row("A", 90.0, 92.0, 97.0)
    assert row.mean == 93.0
    assert row.std == pytest.approx(13**0.5)  # (9 + 1 + 16) / (3 - 1)


def test_difference_is_paired_and_its_interval_is_students():
    # Differences 1, 3, 2: mean 2, standard deviation 1; Student's t at 97.5 % and 2 degrees of freedom is 4.302653.
    difference = table.paired_difference(make_row("A", 91.0, 95.0, 96.0), make_row("B", 90.0, 92.0, 94.0))
    assert (difference.mean, difference.pairs) == (2.0, 3)
    assert difference.margin == pytest.approx(4.302653 / 3**0.5, abs=1e-6)
    assert not difference.is_clear
    # 1.1, 1, 1.2, 1.1: mean 1.1, standard deviation 0.0816497; t at 3 degrees of freedom is 3.182446.
    clear = table.paired_difference(make_row("A", 1.1, 2.0, 3.2, 4.1), make_row("B", 0.0, 1.0, 2.0, 3.0))
    assert clear.margin == pytest.approx(3.182446 * 0.0816497 / 2, abs=1e-6)
    assert clear.is_clear


def test_only_common_seeds_are_compared():
    row, baseline = (
        table.Row("A", {0: 5.0, 2: 9.0, 7: 1.0}, 1, 1, 1),
        table.Row("B", {2: 7.0, 7: 2.0, 8: 50.0}, 1, 1, 1),
    )
    difference = table.paired_difference(row, baseline)
    assert (difference.mean, difference.pairs) == (0.5, 2)
    assert table.paired_difference(row, table.Row("C", {1: 1.0}, 1, 1, 1)) is None


@pytest.mark.parametrize("values", [[(90.0,), (91.3,)], [(90.0, 91.1, 95.3), (91.3, 92.4, 96.6)]])
def test_no_interval_from_one_pair_or_from_pairs_that_differ_alike(values):
    baseline, row = (make_row(name, *of) for name, of in zip("AB", values, strict=True))
    difference = table.paired_difference(row, baseline)
    assert difference.mean == pytest.approx(1.3)
    assert difference.margin is None and not difference.is_clear
    assert table.format_difference(difference) == "+1.30 ± –"


def test_table_from_results():
    def result(seed, accuracy, backward, seconds):
        metrics = {"validation": {"accuracy": 0.0}, "test": {"accuracy": accuracy}}
        passes = {"forward": backward + 5, "backward": backward}
        return {"seed": seed, "metrics": metrics, "passes": passes, "seconds": seconds}

    results = {"SAM": [result(0, 0.91, 20, 3.0), result(1, 0.94, 20, 5.0)], "plain": [result(0, 0.9, 10, 2.0)]}
    rows = table.make_rows(results, "accuracy")
    markdown = table.to_markdown(table.make_cells(rows, "accuracy", ["plain"]))
    assert [[text.strip() for text in line.strip("|").split("|")] for line in markdown.splitlines()[2:]] == [
        ["plain", "90.00 ± –", "", "1.00", "1.00", "2", "1"],
        ["SAM", "92.50 ± 2.12", "+1.00 ± –", "2.00", "1.67", "4", "2"],
    ]
    assert len({len(line) for line in markdown.splitlines()}) == 1


def test_passes_are_counted_over_what_all_runs_count_them():
    def result(passes):
        return {"seed": 0, "metrics": {"test": {"accuracy": 0.9}}, "passes": passes, "seconds": 1}

    over_batches = result({"forward": 20, "backward": 10})
    over_both = result({"forward": 30, "backward": 20, "forward_examples": 900, "backward_examples": 600})
    for results, backward in (((over_batches, over_both), [10, 20]), ((over_both, over_both), [600, 600])):
        rows = table.make_rows(dict(zip("AB", ([of] for of in results), strict=True)), "accuracy")
        assert [row.backward for row in rows] == backward and all(row.forward > row.backward for row in rows)


def test_table_shows_the_wrong_labels_learnt_and_plain_trainings_best_epoch():
    def result(seed, accuracy, rho, learnt, examples):
        metrics = {
            "test": {"accuracy": accuracy},
            "wrong_labels": {"accuracy": learnt},
            "best_epoch": {"accuracy": 0.9},
        }
        passes = {"forward": 9, "backward": 9, "forward_examples": examples + 5, "backward_examples": examples}
        return {"seed": seed, "metrics": metrics, "passes": passes, "seconds": 1, "arguments": {"rho": rho}}

    results = {
        "SGD": [result(0, 0.7, 0, 1, 20), result(1, 0.74, 0, 0.98, 20)],
        "tenth": [result(0, 0.93, 0.5, 0.1, 22), result(1, 0.94, 0.5, 0.2, 22)],
    }
    rows = table.make_rows(results, "accuracy")
    cells = table.make_cells(rows, "accuracy", ["SGD, best epoch"])
    assert cells == [
        ["method", "test accuracy", "minus SGD, best epoch", "wrong labels learnt", "passes", "forward", "s", "seeds"],
        ["SGD", "72.00 ± 2.83", "-18.00 ± 25.41", "99%", "1.00", "1.00", "1", "2"],  # t is 12.706 for two pairs
        ["SGD, best epoch", "90.00 ± 0.00", "", "", "1.00", "1.00", "1", "2"],
        ["tenth", "93.50 ± 0.71", "+3.50 ± 6.35", "15%", "1.10", "1.08", "1", "2"],
    ]
    # Only the test split has a best epoch, and only plain training is shown at it.
    assert [row.name for row in table.make_rows(results, "accuracy", "wrong_labels")] == ["SGD", "tenth"]


def test_conclusion_follows_the_numbers():
    baseline, cheap = make_row("AdamW-2x", 90.0, 91.0, 92.0), make_row("AdamW", 80.0, 80.0, 80.0, backward=5)
    rows = [
        cheap,
        baseline,
        make_row("better", 92.0, 93.1, 93.9),
        make_row("same", 91.0, 90.0, 92.5),
        make_row("worse", 88.0, 89.1, 89.9, forward=15),
    ]
    better, same, worse = report_script.conclude(rows, "accuracy", ["AdamW-2x"])
    assert better.startswith("better minus AdamW-2x: +2.00 points") and better.endswith(
        "better was higher in accuracy."
    )
    assert same.endswith("these runs do not tell the two apart.")
    assert worse.endswith("worse was lower in accuracy.")
    assert report_script.compare_passes(rows) == [
        "AdamW made 1.00 times the cheapest row's backward passes, and no other row did.",
        "AdamW-2x, better, same and worse made 2.00 times the cheapest row's backward passes and can be compared.",
        "worse made 50% more forward passes.",
    ]
    # Plain training's best epoch is a bar to clear and clears none itself.
    rows.append(make_row("AdamW-2x, best epoch", 93.0, 94.0, 96.0))
    assert report_script.compare_passes(rows)[1].startswith("AdamW-2x, better, same and worse made")
    said = report_script.conclude(rows, "accuracy", ["AdamW-2x, best epoch", "AdamW-2x"])
    assert [sentence.split(":")[0] for sentence in said] == [
        *(f"{name} minus AdamW-2x, best epoch" for name in ("AdamW-2x", "better", "same", "worse")),
        *(f"{name} minus AdamW-2x" for name in ("better", "same", "worse")),
    ]
    (single,) = report_script.conclude([make_row("A", 1.0), make_row("B", 2.0)], "bleu", ["A"])
    assert "+1.00, without an interval" in single and "nothing can be concluded" in single


def test_two_baselines_are_compared_with_each_other_once():
    sentences = report_script.conclude([make_row(name, 1.0, 2.0) for name in ("A", "S", "X")], "accuracy", ["A", "S"])
    assert [sentence.split(":")[0] for sentence in sentences] == ["S minus A", "X minus A", "X minus S"]


# --- run_seeds -------------------------------------------------------------------------------------------------------


def test_finished_runs_are_not_made_again(root):
    runs = [make_run(seed=seed) for seed in range(2)]
    assert run_seeds.run_all(runs) == []
    assert run_seeds.run_all([*runs, make_run(seed=2)]) == []
    assert [call[call.index("--seed") + 1] for call in calls(root)] == ["0", "1", "2"]


def test_the_sentence_of_a_refused_run_is_told(tmp_path):
    log = tmp_path / "seed-0.log"
    for text, told in [
        ("", ""),
        ("1 of 3\nerror: --rho needs a value.\n", ", error: --rho needs a value"),
        ("error: earlier\nTraceback\nValueError: x\n", ""),
    ]:
        log.write_text(text)
        assert run_seeds.last_words(log) == told


@pytest.mark.parametrize("change", ["flags", "recipe"])
def test_runs_of_other_arguments_are_set_aside(root, change, capsys):
    run_seeds.run_all([make_run(flags="--rho 0.1")])
    if change == "recipe":
        (root / "tasks/fake/recipes/tiny.yaml").write_text("num_train_epochs: 3\n")
    assert run_seeds.run_all([make_run(flags="--rho 0.2" if change == "flags" else "--rho 0.1")]) == []
    assert len(calls(root)) == 2
    (old,) = (root / "runs/group").glob("replaced-*/SAM/seed-0")
    assert "0.1" in (old / "request.json").read_text() and (old / "result.json").exists()
    assert "was made with other arguments" in capsys.readouterr().out


def test_a_killed_run_is_told_and_resumed_while_the_others_go_on(root, capsys):
    runs = [make_run("bad", 0, "--then die"), make_run("empty", 0, "--then nothing"), *map(make_run, "AB")]
    assert run_seeds.run_all(runs, jobs=2) == runs[:2]
    assert all(run.is_finished for run in runs[2:])
    said = capsys.readouterr().out
    assert "bad seed 0 failed: exit status -9. Its log: runs/group/bad/seed-0.log" in said
    assert "empty seed 0 failed: it ended without a result.json" in said

    assert run_seeds.run_all(runs[:1]) == []
    # The newest checkpoint by number that is complete, and only where there is one.
    assert calls(root)[-1][-2:] == ["--resume_from_checkpoint", "runs/group/bad/seed-0/checkpoint-10"]
    assert sum("--resume_from_checkpoint" in call for call in calls(root)) == 1


@pytest.mark.parametrize("jobs, threads", [(1, 7), (2, 1)])
def test_runs_beside_each_other_have_one_thread(root, monkeypatch, jobs, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_seeds.run_all([make_run()], jobs)
    assert json.loads((root / "runs/group/SAM/seed-0/result.json").read_text())["threads"] == threads


def test_a_run_another_process_is_training_is_left_alone(root, capsys):
    run = make_run()
    (root / run.log).parent.mkdir(parents=True)
    with open(root / run.log, "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert run_seeds.run_all([run]) == [run]
    assert "another process is training it" in capsys.readouterr().out and calls(root) == []
    assert run_seeds.run_all([run]) == []


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_stops_the_runs_and_their_children(root, number):
    line = [sys.executable, "scripts/run_seeds.py", "fake", "tiny", "--group", "group", "--jobs", "2"]
    with ignoring(number):
        process = subprocess.Popen(
            [*line, "--seeds", "0", "1", "2", "--", "SAM=--then sleep"],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 120
    while len(pids := " ".join(p.read_text() for p in root.glob("runs/group/SAM/*/pids")).split()) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    assert all(map(is_alive, pids))
    process.send_signal(number)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 1 and "the same command goes on from here" in said
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(calls(root)) == 2


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["fake", "missing", "SAM="], "there is no recipe tasks/fake/recipes/missing.yaml"),
        (["fake", "tiny", "a b"], "should read NAME="),
        (["fake", "tiny", "samm"], "'samm' is no method of the tasks: give one of sgd, sam,"),
        (["fake", "tiny", "a/b=--rho 0"], "should read NAME="),
        (["fake", "tiny", "SAM=", "--jobs", "0"], "--jobs: '0' is no whole number from 1 on"),
        (["fake", "tiny", "SAM=", "SAM=--rho 1"], "two methods have the same name"),
        (["fake", "tiny", "a=--x 'b"], "the flags of a cannot be taken apart: No closing quotation"),
        (
            ["fake", "tiny", "a=--rho 1 --seed 3"],
            "--seed stands among the flags of a, and run_seeds gives it to each run",
        ),
        (["fake", "tiny", "a=--output-dir=x"], "--output_dir stands among the flags of a"),
        (["fake", "tiny", "SAM=", "--seeds", "1", "2", "1"], "--seeds are 1 2 1: give each once"),
        (["../fake", "tiny", "SAM="], "task is '../fake': give a name, not a path"),
        (["fake", "tiny", "replaced-1="], "'replaced-1' is how replaced runs are called"),
        (["fake", "tiny", "SAM=", "--see", "1"], "there is no flag --see; did you mean --seeds?"),
    ],
)
def test_wrong_arguments_are_refused(root, arguments, sentence):
    assert sentence in refusal(run_seeds.main, *arguments, "--group", "group") and calls(root) == []


@pytest.mark.parametrize(
    "script, arguments, sentence",
    [
        (study, ["cifar10", "--jobs", "0"], "--jobs: '0' is no whole number from 1 on"),
        (study, ["cifar10", "--seeds", "-1"], "--seeds: '-1' is no whole number from 0 to 4294967295"),
        (study, ["cifar10", "--flags", "'"], "--flags: the flags cannot be taken apart"),
        (
            sweep,
            ["cifar10-steps", "--flags=--seed 3"],
            "--flags: --seed stands among the flags, and run_seeds gives it",
        ),
        (buried, ["--seeds", "99999999999"], "--seeds: '99999999999' is no whole number"),
        (study, ["digits-noise", "--methods", "base", "base"], "--methods are base base: give each once"),
        (sweep, ["cifar10-steps", "--seeds", "0", "0"], "--seeds are 0 0: give each once"),
        (summarize, ["results/digits.json", "--baselines", "sam", "sam"], "--baselines are sam sam: give each once"),
        (report_script, ["runs/digits", "--baselines", "sam", "sam"], "--baselines are sam sam: give each once"),
    ],
)
def test_wrong_arguments_of_studies_are_refused(script, arguments, sentence):
    assert sentence in refusal(script.main, *arguments)


@pytest.mark.parametrize("spelt", ["--rho_max 3", "--rho-max 3", "--rho_max=3", "--rho-max=3", "--rho 1 --rho-max=3"])
def test_a_flag_is_the_same_however_it_is_spelt(spelt):
    with pytest.raises(ValueError, match="--rho_max stands in --flags, and some runs have a value of their own"):
        run_flags.refuse_overridden("--method xsam --rho_max 0.4", spelt)
    run_flags.refuse_overridden("--method xsam --alpha_samples 4", spelt)
    assert run_flags.fields(spelt.split())["rho_max"] == "3"
    with pytest.raises(argparse.ArgumentTypeError, match="--output_dir stands among the flags"):
        run_flags.parse_flags(spelt.replace("rho-max", "output-dir").replace("rho_max", "output_dir"))


def test_a_benchmark_warms_up_for_no_rounds_or_more():
    assert "--warm_up starts at 0" in refusal(benchmark.main, "--configuration", "gpt2-1m", "--warm_up", "-1")


def test_a_name_alone_is_the_tasks_method():
    assert run_flags.parse_method("xsam+asam") == ("xsam+asam", "--method xsam+asam")
    assert run_flags.parse_method("mine=") == ("mine", "") and run_flags.parse_method("a=--rho 1") == ("a", "--rho 1")


def test_results_survive_the_file_and_make_the_same_table(root, capsys):
    for name, flags in (("plain", "--rho 0"), ("SAM", "--alpha 1")):
        run_seeds.run_all([make_run(name, seed, flags) for seed in (0, 1, 3)])
    run_seeds.run_all([make_run("SAM", 4, "--then nothing")])
    tables = []
    for source in (root / "runs" / "group", root / "results" / "group.json"):
        summarize.main([str(source), "--baselines", "plain"])
        tables.append(capsys.readouterr().out.rpartition("left out: SAM seed 4.\n\n")[2])
    assert tables[0] == tables[1] and "| SAM    | 91.33 ± 1.53  | +0.00 ± –" in tables[0]
    kept = json.loads((root / "results" / "group.json").read_text())
    assert kept["common"]["versions"] == {"torch": "2"} and len(kept["runs"]) == 6
    original = json.loads((root / "runs" / "group" / "SAM" / "seed-3" / "result.json").read_text())
    (again,) = (run for run in summarize.read(root / "results" / "group.json")["SAM"] if run["seed"] == 3)
    assert {**original, "name": "SAM", "command": again["command"]} == again


@pytest.mark.parametrize("same", [True, False])
def test_scores_on_corrupted_images_stay_with_a_run_that_is_made_again(root, same):
    run_seeds.run_all([make_run("SAM", seed, "--alpha 1") for seed in (0, 1)])
    group, path = root / "runs" / "group", root / "results" / "group.json"
    summarize.keep(group)
    scored = summarize.read(path)
    scored["SAM"][1]["corruptions"] = {"groups": {"noise": 0.5}}
    if not same:
        scored["SAM"][1]["metrics"]["test"]["accuracy"] /= 2
    summarize.write(scored, path)
    summarize.keep(group)
    assert ["corruptions" in run for run in summarize.read(path)["SAM"]] == [False, same]


def test_what_is_common_is_kept_once():
    rows = [{"a": 1, "b": {"c": 1, "d": 2}, "e": {}}, {"a": 1, "b": {"c": 1, "d": 3}, "e": {"f": 1}}]
    common = summarize.common_part(rows)
    assert common == {"a": 1, "b": {"c": 1}}
    short = [summarize.without(row, common) for row in rows]
    assert short == [{"b": {"d": 2}, "e": {}}, {"b": {"d": 3}, "e": {"f": 1}}]
    assert [summarize.merged(common, row) for row in short] == rows


def test_the_command_fails_if_a_run_does(root):
    arguments = [
        "fake",
        "tiny",
        "--group",
        "group",
        "--seeds",
        "0",
        "--",
        "bad=--then die",
        "good=--alpha 1 --rho 0.1",
    ]
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        run_seeds.main(arguments)
    assert calls(root)[1][-4:] == ["--alpha", "1", "--rho", "0.1"]
    run_seeds.main(arguments)


# --- what does not belong into one table, and what is damaged ----------------------------------------------------------


def finished(root, *names, seeds=(0, 1)):
    runs = [make_run(name, seed, "--alpha 1") for seed in seeds for name in names]
    assert run_seeds.run_all(runs) == []
    return root / "runs" / "group"


def change(folder, name="result.json", **changes):
    found = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**found, **changes}))


def ask(folder, *flags):
    """Lets the request of a run ask for more."""
    command = json.loads((folder / "request.json").read_text())["command"]
    change(folder, "request.json", command=[*command, *flags])


BAD_RUNS = {
    "another data set": (
        lambda f: change(f, dataset="fashion_mnist"),
        r"differ in their dataset \(digits and fashion_mnist\)",
    ),
    "another task": (lambda f: change(f, task="translation"), "differ in their task"),
    "another recipe": (lambda f: change(f, "request.json", recipe="rho: 0.3\n"), "differ in their recipe"),
    "other test images": (
        lambda f: change(f, identity={"test_data": "abc"}),
        r"differ in their test_data \(None and abc\)",
    ),
    "another seed": (lambda f: change(f, seed=0), "SAM/seed-1 holds a result of seed 0"),
    "a seed that is none": (lambda f: change(f, seed="1"), "result.json is damaged"),
    "nan": (
        lambda f: change(f, metrics={"test": {"accuracy": float("nan")}}),
        "SAM, seed 1 has diverged .test accuracy nan.",
    ),
    "null": (lambda f: change(f, metrics={"test": {"accuracy": None}}), "SAM, seed 1 has diverged"),
    "diverged": (lambda f: change(f, diverged=True), "SAM, seed 1 has diverged"),
    "no test scores": (
        lambda f: change(f, metrics={"validation": {"accuracy": 1.0}}),
        "SAM, seed 1 has no scores of test: it has valid",
    ),
    "no passes": (lambda f: change(f, passes={}), "result.json is damaged .KeyError: 'forward'.: delete its folder"),
    "an identity that is none": (lambda f: change(f, identity=None), "result.json is damaged .its identity is null"),
    "arguments that are none": (lambda f: change(f, arguments=[]), "result.json is damaged .its arguments is"),
    "versions that are none": (
        lambda f: change(f, versions="x"),
        "result.json is damaged .its versions is .x., and a",
    ),
    "no time": (lambda f: change(f, seconds=None), "result.json is damaged"),
    "cut off": (lambda f: (f / "result.json").write_text('{"seed": 1, '), "result.json is damaged"),
    "empty": (lambda f: (f / "result.json").write_text(""), "result.json is damaged"),
    "a list": (lambda f: (f / "result.json").write_text("[]"), "result.json is damaged"),
    "no text": (lambda f: (f / "result.json").write_bytes(b"\xff\xfe"), "result.json is damaged"),
    "a request cut off": (lambda f: (f / "request.json").write_text("{"), "request.json is damaged"),
    "a history cut off": (lambda f: (f / "trainer_state.json").write_text('{"log'), "trainer_state.json is damaged"),
    "searches cut off": (
        lambda f: (f / "xsam_search.jsonl").write_text('{"step": 1}\n{"st'),
        "xsam_search.jsonl is damaged",
    ),
    "searches of words": (
        lambda f: (f / "xsam_search.jsonl").write_text(
            '{"step": 1, "epoch": "x", "alpha": 1, "alphas": [1], "losses": [1]}'
        ),
        "xsam_search.jsonl is damaged",
    ),
    "searches without an epoch": (
        lambda f: (f / "xsam_search.jsonl").write_text('{"step": 1, "alpha": 1, "alphas": [1], "losses": [1]}'),
        "xsam_search.jsonl is damaged .KeyError: 'epoch'",
    ),
    "a search with fewer losses": (
        lambda f: (f / "xsam_search.jsonl").write_text(
            '{"step": 1, "epoch": 0, "alpha": 1, "alphas": [1, 2], "losses": [null]}'
        ),
        "xsam_search.jsonl is damaged .the search of step 1 has 1 losses",
    ),
    "a history of words": (
        lambda f: (f / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": "x"}]}'),
        "trainer_state.json is damaged",
    ),
    "scores without groups": (lambda f: (f / "corruptions.json").write_text("{}"), "corruptions.json is damaged"),
    "groups in percent": (
        lambda f: (f / "corruptions.json").write_text('{"groups": {"noise": 50}}'),
        "corruptions.json is damaged .its share of corrupted images, noise, is 50, and a number from 0 to 1",
    ),
    "groups as text": (
        lambda f: (f / "corruptions.json").write_text('{"groups": {"noise": "x"}}'),
        "corruptions.json is damaged .its share of corrupted images, noise, is 'x'",
    ),
    "other corrupted images": (
        lambda f: [
            (folder / "corruptions.json").write_text(json.dumps({"test_examples": n, "groups": {"noise": 0.5}}))
            for folder, n in ((f, 7), (f.parent / "seed-0", 500))
        ],
        r"scored on other corrupted images \(test_examples 500 and 7\): score one of them again",
    ),
    "no wrong labels": (
        lambda f: change(f, metrics={"test": {"accuracy": 0.9}, "wrong_labels": None}),
        "its wrong_labels scores are null, and a mapping is expected",
    ),
    "no share of the wrong labels": (
        lambda f: change(f, metrics={"test": {"accuracy": 0.9}, "wrong_labels": {"accuracy": None}}),
        r"SAM, seed 1 has diverged \(wrong_labels accuracy None\)",
    ),
    "a best epoch without a score": (
        lambda f: change(f, metrics={"test": {"accuracy": 0.9}, "best_epoch": {"loss": 1}}),
        r"SAM, seed 1 has diverged \(best_epoch accuracy None\)",
    ),
    "a command that is none": (
        lambda f: change(f, "request.json", command="x"),
        "request.json is damaged .its command is",
    ),
    "a recipe that is none": (
        lambda f: change(f, "request.json", recipe="a: ["),
        "request.json is damaged .its recipe is no",
    ),
    "another method's run": (
        lambda f: (shutil.rmtree(f), shutil.copytree(f.parent.parent / "XSAM" / "seed-1", f)),
        "request.json was made as XSAM/seed-1 and stands for SAM/seed-1: delete the folder and run this seed again",
    ),
    "another method's result": (
        lambda f: (ask(f, "--method", "sam"), change(f, method="sgd")),
        "result.json is a result with method sgd, and its request.json asks for method sam: delete the folder",
    ),
    "another rho": (
        lambda f: (ask(f, "--rho", "0.4"), change(f, arguments={"rho": 0.8})),
        "result.json is a result with rho 0.8, and its request.json asks for rho 0.4",
    ),
    "a rho instead of none": (
        lambda f: (ask(f, "--method=sgd"), change(f, arguments={"rho": 0.8})),
        "a result with rho 0.8, and its request.json asks for rho 0.0",
    ),
    "an alpha that was not asked for": (
        lambda f: (ask(f, "--method", "sam"), change(f, arguments={"alpha": None})),
        "a result with alpha None, and its request.json asks for alpha 1:",
    ),
    "another data set than the recipe's": (
        lambda f: change(f, "request.json", recipe="dataset: cifar100\n"),
        "a result with dataset digits, and its request.json asks for dataset cifar100",
    ),
}


@pytest.mark.parametrize("kind", BAD_RUNS)
@pytest.mark.parametrize("main", [summarize.main, report_script.main], ids=["summarize", "report"])
def test_what_does_not_belong_into_one_table_is_refused_and_nothing_is_written(root, kind, main):
    folder = finished(root, "SAM", "XSAM")
    (root / "results").mkdir()
    (root / "results" / "group.json").write_text("the earlier table")
    damage, words = BAD_RUNS[kind]
    damage(folder / "SAM" / "seed-1")
    with pytest.raises(ValueError, match=words):
        main([str(folder)])
    assert (root / "results" / "group.json").read_text() == "the earlier table"
    assert not (folder / "report.html").exists() and not list(root.rglob("*.part"))


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--method", "sgd"], {"method": "adamw", "arguments": {"rho": 0}}),
        (
            ["--method", "xsam", "--ascent-fraction=0.10"],
            {"method": "xsam-tenth", "arguments": {"ascent_fraction": 0.1}},
        ),
        (["--method", "wsam", "--alpha", "0.5"], {"method": "wsam", "arguments": {"alpha": 0.5}}),
        (["--bf16", "--no_aug", "False"], {"arguments": {"bf16": True, "no_aug": False}}),
        (["--optim_args", "a=1, b=2"], {"arguments": {"optim_args": "a=1, b=2"}}),
        (
            ["--rho", "0.4", "--threads", "1", "--hub_token", "x"],
            {"arguments": {"threads": 2, "hub_token": "<hub_token>"}},
        ),
        (["--lr_scheduler_kwargs", '{"min_lr": 1}'], {"arguments": {"lr_scheduler_kwargs": "{'min_lr': 1}"}}),
        (["--rho", "0.4"], {}),
    ],
)
def test_a_result_of_what_was_asked_for_is_taken_whatever_its_name(root, flags, told):
    folder = finished(root, "anything")
    for run in (folder / "anything").iterdir():
        if run.is_dir():
            ask(run, *flags)
            change(run, **told)
    moved = folder.rename(folder.parent / "another")
    assert list(group.load_group(moved)[0]) == ["anything"]


def test_kept_runs_are_what_their_commands_ask_for(root):
    folder, file = finished(root, "SAM", "XSAM"), root / "results" / "group.json"
    for run in (folder / "SAM").glob("seed-?"):
        change(run, method="sam")
        ask(run, "--method", "sam")
    summarize.main([str(folder)])
    kept = json.loads(file.read_text())
    assert [run["name"] for run in kept["runs"]] == ["SAM", "SAM", "XSAM", "XSAM"]

    def refused(change):
        changed = json.loads(json.dumps(kept))
        for run in changed["runs"]:
            change(run)
        file.write_text(json.dumps(changed))
        return refusal(summarize.main, file)

    assert (
        "group.json: XSAM, seed 0 was made as SAM/seed-0 and stands for XSAM/seed-0: its name was changed"
        in refused(lambda run: run.update(name={"SAM": "XSAM", "XSAM": "SAM"}[run["name"]]))
    )
    assert "group.json: SAM, seed 0 is a result with method xsam, and its command asks for method sam" in refused(
        lambda run: run.update(method="xsam")
    )
    assert "its command is None, and a list of words is expected" in refused(lambda run: run.update(command=None))
    assert "its arguments is null, and a mapping" in refused(lambda run: run.update(arguments=None))
    assert "noise, is 50, and a number from 0 to 1" in refused(
        lambda run: run.update(corruptions={"groups": {"noise": 50}})
    )
    assert "SAM, seed 0 and " in (
        told := refused(lambda run: run.update(corruptions={"test_examples": run["seed"], "groups": {"noise": 0.5}}))
    )
    assert "scored on other corrupted images (test_examples 0 and 1)" in told


def test_a_table_does_not_delete_runs_that_its_folder_lacks(root):
    folder, file = finished(root, "SAM", "XSAM"), root / "results" / "group.json"
    summarize.main([str(folder)])
    kept = json.loads(file.read_text())
    kept["runs"][0]["corruptions"] = {"groups": {"noise": 0.5}}
    file.write_text(json.dumps(kept))
    finished(root, "SAM", seeds=(2,))
    summarize.main([str(folder)])  # more runs than before
    found = summarize.read(file)
    assert {name: [run["seed"] for run in runs] for name, runs in found.items()} == {"SAM": [0, 1, 2], "XSAM": [0, 1]}
    assert ["corruptions" in run for run in found["SAM"]] == [True, False, False]
    earlier = file.read_text()
    shutil.rmtree(folder / "SAM" / "seed-0")
    shutil.rmtree(folder / "XSAM")
    assert "holds SAM, seed 0, and" in (told := refusal(summarize.main, folder)) and "(3 such runs in all)" in told
    assert "rename the folder, after which the file is named, or move the file away" in told
    assert file.read_text() == earlier
    file.unlink()
    summarize.main([str(folder)])
    assert [run["seed"] for run in summarize.read(file)["SAM"]] == [1, 2]


@pytest.mark.parametrize(
    "other", [{"device": "cuda:0"}, {"threads": 9}, {"versions": {"torch": "3"}}, {"git_commit": "f"}]
)
def test_seconds_of_several_machines_are_left_out(root, other, capsys):
    folder = finished(root, "SAM")
    change(folder / "SAM" / "seed-1", **other)
    summarize.main([str(folder)])
    said = capsys.readouterr().out
    one = "git_commit" in other  # several commits are by design
    assert ("| s " in said) is one and (
        "Seconds are left out: these runs were not timed on one device" in said
    ) is not one


def test_a_result_that_run_seeds_did_not_make_is_told(root, capsys):
    folder = finished(root, "SAM")
    (folder / "SAM" / "seed-1" / "request.json").unlink()
    summarize.main([str(folder)])
    assert "left out: SAM seed 1 (it has no request.json of run_seeds)" in capsys.readouterr().out


def test_scores_on_corrupted_images_are_kept_with_their_run(root):
    folder = finished(root, "SAM")
    scores = {"made_by": "a library", "groups": {"noise": 0.5}}
    (folder / "SAM" / "seed-1" / "corruptions.json").write_text(json.dumps(scores))
    summarize.main([str(folder)])
    runs = summarize.read(root / "results" / "group.json")["SAM"]
    assert [run.get("corruptions") for run in runs] == [None, scores]


def test_a_wrong_name_leaves_the_earlier_table(root):
    folder = finished(root, "SAM")
    for flags, words in (
        (["--metric", "bleu"], "There is no metric bleu: choose one of accuracy"),
        (["--baselines", "XSAM"], "There is no run of the baseline XSAM: choose among SAM."),
        (["--split", "validation"], "has no scores of validation"),
        (["--split", "train"], "--split: invalid choice: 'train'"),
    ):
        assert words in refusal(summarize.main, folder, *flags)
    assert not (root / "results").exists()


def test_a_table_that_cannot_be_written_leaves_the_earlier_one(root, monkeypatch):
    folder = make_group(root / "runs" / "group")
    summarize.main([str(folder)])
    (file,) = (root / "results").iterdir()
    earlier = file.read_bytes()
    change(folder / "SAM" / "seed-1", seconds=2.5)

    def full(part, file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)  # the last step: all that was written until then is another file
        with pytest.raises(OSError, match="No space left"):
            summarize.main([str(folder)])
    assert {path: path.read_bytes() for path in (root / "results").iterdir()} == {file: earlier}
    summarize.main([str(folder)])
    assert file.read_bytes() != earlier


def make_group(folder, older=False, **changes):
    """Two runs of one method; the second with changes, wherever such a name stands. Older ones have no identity."""
    arguments = {
        "learning_rate": 0.1,
        "rho": 0.05,
        "output_dir": "a",
        "generation_num_beams": 5,
        "threads": 1,
        "seed": 0,
    }
    arguments |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "ascent_scope": "update"}
    result = {
        **{"task": "t", "dataset": "digits", "model": "vit-small", "method": "sam", "seconds": 1.5, "seed": 0},
        **{"metrics": {"test": {"accuracy": 0.9}}, "passes": {"forward": 4, "backward": 4}, "processes": 1},
        **{"device": "cpu", "threads": 1, "versions": {"torch": "2"}, "arguments": arguments},
        "identity": {"update_batch": 16, "seed": 0, "test_data": "abc", "learning_rate": 0.1, "rho": 0.05},
    }
    if older:
        del result["identity"]

    def changed(of):
        nested = {name: changed(of[name]) for name in ("arguments", "identity") if name in of}
        return {**of, **nested, **{name: value for name, value in changes.items() if name in of}}

    changes = {"seed": 1, **changes}
    for one in (result, changed(result)):
        run = folder / "SAM" / f"seed-{one['seed']}"
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps(one))
        (run / "request.json").write_text('{"command": [], "recipe": ""}')
    kept = {"common": {}, "runs": [{"name": "SAM", **one} for one in (result, changed(result))]}
    (folder / "kept.json").write_text(json.dumps(kept))
    return folder


OTHER_RUNS = {
    "model": ({"model": "vit-ti"}, r"differ in their model \(vit-small and vit-ti\)"),
    "method": ({"method": "xsam"}, r"differ in their method \(sam and xsam\)"),
    "an argument": ({"learning_rate": 0.2}, r"differ in their learning_rate \(0.1 and 0.2\)"),
    "an argument, older": ({"learning_rate": 0.2, "older": True}, r"differ in their learning_rate \(0.1 and 0.2\)"),
    "the batch": ({"update_batch": 32}, r"differ in their update_batch \(16 and 32\)"),
    "the batch, older": (
        {"per_device_train_batch_size": 16, "older": True},
        r"differ in their update_batch \(16 and 32\)",
    ),
    "the processes, older": ({"processes": 2, "older": True}, r"differ in their update_batch \(16 and 32\)"),
    "the beam": ({"generation_num_beams": 1}, r"differ in their generation_num_beams \(5 and 1\)"),
}
IMPOSSIBLE = {
    "true": ({"metrics": {"test": {"accuracy": True}}}, "its test accuracy is True, and a number from 0 to 1"),
    "a text": ({"metrics": {"test": {"accuracy": "0.9"}}}, "its test accuracy is '0.9', and a number from 0 to 1"),
    "percent": ({"metrics": {"test": {"accuracy": 97.0}}}, "its test accuracy is 97.0, and a number from 0 to 1"),
    "another split": ({"metrics": {"best_epoch": {"top5_accuracy": 2}}}, "its best_epoch top5_accuracy is 2"),
    "below 0": ({"metrics": {"test": {"loss": -1.0}}}, "its test loss is -1.0, and a number from 0 up"),
    "bleu": (
        {"metrics": {"test": {"bleu_tokenised": 340.0}}},
        "its test bleu_tokenised is 340.0, and a number from 0 to 100",
    ),
    "negative passes": ({"passes": {"forward": -1, "backward": -1}}, "it counts -1 forward passes"),
    "no passes": ({"passes": {"forward": 1, "backward": 0}}, "it counts 0 backward passes"),
    "passes over examples": (
        {"passes": {"forward": 1, "backward": 1, "backward_examples": -3}},
        "it counts -3 backward_examples passes",
    ),
    "true passes": ({"passes": {"forward": True, "backward": 1}}, "it counts True forward passes"),
    "negative seconds": ({"seconds": -1}, "it took -1 seconds"),
}


@pytest.mark.parametrize("kind", OTHER_RUNS)
def test_runs_of_one_method_may_differ_in_their_seed_only(tmp_path, kind):
    changes, words = OTHER_RUNS[kind]
    folder = make_group(tmp_path / "group", **changes)
    with pytest.raises(ValueError, match=f"SAM/seed-0 and .*SAM/seed-1 stand for one method and {words}, where only"):
        group.load_group(folder)
    with pytest.raises(ValueError, match=f"kept.json: SAM, seed 0 and .*kept.json: SAM, seed 1 .* and {words}"):
        summarize.read(folder / "kept.json")


@pytest.mark.parametrize("name, other", [("task", "translation"), ("dataset", "fashion_mnist")])
def test_methods_are_compared_on_one_data_set(tmp_path, name, other):
    """Of each method all runs are alike."""
    folder = make_group(tmp_path / "group")
    shutil.copytree(folder / "SAM", folder / "XSAM")
    assert list(group.load_group(folder)[0]) == ["SAM", "XSAM"]
    for run in (folder / "XSAM").iterdir():
        change(run, **{name: other})
    with pytest.raises(
        ValueError, match=rf"SAM/seed-0 and .*XSAM/seed-0 differ in their {name} \(.* and {other}\), so that"
    ):
        group.load_group(folder)


def of_identity(**changes):
    return lambda run: run["identity"].update(changes)


# What is done to all runs of the second method in a file; how it then differs from the first's, or nothing.
SECOND_METHODS = {
    "task": (lambda run: run.update(task="translation"), r"differ in their task \(t and translation\)"),
    "dataset": (lambda run: run.update(dataset="cifar10"), r"differ in their dataset \(digits and cifar10\)"),
    "recipe": (
        lambda run: run.update(command=["-m", "train", "recipes/b.yaml"]),
        r"differ in their recipe \(a and b\)",
    ),
    "test images": (of_identity(test_data="abd"), r"differ in their test_data \(abc and abd\)"),
    "validation images": (of_identity(validation_data="e"), r"differ in their validation_data \(None and e\)"),
    "no identity": (lambda run: run.pop("identity"), r"differ in their test_data \(abc and None\)"),
    "no command": (lambda run: run.pop("command"), r"differ in their recipe \(a and None\)"),
    "epochs": (lambda run: run.update(command=[*run["command"], "--num_train_epochs", "4"]), None),
    "training": (of_identity(train_data="e", num_train_epochs=4, method="xsam", model="vit-ti"), None),
    "older": (lambda run: None, None),
}


@pytest.mark.parametrize("kind", SECOND_METHODS)
def test_methods_of_a_file_are_compared_on_one_data_set(tmp_path, kind):
    change, words = SECOND_METHODS[kind]
    file = make_group(tmp_path / "group", older=kind == "older") / "kept.json"
    first = json.loads(file.read_text())["runs"]
    for run in first:
        run["command"] = ["-m", "train", "recipes/a.yaml", "--seed", str(run["seed"])]
    second = [{**run, "name": "XSAM"} for run in json.loads(json.dumps(first))]
    for run in second:
        change(run)
    summarize.write({"SAM": first, "XSAM": second}, file)
    if words is None:
        assert summarize.read(file) == {"SAM": first, "XSAM": second}
        return
    with pytest.raises(ValueError, match=f"kept.json: SAM, seed 0 and .*kept.json: XSAM, seed 0 {words}, so that"):
        summarize.read(file)


def test_a_method_of_another_study_is_refused_though_the_file_says_what_is_common(root):
    ours, others = (json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in ("digits-noise", "noise"))
    sam = [run for run in others["runs"] if run["name"] == "sam"]
    ours["runs"] = [run for run in ours["runs"] if run["name"] in ("base", "base-2x", "sam")]
    (root / "mine.json").write_text(json.dumps(ours))
    summarize.main([str(root / "mine.json"), "--baselines", "base"])
    ours["runs"] = [run for run in ours["runs"] if run["name"] != "sam"] + sam
    (root / "mine.json").write_text(json.dumps(ours))
    words = (
        "mine.json: sam, seed 0 differ in their recipe (digits-noise-resnet-small and fashion-mnist-noise-vit-small)"
    )
    assert words in refusal(summarize.main, root / "mine.json", "--baselines", "base")


def test_a_method_of_another_recipe_is_not_added_to_the_kept_ones(root):
    folder, file = finished(root, "SAM"), root / "results" / "group.json"
    summarize.keep(folder)
    kept = file.read_bytes()
    shutil.rmtree(folder / "SAM")
    recipes = root / "tasks" / "fake" / "recipes"
    shutil.copy(recipes / "tiny.yaml", recipes / "small.yaml")
    assert run_seeds.run_all([run_seeds.Run("fake", "small", "group", "XSAM", 0)]) == []
    with pytest.raises(ValueError, match=r"SAM, seed 0, and XSAM, seed 0, differ in their recipe \(tiny and small\)"):
        summarize.keep(folder)
    assert file.read_bytes() == kept
    shutil.rmtree(folder / "XSAM")
    finished(root, "XSAM")
    summarize.keep(folder)
    assert list(summarize.read(file)) == ["SAM", "XSAM"]


@pytest.mark.parametrize("older", [False, True])
def test_runs_of_one_method_may_be_of_other_folders_machines_and_versions(tmp_path, older):
    folder = make_group(
        tmp_path / "group", output_dir="b", threads=4, versions={"torch": "3"}, device="cuda", older=older
    )
    assert [run.result["seed"] for run in group.load_group(folder)[0]["SAM"]] == [0, 1]
    assert [run["threads"] for run in summarize.read(folder / "kept.json")["SAM"]] == [1, 4]


@pytest.mark.parametrize(
    "later, same",
    [({"stale_decay": 0.5}, True), ({"stale_decay": 0.9}, False), ({"ascent_steps": 1, "alpha": None}, True)],
)
def test_an_argument_that_a_later_version_brought_has_its_default_in_an_older_result(later, same):
    ours = {"identity": {"rho": 0.1}}
    theirs = {"identity": {"rho": 0.1, **later}}
    assert (identity.difference(ours, theirs) is None) is same
    assert (identity.difference(theirs, ours) is None) is same


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_number_that_cannot_be_is_refused(tmp_path, kind):
    changes, words = IMPOSSIBLE[kind]
    folder = make_group(tmp_path / "group", **changes)
    with pytest.raises(ValueError, match=f"SAM/seed-1/result.json is damaged .{words}"):
        group.load_group(folder)
    with pytest.raises(ValueError, match=f"kept.json is not a file that summarize wrote: {words}"):
        summarize.read(folder / "kept.json")


def test_every_file_of_results_is_read_or_no_table():
    read = {}
    for file in (ROOT / "results").glob("*.json"):
        if '"common"' in file.read_text():
            read[file.stem] = summarize.read(file)
    assert {"digits", "digits-noise", "demo", "noise"} <= read.keys()
    # Each is told of: leftovers of a try are not.
    told = "".join(
        file.read_text() for file in (ROOT / "RESULTS.md", ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    )
    assert [name for name in read if f"results/{name}.json" not in told] == []


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is not a file that summarize wrote"),
        ("[]", "is not a file that summarize wrote"),
        ('{"common": {}, "runs": [{}]}', "is not a file that summarize wrote: KeyError: 'seed'"),
        ('{"common": {}, "runs": []}', "holds no runs"),
    ],
)
def test_a_file_that_is_no_table_is_refused(root, content, words):
    (root / "x.json").write_text(content)
    assert words in refusal(summarize.main, root / "x.json")
    assert "There is no nowhere, here or in" in refusal(summarize.main, "nowhere")


def test_a_file_with_one_seed_twice_is_refused(root, capsys):
    summarize.main([str(finished(root, "SAM"))])
    file = root / "results" / "group.json"
    kept = json.loads(file.read_text())
    kept["runs"].append(kept["runs"][0])
    file.write_text(json.dumps(kept))
    assert "SAM has two results of seed 0" in refusal(summarize.main, file)


def test_summarize_finds_its_group_from_anywhere(root, tmp_path, capsys):
    finished(root, "SAM")
    away = tmp_path / "away"
    away.mkdir()
    for cwd, source in (
        (root, "runs/group"),
        (away, "runs/group"),
        (root / "runs", "group"),
        (root / "runs/group", "."),
    ):
        (root / "results" / "group.json").unlink(missing_ok=True)
        done = script(root, "summarize", source, cwd=cwd)
        assert done.returncode == 0 and "| SAM    |" in done.stdout, done.stderr
        assert (root / "results" / "group.json").exists()
    assert not any(away.iterdir())


DAMAGES = {
    "a result cut off": lambda f: (f / "result.json").write_text('{"seed"'),
    "a result that is no text": lambda f: (f / "result.json").write_bytes(b"\xff"),
    "a request that is no text": lambda f: (f / "request.json").write_bytes(b"\xff"),
    "a request that is a folder": lambda f: ((f / "request.json").unlink(), (f / "request.json").mkdir()),
    "checkpoint-last": lambda f: ((f / "result.json").unlink(), (f / "checkpoint-last").mkdir()),
    "a checkpoint that is a file": lambda f: ((f / "result.json").unlink(), (f / "checkpoint-7").write_text("")),
    "a state that is no text": lambda f: (
        (f / "result.json").unlink(),
        (f / "checkpoint-7").mkdir(),
        (f / "checkpoint-7" / "trainer_state.json").write_bytes(b"\xff\xfe"),
    ),
    "a folder that is a file": lambda f: (shutil.rmtree(f), f.write_text("")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_run_is_made_again_and_the_others_go_on(root, kind):
    folder = finished(root, "SAM", seeds=(0, 1))
    DAMAGES[kind](folder / "SAM" / "seed-0")
    assert run_seeds.run_all([make_run("SAM", seed, "--alpha 1") for seed in range(3)]) == []
    assert [call[call.index("--seed") + 1] for call in calls(root)] == ["0", "1", "0", "2"]
    assert "--resume_from_checkpoint" not in calls(root)[-2]
    assert json.loads((folder / "SAM/seed-0/result.json").read_text())["seed"] == 0


def test_a_run_that_cannot_begin_does_not_end_the_others(root, capsys):
    (root / "runs" / "group").mkdir(parents=True)
    (root / "runs" / "group" / "bad").write_text("in the way")
    runs = [make_run("bad"), make_run("good")]
    assert run_seeds.run_all(runs, jobs=2) == runs[:1]
    assert "bad seed 0 failed: [Errno" in capsys.readouterr().out and runs[1].is_finished


def test_a_secret_is_in_no_file_of_a_group(root, capsys):
    task = root / "tasks/fake/train.py"
    task.write_text(
        task.read_text().replace(
            'parser.add_argument("--rho"', 'parser.add_argument("--hub_token")\nparser.add_argument("--rho"'
        )
    )
    for flags in ("--hub_token s3cret", "--hub_token=s3cret"):
        assert run_seeds.run_all([make_run("SAM", 0, flags)]) == []
    assert "s3cret" in calls(root)[0][-1]  # the task got it
    (root / "calls.jsonl").unlink()
    summarize.main([str(root / "runs" / "group")])
    report_script.report(root / "runs" / "group", "accuracy", [])
    for path in root.rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path
    assert "s3cret" not in "".join(capsys.readouterr())


def test_a_secret_that_stands_in_a_run_is_not_kept(root, capsys):
    """Of a task that is not ours, or made by hand."""
    folder = make_group(root / "runs" / "group")
    run = folder / "SAM" / "seed-0"
    arguments = json.loads((run / "result.json").read_text())["arguments"]
    change(run, arguments={**arguments, "hub_token": "s3cret"})
    change(run, "request.json", command=["-m", "train", "--hub_token", "s3cret"])
    summarize.main([str(folder)])
    report_script.report(folder, "accuracy", [])
    kept = (root / "results" / "group.json").read_text()
    assert "s3cret" not in kept + (folder / "report.html").read_text() + "".join(capsys.readouterr())
    assert '"hub_token": "<hub_token>"' in kept and "<hub_token>" in json.loads(kept)["runs"][0]["command"]


# --- the report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Counts elements, collects attributes, and sees that every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_report(root, capsys, seeds):
    runs = [make_run(name, seed, flags) for seed in seeds for name, flags in [("SAM", "--alpha 1"), ("XSAM", "")]]
    run_seeds.run_all(runs)
    report_script.report(root / "runs/group", "accuracy", ["SAM"])
    said, page = capsys.readouterr().out, (root / "runs/group/report.html").read_text()
    assert f"| XSAM   | {'90.00 ± –' if len(seeds) == 1 else '91.00 ± 1.00'}" in said
    assert Page(page).elements.count("svg") == 2
    assert "http" not in page and str(root) not in page and "nan" not in page
    assert all(
        value.startswith(("#", "data:"))
        for name, value in Page(page).attributes
        if name in ("src", "href", "xlink:href")
    )
    assert "python -m tasks.fake.train tasks/fake/recipes/tiny.yaml --seed 0" in page
    assert f"α between 2.00 and 2.00, 2.00 on average over {2 * len(seeds)} searches, 100% of them at an end" in page


def test_report_without_searches_or_curves_and_with_an_unfinished_run(root, capsys):
    run_seeds.run_all([make_run("SAM", 0, "--alpha 1"), make_run("XSAM"), make_run("bad", 3, "--then die")])
    (root / "runs/group/XSAM/seed-0/xsam_search.jsonl").unlink()
    (root / "runs/group/XSAM/seed-0/trainer_state.json").unlink()
    report_script.report(root / "runs/group", "accuracy", [])
    page = (root / "runs/group/report.html").read_text()
    assert Page(page).elements.count("svg") == 1
    assert "Not finished, and so not in the table: bad seed 3." in capsys.readouterr().out


def test_report_of_losses_that_are_all_null(root):
    run_seeds.run_all([make_run("XSAM")])
    search = {"step": 1, "epoch": 0, "alphas": [0, 1, 2], "losses": [None] * 3, "alpha": 1, "angle": 1, "rho_max": 1}
    (root / "runs/group/XSAM/seed-0/xsam_search.jsonl").write_text(json.dumps(search) + "\n")
    report_script.report(root / "runs/group", "accuracy", [])
    assert Page((root / "runs/group/report.html").read_text()).elements.count("svg") == 2


def test_report_of_nothing(root):
    with pytest.raises(ValueError, match="There is no folder .*group: give one of runs/"):
        report_script.report(root / "runs/group", "accuracy", [])
    (root / "runs/group").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="There is no finished run of run_seeds in .*group: give one of runs/, or train one"
    ):
        report_script.report(root / "runs/group", "accuracy", [])
    # A task script leaves its result alone, without the request.
    (root / "runs/group/SAM/seed-1").mkdir(parents=True)
    (root / "runs/group/SAM/seed-1/result.json").write_text("{}")
    with pytest.raises(
        ValueError, match="in .*group [(]SAM seed 1 [(]it has no request.json of run_seeds[)][)]: give"
    ):
        report_script.report(root / "runs/group", "accuracy", [])
    run_seeds.run_all([make_run()])
    with pytest.raises(ValueError, match="no finished run of the baseline AdamW"):
        report_script.report(root / "runs/group", "accuracy", ["AdamW"])


# --- the shell scripts -----------------------------------------------------------------------------------------------

# Plays python and the python of a virtual environment: notes its arguments and makes what `-m venv` makes.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$STUB_LOG"
[[ "$*" == "-c "* && -n "${STUB_OLD:-}" ]] && exit 1
[[ "$*" == "-m pip --version" && -n "${STUB_WITHOUT_PIP:-}" ]] && exit 1
[[ -n "${STUB_FAIL:-}" && "$*" == *"$STUB_FAIL"* ]] && exit 1
if [[ "$*" == "-m venv --clear "* ]]; then
    rm -rf "$4"
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python"
fi
exit 0
"""


class Shell:
    """A folder with the shell scripts, and a PATH on which there is no Python but the stub."""

    def __init__(self, root):
        self.root, self.log = root, root / "log"
        self.bin = root / "bin"
        self.bin.mkdir()
        for tool in ("bash", "env", "dirname", "cat", "cksum", "rm", "mkdir", "touch", "cp", "sed", "grep", "paste"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.add_python(self.bin / "python3")
        (root / "setup.cfg").write_text("[metadata]\n")
        (root / "pyproject.toml").write_text("")
        (root / "scripts").mkdir()
        for name in ("setup_venv", "test", "demo", "run", "demo.py", "run_seeds.py", "table.py"):
            shutil.copy(SCRIPTS / name, root / "scripts")

    def add_python(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PYTHON)
        path.chmod(0o755)

    def __call__(self, *command, **variables):
        """Runs a script; the result, and what Python was asked for beyond `-c`."""
        self.log.write_text("")
        environment = {"PATH": str(self.bin), "STUB_LOG": str(self.log), **variables}
        done = subprocess.run(
            [self.bin / "bash", *command], cwd="/", env=environment, capture_output=True, text=True, timeout=60
        )
        return done, [line for line in self.log.read_text().splitlines() if not line.startswith("-c")]

    def setup(self, extra="checkout", *options, **variables):
        return self(self.root / "scripts/setup_venv", extra, *options, **variables)


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


VENV, PIP = "-m venv --clear .venv", "-m pip --version"
INSTALL = "-m pip install --quiet --disable-pip-version-check --editable .[{}]"


def test_setup_installs_once_and_again_when_outdated(shell):
    done, asked = shell.setup()
    assert done.returncode == 0 and "some minutes" in done.stderr
    assert asked == [VENV, PIP, INSTALL.format("checkout")]
    assert shell.setup()[1] == []
    (shell.root / "setup.cfg").write_text("[metadata]\nname = new\n")
    assert shell.setup()[1] == [PIP, INSTALL.format("checkout")]
    assert shell.setup()[1] == []


def test_the_test_extra_serves_the_checkout_but_not_the_other_way_round(shell):
    shell.setup("checkout")
    assert shell.setup("test")[1] == [PIP, INSTALL.format("test")]
    assert shell.setup("checkout")[1] == []


def test_setup_repairs_an_interrupted_installation(shell):
    done, _ = shell.setup(STUB_FAIL="pip install")
    assert done.returncode != 0
    (shell.root / ".venv/half-a-package").touch()
    assert shell.setup()[1] == [VENV, PIP, INSTALL.format("checkout")]
    assert not (shell.root / ".venv/half-a-package").exists()
    # After an update that failed nothing looks finished, not what was there before either, but the environment is kept.
    shell.setup("test", STUB_FAIL="pip install")
    assert shell.setup("checkout")[1] == [PIP, INSTALL.format("checkout")]
    (shell.root / "setup.cfg").write_text("[metadata]\nname = new\n")
    shell.setup(STUB_FAIL="pip install")
    assert shell.setup()[1] == [PIP, INSTALL.format("checkout")]


def test_setup_keeps_a_venv_made_by_hand(shell):
    shell.add_python(shell.root / ".venv/bin/python")
    (shell.root / ".venv/torch").touch()
    assert shell.setup(STUB_WITHOUT_PIP="1")[1] == [PIP, "-m ensurepip", INSTALL.format("checkout")]
    assert (shell.root / ".venv/torch").exists()


def test_setup_finds_another_python_and_says_when_there_is_none(shell):
    done, asked = shell.setup(STUB_OLD="1")
    assert done.returncode == 1 and done.stderr.startswith("xsam_hf needs Python 3.10 or newer, and none of")
    assert asked == [] and not (shell.root / ".venv").exists()
    (shell.bin / "python3").rename(shell.bin / "python3.10")
    assert shell.setup()[1] == [VENV, PIP, INSTALL.format("checkout")]


def test_setup_without_ensurepip_takes_another_way_or_says_which_there_are(shell):
    """Debian's python3 without the package python3-venv."""
    done, asked = shell.setup(STUB_FAIL="import ensurepip")
    assert done.returncode == 1 and asked == [] and not (shell.root / ".venv").exists()
    assert done.stderr.startswith(
        "python3 cannot make a virtual environment: install its venv module (python3-venv on Debian"
    )
    assert len(done.stderr.splitlines()) == 1
    for tool, made in (
        ("virtualenv", "--quiet --python python3 .venv"),
        ("uv", "venv --quiet --seed --python python3 .venv"),
    ):
        # Plays the tool; its environment has pip.
        (shell.bin / tool).write_text(
            '#!/usr/bin/env bash\necho "$*" >> "$STUB_LOG"\nmkdir -p .venv/bin\ncp "$STUB_BIN/python3" .venv/bin/python\n'
        )
        (shell.bin / tool).chmod(0o755)
        done, asked = shell.setup(STUB_FAIL="import ensurepip", STUB_BIN=str(shell.bin))
        assert done.returncode == 0 and asked == [made, PIP, INSTALL.format("checkout")], done.stderr
        shutil.rmtree(shell.root / ".venv")
    # Another Python that has it comes before both.
    shell.add_python(shell.bin / "python3.12")
    (shell.bin / "python3").write_text(PYTHON.replace("exit 0", '[[ "$*" == *ensurepip* ]] && exit 1\nexit 0'))
    done, asked = shell.setup()
    assert asked == [VENV, PIP, INSTALL.format("checkout")]


def test_the_lowest_versions_get_an_environment_of_their_own(shell):
    (shell.root / "setup.cfg").write_text(
        "[options]\ninstall_requires =\n    torch>=2.8\n    a.b-c>=1.0.2; python_version<'4'\n    numpy\n"
    )
    for version in ("python3.10", "python3.11"):
        shell.add_python(shell.bin / version)
    with open(shell.bin / "python3.10", "a") as lowest:
        lowest.write("# 3.10\n")
    done, asked = shell(shell.root / "scripts/test", "--lowest", "-k", "xsam")
    assert done.returncode == 0, done.stderr
    install = (
        "-m pip install --quiet --disable-pip-version-check --constraint .venv-lowest/lowest.txt --editable .[test]"
    )
    assert asked == [
        "-m venv --clear .venv-lowest",
        PIP,
        install,
        "-m pytest -n 2 --dist worksteal -k xsam",
    ]  # no lint: its tools' versions matter
    assert (shell.root / ".venv-lowest/lowest.txt").read_text() == "torch==2.8\na.b-c==1.0.2\n"
    assert (shell.root / ".venv-lowest/bin/python").read_text().endswith("# 3.10\n")
    assert not (shell.root / ".venv").exists()


def test_a_bar_that_is_turned_off_ends_no_runs(root):
    done = script(
        root, "run_seeds", "fake", "tiny", "sam", "--group", "quiet", "--seeds", 0, env={"TQDM_DISABLE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert (root / "runs/quiet/sam/seed-0/result.json").is_file()


def test_scripts_run_names_the_scripts_there_are(shell):
    for arguments in ((), ("nowhere",), ("table",), ("../setup",), ("demo.py",), ("--help",)):
        done, asked = shell(shell.root / "scripts/run", *arguments)
        assert done.returncode == 2 and asked == []
        named = f"there is no script '{arguments[0]}': " if arguments else ""
        there_are = "scripts/run takes the name of a script and then its arguments; there are: demo run_seeds."
        assert done.stderr == f"error: {named}{there_are}\n"
    done, asked = shell(shell.root / "scripts/run", "run_seeds", "a b", "--group", "x")
    assert done.returncode == 0 and asked[-1] == f"{shell.root}/scripts/run_seeds.py a b --group x"


def test_scripts_test_runs_every_part_and_names_those_that_failed(shell):
    done, asked = shell(shell.root / "scripts/test", "-k", "xsam", STUB_FAIL="ruff")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "failed: lint format"
    tests = ["-m ruff check .", "-m ruff format --check .", "-m mypy xsam_hf"]
    tests += ["-m mkdocs build --strict --config-file scripts/mkdocs.yml", "-m pytest -n 2 --dist worksteal -k xsam"]
    assert asked[-5:] == tests
    done, asked = shell(shell.root / "scripts/test")
    assert done.returncode == 0 and asked[-1] == "-m pytest -n 2 --dist worksteal"
    assert shell(shell.root / "scripts/test", STUB_FAIL="-m pytest")[0].returncode == 1


def test_demo_sets_up_and_starts(shell):
    done, asked = shell(shell.root / "scripts/demo")
    assert done.returncode == 0
    assert asked == [VENV, PIP, INSTALL.format("checkout"), f"{shell.root}/scripts/demo.py"]


def tuned(root, **rhos):
    """Writes what the study has chosen."""
    metrics = {"validation": {"accuracy": 0.9}}
    runs = [
        {
            "name": f"{method}-rho-{rho}",
            "seed": 100,
            "metrics": metrics,
            "passes": {"forward": 10, "backward": 10},
            "seconds": 1,
            "arguments": {"rho": rho},
        }
        for method, rho in rhos.items()
    ]
    (root / "results").mkdir()
    (root / "results" / "digits-noise-tuning.json").write_text(json.dumps({"common": {}, "runs": runs}))


def test_demo_shows_what_each_method_costs_and_learns(root):
    tuned(root, **{"sam": 0.5, "xsam": 0.45, "stale-sam": 0.6})
    done = script(root, "demo")
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (root / "calls.jsonl").read_text().splitlines()]
    assert sorted({tuple(call[call.index("--num_train_epochs") :][:2]) for call in calls}) == [
        ("--num_train_epochs", "1.5"),
        ("--num_train_epochs", "3"),
    ]
    # The base's best epoch is compared with, so that every epoch of it is looked at.
    assert len(calls) == 25 and all(("--eval_steps" in call) != ("sgd" in call) for call in calls)
    lines = [[text.strip() for text in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    columns = [lines[0].index(name) for name in ("method", "test accuracy", "wrong labels learnt", "passes")]
    # The toy's accuracy is 95 % without wrong labels, plus 0, 1 or 2 by the seed.
    assert [[line[column] for column in columns] for line in lines[2:]] == [
        ["SAM-stale", "95.00 ± 1.00", "0%", "1.00"],
        ["SGD", "75.80 ± 0.84", "100%", "1.00"],
        ["SGD, best epoch", "90.20 ± 0.16", "", "1.00"],
        ["SAM", "96.00 ± 1.00", "0%", "2.00"],
        ["SGD-2x", "75.80 ± 0.84", "100%", "2.00"],
        ["SGD-2x, best epoch", "90.20 ± 0.16", "", "2.00"],
        ["XSAM", "94.00 ± 1.00", "10%", "2.00"],
    ]
    page = (root / "runs/demo/report.html").read_text()
    assert Page(page).elements.count("svg") == 2
    text = html.unescape(page)
    for sentence in (
        "SGD learns 100% of them and ends at 75.8 % of the test images",
        "SAM-stale (1.0 times SGD's passes) learns 0% and ends at 95.0 %",
        "XSAM minus SAM: -2.00 points, without an interval, since pairs that all differ alike give none",
        "SGD, best epoch, which nobody knows without the test labels, had 90.2 %.",
        "Over 5 pairs of seeds the 95 % intervals of SAM, XSAM and SAM-stale minus SGD, best epoch lie above 0.",
    ):
        assert sentence in text and sentence in done.stdout
    assert ">wrong labels learnt<" in page and ">test accuracy<" in page  # the axes


def test_the_demo_claims_only_what_the_intervals_allow():
    values = {"SGD": (70, 71, 72), "SGD-2x": (70, 72, 71), "SGD, best epoch": (80, 81, 82), "SGD-2x, best epoch": (90, 91, 92), "SAM": (91, 90, 95),
              "XSAM": (95, 96, 97.5), "SAM-stale": (80, 81, 82.5)}  # fmt: skip
    rows = [table.Row(name, dict(enumerate(of)), 1, 1, 1, 0.5) for name, of in values.items()]
    said = " ".join(demo.lead(rows))
    assert "intervals of SAM, XSAM and SAM-stale minus SGD-2x lie above 0." in said
    assert "intervals of XSAM minus SGD-2x, best epoch lie above 0." in said
    assert "SAM minus SGD-2x, best epoch: +1.00 points, 95 % interval -3.97 to +5.97" in said
    assert "SAM-stale was lower in accuracy." in said
    assert "XSAM minus SAM: +4.17 points" in said and said.endswith("these runs do not tell the two apart.")


def test_the_study_tunes_inside_the_grid_and_compares_on_other_seeds(root, monkeypatch):
    monkeypatch.setattr(study, "ROOT", root)
    with pytest.raises(
        ValueError, match="There is no results/digits-noise-tuning.json: scripts/run study digits-noise"
    ):
        study.chosen("digits-noise")
    methods = ["--methods", "base", "base-2x", "sam", "fraction.1", "--seeds", "0", "1", "--jobs", "2"]
    for _ in range(2):  # the second time nothing is trained
        done = script(root, "study", "digits-noise", *methods)
        assert done.returncode == 0, done.stderr
        called = len(calls(root))
    # The recipe's rho is .1, and the toy is best at .5: SAM starts at .1 and goes up, a tenth of a batch starts at .2.
    grids = {method: list(scores) for method, scores in study.tuning("digits-noise").items()}
    assert grids == {
        "sam": [0.071, 0.1, 0.14, 0.2, 0.28, 0.4, 0.57, 0.8],
        "fraction.1": [0.14, 0.2, 0.28, 0.4, 0.57, 0.8],
    }
    assert study.chosen("digits-noise") == {"sam": 0.57, "fraction.1": 0.57}
    assert study.tuning("digits-noise")["sam"][0.1] == pytest.approx([0.81, 0.80])
    kept = summarize.read(root / "results" / "digits-noise.json")
    assert {name: [run["seed"] for run in runs] for name, runs in kept.items()} == dict.fromkeys(methods[1:5], [0, 1])
    # Seeds 0 and 1: 95 % and one or two points of the toy's more, less 0.7 for a rho of .57.
    assert " 95.30 ± 1.41 " in done.stdout
    assert {run["arguments"]["rho"] for run in kept["sam"]} == {0.57}
    assert kept["base-2x"][0]["passes"]["backward"] == 2 * kept["base"][0]["passes"]["backward"]
    assert called == len(calls(root)) == 2 * (8 + 6) + 2 * 4
    # A fresh checkout has results/ alone: what was chosen is not searched for again, and runs are added.
    shutil.rmtree(root / "runs")
    done = script(root, "study", "digits-noise", "--methods", "sam", "--seeds", "1", "2")
    assert done.returncode == 0, done.stderr
    assert len(calls(root)) == called + 2
    more = summarize.read(root / "results" / "digits-noise.json")
    assert [run["seed"] for run in more.pop("sam")] == [0, 1, 2]
    assert more == {name: runs for name, runs in kept.items() if name != "sam"}
    # Another training under the same name is not added to it.
    changed = (root / "results" / "digits-noise.json").read_text()
    changed = changed.replace('"rho": 0.57', '"rho": 0.4').replace('"0.57"', '"0.4"')  # as its command said
    (root / "results" / "digits-noise.json").write_text(changed)
    done = script(root, "study", "digits-noise", "--methods", "sam", "--seeds", "3")
    assert done.returncode == 2 and "stand for one method and differ in their rho (0.4 and 0.57)" in done.stderr
    assert (root / "results" / "digits-noise.json").read_text() == changed


def test_the_grid_of_rho_grows_towards_the_best_and_ends():
    assert study.grid(0.4, -1, 1) == [0.28, 0.4, 0.57]
    assert study.extend(-1, 1, [1, 2, 1], 0.1) == (-1, 1)
    assert study.extend(-1, 1, [2, 2, 1], 0.1) == (-2, 1)
    assert study.extend(-1, 1, [1, 2, 3], 0.1) == (-1, 2)
    assert study.extend(-6, 1, [3, 2, 1, 1, 1, 1, 1, 1], 0.1) == (-6, 1)
    assert study.extend(-1, 1, [0.11, 0.19, 0.12], 0.1) == (-2, 1)  # none trains
    assert study.best_rho({0.4: [0.9, 0.9], 0.2: [0.8, 1.0], 0.1: [0.9, 0.8]}) == 0.2


# --- the summary in RESULTS.md ---------------------------------------------------------------------------------------


def write_results(folder, setting, methods, tuned):
    """results/ of a setting: accuracies of each method's seeds and its passes, and validation accuracies by method and rho."""
    folder.mkdir(exist_ok=True)

    def run(name, seed, split, accuracy, rho=0.0, passes=10):
        counts = {f"{kind}{over}": passes for kind in ("forward", "backward") for over in ("", "_examples")}
        metrics = {split: {"accuracy": accuracy}}
        return {
            "name": name,
            "seed": seed,
            "metrics": metrics,
            "passes": counts,
            "seconds": 1,
            "arguments": {"rho": rho},
        }

    runs = [
        run(name, seed, "test", accuracy, rho=0.0 if name.startswith(("base", "sgd")) else 0.5, passes=passes)
        for name, (passes, accuracies) in methods.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    for one in runs:
        if one["name"].startswith("base"):
            one["metrics"]["best_epoch"] = {"accuracy": 0.8}
    (folder / f"{setting}.json").write_text(json.dumps({"common": {}, "runs": runs}))
    runs = [
        run(f"{method}-rho-{rho}", 100, "validation", accuracy, rho=rho)
        for method, scores in tuned.items()
        for rho, accuracy in scores.items()
    ]
    (folder / f"{setting}-tuning.json").write_text(json.dumps({"common": {}, "runs": runs}))


@pytest.fixture
def summarized(root, monkeypatch):
    """A repository with the results of one setting, and RESULTS.md with the two marks."""
    for module in (study, summary):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(study, "SETTINGS", {"digits-noise": study.SETTINGS["digits-noise"]})
    write_results(
        root / "results",
        "digits-noise",
        {
            "base": (10, [0.70, 0.71, 0.72]),
            "base-2x": (20, [0.60, 0.60, 0.60]),
            "sam": (20, [0.91, 0.92, 0.93]),
            "xsam": (20, [0.75, 0.76, 0.77]),
            "fraction.1": (10, [0.81, 0.83, 0.82]),
        },
        {"sam": {0.2: 0.8, 0.4: 0.9, 0.8: 0.7}, "fraction.1": {0.4: 0.7, 0.8: 0.9}},
    )
    (root / "RESULTS.md").write_text(f"before\n\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    return root


def test_the_summary_is_paired_with_the_base_at_equal_passes(summarized):
    summary.main([])
    text = (summarized / "RESULTS.md").read_text()
    assert text.startswith("before\n\n<!--") and text.endswith("<!-- to here -->\nafter\n") and "old" not in text
    lines = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    # SAM is 31, 32 and 33 points above twice the epochs: t is 4.303, the standard deviation 1. A method that makes one pass an
    # update is compared with the base itself: 11, 12 and 10 points.
    assert lines[2:9] == [
        ["base", "1.00", "71.00 %"],
        ["base-2x", "2.00", "60.00 %"],
        ["base, best epoch", "1.00", "+9.00 ± 2.48"],
        ["base-2x, best epoch", "2.00", "+20.00 ± –"],
        ["sam", "2.00", "+32.00 ± 2.48 (200%)"],
        ["xsam", "2.00", "+16.00 ± 2.48"],
        ["fraction.1", "1.00", "+11.00 ± 2.48 (69%)"],
    ]
    assert "sam 0.4 of 0.2, 0.4, 0.8" in text and "fraction.1 0.8 (at the end of its grid) of 0.4, 0.8" in text
    assert "minus base-2x, best epoch" in text
    drawn = (summarized / "docs" / "gain.svg").read_text()
    assert drawn.count("<!-- sam -->") == drawn.count("<!-- fraction.1 -->") == 1 and "<!-- base" not in drawn


def test_corrupted_images_have_a_table_of_the_runs_that_were_scored_on_them(summarized):
    file = summarized / "results" / "digits-noise.json"
    kept = json.loads(file.read_text())
    for run in kept["runs"]:
        if run["name"] in ("base-2x", "sam") and run["seed"] < 2:
            level = {"base-2x": 0.2, "sam": 0.3}[run["name"]] + 0.02 * run["seed"] * (run["name"] == "sam")
            groups = {"noise": level, "blur": 0.5, "weather": 0.5, "digital": 0.5, "corrupted": level + 0.1}
            run["corruptions"] = {"made_by": "a library", "test_examples": 500, "groups": groups}
    file.write_text(json.dumps(kept))
    summary.main([])
    text = (summarized / "RESULTS.md").read_text().partition("### digits, CNN: corrupted test images")[2]
    assert "--made --test_examples 500`; [results/digits-noise.json]" in text and "made by a library." in text
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[2:4] == [
        ["base-2x", "20.00", "50.00", "50.00", "50.00", "30.00", "", "-11.00 ± 12.71", "2"],
        ["sam", "31.00", "50.00", "50.00", "50.00", "41.00", "+11.00 ± 12.71", "", "2"],
    ]


@pytest.mark.parametrize("xsam, share", [((70, 75, 80), ""), ((74, 75, 77), " (100%)")])
def test_a_share_is_of_a_gain_that_its_interval_tells_from_0(xsam, share):
    """4 ± 9.94, and 4.33 ± 1.43, which is SAM's gain too."""
    values = {"base": (1, (70, 70, 70)), "base-2x": (2, (70, 71, 72)), "sam": (2, (74, 75, 77)), "xsam": (2, xsam)}
    rows = {name: table.Row(name, dict(enumerate(of)), passes, passes, 1) for name, (passes, of) in values.items()}
    line = next(line for line in summary.overview({"digits-noise": rows}).splitlines() if line.startswith("| sam"))
    assert line.split("|")[3].strip() == "+4.33 ± 1.43" + share


def test_a_summary_that_is_not_what_the_results_say_is_told(summarized):
    assert "RESULTS.md does not say what results/ does: scripts/run summary" in refusal(summary.main, "--check")
    summary.main([])
    before = (summarized / "RESULTS.md").read_text()
    summary.main(["--check"])
    file = summarized / "results" / "digits-noise.json"
    file.write_text(file.read_text().replace("0.93", "0.94"))
    assert "RESULTS.md does not say" in refusal(summary.main, "--check")
    assert (summarized / "RESULTS.md").read_text() == before
    (summarized / "RESULTS.md").write_text(before.replace(summary.END, ""))
    assert "should have the lines" in refusal(summary.main)


def test_a_summary_without_what_others_are_compared_with_says_what_to_train(summarized):
    file = summarized / "results" / "digits-noise.json"
    kept = json.loads(file.read_text())
    kept["runs"] = [run for run in kept["runs"] if run["name"] != "base-2x"]
    file.write_text(json.dumps(kept))
    told = refusal(summary.main)
    assert "results/digits-noise.json has no run of base-2x, which others are compared with" in told
    assert "scripts/run study digits-noise --methods base-2x makes them" in told


def of_another(file, change):
    """The file with a change of each run."""
    kept = json.loads(file.read_text())
    for run in kept["runs"]:
        change(run)
    file.write_text(json.dumps(kept))


# A file of results/, what is done to its runs, what is said.
OTHER_SETTINGS = {
    "data set": (
        "digits-noise",
        lambda run: run.update(dataset="fashion_mnist"),
        "base, seed 0 is a result with dataset fashion_mnist, and base in digits-noise asks for dataset digits",
    ),
    "model": (
        "digits-noise",
        lambda run: run["arguments"].update(model="vit-small"),
        "a result with model vit-small, and base in digits-noise asks for model resnet-small",
    ),
    "recipe": (
        "digits-noise",
        lambda run: run.update(command=["-m", "train", "recipes/digits-vit-small.yaml"]),
        "base, seed 0 is of the recipe digits-vit-small, and digits-noise is of digits-noise-resnet-small: put the file",
    ),
    "names": (
        "digits-noise",
        lambda run: run.update(method={"sam": "xsam", "xsam": "sam"}.get(run["name"], "sgd")),
        "sam, seed 0 is a result with method xsam, and sam in digits-noise asks for method sam",
    ),
    "base": (
        "digits-noise",
        lambda run: run["arguments"].update(rho=0.5),
        "base, seed 0 is a result with rho 0.5, and base in digits-noise asks for rho 0.0",
    ),
    "base-2x": (
        "digits-noise",
        lambda run: run["arguments"].update(num_train_epochs=2),
        "base-2x, seed 0 is a result with num_train_epochs 2, and base-2x in digits-noise asks for num_train_epochs 4",
    ),
    "tuning's data set": (
        "digits-noise-tuning",
        lambda run: run.update(dataset="cifar10"),
        "sam-rho-0.2, seed 100 is a result with dataset cifar10",
    ),
    "tuning's rho": (
        "digits-noise-tuning",
        lambda run: run["arguments"].update(rho=0.9),
        "sam-rho-0.2, seed 100 is a result with rho 0.9, and sam-rho-0.2 in digits-noise asks for rho 0.2",
    ),
    "tuning's method": (
        "digits-noise-tuning",
        lambda run: run.update(method="xsam"),
        "sam-rho-0.2, seed 100 is a result with method xsam",
    ),
    "diverged": (
        "digits-noise",
        lambda run: run.update(diverged=run["name"] == "sam"),
        "digits-noise.json: sam, seed 0 has diverged",
    ),
}


@pytest.mark.parametrize("kind", OTHER_SETTINGS)
def test_results_of_another_setting_or_method_are_not_shown_under_a_name(summarized, kind):
    recipe = summarized / "tasks/image_classification/recipes/digits-noise-resnet-small.yaml"
    recipe.write_text(recipe.read_text() + "dataset: digits\nmodel: resnet-small\n")
    name, change, words = OTHER_SETTINGS[kind]
    file = summarized / "results" / f"{name}.json"
    arguments = {"dataset": "digits", "model": "resnet-small"}
    of_another(file, lambda run: run.update(dataset="digits", arguments={**run["arguments"], **arguments}))
    of_another(file, lambda run: run.update(command=["-m", "train", "recipes/digits-noise-resnet-small.yaml"]))
    summary.main([])
    of_another(file, lambda run: run["arguments"].pop("dataset"))
    summary.main([])
    of_another(file, change)
    told = refusal(summary.main)
    assert words in told and f"results/{name}.json" in told


def test_files_of_other_settings_do_not_stand_for_one(root, monkeypatch):
    """The committed ones, copied: each is of its own setting."""
    monkeypatch.setattr(study, "ROOT", root)
    monkeypatch.setattr(sweep, "ROOT", root)
    monkeypatch.setattr(surfaces, "ROOT", root)
    (root / "results").mkdir()
    shutil.rmtree(root / "tasks")
    (root / "tasks").symlink_to(ROOT / "tasks")

    def put(name, file):
        shutil.copy(ROOT / "results" / f"{name}.json", root / "results" / f"{file}.json")

    for reader, own, other in (
        (study.results, "fashion-noise", "digits-noise"),
        (study.results, "digits-noise", "digits-noise-vit"),
        (study.results, "cifar10", "cifar100"),
        (study.results, "multi30k", "digits-noise"),
        (study.tuning, "fashion-noise-tuning", "digits-noise-tuning"),
        (study.tuning, "fashion-noise-aug-tuning", "fashion-noise-tuning"),
        (surfaces.section, "digits-noise-vit-surfaces", "digits-noise-surfaces"),
    ):
        setting = own.removesuffix("-tuning").removesuffix("-surfaces")
        put(own, own)
        assert reader(setting)
        put(other, own)
        with pytest.raises(ValueError, match=f"results/{own}.json"):
            reader(setting)
        (root / "results" / f"{own}.json").unlink()
    put("digits-noise", "digits-noise")
    put("cifar10", "cifar10")
    put("digits-noise-steps", "digits-noise-steps")
    assert sweep.results("digits-noise-steps")
    put("digits-noise-steps", "cifar10-steps")
    assert "cifar10 is of cifar10-resnet-small" in refusal(lambda _: sweep.results("cifar10-steps"))
    put("digits-noise-rho-max", "digits-noise-rho-max")
    assert sweep.results("digits-noise-rho-max")
    of_another(
        root / "results" / "digits-noise-rho-max.json",
        lambda run: (
            run.update(name={"rho-max-2": "rho-max-4", "rho-max-4": "rho-max-2"}.get(run["name"], run["name"]))
            or run.pop("command")
        ),
    )
    assert "a result with rho_max" in refusal(lambda _: sweep.results("digits-noise-rho-max"))
    put("digits-noise-rho-max", "digits-noise-rho-max")
    of_another(
        root / "results" / "digits-noise.json",
        lambda run: run.update(name=run["name"].replace("xsam", "mine")) or run.pop("command"),
    )
    assert "digits-noise.json has no run of xsam, which" in refusal(lambda _: sweep.results("digits-noise-rho-max"))


def test_flags_for_all_runs_leave_the_settings_model_and_data_alone(monkeypatch):
    monkeypatch.setattr(study, "run_or_exit", lambda *_: pytest.fail("it trains"))
    for flags in ("--model vit-small", "--dataset=cifar10", "--no-aug true", "--method sgd", "--rho=3"):
        name = flags.replace("-a", "_a").split("=")[0].split()[0]
        assert f"{name} stands in --flags" in refusal(study.main, "fashion-noise", f"--flags={flags}")
    assert "dataset" not in study.fixed("multi30k")  # a folder


def test_an_earlier_study_counts_where_the_new_one_has_no_result(root, monkeypatch):
    monkeypatch.setattr(study, "ROOT", root)
    recipe = "tasks/image_classification/recipes/fashion-mnist-noise-vit-small.yaml"
    shutil.copy(ROOT / recipe, root / recipe)
    old = {"sgd": (10, [0.6, 0.7]), "sgd-2x": (20, [0.6, 0.7]), "sam": (20, [0.7, 0.7]), "wsam": (20, [0.1, 0.2])}
    write_results(root / "results", "noise", old, {"sam": {0.1: 0.5}})
    write_results(root / "results", "fashion-noise-vit", {"xsam": (20, [0.8, 0.8])}, {"xsam": {0.2: 0.5, 0.3: 0.6}})
    found = study.results("fashion-noise-vit")
    assert list(found) == ["base", "base-2x", "sam", "xsam"]
    assert [run["metrics"]["test"]["accuracy"] for run in found["base"]] == [0.6, 0.7]
    assert study.chosen("fashion-noise-vit") == {"sam": 0.1, "xsam": 0.3}


# --- one argument varied ---------------------------------------------------------------------------------------------


SWEEP = sweep.Sweep(
    "digits-noise",
    "steps",
    {"sam-2-steps": sweep.Variant("sam", "--ascent_steps 2"), "wide": sweep.Variant("xsam", rho_max=2)},
    seeds=2,
)


def test_a_sweep_takes_the_studys_rho_and_changes_one_argument(summarized, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", summarized)
    monkeypatch.setattr(sweep, "SWEEPS", {"digits-noise-steps": SWEEP})
    trained = []
    monkeypatch.setattr(sweep, "run_or_exit", lambda runs, jobs: trained.extend(runs))
    monkeypatch.setattr(sweep, "keep", lambda group: None)
    assert "xsam has no `rho` in digits-noise yet" in refusal(sweep.main, "digits-noise-steps")
    write_results(
        summarized / "results", "digits-noise", {"sam": (20, [0.9])}, {"sam": {0.4: 0.9}, "xsam": {0.3: 0.9}}
    )
    sweep.main(["digits-noise-steps", "--flags=--threads 1"])
    assert [(run.name, run.seed) for run in trained] == [(n, s) for s in (0, 1) for n in SWEEP.variants]
    assert trained[0].flags == "--method sam --rho 0.4 --ascent_steps 2 --threads 1"
    assert trained[1].flags == "--method xsam --rho 0.3 --rho_max 0.6 --threads 1"
    assert "--rho stands in --flags" in refusal(sweep.main, "digits-noise-steps", "--flags=--rho 0.3")
    assert "digits-noise-steps has no variant narrow: choose among sam-2-steps, wide" in refusal(
        sweep.main, "digits-noise-steps", "--variants", "narrow"
    )


def test_a_sweep_is_shown_beside_the_methods_that_it_varies_at_the_same_seeds(summarized, monkeypatch):
    monkeypatch.setattr(sweep, "ROOT", summarized)
    monkeypatch.setattr(sweep, "SWEEPS", {"digits-noise-steps": SWEEP})
    assert sweep.results("digits-noise-steps") == {}
    write_results(summarized / "results", "digits-noise-steps", {"sam-2-steps": (30, [0.90, 0.90])}, {})
    found = sweep.results("digits-noise-steps")
    assert {name: [run["seed"] for run in runs] for name, runs in found.items()} == dict.fromkeys(
        ["sam", "xsam", "sam-2-steps"], [0, 1]
    )
    summary.main([])
    text = (summarized / "RESULTS.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| sam-2-steps"))
    # 1 and 2 points below SAM's 91 and 92: t is 12.71, the standard deviation .707.
    assert "| 90.00 ± 0.00 " in line and "| -1.50 ± 6.35 " in line and "| 1.50 " in line
    assert "`scripts/run sweep digits-noise-steps`" in text


def test_an_epoch_of_xsam_by_arithmetic():
    rows = {
        "sam": {"seconds": [1.0, 2.0], "median_seconds": 1.5, "median_own_seconds": 0.1},
        "xsam, alpha kept": {"seconds": [1.2, 2.4], "median_seconds": 1.8, "median_own_seconds": 0.4},
        "xsam, search": {"seconds": [4.2, 8.4], "median_seconds": 6.3, "median_own_seconds": 0.9},
    }
    found = epoch_cost.costs(rows, batch=10)
    assert found.kept == pytest.approx([1.2, 1.2]) and (found.own, found.search) == pytest.approx((0.2, 3.0))
    assert found.epoch(updates=300, batch=100) == pytest.approx(1 + 0.02 + 0.01)


def test_surfaces_of_several_seeds_are_kept_and_compared_in_pairs(root, monkeypatch):
    monkeypatch.setattr(surfaces, "ROOT", root)
    assert surfaces.section("digits-noise") == ""
    for seed in (0, 1, 2):
        for method, trace in zip(surfaces.METHODS, (10.0, 4.0, 2.0 / 2**seed, 8.0), strict=True):
            # By rho, batch and distance. At rho and twice rho g_1 leads higher in the second batch, and v(α*) in neither.
            gain = {"first": [[], [[0, 0, 5, 0], [0, 0, 1, 0]]], "last": [[], [[9, 9, 5, 9], [0, 0, 2, 0]]]}
            found = {
                "hessian": {"eigenvalues": [4.0 + seed, 3, 2, 1.5, 1.0], "trace": trace},
                "gain": {**gain, "best": gain["last"]},
                "sharpness": {"average": {"loss": 0.5, "radii": [0.1, 0.5], "samples": [[0, 1], [0, 3 + 2 * seed]]}},
            }
            folder = root / f"seen-{seed}" / method
            folder.mkdir(parents=True)
            for measure, result in found.items():
                kept = {"measure": measure, "settings": {"rho": 0.25}, "result": result}
                (folder / f"{measure}.json").write_text(json.dumps(kept))
    (root / "results").mkdir()
    command = ["digits-noise", *(f"{seed}={root}/seen-{seed}" for seed in (0, 1, 2))]
    surfaces.main(command)
    lines = {}
    for line in surfaces.section("digits-noise").splitlines():
        name, *cells = [text.strip() for text in line.split("|")[1:-1]] or [""]
        lines[name] = cells
    assert "seeds 0, 1, 2, `--rho 0.25`" in surfaces.section("digits-noise")
    assert lines["trace"][:3] == ["10, 10, 10", "4, 4, 4", "2, 1, 0.5"] and lines["λ_1"][0] == "4, 5, 6"
    # The logarithms of XSAM / SAM are -1, -2 and -3 times log 2: mean -2, margin 4.303 / √3.
    assert lines["trace"][4:] == ["0.40", "0.25 (0.04 to 1.40)", "0.10 (0.02 to 0.56)", "0.80"]
    assert lines["average sharpness, r = 0.5"][0] == "2, 3, 4"
    assert lines["g₁ above g₀, batches"][:4] == ["3 of 6"] * 4 and lines["v(α\\*) above g₁, batches"][0] == "0 of 6"
    (root / "seen-2" / "sam" / "gain.json").unlink()
    assert "seen-2/sam/gain.json: python -m xsam_hf.analysis gain sam=CHECKPOINT" in refusal(surfaces.main, *command)


def seen(root, seeds=(0, 1)):
    """What the analysis leaves of a study's runs, and the command that keeps it."""
    for seed in seeds:
        for method in surfaces.METHODS:
            found = {
                "hessian": {"eigenvalues": [4.0, 3, 2, 1.5, 1.0], "trace": 2.0},
                "gain": dict.fromkeys(("first", "last", "best"), [[], [[0, 0, 5, 0]]]),
                "sharpness": {"average": {"loss": 0.5, "radii": [0.1], "samples": [[0, 1]]}},
            }
            folder = root / f"seen-{seed}" / method
            folder.mkdir(parents=True)
            for measure, result in found.items():
                kept = {"measure": measure, "of": f"{method}{seed}", "settings": {"rho": 0.25}, "result": result}
                kept["checkpoint"] = f"runs/digits-noise/{method}/seed-{seed}/checkpoint-7"
                (folder / f"{measure}.json").write_text(json.dumps(kept))
    (root / "results").mkdir()
    return ["digits-noise", *(f"{seed}={root}/seen-{seed}" for seed in seeds)]


BAD_SURFACES = {
    "cut off": (
        lambda f: (f / "gain.json").write_text('{"a'),
        "sam/gain.json is not what python -m xsam_hf.analysis gain",
    ),
    "no settings": (lambda f: (f / "gain.json").write_text("{}"), "sam/gain.json is not what .*KeyError: 'settings'"),
    "a list": (lambda f: (f / "gain.json").write_text("[]"), "sam/gain.json is not what"),
    "another measure": (
        lambda f: shutil.copy(f / "hessian.json", f / "gain.json"),
        "gain.json is not .*its measure is hessian",
    ),
    "another rho": (
        lambda f: change(f, "gain.json", settings={"rho": 9}),
        r"sam/gain.json was taken with \{'rho': 9\}, and the first of its measure with \{'rho': 0.25\}",
    ),
    "another method": (
        lambda f: [
            change(f, f"{measure}.json", checkpoint="runs/digits-noise/xsam/seed-1") for measure in surfaces.MEASURES
        ],
        "was taken of runs/digits-noise/xsam/seed-1, and stands for sam of seed 1 in digits-noise",
    ),
    "another seed": (
        lambda f: change(f, "gain.json", checkpoint="runs/mine/sam/seed-2/checkpoint-1"),
        "was taken of runs/mine/sam/seed-2/checkpoint-1, and stands for sam of seed 1",
    ),
    "another setting": (
        lambda f: change(f, "gain.json", checkpoint="runs/cifar100/sam/seed-1"),
        "was taken of runs/cifar100/sam/seed-1, and stands for",
    ),
    "the same weights": (
        lambda f: [change(f, f"{measure}.json", of="base0") for measure in surfaces.MEASURES],
        "base/hessian.json and .*sam/hessian.json were taken of the same weights, and stand for base of seed 0 and sam of seed 1",
    ),
    "other weights in one measure": (
        lambda f: change(f, "gain.json", of="another"),
        "sam/gain.json was taken of other weights or batches than .*sam/hessian.json",
    ),
}


@pytest.mark.parametrize("kind", BAD_SURFACES)
def test_surfaces_of_another_run_measure_or_setting_are_refused(root, monkeypatch, kind):
    monkeypatch.setattr(surfaces, "ROOT", root)
    command = seen(root)
    surfaces.main(command)
    earlier = surfaces.path_of("digits-noise").read_text()
    damage, words = BAD_SURFACES[kind]
    damage(root / "seen-1" / "sam")
    with pytest.raises(ValueError, match=words):
        surfaces.main(command)
    assert surfaces.path_of("digits-noise").read_text() == earlier


def test_surfaces_want_a_folder_for_each_seed(root, monkeypatch):
    monkeypatch.setattr(surfaces, "ROOT", root)
    setting, zero, one = seen(root)
    for arguments, words in (
        ([zero, zero.replace("0=", "1=")], "stands for base of seed 1 in digits-noise"),
        ([zero, zero], "a seed is given twice"),
        ([zero.partition("=")[2]], "should read SEED=FOLDER, the seed a whole number"),
        ([zero.replace("0=", "x=")], "should read SEED=FOLDER"),
        ([zero.replace("0=", "01=")], "should read SEED=FOLDER"),
        (["0="], "should read SEED=FOLDER"),
    ):
        assert words in refusal(surfaces.main, setting, *arguments)
    for method in surfaces.METHODS:  # of runs that are called otherwise
        for measure in surfaces.MEASURES:
            change(root / "seen-0" / method, f"{measure}.json", checkpoint=f"elsewhere/{method}")
    surfaces.main([setting, zero])
    told = refusal(surfaces.main, setting, zero, zero.replace("0=", "1="))
    assert "were taken of the same weights, and stand for base of seed 0 and base of seed 1: give each run" in told


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"setting": "digits-noise", "seeds": {}}',
        '{"setting": "digits-noise", "seeds": {"0": null}}',
        "cut",
        "x",
        "null",
    ],
)
def test_a_file_of_surfaces_that_is_none_is_told(root, monkeypatch, content):
    monkeypatch.setattr(surfaces, "ROOT", root)
    surfaces.main(seen(root))
    path = surfaces.path_of("digits-noise")
    whole = path.read_text()
    made = {"cut": whole[:200], "x": whole.replace('"1": {', '"x": {'), "null": whole.replace("4.0", "null")}
    path.write_text(made.get(content, content))
    told = refusal(lambda _: surfaces.section("digits-noise"))
    assert f"{path} is not what scripts/run surfaces digits-noise writes" in told and told.endswith("make it again.")
    path.write_text(whole)
    assert "seeds 0, 1" in surfaces.section("digits-noise")


def test_results_md_says_what_results_do():
    summary.main(["--check"])


def test_readme_says_what_results_do():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    settings = summary.images(summary.results())
    digits = settings["digits-noise"]
    said = [table.paired_difference(digits["xsam"], digits["sam"])]
    table_of = ("sam", "xsam", "fraction.1", "stale-sam")
    for setting, methods in {
        "digits-noise": table_of,
        "digits-noise-vit": table_of,
        "fashion-noise": table_of,
        "fashion-noise-vit": ("sam", "xsam"),
        "cifar10": ("sam", "xsam"),
        "cifar100-vit": ("sam", "xsam"),
    }.items():
        rows = settings[setting]
        said += [table.paired_difference(rows[name], summary.equal_base(rows[name], rows)) for name in methods]
    for name in ("sam", "xsam"):  # "neither is clear of 0"
        rows = settings["cifar100"]
        assert not table.paired_difference(rows[name], rows["base-2x"]).is_clear
    assert f"(from {settings['cifar100-vit']['base-2x'].mean:.1f} %)" in readme
    for difference in said:
        assert f"{difference.mean:+.1f} ± {difference.margin:.1f}" in readme
    for name in ("base", "base-2x", "base, best epoch"):
        assert f"{digits[name].mean:.1f} %" in readme
    late, whole = (
        table.paired_difference(digits[name], summary.equal_base(digits[name], digits)) for name in ("late.3", "xsam")
    )
    assert f"keeps {late.mean / whole.mean:.0%}".replace("%", " %") in readme


def test_the_benchmark_times_all_on_the_same_batch_and_says_what_is_our_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    output = tmp_path / "result.json"
    arguments = ["--configuration", "gpt2-1m", "--steps", "2", "--warm_up", "1", "--accumulation", "2"]
    arguments += ["--methods", "plain", "rho=0", "sam", "xsam, search", "--output", str(output)]
    benchmark.main(arguments)
    result = json.loads(output.read_text())
    assert (result["threads"], result["processes"], result["accumulation"]) == (1, 1, 2)
    rows = result["rows"]
    assert all(len(row["seconds"]) == 2 and row["median_page_faults"] >= 0 for row in rows.values())
    assert result["malloc"]["MALLOC_ARENA_MAX"] == "1"
    assert rows["plain"]["median_ratio"] == 1 < rows["sam"]["median_ratio"] < rows["xsam, search"]["median_ratio"]
    # Passes are most of an update, and what is our own is the rest without the optimizer's step.
    own = {name: row.get("median_own_seconds") for name, row in rows.items()}
    assert own["plain"] is own["rho=0"] is None
    assert 0 < own["sam"] < 0.5 * rows["sam"]["median_seconds"]

    rows["xsam, alpha kept"] = {"median_ratio": 3 * rows["sam"]["median_ratio"]}
    titles, cells = growth.cells([result])
    row = dict(zip(titles, cells, strict=True))
    assert row["weights"] == "1.2M" and row["kept α to SAM"] == "3.00" and row["accumulation"] == "2"
