from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations import face_functions, views
from qsd_plugin.degradations.resampling import OPENCV_FILTERS, PILLOW_FILTERS

FACE = np.random.default_rng(1).integers(0, 256, size=(112, 112, 3), dtype=np.uint8)
ALWAYS = {"crop_probability": 1.0, "photometric_probability": 1.0, "rotation_probability": 1.0}


def many(count: int = 800, **options: Any) -> list[dict[str, Any]]:
    """The draws of many degraded views, of a small image for speed."""
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    return [views.degraded_view(image, numpy_stream(seed), **options)[1] for seed in range(count)]


def names_of(params: dict[str, Any]) -> list[str]:
    return [step["name"] for step in params["steps"]]


def test_the_small_image_has_11_to_55_pixels_and_independent_filters() -> None:
    generator, sides, filters = numpy_stream(0), set(), np.zeros((5, 5))
    known = list(PILLOW_FILTERS)
    for _ in range(3000):
        severity, drawn = face_functions.free_qgface_rescale(generator, 112, 112)
        assert drawn["height"] == drawn["width"] == int(0.1**severity * 112 + 1e-9)
        assert drawn["quality"] == 75
        sides.add(drawn["height"])
        filters[known.index(drawn["down"]), known.index(drawn["up"])] += 1
    assert sides == set(range(11, 56))
    assert np.abs(filters - 120).max() < 5 * np.sqrt(120)


def test_the_degraded_view_is_its_steps_in_order() -> None:
    degraded, params = views.degraded_view(FACE, numpy_stream(3), **ALWAYS)
    assert names_of(params) == ["qgface_rescale", "qgface_crop", "photometric", "rotation"]
    expected = FACE
    for step in params["steps"]:
        numbers = {key: value for key, value in step.items() if key not in ("name", "severity")}
        expected = getattr(face_functions, step["name"])(expected, **numbers)
    assert np.array_equal(degraded, expected[:, ::-1] if params["mirrored"] else expected)
    _, crop, jitter, turn = params["steps"]
    assert 0.79 < crop["height"] * crop["width"] / 112**2 <= 1.0
    assert 0.74 < crop["width"] / crop["height"] < 1.35
    assert all(0.8 <= jitter[key] <= 1.2 for key in ("brightness", "contrast", "saturation"))
    assert abs(turn["degrees"]) <= 45.0


def test_steps_happen_as_often_as_asked_and_independently() -> None:
    found = many(crop_probability=0.2, photometric_probability=0.5, rotation_probability=0.0)
    happened = np.array(
        [[name in names_of(params) for name in ("qgface_crop", "photometric", "rotation")] for params in found]
    )
    mirrored = np.array([params["mirrored"] for params in found])
    assert all(names_of(params)[0] == "qgface_rescale" for params in found)
    assert happened.mean(axis=0) == pytest.approx([0.2, 0.5, 0.0], abs=0.08)
    assert mirrored.mean() == pytest.approx(0.5, abs=0.08)
    table = np.corrcoef(np.column_stack([happened[:, :2], mirrored]).T)
    assert np.abs(table - np.eye(3)).max() < 0.15
    ranges = {key: [] for key in ("brightness", "contrast", "saturation")}
    for params in many(400, photometric_probability=1.0):
        for key, values in ranges.items():
            values.append(params["steps"][-1][key])
    for values in ranges.values():
        assert (np.min(values), np.max(values)) == pytest.approx((0.8, 1.2), abs=0.01)


def test_a_changed_probability_changes_no_number() -> None:
    for seed in range(10):
        _, all_of_them = views.degraded_view(FACE, numpy_stream(seed), **ALWAYS)
        _, none = views.degraded_view(
            FACE, numpy_stream(seed), crop_probability=0.0, photometric_probability=0.0, rotation_probability=0.0
        )
        _, some = views.degraded_view(FACE, numpy_stream(seed), **{**ALWAYS, "crop_probability": 0.0})
        assert none["steps"] == all_of_them["steps"][:1]
        assert some["steps"] == [step for step in all_of_them["steps"] if step["name"] != "qgface_crop"]
        assert none["mirrored"] == some["mirrored"] == all_of_them["mirrored"]


def test_the_pair_is_mirrored_independently_and_the_clean_view_is_clean() -> None:
    image = np.random.default_rng(2).integers(0, 256, size=(12, 12, 3), dtype=np.uint8)
    mirrored = []
    for seed in range(600):
        degraded, clean, params = views.view_pair(image, numpy_stream(seed))
        again = views.replay_pair(image, json.loads(json.dumps(params)))
        assert np.array_equal(again[0], degraded)
        assert np.array_equal(again[1], clean)
        assert np.array_equal(clean, image[:, ::-1] if params["clean"]["mirrored"] else image)
        mirrored.append([params["degraded"]["mirrored"], params["clean"]["mirrored"]])
    assert np.mean(mirrored, axis=0) == pytest.approx([0.5, 0.5], abs=0.09)
    assert abs(np.corrcoef(np.array(mirrored).T)[0, 1]) < 0.17
    assert not np.shares_memory(clean, image)


