"""A run that is a fork of a process that has imported everything is the run that `python -m` would be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.starter import Starter
from tasks.image_classification import train as images


ROOT = Path(__file__).resolve().parent.parent
STARTER = (ROOT / "scripts/starter.py").read_text()

# What it imports stands in another file, as a task's libraries do.
TASK = """
import json, os, signal, sys
import library

def main():
    if sys.argv[1] == "look":
        spec = sys.modules["__main__"].__spec__
        streams = [os.fstat(1).st_ino == os.fstat(2).st_ino, sys.stdin.read(), sys.stdout.encoding, sys.stdout.line_buffering]
        signals = [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)]
        files = [os.readlink(f"/proc/self/fd/{n}") for n in range(3, 64) if os.path.exists(f"/proc/self/fd/{n}")]
        alone = os.getpid() == os.getpgrp() == os.getsid(0)
        seen = [sys.argv, sys.path, os.getcwd(), __name__, spec.name, streams, signals, files, alone, dict(os.environ)]
        print(json.dumps(seen))
    if sys.argv[1] == "version":
        print(library.VERSION, "imported here" if library.WHERE == os.getpid() else "imported before", flush=True)
        if len(sys.argv) > 2:
            open(sys.argv[2]).read()  # waits
    if sys.argv[1] == "fail":
        raise ArithmeticError("for this reason")
    if sys.argv[1] == "exit":
        sys.exit(3)
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    main()
"""
LIBRARY = "import os, sys\nVERSION, WHERE = 1, os.getpid()\nsys.stderr.write('a warning of the library\\n')\n"


@pytest.fixture
def folder(tmp_path):
    for name, text in (("tasks/fake/train.py", TASK), ("scripts/starter.py", STARTER), ("library.py", LIBRARY)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def starter(folder):
    starter = Starter(folder, ["tasks.fake.train"], os.environ)
    yield starter
    starter.close()


def start(starter, *arguments, name="log"):
    with open(starter.folder / name, "a") as log:
        return starter.start(["tasks.fake.train", *arguments], log)


def ended(starter, *arguments):
    """The exit status of a run, and what it said."""
    (starter.folder / "log").unlink(missing_ok=True)
    return start(starter, *arguments).wait(timeout=900), (starter.folder / "log").read_text()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at open files through /proc")
@pytest.mark.parametrize("interrupt", [signal.SIG_DFL, signal.SIG_IGN], ids=["SIGINT", "SIGINT ignored"])
def test_a_run_is_what_a_command_is(folder, interrupt):
    before = signal.signal(signal.SIGINT, interrupt)  # a child's Python handles what was not ignored
    starter = Starter(folder, ["tasks.fake.train"], {**os.environ, "OMP_NUM_THREADS": "7"})
    try:
        forked = ended(starter, "look", "--rho", "0.1")
        command = subprocess.run(
            [sys.executable, "-m", "tasks.fake.train", "look", "--rho", "0.1"],
            cwd=folder,
            env=starter.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
        starter.close()
    assert forked == (0, command.stdout) and command.returncode == 0
    said, seen = command.stdout.splitlines()
    assert said == "a warning of the library"
    assert json.loads(seen)[6][0] == str(signal.default_int_handler if interrupt == signal.SIG_DFL else signal.SIG_IGN)


def test_a_run_ends_as_a_command_does_and_the_next_one_is_not_troubled(starter):
    status, said = ended(starter, "fail")
    assert status == 1 and "Traceback" in said and said.endswith("ArithmeticError: for this reason\n")
    assert ended(starter, "exit")[0] == 3
    assert ended(starter, "die")[0] == -signal.SIGKILL
    assert ended(starter, "version") == (0, "a warning of the library\n1 imported before\n")
    assert len(starter.servers) == 1


def test_a_run_is_of_the_code_as_it_is_when_it_starts(starter):
    """And one that is under way goes on with its own."""
    os.mkfifo(starter.folder / "gate")
    first = start(starter, "version", "gate", name="first")
    (starter.folder / "library.py").write_text(LIBRARY.replace("1", "2"))
    assert "1 imported before" in ended(starter, "version")[1]  # not a file of ours
    task = starter.folder / "tasks/fake/train.py"
    task.write_text(task.read_text() + "\n# edited\n")
    assert "2 imported before" in ended(starter, "version")[1]
    assert first.poll() is None
    (starter.folder / "gate").write_text("go on")
    assert first.wait(timeout=900) == 0
    assert "1 imported before" in (starter.folder / "first").read_text()


def test_what_cannot_be_imported_is_said_by_each_run(starter):
    (starter.folder / "library.py").write_text("import nowhere\n")
    for _ in range(2):
        status, said = ended(starter, "look")
        assert status == 1 and said.count("ModuleNotFoundError: No module named 'nowhere'") == 1


def test_after_cuda_was_asked_a_run_begins_anew(starter):
    """CUDA cannot be used in a fork of a process that has used it, and PyTorch knows in the fork."""
    (starter.folder / "torch.py").write_text(
        "import os\nMAKER = os.getpid()\nclass cuda:\n    def _is_in_bad_fork():\n        return os.getpid() != MAKER\n"
    )
    (starter.folder / "library.py").write_text("import torch\n" + LIBRARY)
    assert ended(starter, "version") == (0, "a warning of the library\n1 imported here\n")


def test_a_server_that_was_killed_is_replaced(starter):
    os.mkfifo(starter.folder / "gate")
    run = start(starter, "version", "gate")
    starter.servers[0][0].kill()
    starter.servers[0][0].wait()
    assert run.wait(timeout=900) == 255
    run.kill(signal.SIGKILL)
    assert ended(starter, "exit")[0] == 3


def test_a_run_does_not_begin_when_its_caller_is_interrupted_before(starter):
    marker = starter.folder / "imports"
    (starter.folder / "library.py").write_text(f"import time\nopen({str(marker)!r}, 'w')\ntime.sleep(1.5)\n" + LIBRARY)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            start(starter, "version", name="never")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended(starter, "version")[0] == 0  # the server has come so far
    assert (starter.folder / "never").read_text() == ""


def test_a_signal_reaches_all_of_a_run_and_none_is_too_late(starter):
    os.mkfifo(starter.folder / "gate")
    run = start(starter, "version", "gate")
    run.kill(signal.SIGTERM)
    assert run.wait(timeout=900) == -signal.SIGTERM
    run.kill(signal.SIGTERM)


def test_a_training_in_a_fork_is_the_same_to_the_last_bit(tmp_path):
    line = [
        "tasks/image_classification/recipes/digits-noise-resnet-small.yaml",
        "--method",
        "xsam",
        "--max_steps",
        "3",
    ]
    line += ["--threads", "1", "--eval_strategy", "no", "--report_to", "none"]
    starter = Starter(ROOT, ["tasks.image_classification.train"], os.environ)
    try:
        with open(tmp_path / "log", "w") as log:
            forked = [*line, "--output_dir", str(tmp_path / "forked")]
            run = starter.start(["tasks.image_classification.train", *forked], log)
        images.main([*line, "--output_dir", str(tmp_path / "here")])
        assert run.wait(timeout=900) == 0, (tmp_path / "log").read_text()
    finally:
        starter.close()
        torch.set_num_threads(1)
    forked, here = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("forked", "here"))
    assert forked == here
    forked, here = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("forked", "here"))
    assert forked["metrics"] == here["metrics"] and forked["identity"] == here["identity"]
