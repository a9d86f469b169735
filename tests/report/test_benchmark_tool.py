"""The benchmark tool's verdicts and table."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "benchmark.py"))


@pytest.mark.parametrize(
    ("item", "verdict"),
    [
        ({"median": 0.9, "low": 0.8, "high": 0.99, "limit": 1.0}, True),
        ({"median": 0.9, "low": 0.8, "high": 1.01, "limit": 1.0}, False),
        ({"a_seconds": 0.1, "seconds_limit": 0.2}, True),
        ({"a_seconds": 0.1}, None),
        ({"a_seconds": 0.1, "a_high_seconds": 0.3, "seconds_limit": 0.2}, False),
        ({"above_us": 2.0, "above_high_us": 2.4, "above_limit_us": 2.5}, True),
        ({"above_us": 2.0, "above_high_us": 2.6, "above_limit_us": 2.5}, False),
        ({"a_seconds": 0.1, "seconds_limit": 0.2, "extra_memory_mib": 99.0, "memory_limit_mib": 100.0}, True),
        ({"a_seconds": 0.1, "seconds_limit": 0.2, "extra_memory_mib": 101.0, "memory_limit_mib": 100.0}, False),
        ({"a_seconds": 0.1, "seconds_limit": 0.2, "extra_memory_mib": None, "memory_limit_mib": 100.0}, None),
        ({"a_seconds": 0.3, "seconds_limit": 0.2, "extra_memory_mib": None, "memory_limit_mib": 100.0}, False),
    ],
)
def test_limit_is_met_when_the_upper_bound_is(item: dict[str, float], verdict: bool | None) -> None:
    assert TOOL["met"](item) is verdict


def test_skipped_items_say_why() -> None:
    text = TOOL["table"]({"ranking": {"items": {"given": {"skipped": "Cython is not installed"}}}})
    assert "Cython is not installed" in text


def test_every_limit_of_an_item_is_in_its_row() -> None:
    ratio = {"median": 2.0, "low": 1.9, "high": 2.1, "a_seconds": 0.5, "b_seconds": 0.25, "pairs": 30}
    above = {"above_us": 1.85, "above_low_us": 1.8, "above_high_us": 1.9, "above_limit_us": 2.5}
    index = {"a_seconds": 0.6, "seconds_limit": 1.5, "extra_memory_mib": 164.2, "memory_limit_mib": 190.7}
    items = {"reading": ratio | above, "index": index}
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in TOOL["table"]({"faces": {"items": items}}).splitlines()[2:]
    ]
    assert rows == [
        ["reading", "0.5", "0.25", "2 [1.9, 2.1], +1.85 [1.80, 1.90] µs", "+2.5 µs", "met", "", "30"],
        ["index", "0.6", "", "", "1.5, 191 MiB", "met", "164", ""],
    ]


def test_record_suite_reads_what_was_written() -> None:
    from qsd_plugin.report.benchmarks import records

    items = records.run(30, image_bytes=50, batch=8, index_keys=100, pairs=1)["items"]
    assert list(items) == [
        "index of 100 keys",
        "records one by one, in order",
        "records in batches of 8, in order",
        "records one by one, shuffled",
        "records in batches of 8, shuffled",
    ]
    assert {item["identical"] for item in items.values()} == {True}
    limited = [name for name, item in items.items() if TOOL["_limits"](item)]
    assert limited == list(items)[:4]


def test_verification_suite_compares_equal_results() -> None:
    from qsd_plugin.report.benchmarks import verification

    result = verification.run(80, dim=8, folds=2, pairs=1)
    assert result["items"]["verification, given distances"]["bit_equal"] is True
    assert {TOOL["met"](item) is None for item in result["items"].values()} == {False}
