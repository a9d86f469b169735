"""What is measured on DIL's renderings, on networks whose effect is known; enhancement measures; the plane of codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.panels import Picture, draw_panels
from qsd_plugin.report.dil import enhancement
from qsd_plugin.report.dil.code_plot import axis_correlation, draw_codes, principal_plane
from qsd_plugin.report.dil.measures import measured
from qsd_plugin.report.dil.renderer import check_size
from qsd_plugin.report.dil.swap_effect import Effect, as_json, as_table, swap_effect

RENDERED = np.linspace(0.5, 1.5, 12 * 8).reshape(12, 8)  # mean 1


class Levels:
    """In place of a trained stage 1: a picture's code is its mean level, and a rendering has its code's."""

    def __init__(self, level: Callable[[float], float] = lambda code: code) -> None:
        self._level = level

    def resized(self, pictures: Sequence[Picture]) -> list[Picture]:
        return list(pictures)

    def contents(self, pictures: Sequence[Picture]) -> torch.Tensor:
        return torch.zeros(len(pictures), 1)

    def codes(self, pictures: Sequence[Picture], head: str = "real") -> torch.Tensor:
        return torch.tensor([[float(picture.mean())] for picture in pictures])

    def render(self, contents: torch.Tensor, codes: torch.Tensor) -> list[Picture]:
        levels = [self._level(code) for code in codes[:, 0].tolist()]
        return [np.repeat((RENDERED * level)[:, :, None], 3, axis=2).round().astype(np.uint8) for level in levels]


def flat(levels: Sequence[float]) -> list[Picture]:
    return [np.full((12, 8, 3), level, dtype=np.uint8) for level in levels]


def effect(renderer: Any, count: int = 60, seed: int = 0) -> dict[str, Effect]:
    levels = np.random.default_rng(seed).integers(110, 130, 2 * count)
    people = [str(place // 2) for place in range(count)]
    clean, sources = flat(levels[:count]), flat(levels[count:])
    return swap_effect(renderer, clean, flat(levels[count:] - 70), sources, people, seed=seed)


def test_codes_that_carry_brightness_move_it_both_ways_and_permuted_ones_do_not() -> None:
    found = effect(Levels())["brightness"]
    levels = np.random.default_rng(0).integers(110, 130, 120)
    assert found.input.value == -70
    assert found.degrading.value == pytest.approx(np.mean(levels[60:] - 70 - levels[:60]), abs=0.1)
    assert found.cleaning.value == pytest.approx(-found.degrading.value, abs=1e-9)
    assert found.degrading.identities == 30
    assert abs(found.control_degrading.value) < 25
    assert not found.control_degrading.excludes_zero
    assert (found.share_degrading, found.share_cleaning) == (1.0, 1.0)
    assert found.verdict == "both ways"


def test_what_codes_do_not_carry_or_carry_upside_down_is_told() -> None:
    nothing = effect(Levels(lambda code: 100.0))["brightness"]
    assert (nothing.degrading.value, nothing.share_degrading) == (0.0, 0.0)
    assert nothing.verdict == "wrong way or none"
    assert effect(Levels(lambda code: 160 - code))["brightness"].verdict == "wrong way or none"
    sharpness = effect(Levels())["sharpness"]  # flat pictures: the degradation has no effect on it
    assert sharpness.verdict == "the degradation does not change it"
    text = as_table({"ill": {"brightness": nothing}})
    assert "| ill" in text
    assert "-70.0 (-70.0 to -70.0)" in text
    assert "wrong way or none" in text
    assert as_json({"brightness": nothing})["brightness"]["input"]["value"] == -70


def test_pairs_are_checked() -> None:
    with pytest.raises(DataError, match=r"Pairs of a swap: got \(1, 1, 1, 1\); expected lists of equal length"):
        swap_effect(Levels(), flat([9]), flat([9]), flat([9]), ["a"])  # type: ignore[arg-type]


def test_sharpness_is_a_ratio_and_does_not_count_darkness() -> None:
    stripes = np.zeros((16, 16, 3), dtype=np.uint8)
    stripes[:, ::4], stripes[:, 1::4] = 200, 200
    half = (stripes // 2).astype(np.uint8)
    blurred = gaussian_filter(stripes.astype(float), (0, 2, 0), mode="wrap").round().astype(np.uint8)
    values = measured([stripes, half, blurred])
    assert values[0, 0] == pytest.approx(values[1, 0])
    assert values[1, 1] == pytest.approx(values[0, 1] / 2)
    assert values[2, 0] < values[0, 0] - 2
    grey = stripes[:, :, 0].astype(float)  # columns 200 200 0 0: slopes 0 -100 -100 100 ... inside
    slopes = np.gradient(grey, axis=1)
    assert values[0, 0] == pytest.approx(np.log((slopes**2).mean() / grey.mean() ** 2))


def test_psnr_and_ssim_have_their_closed_and_second_forms() -> None:
    stream = np.random.default_rng(0)
    true = stream.integers(20, 200, (24, 32, 3), dtype=np.uint8)
    brighter = (true + 10).astype(np.uint8)
    noisy = np.clip(true + stream.normal(0, 20, true.shape), 0, 255).astype(np.uint8)
    values = enhancement.compared([true, brighter, noisy], [true, true, true])
    assert values[0].tolist() == [100.0, 1.0]
    assert values[1, 0] == pytest.approx(20 * np.log10(25.5))
    x, y = noisy.astype(float), true.astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5)[5:-5, 5:-5]

    a, b = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    cov, vx, vy = mean(x * y) - mx * my, mean(x * x) - mx**2, mean(y * y) - my**2
    ssim = ((2 * mx * my + a) * (2 * cov + b) / ((mx**2 + my**2 + a) * (vx + vy + b))).mean()
    assert values[2, 1] == pytest.approx(ssim, rel=1e-6)
    with pytest.raises(DataError, match=r"sizes: got \(\(24, 32\), \(24, 31\)\)"):
        enhancement.compared([true], [true[:, :31]])


def test_measures_without_a_reference() -> None:
    halves = np.zeros((16, 16, 3), dtype=np.uint8)
    halves[:, 8:] = 200
    sharp = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    smooth = gaussian_filter(sharp.astype(float), (2, 2, 0)).astype(np.uint8)
    values = enhancement.alone([halves, sharp, np.full_like(halves, 7), smooth])
    assert values[0, 0] == pytest.approx(1.0)
    assert values[2].tolist() == [0.0, 1.0]
    assert values[1, 1] + 0.1 < values[3, 1] < 1


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    with pytest.raises(ConfigError, match=r"not installed: got 'skimage.measure'; expected scikit-image\. pip install"):
        enhancement.alone(flat([3]))


def test_the_summary_compares_with_before_and_scaling_needs_no_network() -> None:
    true = [np.random.default_rng(k).integers(60, 200, (16, 16, 3), dtype=np.uint8) for k in range(6)]
    dark = [(picture // 4).astype(np.uint8) for picture in true]
    level = float(np.mean([picture.mean() for picture in true]))
    scaled = enhancement.scaled_to(dark, level)
    assert [picture.mean() for picture in scaled] == pytest.approx([level] * 6, abs=1)
    found = enhancement.summary(dark, {"scaled": scaled, "true": true}, true, [str(k) for k in range(6)])
    assert list(found) == ["before", "scaled", "true"]
    assert found["true"]["psnr"]["mean"] == 100.0
    before, after = (enhancement.compared(part, true)[:, 0] for part in (dark, scaled))
    gain = found["scaled"]["psnr"]["gain"]
    assert gain.value == pytest.approx((after - before).mean())
    assert gain.low > 5
    table = enhancement.as_table(found)
    assert f"{after.mean():.2f} ({gain.low:+.2f} to {gain.high:+.2f})" in table
    assert list(enhancement.summary(dark, {}, None, ["a"] * 6)["before"]) == ["entropy", "blur"]


def test_the_plane_is_that_of_a_principal_component_analysis(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).normal(size=(40, 5)) * [5, 3, 1, 0.5, 0.1] + 7
    plane, other = principal_plane(codes), PCA(2).fit(codes)
    np.testing.assert_allclose(np.abs(plane.points), np.abs(other.transform(codes)), atol=1e-9)
    np.testing.assert_allclose(plane.explained, other.explained_variance_ratio_)
    severity = np.where(np.arange(40) < 3, np.nan, np.arange(40) / 40)
    draw_codes(
        plane, {"severity": severity, "camera": np.array(["a", "b", "", "a"] * 10)}, tmp_path / "x" / "codes.png"
    )
    with Image.open(tmp_path / "x" / "codes.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 30
    with pytest.raises(DataError, match="Codes to plot: all are equal"):
        principal_plane(np.ones((5, 3)))
    with pytest.raises(DataError, match=r"Codes to plot: got \(2, 3\)"):
        principal_plane(np.ones((2, 3)))


def test_severity_is_read_off_codes_that_did_not_make_the_axis() -> None:
    stream = np.random.default_rng(0)
    severity, held_out = np.repeat([0.0, 0.5, 1.0], 40), np.tile(np.arange(40) % 2 == 1, 3)
    noise = stream.normal(size=(120, 6))
    assert axis_correlation(noise + 20 * severity[:, None] * [1, 0, 0, 0, 0, -1], severity, held_out) > 0.9
    # Codes that know severity only where the axis is made: on the others there is nothing to read off.
    half = np.where(held_out, 0.0, severity)
    assert abs(axis_correlation(noise + 20 * half[:, None], severity, held_out)) < 0.3


def test_sheets_and_sizes_are_checked() -> None:
    with pytest.raises(DataError, match=r"Pictures of a sheet: got .*all of one size"):
        draw_panels({(0, 0): flat([1])[0], (0, 1): flat([1])[0][:5]}, rows=[""], columns=["", ""])
    with pytest.raises(
        DataError, match=r"got '40 x 32 pixels .height x width.'; expected multiples of 16, at least 20"
    ):
        check_size((40, 32))
    with pytest.raises(DataError, match="expected multiples of 16"):
        check_size((32, 16))
