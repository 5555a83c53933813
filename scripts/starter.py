"""
Starts training runs from one process that has imported what they need. The imports take a run nine CPU seconds, a fork of that
process none.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


class Starter:
    """
    The caller's side: asks a server, which it starts at the first run, for forks.

    Args:
        folder (`Path`): where the runs work, the root of the repository.
        modules (`Sequence[str]`): what the runs execute, and the server imports.
        environment (`Mapping[str, str]`): of all runs.
    """

    def __init__(self, folder: Path, modules: Sequence[str], environment: Mapping[str, str]):
        self.folder, self.modules, self.environment = folder, modules, environment
        self.servers: list[tuple[subprocess.Popen, socket.socket]] = []
        self.sources: dict[Path, int] = {}

    def start(self, command: Sequence[str], log: IO) -> Started:
        """
        Starts `python -m` with a command, in a session of its own, its output in `log`.

        Raises:
            `RuntimeError`: the server has ended.
        """
        # Of the code as it is now: an edit or a checkout during a study would give results the name of another commit.
        sources = {
            path: path.stat().st_mtime_ns
            for name in ("tasks", "xsam_hf")
            for path in (self.folder / name).rglob("*.py")
        }
        if not self.servers or self.servers[-1][0].poll() is not None or sources != self.sources:
            self.servers.append(self._serve())  # the older ones still have runs to wait for
            self.sources = sources
        status, theirs = os.pipe()
        try:
            socket.send_fds(self.servers[-1][1], [json.dumps(command).encode()], [log.fileno(), theirs])
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(theirs)
        return Started(status)

    def _serve(self) -> tuple[subprocess.Popen, socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            server = subprocess.Popen(
                [sys.executable, "-c", "from scripts.starter import serve; serve()", *self.modules],
                cwd=self.folder,
                env=self.environment,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interruption reaches the caller, which ends the runs first
            )
        return server, ours

    def close(self) -> None:
        """Ends the servers; a run that is still there goes on, and nobody knows how it ends."""
        for server, orders in self.servers:
            server.kill()
            server.wait()
            orders.close()


class Started:
    """
    A run, with what is needed of `Popen`.

    Args:
        status (`int`): a pipe in which the run says its process's number, and the server its exit status.
    """

    def __init__(self, status: int):
        self._status = os.fdopen(status)
        self.returncode: int | None = None
        try:
            self.pid = int(self._status.readline())
        except ValueError:
            raise RuntimeError("the process that starts the runs has ended") from None
        except BaseException:
            self._status.close()  # without a reader the run does not begin
            raise

    def poll(self) -> int | None:
        """The exit status, -n after signal n, or `None` while the run goes on; 255 when the server is gone, which knew it."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline() or 255)
            self._status.close()
        return self.returncode

    def kill(self, number: int) -> None:
        """Sends a signal to the run and all processes of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout: float) -> int | None:
        """`poll`, after up to `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.returncode


def serve() -> None:
    """
    The server's side: imports, and becomes each run in a fork of itself.

    Forks of a process with threads are safe only while nobody needs them, so nothing here may compute: OpenMP's and autograd's
    threads begin with the first use. Those that numpy's BLAS and pyarrow's jemalloc begin at import are made anew in the child by them.
    """
    said = tempfile.TemporaryFile()
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    if sys.path[0] == "":
        sys.path[0] = os.getcwd()  # as `python -m` has it
    orders = socket.socket(fileno=os.dup(0))
    forks = sys.platform == "linux"  # on macOS its own libraries do not bear it
    for module in sys.argv[1:] if forks else ():
        try:
            importlib.import_module(module)
        except BaseException:  # each run meets it again, and says it in its log
            pass
        sys.modules.pop(module, None)  # a run executes it as `__main__`
    sys.stdout.flush()
    gc.freeze()  # to look through what the imports have made, which stays, takes a run two seconds, and memory that forks share

    running: dict[int, int] = {}
    orders.settimeout(0.1)
    while True:
        while running:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            status = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):  # the caller was interrupted, and did not want this run
                os.write(status, f"{os.waitstatus_to_exitcode(ended)}\n".encode())
            os.close(status)
        try:
            order, files, *_ = socket.recv_fds(orders, 1 << 20, 2)
        except TimeoutError:
            continue
        if not order:  # the caller is gone
            return
        log, status = files
        if (pid := os.fork()) == 0:
            break
        running[pid] = status
        os.close(log)

    os.setsid()
    for other in running.values():
        os.close(other)
    orders.close()
    try:
        os.write(status, f"{os.getpid()}\n".encode())
    except BrokenPipeError:  # the caller was interrupted
        os._exit(1)
    os.close(status)
    null = os.open(os.devnull, os.O_RDONLY)
    for file, stream in ((null, 0), (log, 1), (log, 2)):
        os.dup2(file, stream)
    os.close(null)
    os.close(log)
    command = json.loads(order)
    torch = sys.modules.get("torch")
    asked = torch is not None and torch.cuda._is_in_bad_fork()  # an import has asked CUDA for its devices
    if not forks or asked or command[0] not in sys.argv[1:]:  # a launcher of several processes, for instance
        os.execv(sys.executable, [sys.executable, "-m", *command])
    os.write(2, os.pread(said.fileno(), 1 << 20, 0))  # the imports' warnings
    said.close()
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
