"""Sets that are made once and found again: a folder below a cache, complete or absent, filled by several processes."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qsd_plugin.core.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TRUTH_FILE = "truth.csv"
#: Written last: a folder that has it is complete.
META_FILE = "meta.json"

_CHUNK = 32  # pictures a worker makes before it reports

S = TypeVar("S")
T = TypeVar("T")


def build_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make a set, or find it.

    The set is written to a temporary folder that is renamed when complete. An interrupted build therefore leaves
    nothing that could be taken for a set, and of two processes that build the same one, one wins and both get it.

    Args:
        folder: The set's folder; its parent, the cache, is created if missing.
        write: Fills a folder, :data:`META_FILE` last.

    Returns:
        ``folder``.

    Raises:
        DataError: The cache cannot be written.
    """
    if (folder / META_FILE).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(
            "Cache folder for synthetic data",
            value=str(folder.parent),
            expected="a folder that can be created and written",
            remedy=f"Choose another one ({error.strerror}).",
        ) from error
    try:
        write(building)
        building.chmod(0o755)  # mkdtemp's 0o700 would lock colleagues out of a shared cache
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def fingerprint(spec: DataclassInstance) -> str:
    """Eight digits that tell sets of different parameters apart."""
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:8]


def complete_folder(folder: str | Path) -> Path:
    """``folder``, a complete set.

    Raises:
        DataError: It is none.
    """
    folder = Path(folder)
    if not (folder / META_FILE).is_file() or not (folder / TRUTH_FILE).is_file():
        raise DataError(
            "Synthetic set",
            value=str(folder),
            expected=f"a folder with {TRUTH_FILE} and {META_FILE}",
            remedy="Pass the folder that build() returned.",
        )
    return folder


def in_processes(make: Callable[[list[S]], list[T]], samples: Sequence[S], workers: int) -> Iterator[T]:
    """What ``make`` returns for every sample, in their order.

    Args:
        make: Takes some of the samples; can be sent to another process.
        samples: All of them.
        workers: Processes; 1 stays in this one. More than one are spawned, which imports the main script again.

    Raises:
        DataError: Workers cannot be started.
    """
    chunks = [list(samples[start : start + _CHUNK]) for start in range(0, len(samples), _CHUNK)]
    if workers <= 1:
        for chunk in chunks:
            yield from make(chunk)
        return
    # Spawned, not forked: the parent may hold threads, as every process that has run torch does.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            futures = [pool.submit(make, chunk) for chunk in chunks]
            for future in futures:
                yield from future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "Worker processes for synthetic data",
                value=workers,
                expected="processes that can import the main script again",
                remedy='Call build() under `if __name__ == "__main__":`, or pass workers=1.',
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _publish(building: Path, folder: Path) -> None:
    """Rename the complete set into place unless another process was first; a folder without a marker is replaced."""
    while True:
        try:
            building.rename(folder)  # fails where a folder with files in it stands
            return
        except OSError:
            if (folder / META_FILE).is_file():
                return
            if not folder.is_dir():
                raise
        # Moved aside first: renaming is atomic, deleting is not.
        stale = building.with_name(f"{building.name}.stale")
        with suppress(FileNotFoundError):
            folder.rename(stale)
            shutil.rmtree(stale)
