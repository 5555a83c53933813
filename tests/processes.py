"""Processes that have imported everything already: forks of the tests' own, and commands of the tasks (see test_starter.py)."""

import functools
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState

from scripts.starter import Starter


# Seconds after which a process hangs. Two of them, which take half a minute alone, took five beside eight busy ones.
HUNG = 900


def start_process(work):
    """Starts `work(report)` in a forked process; what it reports, its traceback included, can be read from a pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        sys.stdout = open(os.devnull, "w")
        work(lambda text: os.write(writing, text.encode()))
        status = 0
    except BaseException:
        os.write(writing, traceback.format_exc().encode())
    finally:
        os._exit(status)


def end_process(child, reading, seconds=HUNG):
    """Its exit status, negative for a signal, and its report. One that hangs fails the test."""
    deadline = time.time() + seconds
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.time() > deadline:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.01)
    with open(reading, "rb") as pipe:
        report = pipe.read().decode()
    assert time.time() < deadline, "it hung"
    return os.waitstatus_to_exitcode(ended[1]), report


def in_process(work):
    return end_process(*start_process(work))


def in_ranks(work, number=2, seconds=HUNG):
    """The exit status and the report of `work(rank, report)` in each of some gloo processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def ranked(rank):
        def run(report):
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            os.environ |= {"WORLD_SIZE": f"{number}", "LOCAL_WORLD_SIZE": f"{number}"}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
            AcceleratorState._reset_state(reset_partial_state=True)
            work(rank, report)

        return run

    started = [start_process(ranked(rank)) for rank in range(number)]
    return [end_process(*process, seconds) for process in started]


@functools.cache
def starter():
    """Its server ends with this process."""
    return Starter(
        Path(__file__).parents[1], ["tasks.image_classification.train", "tasks.translation.train"], os.environ
    )


def run_command(log, module, *arguments, status=0):
    """What `python -m` of a task's module says on both streams, once it has ended with that status."""
    with open(log, "w") as file:
        run = starter().start([module, *map(str, arguments)], file)
    ended, said = run.wait(timeout=500), Path(log).read_text()
    assert ended == status, said[-3000:]
    return said
