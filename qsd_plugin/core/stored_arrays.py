"""Dataclasses of arrays that are kept as one ``.npz`` file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.files import write_atomically

Stored = TypeVar("Stored", bound="StoredArrays")


class StoredArrays:
    """Base of a dataclass whose fields are arrays."""

    #: What messages call the file.
    what: ClassVar[str]

    def save(self, file: Path) -> None:
        """Write an ``.npz`` file."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in self._names()}
        write_atomically(file, lambda stream: np.savez_compressed(stream, **arrays))

    @classmethod
    def load(cls: type[Stored], file: Path) -> Stored:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: Another kind of file.
        """
        names = cls._names()
        with np.load(file, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive]
            if missing:
                raise DataError(f"{cls.what} {file}: missing arrays", value=missing, expected=", ".join(names))
            return cls(**{name: archive[name] for name in names})

    @classmethod
    def _names(cls) -> list[str]:
        return [entry.name for entry in fields(cls)]  # type: ignore[arg-type]
