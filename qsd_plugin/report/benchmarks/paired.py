"""Fair comparison of two pieces of work: interleaved runs, the median of the paired ratios, its interval."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

#: Memory files of Linux: writing 5 to the first makes the process's peak (VmHWM) start again from now.
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

# Parameters of glibc's mallopt, from its malloc.h, and their defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let the process keep the memory it frees, for everything that is timed inside.

    By default glibc returns every large block to the system and asks for it again, zeroed, a moment later. For a
    training step on a CPU that is a sixth of the time and most of its scatter, on both sides of a comparison alike.

    Yields:
        Whether the C library can do it; elsewhere nothing changes.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        kept = bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        yield False
        return
    try:
        yield kept
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def paired_ratio(a: Callable[[], Any], b: Callable[[], Any], pairs: int = 30) -> dict[str, Any]:
    """Time ``a`` and ``b`` alternately, the first of each pair in turn, after one warm-up run of both.

    Args:
        a: The work in question.
        b: What it is compared with.
        pairs: Number of timed pairs; with fewer than 6 the interval is the range and covers less than 95 %.

    Returns:
        ``median``, ``low`` and ``high``: the ratio a / b with the distribution-free 95 % interval of its median;
        ``a_seconds`` and ``b_seconds``: the medians; ``a_high_seconds``: the upper bound of a's; ``pairs``.
    """
    return _ratio(_paired_times(a, b, pairs))


def pooled_ratio(
    build: Callable[[bool], tuple[Callable[[], Any], Callable[[], Any]]],
    pairs: int = 30,
    *,
    rounds: int = 4,
    clock: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """:func:`paired_ratio` over several rounds, for each of which both sides are built anew.

    Where the buffers of a side lie in memory makes a per cent or two of a training step, and depends on which side was
    built first. One pair of sides would be measured with one such placement; here each comes first in turn.

    Args:
        build: Builds ``a`` and ``b``; told whether to build ``b`` first, as in every second round.
        pairs: Timed pairs in all, divided among the rounds as evenly as possible.
        rounds: How often to build; no more often than there are pairs.
        clock: What is read before and after, such as ``time.process_time`` for CPU seconds; ``None``: the wall's.

    Returns:
        As :func:`paired_ratio`, of the pairs of all rounds.
    """
    times: list[tuple[float, float]] = []
    rounds = min(rounds, pairs)
    for number in range(rounds):
        a, b = build(number % 2 == 1)
        # Who runs first within a pair goes on alternating, so that an odd number of pairs per round gives no advantage.
        times += _paired_times(a, b, pairs * (number + 1) // rounds - len(times), start=len(times), clock=clock)
        del a, b
        gc.collect()  # models often are in cycles; both sides of the next round must find the same memory
    return _ratio(times)


def paired_excess(a: Callable[[], Any], b: Callable[[], Any], pairs: int = 30, *, parts: int) -> dict[str, Any]:
    """:func:`paired_ratio`, and what ``a`` takes longer.

    Args:
        a: The work in question.
        b: What it is compared with.
        pairs: Number of timed pairs.
        parts: Equal parts of the work, such as records.

    Returns:
        As :func:`paired_ratio`, and ``above_us``, ``above_low_us`` and ``above_high_us``: microseconds per part that
        ``a`` takes beyond ``b``, median of the pairs with its 95 % interval.
    """
    times = _paired_times(a, b, pairs)
    above = [(first - second) / parts * 1e6 for first, second in times]
    low, high = median_interval(above)
    return _ratio(times) | {"above_us": median(above), "above_low_us": low, "above_high_us": high}


def _paired_times(
    a: Callable[[], Any],
    b: Callable[[], Any],
    pairs: int,
    *,
    start: int = 0,
    clock: Callable[[], float] | None = None,
) -> list[tuple[float, float]]:
    a(), b()
    times = []
    for pair in range(start, start + pairs):
        if pair % 2:
            second, first = seconds(b, clock), seconds(a, clock)
            times.append((first, second))
        else:
            times.append((seconds(a, clock), seconds(b, clock)))
    return times


def _ratio(times: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [first / second for first, second in times]
    ours = [first for first, _ in times]
    low, high = median_interval(ratios)
    return {
        "median": median(ratios),
        "low": low,
        "high": high,
        "a_seconds": median(ours),
        "a_high_seconds": median_interval(ours)[1],
        "b_seconds": median(second for _, second in times),
        "pairs": len(times),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median from order statistics; the range of fewer than 6 values."""
    ordered, count = sorted(values), len(values)
    below, outside = 0, 0.5**count  # probability that at most `below` values lie under the median
    while outside <= 0.025:
        below += 1
        outside += math.comb(count, below) * 0.5**count
    rank = max(below - 1, 0)
    return ordered[rank], ordered[count - 1 - rank]


def seconds(work: Callable[[], Any], clock: Callable[[], float] | None = None) -> float:
    """Seconds of one run of ``work``, on the wall unless another clock is given."""
    now = clock or time.perf_counter
    start = now()
    work()
    return now() - start


def extra_memory_mib(work: Callable[[], Any]) -> float | None:
    """Peak resident memory while ``work`` runs beyond what was resident before, in MiB; ``None`` outside Linux."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    before = _resident_kib("VmRSS")
    work()
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])
