"""Flags on the command line, after an optional YAML recipe whose fields are their defaults."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from tasks.methods import METHODS, flags


def parse(dataclasses: Sequence[type], argv: Sequence[str], description: str) -> tuple[Any, ...]:
    """
    Parses `[recipe.yaml] [--method NAME] [--flag value ...]` into one object for each dataclass.

    A flag comes before the method's value (which is printed), and that before the recipe's.

    Raises:
        `ValueError`: the recipe or the method is missing, or the recipe has a field that no dataclass has.
    """
    parser = HfArgumentParser(dataclasses, description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--method", help=f"A named set of flags: {', '.join(METHODS)}. Other flags come before it.")
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        recipe = Path(argv.pop(0))
        if not recipe.is_file():
            raise ValueError(
                f"There is no recipe {recipe}: give a YAML file, such as those in the task's recipes folder."
            )
        values = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
        unknown = sorted(values.keys() - {action.dest for action in parser._actions})
        if unknown:
            raise ValueError(f"{recipe} has unknown fields: {', '.join(unknown)}. `--help` lists the known ones.")
        parser.set_defaults(**values)
        for action in parser._actions:
            if action.dest in values:
                action.required = False
    method, argv = _take_method(argv)
    if method is not None:
        print(f"--method {method} stands for: {flags(method) or 'nothing beyond the recipe'}", file=sys.stderr)
        parser.set_defaults(**METHODS[method])
    return parser.parse_args_into_dataclasses(argv)[: len(dataclasses)]


def _take_method(argv: list[str]) -> tuple[str | None, list[str]]:
    alone = ArgumentParser(add_help=False, allow_abbrev=False)
    alone.add_argument("--method")
    found, rest = alone.parse_known_args(argv)
    return found.method, rest
