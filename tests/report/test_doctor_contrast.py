"""The run doctor on QGFace: too few or too many pairs, a queue that is not full, a term that outweighs the others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from qsd_plugin.report.run_doctor import contrast, open_run

FINE = {
    "qgface/contrasted": 0.2,
    "qgface/low_quality_clean": 0.05,
    "qgface/low_quality_degraded": 0.15,
    "qgface/negatives": 64.0,
    "loss_qgface": 0.2 * 3 + 0.8 * math.log(129),
    "total_loss": 0.2 * 3 + 0.8 * math.log(129) + 5.4,
}


def findings(folder: Path, figures: dict[str, float], **options: Any) -> list[tuple[str, str, str]]:
    """Verdict, figure and advice."""
    stage = folder / "run"
    stage.mkdir()
    architecture = options.pop("architecture", "QGFace")
    settings = {
        "MODEL": {"META_ARCHITECTURE": architecture},
        "QSD": {"BASE": options.pop("base", "Baseline")},
        "QGFACE": {
            "THRESHOLD": 0.2,
            "CONTRAST": {
                "THRESHOLD": -1.0,
                "QUEUE": "proxy",
                "QUEUE_SIZE": 64,
                "WEIGHT": 1.0,
                "RESCALE": True,
                "REDUCTION": "all",
                **options,
            },
        },
    }
    (stage / "config.yaml").write_text(json.dumps(settings))
    (stage / "metrics.json").write_text(json.dumps({"iteration": 99, **figures}))
    return [(finding.verdict, finding.figure, finding.next_step) for finding in contrast.contrast(open_run(stage))]


def test_a_sound_run_is_told_in_figures(tmp_path: Path) -> None:
    """Active pairs have the loss 3: a tenth of what has a gradient (0.6 of 6)."""
    assert findings(tmp_path, FINE) == [
        ("ok", "20.0%, views of a quality below 0.2: clean 5.0%, degraded 15.0%", ""),
        ("ok", "64 of 64 entries", ""),
        ("ok", "10.0% of the loss that has a gradient (0.6, beside 3.89 of pairs without weight)", ""),
    ]


@pytest.mark.parametrize(
    ("share", "verdict", "advice"),
    [(0.0, "warning", "Raise"), (0.009, "warning", "Raise"), (0.01, "ok", ""), (0.95, "warning", "Lower")],
)
def test_pairs_must_be_contrasted_and_not_all(tmp_path: Path, share: float, verdict: str, advice: str) -> None:
    found, _, step = findings(tmp_path, {**FINE, "qgface/contrasted": share})[0]
    assert found == verdict
    assert step.startswith(advice)
    assert bool(step) == bool(advice)


def test_a_queue_that_is_not_full_and_a_large_term_are_told(tmp_path: Path) -> None:
    figures = {**FINE, "qgface/negatives": 40.0, "loss_qgface": 9.0, "total_loss": 11.0}
    found = findings(tmp_path, figures, REDUCTION="active", THRESHOLD=0.5)
    assert "below 0.5" in found[0][1]
    assert found[1] == ("warning", "40 of 64 entries", "Lower QGFACE.CONTRAST.QUEUE_SIZE, or train for more steps.")
    assert found[2][0] == "warning"
    assert found[2][1].startswith("81.8% of the loss that has a gradient (9, beside 0 of")


def test_other_architectures_are_left_alone_and_qsd_on_top_is_not(tmp_path: Path) -> None:
    for number, (options, count) in enumerate(
        [
            ({"architecture": "Baseline"}, 0),
            ({"architecture": "Baseline", "base": "QGFace"}, 0),
            ({"QUEUE": "none"}, 0),
            ({"architecture": "QSD", "base": "QGFace"}, 3),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        assert len(findings(tmp_path / str(number), FINE, **options)) == count
    (tmp_path / "short").mkdir()
    ((verdict, figure, _),) = findings(tmp_path / "short", {})
    assert (verdict, figure) == ("unknown", "100 steps")
