"""The host's train loader with a report of damaged images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from qsd_plugin.data.corrupt import CorruptImages

logger = logging.getLogger("fastreid.qsd_plugin.data")

#: Batch key between the loader's workers and the main process.
CORRUPT = "corrupt_paths"


class WatchedLoader:
    """A host train loader whose batches report damaged images on the way to the trainer; else it is the host's loader.

    Args:
        loader: The host's loader over a :class:`TrainSet`.
        record: Where damaged images are taken down.
    """

    def __init__(self, loader: Any, record: CorruptImages) -> None:
        self.loader = loader
        self.record = record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return WatchedIterator(iter(self.loader), self.record)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)


class WatchedIterator:
    # A class and not a generator function: iter() starts the workers, as the host's loader does.
    def __init__(self, batches: Iterator[dict[str, Any]], record: CorruptImages) -> None:
        self._batches = batches
        self._record = record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        damaged = [path for paths in batch.pop(CORRUPT) for path in paths.splitlines()]
        for path in self._record.report(damaged):
            logger.warning("Training image cannot be decoded, another one of its identity takes its place: %s", path)
        return batch
