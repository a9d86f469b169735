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
        ({"extra_memory_mib": 100.0, "memory_limit_mib": 128.0}, True),
        ({"extra_memory_mib": 129.0, "memory_limit_mib": 128.0}, False),
        ({"extra_memory_mib": None, "memory_limit_mib": 128.0}, None),
    ],
)
def test_limit_is_met_when_the_upper_bound_is(item: dict[str, float], verdict: bool | None) -> None:
    assert TOOL["met"](item) is verdict


def test_skipped_items_say_why() -> None:
    text = TOOL["table"]({"ranking": {"items": {"given": {"skipped": "Cython is not installed"}}}})
    assert "Cython is not installed" in text


def test_verification_suite_compares_equal_results() -> None:
    from qsd_plugin.report.benchmarks import verification

    result = verification.run(80, dim=8, folds=2, pairs=1)
    assert result["items"]["verification, given distances"]["bit_equal"] is True
    assert {TOOL["met"](item) is None for item in result["items"].values()} == {False}