def test_two_degraded_views_are_independent() -> None:
    first, second, params = views.view_pair(FACE, numpy_stream(1), aligned=False, rotation_probability=1.0)
    assert set(params) == {"degraded", "second"}
    assert params["degraded"]["steps"] != params["second"]["steps"]
    again = views.replay_pair(FACE, params)
    assert np.array_equal(again[0], first)
    assert np.array_equal(again[1], second)


def test_colour_order_swaps_what_jpeg_and_luma_see() -> None:
    blue = np.zeros((112, 112, 3), dtype=np.uint8)
    blue[:, :, 2] = 200
    options = {"photometric_probability": 1.0, "crop_probability": 0.0}
    rgb, params = views.degraded_view(blue, numpy_stream(5), **options)
    bgr, swapped = views.degraded_view(blue, numpy_stream(5), **options, colour_order="bgr")
    assert swapped == {**params, "colour_order": "bgr"}
    assert (rgb.mean(axis=(0, 1)).argmax(), bgr.mean(axis=(0, 1)).argmax()) == (2, 2)  # RGB on both sides
    assert not np.array_equal(rgb, bgr)
    by_hand = views.replay_view(np.ascontiguousarray(blue[:, :, ::-1]), params)[:, :, ::-1]
    assert np.array_equal(bgr, by_hand)


@pytest.mark.parametrize("variant", views.ADAFACE_VARIANTS)
def test_adaface_s_augmentation(variant: str) -> None:
    view, params = views.adaface_view(FACE, numpy_stream(8), variant=variant, probability=1.0)
    assert names_of(params) == [f"{variant}_crop", "adaface_rescale", "photometric"]
    assert np.array_equal(views.replay_view(FACE, json.loads(json.dumps(params))), view)
    image, filters = np.zeros((40, 40, 3), dtype=np.uint8), OPENCV_FILTERS if variant == "adaface" else PILLOW_FILTERS
    used, sides, factors, boxes = set(), [], [], []
    for seed in range(500):
        crop, rescale, jitter = views.adaface_view(image, numpy_stream(seed), variant=variant, probability=1.0)[1][
            "steps"
        ]
        used |= {rescale["down"], rescale["up"]}
        sides.append(rescale["height"])
        factors += [jitter[key] for key in ("brightness", "contrast", "saturation")]
        boxes.append(crop["height"] * crop["width"] / 1600)
    assert used == set(filters)
    assert (min(sides), max(sides)) == (8, 39)
    assert (min(factors), max(factors)) == pytest.approx((0.5, 1.5), abs=0.01)
    assert (min(boxes), max(boxes)) == pytest.approx((0.2, 1.0), abs=0.05)
    happened = [names_of(views.adaface_view(image, numpy_stream(seed), variant=variant)[1]) for seed in range(600)]
    for name in (f"{variant}_crop", "adaface_rescale", "photometric"):
        assert np.mean([name in names for names in happened]) == pytest.approx(0.2, abs=0.075)


def test_equal_generators_give_equal_views_and_the_image_is_left_alone() -> None:
    before = FACE.copy()
    for make in (views.clean_view, views.degraded_view, views.adaface_view):
        first, second = (make(FACE, numpy_stream(9))[0] for _ in range(2))
        assert np.array_equal(first, second)
        assert first.flags.c_contiguous
        first[:] = 0
    assert np.array_equal(FACE, before)


def test_persons_keep_their_shape() -> None:
    person = np.random.default_rng(1).integers(0, 256, size=(128, 64, 3), dtype=np.uint8)
    degraded, params = views.degraded_view(person, numpy_stream(0), **ALWAYS)
    assert degraded.shape == person.shape
    assert params["steps"][0]["height"] // 2 == pytest.approx(params["steps"][0]["width"], abs=1)


def test_bad_input() -> None:
    with pytest.raises(DataError, match=r"'qgface_rescale': got '9 x 112 pixels'; expected at least 10 pixels"):
        views.degraded_view(FACE[:9], numpy_stream(0))
    with pytest.raises(DataError, match=r"float64 array of shape \(112, 112, 3\)"):
        views.clean_view(FACE / 255.0, numpy_stream(0))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"Option crop_probability of a view: got 1\.2; expected a number in \[0, 1\]"
    ):
        views.degraded_view(FACE, numpy_stream(0), crop_probability=1.2)
    with pytest.raises(ConfigError, match=r"Option probability of a view: got nan"):
        views.adaface_view(FACE, numpy_stream(0), probability=float("nan"))
    with pytest.raises(ConfigError, match=r"Unknown colour order: got 'brg'\. Did you mean .*'bgr'"):
        views.degraded_view(FACE, numpy_stream(0), colour_order="brg")
    with pytest.raises(ConfigError, match=r"Unknown variant of the AdaFace view: got 'adaFace2'\. Did you mean 'adaf"):
        views.adaface_view(FACE, numpy_stream(0), variant="adaFace2")
    _, params = views.degraded_view(FACE, numpy_stream(0))
    for broken in ({}, {"steps": []}, {**params, "colour_order": "gbr"}, [params]):
        with pytest.raises(DataError, match=r"Parameters of a view: got .*dictionary that came with the view"):
            views.replay_view(FACE, broken)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Parameters of a view"):
        views.replay_pair(FACE, params)
