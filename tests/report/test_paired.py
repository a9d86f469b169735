"""The machinery that all benchmarks share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import pytest

from qsd_plugin.report.benchmarks import paired, ranking


@pytest.mark.parametrize(("count", "ranks"), [(1, (1, 1)), (5, (1, 5)), (6, (1, 6)), (10, (2, 9)), (30, (10, 21))])
def test_interval_of_the_median(count: int, ranks: tuple[int, int]) -> None:
    """Ranks from the tables of the sign test, for instance Conover, "Practical Nonparametric Statistics"."""
    values = np.random.default_rng(0).permutation(np.arange(1, count + 1)).tolist()
    assert paired.median_interval(values) == ranks


def test_runs_are_interleaved_and_ratios_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def work(name: str, durations: list[float]) -> None:
        order.append(name)
        clock[0] += durations.pop(0)

    monkeypatch.setattr(paired.time, "perf_counter", lambda: clock[0])
    ours, base = [9.0, 2.0, 6.0, 30.0], [9.0, 1.0, 2.0, 10.0]  # the first of each is the warm-up
    result = paired.paired_ratio(lambda: work("a", ours), lambda: work("b", base), pairs=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    seconds = {"a_seconds": 6.0, "a_high_seconds": 30.0, "b_seconds": 2.0}
    assert result == {"median": 3.0, "low": 2.0, "high": 3.0, **seconds, "pairs": 3}
    assert result["median"] == median([2 / 1, 6 / 2, 30 / 10])


@pytest.mark.parametrize(("pairs", "rounds", "counts"), [(7, 3, [2, 2, 3]), (60, 4, [15] * 4), (2, 4, [1, 1])])
def test_pairs_are_pooled_over_rounds_with_sides_of_their_own(
    monkeypatch: pytest.MonkeyPatch, pairs: int, rounds: int, counts: list[int]
) -> None:
    clock, builds, runs = [0.0], [], []

    def build(b_first: bool) -> tuple[Callable[[], None], Callable[[], None]]:
        builds.append(b_first)
        number = len(builds)  # in round n a pair takes n seconds to 1

        def work(name: str, takes: float) -> None:
            runs.append((number, name))
            clock[0] += takes

        return partial(work, "a", float(number)), partial(work, "b", 1.0)

    monkeypatch.setattr(paired.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(paired.gc, "collect", lambda: 0)
    result = paired.pooled_ratio(build, pairs, rounds=rounds)
    assert builds == [False, True, False, True][: len(counts)]
    ratios = [float(number) for number, count in enumerate(counts, start=1) for _ in range(count)]
    assert (result["pairs"], result["median"]) == (pairs, median(ratios))
    assert (result["low"], result["high"]) == paired.median_interval(ratios)
    timed = [name for number in range(1, len(counts) + 1) for name in [n for r, n in runs if r == number][2:]]
    assert "".join(timed) == ("abba" * pairs)[: 2 * pairs]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_extra_memory_counts_what_was_freed_again() -> None:
    # In a process of its own, as the benchmarks run: memory that an earlier test gave back would be used again unseen.
    code = (
        "import numpy as np; from qsd_plugin.report.benchmarks.paired import extra_memory_mib as extra\n"
        "print(extra(lambda: np.ones(8 << 20).sum()), extra(lambda: None))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    if printed == ["None", "None"]:
        pytest.skip("the peak cannot be reset here")
    large, nothing = map(float, printed)
    assert 60 < large < 80  # 64 MiB
    assert nothing < 10


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_freed_memory_stays_with_the_process_inside_and_goes_back_after() -> None:
    code = (
        "import numpy as np; from qsd_plugin.report.benchmarks import paired\n"
        "def left(): np.ones(8 << 20).sum(); return paired._resident_kib('VmRSS') >> 10\n"
        "before = left()\n"
        "with paired.freed_memory_kept() as kept: inside = left()\n"
        "print(kept, inside - before, left() - before)"
    )
    kept, inside, after = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    if kept == "False":
        pytest.skip("this C library cannot keep freed memory")
    assert 60 < int(inside) < 80  # 64 MiB
    assert int(after) < 10


def test_benchmark_items_at_a_small_size() -> None:
    size = ranking.Size(queries=30, gallery=200, distractors=20, identities=10, dim=16)
    for item in (ranking._streamed(size, "trained", 0, 2), ranking._rerank(size, 0, 2)):
        assert item["pairs"] == 2
        assert 0 < item["low"] <= item["median"] <= item["high"]
        assert item["mAP"] > 0.7
    assert ranking._streamed(size, "untrained", 0, 1)["mAP"] < 0.4
    first, second = (ranking.people(size, "trained", 3)[0] for _ in range(2))
    assert first.equal(second)
