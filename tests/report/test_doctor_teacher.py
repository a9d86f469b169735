"""The run doctor on distillations: a student that stands still, a queue that stays random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsd_plugin.report.run_doctor import Finding, comparison, open_run, teacher, training


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


@pytest.mark.parametrize(("last", "ended_early"), [("student", False), ("teacher", True)])
def test_a_distillation_has_ended_when_its_student_has(tmp_path: Path, last: str, ended_early: bool) -> None:
    for name in ("teacher", "student")[: 1 if last == "teacher" else 2]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps({"finished": True}))
        (folder / "metrics.json").write_text(json.dumps({"iteration": 20, "total_loss": 1.0}))
        (folder / "config.yaml").write_text(f"OUTPUT_DIR: {folder}\nRECIPE: {{NAME: qud}}\n")
    run = open_run(tmp_path)
    early = [finding for finding in training.finished(run) if "has not reached" in finding.sentence]
    assert [finding.limit for finding in early] == ["stage student"] * ended_early
    assert not list(comparison.control(run))  # the control of a distillation is an arm of an experiment
