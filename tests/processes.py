"""Processes that have imported everything already: forks of the tests' own, and commands of the tasks (see test_starter.py)."""

import functools
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.run as torchrun
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState

from scripts.starter import Starter


# Seconds after which a process hangs. Two of them, which take half a minute alone, took five beside eight busy ones.
HUNG = 900


@contextmanager
def ignoring(number):
    """As a shell starts the tests with `nohup` or `&`: a process that begins here ignores the signal, unless it is told not to."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


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


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def in_ranks(work, number=2, seconds=HUNG):
    """The exit status and the report of `work(rank, report)` in each of some gloo processes."""
    port = free_port()

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


def forks_for_a_script(work):
    """From now on `torchrun` and `accelerate launch`, called here, start forks that call `work`, where they would start a script."""
    config_from_args = torchrun.config_from_args

    def forking(args):
        config, _, _ = config_from_args(args)
        config.start_method = "fork"
        return config, work, ()

    torchrun.config_from_args = forking
    AcceleratorState._reset_state(reset_partial_state=True)


def under_torchrun(work, number=2):
    def run(report):
        forks_for_a_script(work)
        torchrun.run(torchrun.parse_args(["--nproc_per_node", f"{number}", "--standalone", "train.py"]))

    status, report = in_process(run)
    assert status == 0, report


def launched(config, work, *flags, machines=1):
    """
    Calls `work` in each process that `accelerate launch` starts by a config of scripts/accelerate/, with flags for what shall be other
    than there. Machines are processes of this one, each with a launcher.
    """
    file = Path(__file__).parents[1] / "scripts" / "accelerate" / f"{config}.yaml"
    address = [
        "--main_process_ip",
        "localhost",
        "--main_process_port",
        f"{free_port()}",
        "--num_machines",
        f"{machines}",
    ]

    def launch(machine):
        def run(report):
            forks_for_a_script(work)
            rank = ["--machine_rank", f"{machine}"]
            launch_command(
                launch_command_parser().parse_args(["--config_file", f"{file}", *address, *rank, *flags, "train.py"])
            )

        return run

    started = [start_process(launch(machine)) for machine in range(machines)]
    ended = [end_process(*process) for process in started]
    assert all(status == 0 for status, _ in ended), "\n".join(report for _, report in ended)


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
    ended, said = run.wait(timeout=900), Path(log).read_text()
    assert ended == status, said[-3000:]
    return said
