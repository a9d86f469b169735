"""The run doctor on heads whose margin follows the norm: norms that do not differ, a gate that does nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qsd_plugin.report.run_doctor import norms, open_run

FINE = {"norms/mean": 21.0, "norms/std": 3.0, "norms/clipped": 0.0}


def findings(folder: Path, figures: dict[str, float], **config: Any) -> list[tuple[str, str, str]]:
    """Verdict, figure and advice on a run of a thousand steps with these figures at its end."""
    stage = folder / "run"
    stage.mkdir()
    steps = config.pop("steps", 1000)
    events = [{"norms/mean": 1.0, "norms/std": 0.0, "iteration": 0}, {**figures, "iteration": steps - 1}]
    (stage / "metrics.json").write_text("\n".join(json.dumps(event) for event in events[not figures :]))
    head = config.pop("head", "QGFaceHead")
    settings = {
        "MODEL": {"HEADS": {"NAME": head}},
        "QGFACE": {"MOMENTUM": 0.01, "START": "", "THRESHOLD": 0.2, **config},
    }
    (stage / "config.yaml").write_text(json.dumps(settings))
    return [(finding.verdict, finding.figure, finding.next_step) for finding in norms.norms(open_run(stage))]


@pytest.mark.parametrize(("std", "verdict"), [(3.0, "ok"), (0.43, "ok"), (0.41, "problem"), (0.0, "problem")])
def test_norms_must_differ(tmp_path: Path, std: float, verdict: str) -> None:
    ((found, figure, step),) = findings(tmp_path, {**FINE, "norms/std": std}, head="AdaFaceHead")
    assert (found, figure) == (verdict, f"mean 21, deviation {std:.3g}")
    assert ("neck_in" in step) == (verdict == "problem")


@pytest.mark.parametrize(
    ("share", "verdict", "advice"),
    [(0.0, "warning", "Raise"), (0.009, "warning", "Raise"), (0.02, "ok", ""), (0.6, "warning", "Lower")],
)
def test_gate_must_take_out_some_images_and_not_most(tmp_path: Path, share: float, verdict: str, advice: str) -> None:
    _, (found, figure, step) = findings(tmp_path, {**FINE, "norms/low_quality": share})
    assert (found, figure) == (verdict, f"{share:.1%} at QGFACE.THRESHOLD 0.2")
    assert step.startswith(advice)
    assert bool(step) == bool(advice)


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({"head": "AdaFaceHead", "steps": 200}, True),  # 0.99^200 = 13 %
        ({"head": "AdaFaceHead", "steps": 240}, False),  # 9 %
        ({"head": "AdaFaceHead", "steps": 200, "START": "debiased"}, False),
        ({"steps": 200}, False),
        ({"steps": 200, "START": "zeros"}, True),
    ],
)
def test_short_trainings_do_not_leave_the_start_of_the_statistics(
    tmp_path: Path, config: dict[str, Any], warned: bool
) -> None:
    found = findings(tmp_path, FINE, **config)
    assert [(verdict, figure) for verdict, figure, _ in found[1:]] == (
        [("warning", "13% of it is left after 200 steps")] if warned else []
    )


def test_norms_outside_the_range_are_told(tmp_path: Path) -> None:
    found = findings(tmp_path, {**FINE, "norms/clipped": 0.2})
    assert found[1][:2] == ("warning", "20% of the images")


def test_other_heads_are_left_alone_and_short_logs_named(tmp_path: Path) -> None:
    assert findings(tmp_path, FINE, head="EmbeddingHead") == []
    (tmp_path / "short").mkdir()
    ((verdict, figure, _),) = findings(tmp_path / "short", {}, steps=5)
    assert (verdict, figure) == ("unknown", "5 steps")
