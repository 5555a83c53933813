"""What must not be written down: the values of fields and flags whose names say that they are secret."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


# `hub_token` and `api-key`, but not `max_tokens`.
NAME = re.compile(r"(?:^|[_-])(?:token|key|apikey|secret|password|passwd)(?:$|[_-])", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a field or a flag of that name holds a secret."""
    return NAME.search(name.lstrip("-")) is not None


def without_secrets(value: Any) -> Any:
    """A copy of nested mappings and lists in which secrets are replaced by their names."""
    if isinstance(value, Mapping):
        return {
            name: f"<{name}>" if is_secret(str(name)) and part is not None else without_secrets(part)
            for name, part in value.items()
        }
    return [without_secrets(part) for part in value] if isinstance(value, list | tuple) else value


def without_secret_flags(command: Sequence[str]) -> list[str]:
    """A command line in which the values of secret flags are replaced by the flags' names."""
    shown: list[str] = []
    hide = None
    for part in command:
        flag, equals, _ = part.partition("=")
        if hide is not None and not part.startswith("--"):
            part = f"<{hide}>"
        hide = None
        if flag.startswith("-") and is_secret(flag):
            name = flag.lstrip("-")
            part, hide = (f"{flag}=<{name}>", None) if equals else (part, name)
        shown.append(part)
    return shown
