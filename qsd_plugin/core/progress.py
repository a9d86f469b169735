"""Progress with an ETA for long loops, quiet when the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

#: Seconds between two progress lines when the output is a file or a pipe.
LINE_INTERVAL_S = 15.0


def progress(items: Iterable[T], title: str, *, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while showing how many are done and how long the rest will take.

    A terminal gets a live bar; anything else gets one line every :data:`LINE_INTERVAL_S` seconds on standard error.

    Args:
        items: What to iterate over.
        title: A few words before the count.
        total: Number of items; taken from ``len(items)`` where it has one.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=title, total=total)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= LINE_INTERVAL_S:
            last = now
            print(_line(title, done, total, now - start), file=sys.stderr, flush=True)
        yield item


def duration(seconds: float) -> str:
    """``3:05`` or ``1:02:09`` for a number of seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _line(title: str, done: int, total: int | None, elapsed: float) -> str:
    if not total:
        return f"{title}: {done} done in {duration(elapsed)}"
    return f"{title}: {done}/{total}, {duration(elapsed)} so far, ETA {duration(elapsed / done * (total - done))}"
