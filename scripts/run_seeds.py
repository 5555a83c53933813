#!/usr/bin/env python
"""
Trains one recipe with several methods and seeds. Each run is a process of its own and fills
`runs/<group>/<name>/seed-<seed>`; what it prints goes to `seed-<seed>.log` beside that folder.

    scripts/run_seeds image_classification digits-vit-small sam xsam wide="--method xsam --rho 0.2" \\
        --group radius --seeds 0 1 2 --jobs 2

A name alone is the task's `--method`.

Call it again after a failure or an interruption: finished runs are kept, the others go on from their last checkpoint.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """One training run. Paths are relative to the root of the repository, and so are those in the command."""

    task: str
    recipe: str
    group: str
    name: str
    seed: int
    flags: str = ""

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path("runs", self.group, self.name, f"seed-{self.seed}")

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def command(self) -> list[str]:
        script, recipe = f"tasks/{self.task}/train.py", f"tasks/{self.task}/recipes/{self.recipe}.yaml"
        return [script, recipe, "--seed", str(self.seed), "--output_dir", str(self.folder), *shlex.split(self.flags)]

    @property
    def request(self) -> str:
        """What is asked for: results made by another command, or with another text of the recipe, answer another question."""
        recipe = (ROOT / self.command[1]).read_text()
        return json.dumps({"command": self.command, "recipe": recipe}, indent=2)

    @property
    def is_ours(self) -> bool:
        request = ROOT / self.folder / "request.json"
        return request.exists() and request.read_text() == self.request

    @property
    def is_finished(self) -> bool:
        return self.is_ours and (ROOT / self.folder / "result.json").exists()

    def start(self, one_thread: bool) -> subprocess.Popen:
        folder = ROOT / self.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(ROOT / self.log, "a") as log:
            # The child inherits the lock with its output and holds it until it ends, also when we are killed before it.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError("another process is training it") from None
            if folder.exists() and not self.is_ours:
                old = ROOT / "runs" / self.group / time.strftime("replaced-%Y%m%d-%H%M%S") / self.name / folder.name
                old.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(old)
                tqdm.write(f"{self}: {self.folder} was made with other arguments and is now {old.relative_to(ROOT)}")
            folder.mkdir(exist_ok=True)
            (folder / "request.json").write_text(self.request)
            # The Trainer writes trainer_state.json last: a checkpoint without it, or with half of it, is half written.
            states = filter(is_json, folder.glob("checkpoint-*/trainer_state.json"))
            checkpoints = sorted((state.parent for state in states), key=lambda path: int(path.name.split("-")[1]))
            resume = ["--resume_from_checkpoint", str(checkpoints[-1].relative_to(ROOT))] if checkpoints else []
            return subprocess.Popen(
                [sys.executable, *self.command, *resume],
                cwd=ROOT,
                env={**os.environ, **({"OMP_NUM_THREADS": "1"} if one_thread else {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except json.JSONDecodeError:
        return False
    return True


def run_all(runs: list[Run], jobs: int = 1) -> list[Run]:
    """Trains the runs that are not finished, `jobs` at a time, and returns those that failed."""
    waiting = [run for run in runs if not run.is_finished]
    running: dict[Run, subprocess.Popen] = {}
    failed = []
    # The clock moves on every five seconds, which a log file can bear too.
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", mininterval=5, miniters=0) as bar:

        def settle(run: Run, problem: str | None) -> None:
            if problem:
                failed.append(run)
                tqdm.write(f"{run} failed: {problem}. Its log: {run.log}")
            bar.update()

        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    try:
                        running[run] = run.start(one_thread=jobs > 1)
                    except (OSError, RuntimeError) as error:
                        settle(run, str(error))
                if (names := ", ".join(map(str, running))) != bar.postfix:
                    bar.set_postfix_str(names)
                bar.update(0)
                time.sleep(0.2)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        if process.returncode:
                            settle(run, f"exit status {process.returncode}")
                        else:
                            settle(run, None if run.is_finished else "it ended without a result.json")
        finally:
            # Each child leads a session of its own, so that its data-loading processes end with it.
            for process in running.values():
                os.killpg(process.pid, signal.SIGTERM)
            for process in running.values():
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
    return failed


def run_or_exit(runs: list[Run], jobs: int) -> None:
    """`run_all` for a command: what is left to do ends it with a sentence."""
    # A polite kill and a closed terminal stop the runs as Ctrl-C does, unless the caller (`nohup`) ignores them.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        failed = run_all(runs, jobs)
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on from here.")
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: the same command tries them again.")


def parse_method(text: str) -> tuple[str, str]:
    name, equals, flags = text.partition("=")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise argparse.ArgumentTypeError(f'{text!r} should read NAME="--flag value ...", the name fit for a folder')
    return name, flags if equals else f"--method {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="a folder of tasks/")
    parser.add_argument("recipe", help="a file of the task's recipes/, without .yaml")
    parser.add_argument("methods", nargs="+", type=parse_method, metavar='NAME[="--flag value ..."]')
    parser.add_argument("--group", required=True, help="the folder of runs/ to fill")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with more than one, each has one thread")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs starts at 1")
    if not (ROOT / "tasks" / args.task / "recipes" / f"{args.recipe}.yaml").exists():
        parser.error(f"there is no recipe tasks/{args.task}/recipes/{args.recipe}.yaml")
    if len(dict(args.methods)) < len(args.methods):
        parser.error("two methods have the same name")

    # Seeds outside, methods inside: an interrupted comparison holds pairs.
    runs = [
        Run(args.task, args.recipe, args.group, name, seed, flags)
        for seed in args.seeds
        for name, flags in args.methods
    ]
    run_or_exit(runs, args.jobs)


if __name__ == "__main__":
    main()
