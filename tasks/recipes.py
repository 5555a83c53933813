"""Flags on the command line, after an optional YAML recipe whose fields are their defaults."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.events import AliasEvent
from transformers import HfArgumentParser

from tasks.command import Parser, refusals, sentence
from tasks.methods import METHODS, flags, is_method, name_of
from tasks.secret import is_secret


ENDINGS = (".yaml", ".yml")
# Mappings that may stand in a file of their own.
FILES = ("accelerator_config", "deepspeed", "fsdp_config")


class DataclassParser(Parser, HfArgumentParser):
    """Transformers' parser, whose flags are the fields of dataclasses, with our manners; its numbers are finite, and no value is empty."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is float:
                action.type = _finite

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            # An environment variable that is not set, for instance: as a folder it would be the current one.
            if isinstance(value, str) and not value.strip() and value != self.get_default(name):
                raise ValueError(f"`{name}` is empty: give a value, or leave it out.")
        return found, rest


def parse(classes: Sequence[type], argv: Sequence[str], description: str, runs: str = "runs") -> tuple[Any, ...]:
    """
    Parses `[recipe.yaml] [--method NAME] [--flag value ...]` into one object for each dataclass.

    Precedence: a flag, then the flags that the command line's method stands for (they are printed), then the recipe's fields,
    then those of the recipe's own `method`. Without an `output_dir` anywhere, it is `RUNS/RECIPE/METHOD/seed-SEED`, so that no
    two methods or seeds of a recipe share a folder.

    Args:
        classes (`Sequence[type]`): dataclasses, the task's own, then the Trainer's, which has `output_dir` and `seed`.
        argv (`Sequence[str]`): the command line.
        description (`str`): what `--help` begins with.
        runs (`str`): the folder for what has no `output_dir`.

    Raises:
        `ValueError`: the recipe or the method is missing; a field of the recipe is unknown, or its value not of the field's
            type; a method is named whose flags others overrule.
    """
    parser = DataclassParser(classes, description=description)
    parser.add_argument("--method", help=f"A named set of flags: {', '.join(METHODS)}. Other flags come before it.")
    argv = list(argv)
    recipe = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    values = read(recipe) if recipe else {}
    _refuse_other_task(recipe, Path(runs).name)
    own_method = values.pop("method", None)
    if own_method is not None:
        try:
            flags(own_method)
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}") from error
    line = _as_flags(recipe, values, parser, classes)

    found, rest = parser.parse_known_args(argv)
    late = [part for part in rest if part.endswith(ENDINGS)]
    if late:
        raise ValueError(f"{late[0]} comes too late: a recipe is the first argument, before all flags.")
    parser.refuse_unknown(rest)
    method = found.method if found.method is not None else own_method
    named = [f"--{name}={value}" for name, value in _fields_of(method).items()]
    line = [*line, *named] if found.method is not None else [*named, *line]
    if method is not None:
        print(f"--method {method} stands for: {flags(method) or 'nothing beyond the recipe'}", file=sys.stderr)

    objects = _instances(parser, [*line, *argv], classes)
    args = objects[-1]
    if method is not None and not is_method(method, args):
        raise ValueError(
            f"`method` is {method}, but with the other fields the run would be {name_of(args)}: leave out the method, or what "
            f"contradicts {flags(method) or 'the defaults'}."
        )
    if not any(part.split("=")[0] in ("--output_dir", "--output-dir") for part in (*line, *argv)):
        name = recipe.stem if recipe else "no-recipe"
        args.output_dir = str(Path(runs, name, method or name_of(args), f"seed-{args.seed}"))
    if args.hub_token is not None:
        # The Trainer keeps its arguments in every checkpoint, and the hub's client looks here too.
        os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
    return objects


