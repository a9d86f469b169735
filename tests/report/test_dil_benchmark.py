"""DIL's benchmark: both sides of every kind of step run, and limits are those of time and of memory."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qsd_plugin.report.benchmarks import dil

TINY = dil.Size(pairs=2, images=4, height=64, width=1 / 16)
TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


@pytest.mark.parametrize("kind", dil.KINDS)
def test_both_sides_of_a_step_train(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many optimizer steps on either side, on the same number of parameters."""
    steps: list[int] = []
    update = torch.optim.Adam.step

    def counted(self: Any, *args: Any) -> Any:
        steps.append(sum(part.numel() for group in self.param_groups for part in group["params"]))
        return update(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    ours, plain = dil.both_steps(kind, TINY, 0)
    ours()
    done = list(steps)
    steps.clear()
    plain()
    assert steps[-1] == done[-1]
    # The discriminators' Adam is ours in stage 1.
    assert len(steps) == (1 if kind == "stage 2" else 2)
    assert len(done) == 1


def figures(monkeypatch: pytest.MonkeyPatch, ours: float) -> dict[str, Any]:
    clocks = []

    def ratio(build: Any, pairs: int, *, rounds: int, clock: Any) -> dict[str, Any]:
        clocks.append(clock)
        return {"median": 0.8, "low": 0.7, "high": 0.85, "a_seconds": 3.0, "b_seconds": 4.0, "pairs": pairs}

    monkeypatch.setattr(dil, "pooled_ratio", ratio)
    monkeypatch.setattr(dil, "_peak", lambda kind, size, seed, plain: 1000.0 if plain else ours)
    items: dict[str, Any] = dil.run([TINY], pairs=5)["items"]
    assert clocks == 3 * [time.process_time]
    assert list(items) == [
        "DIL stage 1 paired, B=2 64x32 width 0.0625",
        "DIL stage 1 unpaired, B=2 64x32 width 0.0625",
        "DIL stage 2, B=4 64x32 width 0.0625",
    ]
    return items


@pytest.mark.parametrize(("ours", "kept"), [(700.0, True), (850.0, False)])
def test_time_and_memory_have_limits(monkeypatch: pytest.MonkeyPatch, ours: float, kept: bool) -> None:
    item = figures(monkeypatch, ours)["DIL stage 2, B=4 64x32 width 0.0625"]
    tool = runpy.run_path(str(TOOL))
    assert tool["met"](item) is kept
    assert tool["met"](item | {"high": 0.95}) is False
    row = tool["table"]({"dil": {"items": {"step": item}}}).splitlines()[-1]
    assert "0.9, 0.8 of memory" in row
    assert f"{ours:.0f} ({ours / 1000:.2f} of 1000)" in row


def test_memory_that_cannot_be_read_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dil, "_peak", lambda kind, size, seed, plain: None)
    assert dil.memory("stage 2", TINY, 0, 2) == {"extra_memory_mib": None}
