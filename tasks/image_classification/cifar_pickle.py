"""A batch of CIFAR's python archive, unpickled: arrays of bytes, and nothing that a pickle may run."""

from __future__ import annotations

import io
import pickle
import reprlib
from typing import Any, NoReturn

import numpy as np

from tasks.command import sentence


def unpickle(data: bytes, where: str) -> dict[str, Any]:
    """
    A CIFAR batch: a pickled dictionary of lists, texts and arrays of bytes. Nothing else is made of it, and nothing is run.

    Raises:
        `ValueError`: it is damaged, or asks for anything that such a batch does not need.
    """
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # of the unpickler: whatever the bytes make it stumble over
        told = isinstance(error, pickle.UnpicklingError)
        reason = sentence(error) if told else f"it is cut off or damaged ({sentence(error)})"
        raise ValueError(
            f"{where} is not a batch of CIFAR: {reason}. Nothing of it was run; do not use it."
        ) from error
    if not isinstance(batch, dict):
        raise ValueError(f"{where} is not a batch of CIFAR, but a {type(batch).__name__}.")
    entries = {}
    for key, value in batch.items():
        name = key.decode("latin1") if isinstance(key, bytes) else key
        try:
            entries[name] = value.array() if isinstance(value, _Array) else value
        except ValueError as error:
            raise ValueError(f"{where} is not a batch of CIFAR: its {name!r} {error}.") from error
    return entries


class _Array:
    """Stands in for `numpy.ndarray` while a pickle is read: keeps what it says of an array, and believes none of it."""

    state: Any = None

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """
        The array, made from its bytes alone.

        Raises:
            `ValueError`: it is none of unsigned bytes, or its shape and its bytes do not fit.
        """
        try:
            _, shape, kind, by_columns, content = self.state
        except (TypeError, ValueError):
            raise ValueError("lacks its shape or its bytes") from None
        if not isinstance(kind, _Kind) or kind.name not in ("u1", "|u1", "uint8"):
            name = reprlib.repr(kind.name if isinstance(kind, _Kind) else kind)
            raise ValueError(f"is of type {name}, not of unsigned bytes")
        if isinstance(content, str):  # as Python 2 wrote bytes
            content = content.encode("latin1")
        whole = isinstance(shape, tuple) and len(shape) < 32 and all(type(n) is int and n >= 0 for n in shape)
        if not whole or not isinstance(content, bytes) or int(np.prod(shape, dtype=object)) != len(content):
            count = len(content) if isinstance(content, bytes) else "no"
            raise ValueError(f"has the shape {reprlib.repr(shape)} and {count} bytes")
        return np.frombuffer(content, "u1").reshape(shape, order="F" if by_columns else "C")


class _Kind:
    """Stands in for `numpy.dtype`: the name alone, whatever else the pickle says of it."""

    name: Any = None

    def __init__(self, *arguments: Any):
        if arguments:
            self.name = arguments[0]

    def __setstate__(self, state: Any) -> None:
        pass


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Stands in for `_codecs.encode`, by which newer Pythons write bytes for older ones."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes a {type(text).__name__} as {reprlib.repr(encoding)}")
    return text.encode("latin1")


class _Operations(dict):
    def __missing__(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"it holds the operation {chr(code)!r}, which such a batch does not need")


class _BatchUnpickler(pickle._Unpickler):
    """
    Knows what a pickled array of bytes needs, under the old and the new name of NumPy's module, and makes stand-ins of it.

    The unpickler in Python, not the one in C, which takes as much memory as a few bytes tell it to; and of its operations those
    that a dictionary of lists, texts and arrays is made of.
    """

    STAND_INS = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Kind,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self.STAND_INS.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return found

    def load_build(self) -> None:
        if type(self.stack[-2]) not in (_Array, _Kind):  # on a class or a function it would change ours
            raise pickle.UnpicklingError("it sets the state of something that is no array")
        super().load_build()

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])  # those since the mark
        super().load_setitems()

    def _check_keys(self, keys: list) -> None:
        # Tuples in tuples, a million deep, would overflow the stack when they are hashed.
        if not all(isinstance(key, str | bytes) for key in keys):
            raise pickle.UnpicklingError("a dictionary has a key that is no text")

    _NEEDED = (
        "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 STRING BINSTRING "
        "SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST "
        "APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT GLOBAL STACK_GLOBAL REDUCE PUT BINPUT LONG_BINPUT "
        "MEMOIZE GET BINGET LONG_BINGET"
    )
    dispatch = _Operations(
        {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, n)[0] for n in _NEEDED.split())}
    )
    dispatch |= {pickle.BUILD[0]: load_build, pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems}
