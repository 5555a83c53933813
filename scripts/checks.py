"""Checks that run one after the other, each in a process of its own: none of them ends, poisons or delays the others for long."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from scripts.table import to_markdown


@dataclass(frozen=True)
class Expected:
    """A range, ends included; without ends the figure is only told."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        return self == Expected() or self.low <= value <= self.high

    def __str__(self) -> str:
        if self == Expected():
            return ""
        if self.low == self.high:
            return f"{self.low:g}"
        if self.low == -math.inf:
            return f"≤ {self.high:g}"
        return f"≥ {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"


TOLD = Expected()


def at_most(value: float) -> Expected:
    return Expected(high=value)


def at_least(value: float) -> Expected:
    return Expected(low=value)


def exactly(value: float) -> Expected:
    return Expected(value, value)


class Skip(Exception):
    """The check needs something that is not here."""


@dataclass(frozen=True)
class Line:
    """
    One figure of a check.

    Args:
        check, what (`str`): what is checked.
        status (`str`): `ok`, `failed`, `told` (nothing is expected), `raised` (the check ended early) or `skipped`.
        found (`float`, *optional*): the figure; none where the check raised or was skipped.
        expected (`str`): the range that it should be in.
        unit (`str`): of both.
        seconds (`float`): since the line before.
        note (`str`): why it raised or was skipped.
    """

    check: str
    what: str
    status: str
    found: float | None = None
    expected: str = ""
    unit: str = ""
    seconds: float = 0.0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Its fields; a figure that is not finite is text, for which JSON has no number."""
        fields = asdict(self)
        if self.found is not None and not math.isfinite(self.found):
            fields["found"] = str(self.found)
        return fields


# What is checked, what was found (an exception, if only this part of the check ended early), what is expected, its unit.
Figure = tuple[str, Any, Expected, str]
Found = Iterator[Figure]
# Called with a device, such as "cuda". Raises `Skip`.
Check = Callable[[str], Found]


def needs_a_gpu(device: str, why: str = "it is about CUDA") -> None:
    if device != "cuda":
        raise Skip(why)


def each(part: Callable[..., Found], names: Iterable[str], *args: Any) -> Found:
    """The figures of `part(name, *args)` for every name. One that raises does not end the others."""
    for name in names:
        try:
            for what, *rest in part(name, *args):
                yield f"{name}: {what}", *rest
        except Exception as error:
            yield name, error, TOLD, ""


def run_checks(checks: Sequence[Check], device: str, limit: float, deadline: float) -> Iterator[Line]:
    """
    The lines of all checks, as they come.

    Args:
        checks (`Sequence[Check]`): functions at the top of a module; a line names them by their function.
        device (`str`): what each is called with.
        limit (`float`): seconds after which a check is ended.
        deadline (`float`): on `time.monotonic()`'s clock; checks that would begin later are skipped.
    """
    for check in checks:
        left = deadline - time.monotonic()
        if left <= 0:
            yield Line(_name(check), "", "skipped", note="no time was left")
            continue
        yield from _in_a_process(check, device, min(limit, left))


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")


def _in_a_process(check: Check, device: str, limit: float) -> Iterator[Line]:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        process = multiprocessing.Process(target=_child, args=(check, device, sender, output.name))
        began, ended = time.monotonic(), False
        process.start()
        sender.close()
        try:
            while not ended:
                if not receiver.poll(max(0.0, began + limit - time.monotonic())):
                    yield Line(_name(check), "", "raised", note=f"it was not done after {limit:.0f} s")
                    break
                line = receiver.recv()
                ended = line is None
                if line is not None:
                    yield line
        except EOFError:
            process.join(10)
            said = " ".join(output.read().split())[-200:]
            yield Line(_name(check), "", "raised", note=f"its process ended with status {process.exitcode}: {said}")
        finally:
            _end(process)


def _child(check: Check, device: str, sender: Connection, output: str) -> None:
    os.setpgrp()  # so that processes of its own can be ended with it
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    name, began = _name(check), time.monotonic()
    try:
        for what, found, expected, unit in check(device):
            if isinstance(found, Exception):
                sender.send(_raised(name, what, found, time.monotonic() - began))
                began = time.monotonic()
                continue
            found = float(found)
            status = "told" if expected == TOLD else "ok" if expected.holds(found) else "failed"
            now = time.monotonic()
            sender.send(Line(name, what, status, found, str(expected), unit, round(now - began, 2)))
            began = now
    except Skip as reason:
        sender.send(Line(name, "", "skipped", note=str(reason)))
    except Exception as error:
        sender.send(_raised(name, "", error, time.monotonic() - began))
    sender.send(None)


def _raised(check: str, what: str, error: Exception, seconds: float) -> Line:
    traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({os.path.basename(place.filename)}:{place.lineno})"
    return Line(check, what, "raised", seconds=round(seconds, 2), note=note)


def _end(process: Any) -> None:
    process.join(5)
    try:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has left behind
    except ProcessLookupError:
        process.kill()
    process.join()


def table(lines: Sequence[Line]) -> str:
    """Markdown, a row for each line."""
    rows = [
        [
            line.check,
            ": ".join(filter(None, (line.what, line.note))),
            _figure(line.found),
            line.expected,
            line.unit,
            line.status,
        ]
        for line in lines
    ]
    return to_markdown([["check", "what", "found", "expected", "unit", ""], *rows])


def _figure(found: float | None) -> str:
    return "" if found is None else f"{found:,.0f}" if abs(found) >= 1000 else f"{found:.3g}"
