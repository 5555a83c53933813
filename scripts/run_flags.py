"""Flags and seeds of runs, as the command lines of the scripts give them."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence

from tasks.command import Parser
from tasks.methods import METHODS


NAME = r"\w[\w.+-]*"  # fit for a folder
OURS = ("seed", "output_dir", "resume_from_checkpoint")  # fields that run_seeds gives itself


def fields(parts: Sequence[str]) -> dict[str, str]:
    """The flags of a command line by their fields, however they are spelt: `--rho-max 3`, `--rho_max=3`. The last one counts."""
    found: dict[str, str] = {}
    name = None
    for part in parts:
        if part.startswith("--"):
            flag, _, value = part.partition("=")
            name = flag[2:].replace("-", "_")
            found[name] = value
        elif name is not None:
            found[name] = f"{found[name]} {part}".strip()
    return found


def parse_flags(text: str, where: str = "the flags") -> str:
    """
    Flags for a run, as one text.

    Raises:
        `argparse.ArgumentTypeError`: a quotation mark is not closed; a flag is ours to give.
    """
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{where} cannot be taken apart: {error}") from error
    for name in fields(parts):
        if name in OURS:
            raise argparse.ArgumentTypeError(f"--{name} stands among {where}, and run_seeds gives it to each run")
    return text


def refuse_overridden(own: str, given: str) -> None:
    """
    Refuses a flag for all runs that a run has a value of its own for: rows of several names would be one training.

    Raises:
        `ValueError`: a flag stands in both texts.
    """
    names, again = (fields(shlex.split(flags)).keys() for flags in (own, given))
    if names & again:
        raise ValueError(
            f"--{min(names & again)} stands in --flags, and some runs have a value of their own for it: leave it out."
        )


def parse_seed(text: str) -> int:
    """
    Raises:
        `argparse.ArgumentTypeError`: no training takes such a seed.
    """
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return int(text)


def parse_count(text: str) -> int:
    """
    Raises:
        `argparse.ArgumentTypeError`: it is no whole number from 1 on.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def parse_method(text: str) -> tuple[str, str]:
    """
    A method of the command line: its name and its flags.

    Raises:
        `argparse.ArgumentTypeError`: the name is not fit for a folder, or has no flags and is none of the tasks' methods; a quotation
            mark is not closed; a flag is ours to give.
    """
    name, equals, flags = text.partition("=")
    if not re.fullmatch(NAME, name):
        raise argparse.ArgumentTypeError(f'{text!r} should read NAME="--flag value ...", the name fit for a folder')
    if name.startswith("replaced-"):
        raise argparse.ArgumentTypeError(f"{name!r} is how replaced runs are called: give another name")
    parse_flags(flags, f"the flags of {name}")
    if not equals and name not in METHODS:
        raise argparse.ArgumentTypeError(
            f'{name!r} is no method of the tasks: give one of {", ".join(METHODS)}, or NAME="--flag value ..."'
        )
    return name, flags if equals else f"--method {name}"


def check_once(parser: Parser, **lists: Sequence | None) -> None:
    """Refuses arguments of the command line that are given twice, each list with its flag's name."""
    for name, given in lists.items():
        if given is not None and len(set(given)) < len(given):
            parser.error(f"--{name} are {' '.join(map(str, given))}: give each once")
