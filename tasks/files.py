"""Files that are whole or not there, and archives that cannot fill the memory."""

from __future__ import annotations

import filecmp
import gzip
import os
import tarfile
import zlib
from collections.abc import Collection, Iterable
from itertools import combinations
from pathlib import Path
from typing import IO


# More than any archive of these tasks unpacks to: CIFAR's are 186 MB.
LARGEST = 512 << 20


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes beside the file first: whoever interrupts this finds the old file or the new one."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def refuse_file(folder: Path, name: str) -> None:
    """
    Refuses a path where a folder is to be, and a file is.

    Args:
        folder (`Path`): need not be there.
        name (`str`): what the path was given as, for the message.

    Raises:
        `ValueError`: it, or one of the folders that it is in, is a file.
    """
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(
                f"{name} is {folder}, and {part} is a file: give a folder, or a path where nothing is yet."
            )


def refuse_a_copy(files: Iterable[Path], what: str) -> None:
    """
    Refuses two files of one split that are the same: all that they hold would count twice.

    Args:
        files (`Iterable[Path]`): the split's.
        what (`str`): what they hold, for the message.

    Raises:
        `ValueError`: there are such; it names both.
    """
    for one, other in combinations(sorted(files), 2):
        if filecmp.cmp(one, other, shallow=False):  # reads them only where their sizes are equal
            raise ValueError(
                f"{one} and {other} are the same, and their {what} would count twice: take one of them away."
            )


class _Bounded:
    """A stream that ends with an error after `LARGEST` bytes, however little it was packed into."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.left = stream, LARGEST

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {LARGEST >> 20} MiB")
        return data


def read_gzip(file: Path) -> bytes:
    """
    What a gzipped file unpacks to.

    Raises:
        `ValueError`: it is cut off, damaged, not gzipped, or unpacks to more than `LARGEST` bytes.
    """
    try:
        with gzip.open(file) as stream:
            return _Bounded(stream).read(LARGEST + 1)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{file} is cut off, damaged or not gzipped ({error}): fetch it again.") from error


def read_members(file: Path, names: Collection[str]) -> dict[str, bytes]:
    """
    The files of a .tar.gz archive that have these names, whatever folder they are in; nothing is written to the disk.

    Raises:
        `ValueError`: there is no such archive, it is cut off, damaged, or unpacks to more than `LARGEST` bytes, or a file is
            missing in it or there twice.
    """
    found: dict[str, bytes] = {}
    try:
        with gzip.open(file) as stream, tarfile.open(fileobj=_Bounded(stream), mode="r|") as archive:
            for member in archive:
                name = Path(member.name).name
                if not member.isfile() or name not in names:
                    continue
                if name in found:
                    raise ValueError(f"it holds {name} twice")
                if member.size > LARGEST:  # a sparse one can be larger than what was unpacked
                    raise ValueError(f"{name} has more than {LARGEST >> 20} MiB")
                found[name] = archive.extractfile(member).read()
    except FileNotFoundError:
        raise ValueError(f"There is no archive {file}.") from None
    except IsADirectoryError:
        raise ValueError(
            f"{file} is a folder, and an archive is expected: give the .tar.gz or .tgz file itself."
        ) from None
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(
            f"{file} is cut off, damaged or no archive ({error}): delete it and fetch it again."
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{file} is another archive, or cut off: {', '.join(missing)} not found in it.")
    return found
