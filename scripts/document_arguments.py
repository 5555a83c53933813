"""Writes docs/arguments.md: every field of XSAMArguments with its choices, its default and its help."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

from tasks.command import Parser, run
from xsam_hf import XSAMArguments


PAGE = Path(__file__).resolve().parent.parent / "docs" / "arguments.md"
HEAD = """# The method's arguments

Fields of `XSAMArguments`, and so of `XSAMTrainingArguments` and `XSAMSeq2SeqTrainingArguments`: keyword arguments, and flags of the
command line through `HfArgumentParser`. *`scripts/run document_arguments` writes this page.*

| field | default | meaning |
|---|---|---|
"""


def page() -> str:
    hints, rows = get_type_hints(XSAMArguments), []
    for field in fields(XSAMArguments):
        choices = [choice for choice in get_args(hints[field.name]) if isinstance(choice, str)]
        meaning = field.metadata["help"] + (
            f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        )
        default = "–" if field.default is None else f"`{field.default}`"
        rows.append(f"| `{field.name}` | {default} | {meaning} |\n")
    return HEAD + "".join(rows)


def main(argv: Sequence[str]) -> None:
    Parser(description=__doc__).parse_args(argv)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    run(main)
