"""The contact sheet and the tool that writes it: every panel is looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError, RegistryError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations import apply, names
from qsd_plugin.degradations.sheet import SEVERITIES, Sheet, contact_sheet
from tools.visualize import main


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    rows, columns = np.mgrid[:64, :40]
    image = np.stack([rows * 3, 250 - columns * 5, 40 + (rows * columns) % 180], axis=2)
    return image.astype(np.uint8)


def expected(name: str, image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    degraded, _ = apply(name, image, numpy_stream(seed, name), severity)
    size = (image.shape[1], image.shape[0])
    return np.asarray(Image.fromarray(degraded).resize(size, Image.Resampling.BICUBIC))


def check_panels(sheet: Sheet, image: np.ndarray, rows: list[str], severities: tuple[float, ...], seed: int) -> None:
    assert list(sheet.panels) == [(name, severity) for name in rows for severity in severities]
    covered = np.zeros(sheet.picture.shape[:2], dtype=int)
    for (name, severity), (top, left) in sheet.panels.items():
        assert np.array_equal(sheet.panel(name, severity), expected(name, image, severity, seed))
        covered[top : top + image.shape[0], left : left + image.shape[1]] += 1
    assert covered.max() == 1  # no panel hides another
    assert covered.sum() == len(rows) * len(severities) * image.shape[0] * image.shape[1]


def test_the_sheet_holds_every_degradation_at_every_severity(picture: np.ndarray) -> None:
    sheet = contact_sheet(picture)
    check_panels(sheet, picture, names(), SEVERITIES, 0)
    corners = [sheet.panels[name, 0.0] for name in names()]
    assert [top for top, _ in corners] == sorted(top for top, _ in corners)
    for name in names():
        places = [sheet.panels[name, severity] for severity in SEVERITIES]
        assert len({top for top, _ in places}) == 1
        assert [left for _, left in places] == sorted(left for _, left in places)


def test_rows_and_columns_are_labelled(picture: np.ndarray) -> None:
    sheet = contact_sheet(picture, degradations=["blur", "dil_poisson"], severities=(0.5, 1.0))
    ink = (sheet.picture < 128).all(axis=2)
    head, margin = sheet.panels["blur", 0.5]
    for name in ("blur", "dil_poisson"):
        top, _ = sheet.panels[name, 0.5]
        assert ink[top : top + 64, :margin].any()
    for severity in (0.5, 1.0):
        _, left = sheet.panels["blur", severity]
        assert ink[:head, left : left + 40].any()


def test_a_larger_image_is_shrunk_first() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8)
    sheet = contact_sheet(image, degradations=["motion_blur"], severities=(0.0, 1.0), longest=100, seed=3)
    small = np.asarray(Image.fromarray(image).resize((100, 45), Image.Resampling.LANCZOS))
    check_panels(sheet, small, ["motion_blur"], (0.0, 1.0), 3)


def test_bad_input(picture: np.ndarray) -> None:
    with pytest.raises(RegistryError, match=r"Unknown degradation: got 'blurr'\. Did you mean 'blur'"):
        contact_sheet(picture, degradations=["blurr"])
    with pytest.raises(ConfigError, match=r"Severity of degradation 'blur': got 1\.2"):
        contact_sheet(picture, degradations=["blur"], severities=(1.2,))
    with pytest.raises(ConfigError, match="Contact sheet without panels"):
        contact_sheet(picture, degradations=[])
    with pytest.raises(DataError, match=r"'qgface_rescale': got '9 x 40 pixels'"):
        contact_sheet(picture[:9], degradations=["qgface_rescale"])


def test_the_tool_writes_the_sheet(picture: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "person.png", tmp_path / "sheet.png"
    Image.fromarray(picture).save(source)
    assert main(["degradations", str(source), "--output", str(target)]) == 0
    with Image.open(target) as found:
        assert found.format == "PNG"
        assert np.array_equal(np.asarray(found), contact_sheet(picture).picture)
    assert capsys.readouterr().out == f"{target}: {len(names()) * len(SEVERITIES)} panels\n"
    options = ["--names", "noise", "dil_jpg", "--severities", "0.3", "--seed", "5"]
    assert main(["degradations", str(source), "--output", str(target), *options]) == 0
    with Image.open(target) as found:
        wanted = contact_sheet(picture, degradations=["noise", "dil_jpg"], severities=[0.3], seed=5)
        assert np.array_equal(np.asarray(found), wanted.picture)


def test_the_tool_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["degradations", str(tmp_path / "none.png"), "--output", str(tmp_path / "sheet.png")]) == 2
    assert "DataError: Image that cannot be read: got" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()
