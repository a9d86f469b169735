"""What DET and error-versus-discard pictures show, read back from the axes they are drawn on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.evaluation.quality_curves import Curve
from qsd_plugin.report import curve_pictures
from qsd_plugin.report.conditions import level_panels


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    drawn: list[Any] = []
    finish = curve_pictures._finish

    def kept(figure: Any, axis: Any, path: Path) -> None:
        finish(figure, axis, path)
        drawn.append(axis)

    monkeypatch.setattr(curve_pictures, "_finish", kept)
    return drawn


def test_det(tmp_path: Path, axes: list[Any]) -> None:
    far, tar = np.array([0, 0.001, 0.1, 1]), np.array([0.2, 0.7, 0.9, 1])
    curve_pictures.draw_det({"lfw": (far, tar), "cfp": (far, tar**2)}, tmp_path / "new" / "det.png")
    (axis,) = axes
    first, second = axis.get_lines()
    assert first.get_xdata().tolist() == second.get_xdata().tolist() == [0.001, 0.1]
    assert first.get_ydata() == pytest.approx([0.3, 0.1])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["lfw", "cfp"]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    with Image.open(tmp_path / "new" / "det.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_det_without_a_single_error_is_still_a_picture(tmp_path: Path, axes: list[Any]) -> None:
    curve_pictures.draw_det({"perfect": (np.array([0, 0, 1]), np.array([0, 1, 1]))}, tmp_path / "det.png")
    (axis,) = axes
    assert axis.get_legend().get_texts()[0].get_text() == "perfect (no errors to trade)"
    assert (tmp_path / "det.png").stat().st_size > 1000


def test_error_discard_is_a_staircase_to_the_end(tmp_path: Path, axes: list[Any]) -> None:
    steps = np.array([0, 0.1]), np.array([0.05, 0.02])
    curve = Curve(*steps, 0.009, 0.004, np.zeros(2), 0.3, 100, "FNMR, fixed threshold from FNMR 0.05")
    curve_pictures.draw_error_discard({"norm": curve}, tmp_path / "edc.png")
    (axis,) = axes
    (line,) = axis.get_lines()
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xdata().tolist() == [0, 0.1, 0.3]
    assert line.get_ydata().tolist() == [0.05, 0.02, 0.02]
    assert axis.get_title() == "FNMR, fixed threshold from FNMR 0.05"
    assert axis.get_legend().get_texts()[0].get_text() == "norm: area 0.009 (best 0.004)"
    assert (tmp_path / "edc.png").stat().st_size > 1000


def test_levels_go_from_mild_to_strong_behind_the_images_as_they_are(tmp_path: Path) -> None:
    names = [
        "clean/mAP",
        "clean/rank1",
        "lowres-0.1/mAP",
        "lowres-0.5/mAP",
        "lowres-0.5/rank1",
        "blur-1/mAP",
        "blur-0.5/mAP",
    ]
    arms = {"one": dict(zip(names, range(7), strict=True)), "two": dict(zip(names, range(10, 17), strict=True))}
    panels = level_panels(arms, "mAP")
    assert list(panels) == ["lowres", "blur"]
    # What lowres leaves of an image falls as it gets worse; a severity rises.
    assert (panels["lowres"].ticks, panels["lowres"].means) == (
        ["clean", "0.5", "0.1"],
        {"one": [0, 3, 2], "two": [10, 13, 12]},
    )
    assert (panels["blur"].ticks, panels["blur"].means["two"]) == (["clean", "0.5", "1"], [10, 16, 15])
    curve_pictures.draw_over_severity(panels, "mAP, percent", tmp_path / "levels.png")
    with Image.open(tmp_path / "levels.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 1.5 * pixels.shape[0]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    sides = level_panels({"one": {"blur-1/one/accuracy": 1.0, "blur-1/both/accuracy": 2.0}}, "accuracy")
    assert {title: panel.ticks for title, panel in sides.items()} == {"blur, one": ["1"], "blur, both": ["1"]}
    assert level_panels({"one": {"mAP": 1.0}}, "mAP") == {}
