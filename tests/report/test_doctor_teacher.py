"""The run doctor on distillations: a student that stands still, a queue that stays random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsd_plugin.report.run_doctor import Finding, open_run, teacher


def run_of(folder: Path, events: list[dict[str, Any]], **config: str) -> Any:
    stage = folder / "student"
    stage.mkdir()
    lines = [json.dumps({"iteration": 20 * number, **event}) for number, event in enumerate(events, 1)]
    (stage / "metrics.json").write_text("\n".join(lines))
    base = config.get("base", "Baseline")
    (stage / "config.yaml").write_text(
        f"MODEL: {{META_ARCHITECTURE: {config.get('name', 'QUD')}}}\nQSD: {{BASE: {base}}}"
    )
    return open_run(stage)


def cosines(*values: float) -> list[dict[str, Any]]:
    return [{"qud/mean_cosine": value, "qud/queue_filled": 1.0} for value in values]


@pytest.mark.parametrize(
    ("values", "verdict", "figure"),
    [
        ((0.01, 0.02), "problem", "from 0.01 to 0.02"),
        ((0.3, 0.1), "problem", "from 0.30 to 0.10"),
        ((0.01, 0.04), "ok", "from 0.01 to 0.04"),
        ((0.91, 0.9), "ok", "from 0.91 to 0.90"),  # fine-tuned
        ((0.5,), "unknown", "21 steps"),
    ],
)
def test_cosine_must_rise_or_be_high(tmp_path: Path, values: tuple[float, ...], verdict: str, figure: str) -> None:
    (finding,) = teacher.teacher(run_of(tmp_path, cosines(*values)))
    assert (finding.verdict, finding.figure) == (verdict, figure)


@pytest.mark.parametrize(("filled", "verdict"), [(1.0, "ok"), (0.75, "warning")])
def test_queue_must_be_filled_in_the_end(tmp_path: Path, filled: float, verdict: str) -> None:
    run = run_of(tmp_path, [{"qud/queue_filled": 0.3}, {"qud/queue_filled": filled}])
    (finding,) = teacher.queue(run)
    assert finding.verdict == verdict
    assert finding.figure == f"{filled:.0%} holds embeddings of the teacher"


@pytest.mark.parametrize(
    ("name", "base", "told"), [("QSD", "QUD", True), ("QSD", "Baseline", False), ("Baseline", "QUD", False)]
)
def test_only_trainings_with_qud_are_looked_at(tmp_path: Path, name: str, base: str, told: bool) -> None:
    run = run_of(tmp_path, cosines(0.1, 0.9), name=name, base=base)
    findings: list[Finding] = [*teacher.teacher(run), *teacher.queue(run)]
    assert len(findings) == 2 * told
