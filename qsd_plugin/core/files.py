"""Files and folders that are either complete or absent: written next to their place, then moved there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qsd_plugin.core.errors import DataError


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Write ``content`` (bytes, or a function that writes to a binary file) to ``path``; a kill leaves the old file.

    Raises:
        DataError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(
            "Cannot write", value=str(path), expected="a writable folder", remedy=f"The system says: {error.strerror}."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` at the end of the block and vanishes if the block raises.

    Raises:
        DataError: ``target`` exists and is not an empty folder, or cannot be made.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError("Folder to write", value=str(target), expected="one that is empty or does not exist")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise DataError(
            "Cannot write",
            value=str(target),
            expected="a writable folder",
            remedy=f"The system says: {error.strerror}.",
        ) from error
    try:
        yield partial
        os.chmod(partial, 0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_writable(folder: Path) -> None:
    """Make ``folder`` and prove that a file can be written there, before any work is done.

    Raises:
        DataError: It cannot be made or written.
    """
    write_atomically(folder / ".writable", b"")
    (folder / ".writable").unlink(missing_ok=True)
