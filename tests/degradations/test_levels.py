"""Named levels of degradation: what each name does to an image, that it does so every time, and what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.degradations import apply, replay
from qsd_plugin.degradations.levels import CROSS_RESOLUTION_LEVELS, LOWRES_LEVELS, parse_levels
from qsd_plugin.degradations.resampling import PILLOW_FILTERS

IMAGE = np.random.default_rng(0).integers(0, 256, (112, 112, 3)).astype(np.uint8)


@pytest.mark.parametrize(("text", "side"), list(zip(LOWRES_LEVELS, (56, 28, 16, 11), strict=True)))
def test_lowres_is_the_paper_s_view_at_a_fixed_side(text: str, side: int) -> None:
    (level,) = parse_levels([text])
    found, params = level.apply(IMAGE, seed=3, index=5)
    small = Image.fromarray(IMAGE).resize((side, side), PILLOW_FILTERS[params["down"]])
    packed = io.BytesIO()
    small.save(packed, "JPEG", quality=75)
    expected = Image.open(packed).resize((112, 112), PILLOW_FILTERS[params["up"]])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(("text", "side"), list(zip(CROSS_RESOLUTION_LEVELS, (8, 12, 16, 20), strict=True)))
def test_cross_resolution_is_bilinear_and_antialiased(text: str, side: int) -> None:
    import torch
    import torch.nn.functional as F

    found, _ = parse_levels([text])[0].apply(IMAGE, seed=0, index=0)
    kernel = {"mode": "bilinear", "antialias": True, "align_corners": False}
    pixels = torch.from_numpy(IMAGE).permute(2, 0, 1)[None].double()
    small = F.interpolate(pixels, (side, side), **kernel).round()
    expected = F.interpolate(small, (112, 112), **kernel).round()[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 2  # Pillow's fixed-point weights


def test_filters_are_drawn_per_image_and_from_all_five() -> None:
    (level,) = parse_levels(["lowres-0.25"])
    drawn = [level.apply(IMAGE, seed=0, index=index)[1] for index in range(80)]
    assert {params["down"] for params in drawn} == {params["up"] for params in drawn} == set(PILLOW_FILTERS)
    assert any(params["down"] != params["up"] for params in drawn)


@pytest.mark.parametrize("text", ["lowres-0.15", "px-8", "noise-0.5", "motion_blur-1", "occlusion-0.7"])
def test_an_image_is_degraded_the_same_way_every_time(text: str) -> None:
    (level,) = parse_levels([text])
    first, params = level.apply(IMAGE, seed=1, index=4)
    level.apply(IMAGE, seed=1, index=9)
    assert np.array_equal(level.apply(IMAGE, seed=1, index=4)[0], first)
    assert np.array_equal(replay(IMAGE, json.loads(json.dumps(params))), first)
    assert not np.array_equal(first, IMAGE)
    if text != "px-8":
        others = [level.apply(IMAGE, seed=seed, index=index)[1] for seed in (1, 2) for index in range(8)]
        assert len({json.dumps(other) for other in others}) > 3


def test_levels_of_one_degradation_differ_in_the_amount_alone() -> None:
    mild, strong = (
        level.apply(IMAGE, seed=0, index=7)[1] for level in parse_levels(["motion_blur-0.3", "motion_blur-1"])
    )
    assert mild["angle"] == strong["angle"]
    assert mild["length"] < strong["length"]
    ends = [level.apply(IMAGE, seed=0, index=7)[1] for level in parse_levels(LOWRES_LEVELS)]
    assert len({(params["down"], params["up"]) for params in ends}) == 1


def test_registered_degradations_at_a_severity() -> None:
    found, params = parse_levels(["darkness-0.75"])[0].apply(IMAGE, seed=0, index=0)
    expected, drawn = apply("darkness", IMAGE, np.random.default_rng(1), 0.75)
    assert params == drawn
    assert np.array_equal(found, expected)
    assert parse_levels(["compression-1"])[0].apply(IMAGE, seed=0, index=0)[1]["quality"] == 4


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"Levels of degradation: got \[\]; expected one or more, each once. Such as lowres-0.5"),
        (["px-8", "px-8"], r"expected one or more, each once"),
        (["lowres"], r"Level of degradation: got 'lowres'; expected a degradation, '-' and a number: lowres-0.15"),
        (["lowres-x"], r"got 'lowres-x'; expected a degradation, '-' and a number"),
        (["lowers-0.5"], r"Degradation of a level: got 'lowers-0.5'. Did you mean 'lowres'"),
        (["dil_res-0.5"], r"Degradation of a level: got 'dil_res-0.5'"),
        (["lowres-0"], r"got 'lowres-0'; expected a share of the image's side above 0, up to 1"),
        (["px-8.5"], r"got 'px-8.5'; expected a whole number of pixels"),
        (["px-0"], r"got 'px-0'; expected a whole number of pixels"),
        (["blur-1.5"], r"got 'blur-1.5'; expected a severity from 0 to 1"),
        (["blur-nan"], r"got 'blur-nan'; expected a severity from 0 to 1"),
        (["px-inf"], r"got 'px-inf'; expected a whole number of pixels"),
    ],
)
def test_what_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_levels(texts)


def test_images_are_checked() -> None:
    for text in ("lowres-0.5", "px-8", "blur-0.5"):
        with pytest.raises(DataError, match="Image to degrade: got 'float64 array"):
            parse_levels([text])[0].apply(np.zeros((20, 20, 3)), seed=0, index=0)
    with pytest.raises(DataError, match="Size of an image to degrade by 'qgface_rescale'"):
        parse_levels(["lowres-0.5"])[0].apply(np.zeros((9, 20, 3), np.uint8), seed=0, index=0)
