"""
Trains one recipe with several methods and seeds. Each run is a process of its own (see scripts/starter.py) and fills
`runs/<group>/<name>/seed-<seed>`; what it prints goes to `seed-<seed>.log` beside that folder.

    scripts/run run_seeds image_classification digits-vit-small sam xsam wide="--method xsam --rho 0.2" \\
        --group radius --seeds 0 1 2 --jobs 2

A name alone is the task's `--method`.

Call it again after a failure or an interruption: finished runs are kept, the others go on from their last checkpoint.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from scripts.run_flags import NAME, check_once, parse_count, parse_method, parse_seed
from scripts.starter import Started, Starter
from tasks.command import Parser, run, sentence
from tasks.files import write_whole
from tasks.secret import without_secret_flags


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
    def recipe_file(self) -> Path:
        return Path("tasks", self.task, "recipes", f"{self.recipe}.yaml")

    @property
    def module(self) -> str:
        return f"tasks.{self.task}.train"

    @property
    def command(self) -> list[str]:
        own = ["--seed", str(self.seed), "--output_dir", str(self.folder)]
        return ["-m", self.module, str(self.recipe_file), *own, *shlex.split(self.flags)]

    @property
    def request(self) -> bytes:
        """
        What is asked for: results made by another command, or with another text of the recipe, answer another question.
        Secrets are left out.
        """
        recipe = (ROOT / self.recipe_file).read_text(encoding="utf-8")
        return json.dumps({"command": without_secret_flags(self.command), "recipe": recipe}, indent=2).encode()

    @property
    def is_ours(self) -> bool:
        request = ROOT / self.folder / "request.json"
        return request.is_file() and request.read_bytes() == self.request

    @property
    def is_finished(self) -> bool:
        return self.is_ours and is_json(ROOT / self.folder / "result.json")

    def start(self, starter: Starter, launch: Sequence[str] = ()) -> Started:
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
            write_whole(folder / "request.json", self.request)
            (folder / "result.json").unlink(missing_ok=True)  # a damaged one: a whole one would have been kept
            return starter.start([*launch, *self.command, *resume_flags(folder)][1:], log)


def resume_flags(folder: Path) -> list[str]:
    """From the last whole checkpoint of a run, if there is one."""
    if not any(folder.glob("checkpoint-*")):
        return []
    from xsam_hf.trainer.checkpoint import last_whole_checkpoint  # which imports torch, some seconds

    try:
        checkpoint = Path(last_whole_checkpoint(folder))
    except ValueError:
        return []
    return ["--resume_from_checkpoint", str(checkpoint.relative_to(ROOT))]


def last_words(log: Path) -> str:
    """The sentence that a refused run has ended with, to follow its status."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f", {lines[-1].strip().rstrip('.')}" if lines and lines[-1].startswith("error: ") else ""


def is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def is_finished(run: Run) -> bool:
    try:
        return run.is_finished
    except (OSError, ValueError):  # it will say so when it is started
        return False


def run_all(runs: list[Run], jobs: int = 1, launch: Sequence[str] = ()) -> list[Run]:
    """Trains the runs that are not finished, `jobs` at a time, and returns those that failed; `launch` goes before their commands."""
    waiting = [run for run in runs if not is_finished(run)]
    running: dict[Run, Started] = {}
    failed = []
    modules = [] if launch else sorted({run.module for run in waiting})
    starter = Starter(ROOT, modules, {**os.environ, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})})
    shown = ""  # not the bar's: one that TQDM_DISABLE turns off keeps nothing
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
                        running[run] = run.start(starter, launch)
                    except (OSError, RuntimeError, ValueError) as error:  # of this run's files: the others go on
                        settle(run, sentence(error))
                if (names := ", ".join(map(str, running))) != shown:
                    bar.set_postfix_str(names)
                    shown = names
                bar.update(0)
                time.sleep(0.2)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        if process.returncode:
                            settle(run, f"exit status {process.returncode}{last_words(ROOT / run.log)}")
                        else:
                            settle(run, None if is_finished(run) else "it ended without a result.json")
        finally:
            # With its session, so that its data-loading processes end too.
            for process in running.values():
                process.kill(signal.SIGTERM)
            for process in running.values():
                if process.wait(timeout=10) is None:
                    process.kill(signal.SIGKILL)
            starter.close()
    return failed


def run_or_exit(runs: list[Run], jobs: int, launch: Sequence[str] = ()) -> None:
    """`run_all` for a command: what is left to do ends it with a sentence and status 1."""
    # A polite kill and a closed terminal stop the runs as Ctrl-C does, unless the caller (`nohup`) ignores them.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        failed = run_all(runs, jobs, launch)
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command goes on from here.")
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: the same command tries them again.")


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("task", help="a folder of tasks/")
    parser.add_argument("recipe", help="a file of the task's recipes/, without .yaml")
    parser.add_argument("methods", nargs="+", type=parse_method, metavar='NAME[="--flag value ..."]')
    parser.add_argument("--group", required=True, help="the folder of runs/ to fill")
    parser.add_argument("--seeds", nargs="+", type=parse_seed, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--jobs", type=parse_count, default=1, help="runs at a time; with more than one, each has one thread"
    )
    args = parser.parse_args(argv)
    for name in ("task", "recipe", "group"):
        if not re.fullmatch(NAME, getattr(args, name)):
            parser.error(f"{name} is {getattr(args, name)!r}: give a name, not a path")
    recipe = Path("tasks", args.task, "recipes", f"{args.recipe}.yaml")
    if not (ROOT / recipe).is_file():
        parser.error(f"there is no recipe {recipe}")
    if len(dict(args.methods)) < len(args.methods):
        parser.error("two methods have the same name")
    check_once(parser, seeds=args.seeds)

    # Seeds outside, methods inside: an interrupted comparison holds pairs.
    run_or_exit(
        [
            Run(args.task, args.recipe, args.group, name, seed, flags)
            for seed in args.seeds
            for name, flags in args.methods
        ],
        args.jobs,
    )


if __name__ == "__main__":
    run(main)