def read(recipe: Path) -> dict[str, Any]:
    """
    The fields of a recipe, read as YAML 1.2: `no` and `1:30` are text, `1e-3` is a number, and no key comes twice.

    Raises:
        `ValueError`: there is no such file, or it is not one YAML mapping of names to values.
    """
    if not recipe.is_file():
        raise ValueError(f"There is no recipe {recipe}: {_meant(recipe)}")
    try:
        text = recipe.read_text(encoding="utf-8-sig")
        if any(line.startswith("%") for line in text.splitlines()):
            raise ValueError("a line begins with %, and directives are not taken")
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            raise ValueError("a line has an alias (*name): write out what it stands for")
        values = YAML(typ="safe", pure=True).load(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{recipe} is not in UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except (YAMLError, ValueError, RecursionError) as error:
        said = sentence(error).partition(" To suppress this check")[0]  # of keys that are there twice
        raise ValueError(f"{recipe} is not a recipe in YAML: {said}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{recipe} is not a recipe in YAML: expected lines of the form `field: value`.")
    return values


def _refuse_other_task(recipe: Path | None, task: str) -> None:
    """
    A recipe of another task may hold fields that all tasks have, and would train something else.

    Raises:
        `ValueError`: so it is.
    """
    tasks, folder = Path(__file__).parent, recipe.absolute().parent if recipe else Path()
    if (
        folder.name == "recipes"
        and folder.parent.parent == tasks
        and (tasks / task).is_dir()
        and folder.parent.name != task
    ):
        raise ValueError(
            f"{recipe} is a recipe of the task {folder.parent.name}, not of {task}: run tasks.{folder.parent.name}.train."
        )


def _meant(recipe: Path) -> str:
    known = {file.stem: file for file in sorted(Path(__file__).parent.glob("*/recipes/*.yaml"))}
    near = difflib.get_close_matches(recipe.stem, known, n=1)
    if not near:
        return "give a YAML file, such as those in the task's recipes folder."
    return f"did you mean {os.path.relpath(known[near[0]])}?"


def _as_flags(
    recipe: Path | None, values: dict[str, Any], parser: DataclassParser, classes: Sequence[type]
) -> list[str]:
    """
    A recipe's fields as flags, each checked by itself.

    Raises:
        `ValueError`: an unknown field, or a value that is not of the field's type.
    """
    actions = {action.dest: action for action in parser._actions if action.nargs != 0 and action.dest != "method"}
    unknown = sorted(values.keys() - actions.keys())
    if unknown:
        raise ValueError(f"{recipe} has unknown fields: {', '.join(unknown)}. `--help` lists the known ones.")
    types = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    line = []
    for name, value in values.items():
        try:
            flag = _as_flag(name, value, actions[name], types[name])
            parser.parse_known_args(flag)
        except ValueError as error:
            raise ValueError(f"{recipe}: {sentence(error)}") from error
        line += flag
    return line


def _as_flag(name: str, value: Any, action: Any, hint: Any) -> list[str]:
    if value is None:
        if action.default is not None:
            raise ValueError(f"`{name}` has no value: give one, or leave the line out for {action.default!r}.")
        return []
    if is_secret(name):
        raise ValueError(f"`{name}` is a secret, and a recipe is kept with the results: give it as a flag, or log in.")
    if isinstance(value, list):
        if action.nargs != "+":
            raise ValueError(f"`{name}` is a list: give one value.")
        parts = [_scalar(name, part, action) for part in value]
        if flag := next((part for part in parts if part.startswith("-")), None):
            raise ValueError(f"`{name}` has {flag!r}, which would be a flag: give it on the command line.")
        return [f"--{name}", *parts]
    if isinstance(value, dict):
        if not _is_mapping(hint):
            raise ValueError(f"`{name}` is a mapping: give one value.")
        try:
            return [f"--{name}={json.dumps(value, allow_nan=False)}"]
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` is {value}, which is no JSON: {sentence(error)}.") from error
    return [f"--{name}={_scalar(name, value, action)}"]


def _is_mapping(hint: Any) -> bool:
    """Whether a field takes a mapping: `dict`, `dict[str, Any] | None` ..."""
    return any((get_origin(part) or part) is dict for part in (hint, *get_args(hint)))


def _scalar(name: str, value: Any, action: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bool | int | float):
        raise ValueError(f"`{name}` is {value}, a {type(value).__name__} in YAML: put it in quotes if it is text.")
    if action.type is str:
        raise ValueError(
            f"`{name}` is the {type(value).__name__} {value} in YAML, and text is expected: put it in quotes."
        )
    if isinstance(value, bool) and action.type in (int, _finite):
        raise ValueError(f"`{name}` is {str(value).lower()}: give a number.")
    return str(value)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


_finite.__name__ = "finite float"  # argparse: "invalid finite float value: 'nan'"


def _fields_of(method: Any) -> dict[str, Any]:
    if method is None:
        return {}
    flags(method)  # which refuses unknown ones
    return METHODS[method]


def _instances(parser: DataclassParser, line: list[str], classes: Sequence[type]) -> tuple[Any, ...]:
    """
    The dataclasses, filled in.

    Raises:
        `ValueError`: a value is refused, by us or by transformers, or a mapping is no JSON.
    """
    found, _ = parser.parse_known_args(line)
    for cls in classes:
        for name, hint in get_type_hints(cls).items():
            value = getattr(found, name, None)
            if not _is_mapping(hint) or not isinstance(value, str) or (name in FILES and not value.startswith("{")):
                continue
            try:
                whole = isinstance(json.loads(value, parse_constant=_finite), dict)
            except ValueError as error:
                raise ValueError(f"`{name}` is {value}, which is no JSON: {error}.") from error
            if not whole:
                raise ValueError(f'`{name}` is {value}: give a mapping in JSON, such as {{"name": 1}}.')
    with refusals():
        return parser.parse_args_into_dataclasses(line, look_for_args_file=False)[: len(classes)]
