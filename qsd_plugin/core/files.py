"""Files that are either complete or absent: written next to their place, then moved there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
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


def check_writable(folder: Path) -> None:
    """Make ``folder`` and prove that a file can be written there, before any work is done.

    Raises:
        DataError: It cannot be made or written.
    """
    write_atomically(folder / ".writable", b"")
    (folder / ".writable").unlink(missing_ok=True)
