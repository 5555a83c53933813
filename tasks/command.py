"""How every command of this repository refuses: one sentence on stderr and status 2, and no traceback unless it is asked for."""

from __future__ import annotations

import difflib
import pickle
import re
import signal
import sys
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from safetensors import SafetensorError


# In the messages of torch.save and torch.load.
_OF_A_FILE = ("PytorchStreamReader", "PytorchStreamWriter", "inline_container", "unexpected pos")


class Parser(ArgumentParser):
    """
    Names the flag that is wrong, without the usage of all the others, and takes no abbreviations.

    Raises:
        `ValueError`: a flag is unknown, or its value is of another type.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter, **kwargs)
        # -1e-3 is a value as well, and no flag; older Pythons know -0.001 alone.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
        self.add_argument("--traceback", action="store_true", help="Show where in the code a refusal comes from.")

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").rstrip(".")
        raise ValueError(f"{message}{'' if message.endswith('?') else '.'} --help lists all flags.")

    def refuse_unknown(self, rest: Sequence[str]) -> None:
        """Refuses what `parse_known_args` has left over, and names the flag that was probably meant."""
        if not rest:
            return
        # Without the values: one of them may be a password.
        flag = next((part for part in rest if part.startswith("-")), rest[0]).partition("=")[0]
        known = [
            option.lstrip("-") for action in self._actions for option in action.option_strings if option[1:2] == "-"
        ]
        # Without the dashes, which would make --lr look like --rho.
        near = difflib.get_close_matches(flag.lstrip("-"), known, n=1)
        if not flag.startswith("-"):
            self.error(f"{flag!r} is not expected there")
        self.error(f"there is no flag {flag}" + (f"; did you mean --{near[0]}?" if near else ""))

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        self.refuse_unknown(rest)
        return found


def run(main: Callable[[Sequence[str]], object]) -> None:
    """
    Calls `main` with the command line and turns what it refuses into one sentence and status 2; `--traceback` shows the rest.

    What a command refuses is a `ValueError`, a `NotImplementedError`, or what the system says of a file (`OSError`), also where
    safetensors and torch say it in words of their own. Any other error is a fault of ours and keeps its traceback.
    """
    argv = sys.argv[1:]
    # In a locale without the letters of a translation they are escaped; a finished training does not end there.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(_end("Interrupted.", 128 + signal.SIGINT))
    except (ValueError, NotImplementedError, OSError) as error:
        if "--traceback" in argv:
            traceback.print_exc()
        sys.exit(_end(f"error: {sentence(error)}", 2))
    except (SafetensorError, RuntimeError) as error:
        if not is_of_a_file(error):
            raise
        if "--traceback" in argv:
            traceback.print_exc()
        sys.exit(
            _end(
                f"error: a file could not be read or written ({sentence(error)}): is it damaged, or the disk full?", 2
            )
        )


def is_of_a_file(error: BaseException) -> bool:
    """Whether safetensors, or torch's writer and reader, met with a full disk or a damaged file."""
    return isinstance(error, SafetensorError) or any(part in str(error) for part in _OF_A_FILE)


@contextmanager
def needs(packages: str, module: str) -> Iterator[None]:
    """
    Around imports that the `checkout` extra does not bring. Where one fails, a command ends with one sentence and status 2, as `run`
    would end it.

    Args:
        packages (`str`): what to install.
        module (`str`): the importing module's `__name__`.

    Raises:
        `ImportError`: the module is imported, and no command.
    """
    try:
        yield
    except ImportError as error:
        if module != "__main__":
            raise
        sys.exit(_end(f"error: {sentence(error)}: this command needs `pip install {packages}`.", 2))


@contextmanager
def refusals() -> Iterator[None]:
    """
    Around what transformers makes of its arguments before it trains.

    Raises:
        `ValueError`: instead of whatever it stumbles over: a package that is not installed, a keyword that a schedule does not
            take.
    """
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in text:  # which advises to load it all the same
        return "a file with weights or states holds more than tensors, or is damaged, and was not loaded: do not use this folder."
    says_little = isinstance(error, KeyError | AttributeError | TypeError | IndexError) or not text
    if says_little:
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def cut(text: str, most: int = 80) -> str:
    """What is quoted of data, which can be a whole column: at most so many characters of it."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _end(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return status
