"""Book-keeping of training images that could not be decoded, across loader workers and ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qsd_plugin.core.errors import DataError

FILE_NAME = "corrupt_images.txt"
_SHOWN = 20


class CorruptImages:
    """The damaged training images of a run, and the limit at which it has to stop.

    Every rank reports what its loader replaced. Ranks share their findings through a file in the run's folder instead
    of a collective, so that a step costs nothing; rank 0 alone decides, because it alone can save a checkpoint.

    Args:
        limit: Largest share of the training images that may be damaged, 0 to 1.
        folder: The run's folder, where :data:`FILE_NAME` lists the images; ``None``: kept in memory only.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, limit: float, *, folder: Path | None, rank: int = 0, world_size: int = 1) -> None:
        self._limit = limit
        self._file = None if folder is None else folder / FILE_NAME
        self._rank, self._shared = rank, world_size > 1
        self._read_up_to = 0
        self.paths: set[str] = set()
        self.num_images = 0
        if self._file is not None and rank == 0:
            self._file.unlink(missing_ok=True)  # a list of an earlier run: those images may have been repaired

    def expect(self, num_images: int) -> None:
        """Declare how many training images there are; the largest of several loaders counts."""
        self.num_images = max(self.num_images, num_images)

    def report(self, paths: Iterable[str]) -> list[str]:
        """Take down images found damaged and check the limit.

        Returns:
            Those not known before.

        Raises:
            DataError: On rank 0, when more than the limit's share is damaged; lists the images.
        """
        new = sorted(set(paths) - self.paths)
        if new:
            self.paths.update(new)
            self._append(new)
        if self._rank == 0:
            if self._shared:
                self._read_other_ranks()
            if len(self.paths) > self._limit * self.num_images:
                raise DataError(
                    f"Too many damaged training images: {self.summary()}",
                    value=f"{len(self.paths) / max(self.num_images, 1):.2%}",
                    expected=f"at most {self._limit:.2%} (DATA.MAX_CORRUPT)",
                    remedy="Repair or remove them (tools/build_data.py reid-check DIR finds all), then resume.",
                )
        return new

    def summary(self) -> str:
        """A sentence for the end of the run; empty when every image was sound."""
        if not self.paths:
            return ""
        listed = sorted(self.paths)
        rest = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        where = f" (all in {self._file})" if self._file else ""
        shown = ", ".join(listed[:_SHOWN])
        return f"{len(listed)} of {self.num_images} training images could not be decoded{where}: {shown}{rest}"

    def _append(self, paths: Iterable[str]) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write("".join(f"{path}\n" for path in paths))

    def _read_other_ranks(self) -> None:
        if self._file is None or not self._file.exists() or os.path.getsize(self._file) == self._read_up_to:
            return
        with self._file.open("rb") as file:
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]  # another rank may be in the middle of a line
        self._read_up_to = len(complete)
        self.paths.update(complete.decode().splitlines())
