"""Flags on the command line, after an optional YAML recipe whose fields are their defaults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse(dataclasses: Sequence[type], argv: Sequence[str], description: str) -> tuple[Any, ...]:
    """
    Parses `[recipe.yaml] [--flag value ...]` into one object for each dataclass; a flag comes before the recipe's value.

    Raises:
        `ValueError`: the recipe is missing, or has a field that no dataclass has.
    """
    parser = HfArgumentParser(dataclasses, description=description)
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
    return parser.parse_args_into_dataclasses(argv)
