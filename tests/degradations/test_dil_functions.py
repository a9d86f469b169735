"""DIL's functions against what the official program recorded, at the numbers that its seeds draw."""

from __future__ import annotations

import io
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations import apply, dil_functions, draw, names, replay
from qsd_plugin.degradations.mixing import replay_steps

DIL = [name for name in names() if name.startswith("dil_")]
#: 1 grey level where an image library is between; its versions differ by as much.
EXACT, LIBRARY = 0, 1


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "dil_degradations.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """The recipe of the recorded input; RandomState(crc32("pil/deg")) is frozen by NumPy."""
    rows, columns = np.mgrid[0:256, 0:128].astype(np.float64)
    base = np.stack(
        [
            127 + 90 * np.sin(columns / 9.0) * np.cos(rows / 17.0),
            127 + 100 * np.sin((columns + 2 * rows) / 23.0),
            40 + 170 * (rows / 255),
        ],
        axis=2,
    )
    grain = np.random.RandomState(zlib.crc32(b"pil/deg")).standard_normal((256, 128, 3))
    return np.clip(np.rint(base + 12 * grain), 0, 255).astype(np.uint8)


def legacy(seed: int) -> np.random.RandomState:
    """The stream that the official program draws from."""
    return np.random.RandomState(seed)


def check(recorded: dict[str, np.ndarray], name: str, found: np.ndarray, tolerance: int) -> None:
    expected = recorded[name]
    assert found.dtype == np.uint8
    assert found.shape == tuple(recorded[f"{name}/shape"])
    step = found.shape[0] // expected.shape[0]
    assert np.abs(found[::step, ::step].astype(int) - expected).max() <= tolerance
    assert abs(int(found.sum(dtype=np.int64)) - int(recorded[f"{name}/sum"])) <= tolerance * found.size // 10


def drawn_ill(stream: np.random.RandomState) -> dict[str, float]:
    return {"gamma": stream.uniform(2.0, 3.5), "gain": stream.uniform(0.75, 1.0)}


@pytest.mark.parametrize("seed", [0, 1])
def test_recorded_single_functions(recorded: dict[str, np.ndarray], picture: np.ndarray, seed: int) -> None:
    check(recorded, f"ill/{seed}", replay(picture, {"name": "dil_ill", **drawn_ill(legacy(seed))}), EXACT)
    ratio = legacy(seed).uniform(3.0, 5.0)
    size = {"height": int(256 // ratio), "width": int(128 // ratio)}  # the official program cuts, dil_res rounds
    check(recorded, f"res/{seed}", replay(picture, {"name": "dil_res", **size}), LIBRARY)
    stream = legacy(seed)
    line = {"length": int(stream.randint(5, 15)), "angle": stream.uniform(0.0, 180.0)}
    check(recorded, f"motion/{seed}", replay(picture, {"name": "dil_motion", **line}), LIBRARY)
    check(recorded, f"blur/{seed}", replay(picture, {"name": "dil_blur", "radius": (3, 4)[seed]}), LIBRARY)
    noise = legacy(seed).normal(0.0, dil_functions.NOISE_STD, picture.shape)
    check(recorded, f"noise/{seed}", dil_functions.add_noise(picture, noise), EXACT)
    check(recorded, f"poisson/{seed}", dil_functions.add_counts(picture, legacy(seed).poisson(picture)), EXACT)


def test_recorded_dark_in_both_orders(recorded: dict[str, np.ndarray], picture: np.ndarray) -> None:
    stream = legacy(0)  # Poisson first
    noisy = dil_functions.add_counts(picture, stream.poisson(picture))
    check(recorded, "dark/0", dil_functions.dil_ill(noisy, **drawn_ill(stream)), EXACT)
    stream = legacy(1)
    dark = dil_functions.dil_ill(picture, **drawn_ill(stream))
    check(recorded, "dark/1", dil_functions.add_counts(dark, stream.poisson(dark)), EXACT)


def test_recorded_mixes_from_the_picture_on(recorded: dict[str, np.ndarray], picture: np.ndarray) -> None:
    """No step, and the two steps that stand in test_mixing."""
    check(recorded, "res+ill_0.5_clear/0", replay_steps(picture, []), EXACT)
    stream = legacy(0)
    ratio = stream.uniform(3.0, 5.0)
    size = {"height": int(256 // ratio), "width": int(128 // ratio)}
    steps = [{"name": "dil_res", **size}, {"name": "dil_ill", **drawn_ill(stream)}]
    check(recorded, "res+ill_0.5/0", replay_steps(picture, steps), LIBRARY)


def test_dark_is_its_two_parts_in_the_order_it_says(picture: np.ndarray) -> None:
    ill, poisson = {"gamma": 2.5, "gain": 0.8}, {"strength": 0.7, "seed": 3}
    for first in (True, False):
        found = dil_functions.dil_dark(picture, **ill, **poisson, poisson_first=first)
        order = ("dil_poisson", "dil_ill") if first else ("dil_ill", "dil_poisson")
        expected = picture
        for name in order:
            expected = replay(expected, {"name": name, **(ill if name == "dil_ill" else poisson)})
        assert np.array_equal(found, expected)
    firsts = [draw("dil_dark", numpy_stream(seed), 8, 8)["poisson_first"] for seed in range(400)]
    assert 150 < sum(firsts) < 250  # 5 standard deviations


def test_a_given_ratio_is_kept_exactly(recorded: dict[str, np.ndarray], picture: np.ndarray) -> None:
    severity, size = dil_functions.draw_res(numpy_stream(0), 256, 128, ratio=(2.0, 2.0))
    assert size == {"height": 128, "width": 64}  # 127 x 63 in the official program
    assert severity == pytest.approx(np.log(2) / np.log(5))
    check(recorded, "res(2,2+1e-6)/0", dil_functions.dil_res(picture, height=127, width=63), LIBRARY)


def test_jpg_keeps_the_order_of_the_channels() -> None:
    """Against Pillow's codec at the same quality and subsampling, which reads RGB."""
    rows, columns = np.mgrid[:48, :64]
    image = np.stack([rows * 5, 255 - columns * 3, 90 + columns], axis=2).astype(np.uint8)
    image[10:30, 20:50] = (220, 30, 20)
    packed = io.BytesIO()
    PILImage.fromarray(image).save(packed, format="JPEG", quality=20, subsampling=2)
    expected = np.asarray(PILImage.open(packed)).astype(int)
    found = dil_functions.dil_jpg(image, quality=20)
    assert np.abs(found - expected).max() <= 4
    assert np.abs(found - expected).mean() < 0.5
    assert np.abs(dil_functions.dil_jpg(image[:, :, ::-1].copy(), quality=20)[:, :, ::-1] - expected).mean() > 1.0


def test_poisson_numbers_have_their_mean_and_variance() -> None:
    image = np.full((200, 200, 3), 100, dtype=np.uint8)
    image[0, 0] = 255
    found = dil_functions.dil_poisson(image, strength=1.0, seed=1).astype(np.float64)
    assert found.max() == 255
    top = 255.0 + np.random.default_rng(1).poisson(image)[0, 0].max()
    inner = found[1:]
    assert inner.mean() == pytest.approx(200.0 * 255.0 / top - 0.5, abs=0.1)  # truncation takes half a level
    assert inner.std() == pytest.approx(10.0 * 255.0 / top, abs=0.1)
    half = dil_functions.dil_poisson(image, strength=0.5, seed=1).astype(np.float64)
    assert np.abs(half - (image + found) / 2.0).max() <= 1.0


RANGES = {
    "dil_res": {"height": (20, 33), "width": (10, 17)},
    "dil_ill": {"gamma": (2.0, 3.5), "gain": (0.75, 1.0)},
    "dil_jpg": {"quality": (10, 20)},
    "dil_motion": {"length": (5, 14), "angle": (0.0, 180.0)},
    "dil_blur": {"radius": (3, 6)},
    "dil_noise": {"std": (10.0, 10.0)},
    "dil_poisson": {"strength": (1.0, 1.0)},
    "dil_dark": {"gamma": (2.0, 3.5), "gain": (0.75, 1.0), "strength": (1.0, 1.0)},
}


@pytest.mark.parametrize("name", DIL)
def test_without_a_severity_the_paper_s_ranges_are_drawn_uniformly(name: str) -> None:
    generator = numpy_stream(1, name)
    drawn = [draw(name, generator, 100, 50) for _ in range(1500)]
    for key, (low, high) in RANGES[name].items():
        found = np.array([params[key] for params in drawn], dtype=np.float64)
        assert low <= found.min()
        assert found.max() <= high + 1e-12
        if high > low and name != "dil_res":
            assert found.mean() == pytest.approx((low + high) / 2.0, abs=0.1 * (high - low) / 2.0)
            steps = high - low + 1 if isinstance(low, int) else np.inf  # whole numbers spread a little further
            assert found.std() == pytest.approx((high - low) * np.sqrt((1 + 2 / (steps - 1)) / 12.0), rel=0.05)
            assert found.min() - low < 0.02 * (high - low)
            assert high - found.max() < 0.02 * (high - low)
    severities = np.array([params["severity"] for params in drawn])
    assert (severities >= 0.2).all()
    assert (severities <= 1.0).all()
    if name == "dil_res":
        ratios = 5.0**severities
        assert ratios.mean() == pytest.approx(4.0, abs=0.06)
        assert ratios.min() < 3.01
        assert ratios.max() > 4.99


@pytest.mark.parametrize("name", DIL)
def test_the_severity_of_a_free_draw_is_on_the_scale_of_asked_ones(name: str) -> None:
    free = draw(name, numpy_stream(2), 100, 50)
    asked = draw(name, numpy_stream(2), 100, 50, free["severity"])
    for key in {"height", "width", "quality", "length", "radius", "std"} & set(free):
        assert asked[key] == pytest.approx(free[key])
    if "gain" in free:  # two numbers on one scale: their positions' mean
        positions = [(free["gamma"] - 1) / 2.5, (1 - free["gain"]) / 0.25]
        assert free["severity"] == pytest.approx(np.mean(positions))
        assert [(asked["gamma"] - 1) / 2.5, (1 - asked["gain"]) / 0.25] == pytest.approx([np.mean(positions)] * 2)


@pytest.mark.parametrize("name", DIL)
def test_severity_runs_from_no_change_to_the_strongest_drawn(name: str, picture: np.ndarray) -> None:
    image = np.ascontiguousarray(picture[::2, ::2])
    errors = []
    for severity in (0.0, 0.25, 0.5, 0.75, 1.0):
        found, params = apply(name, image, numpy_stream(4, name), severity)
        if name == "dil_res":
            found = np.asarray(PILImage.fromarray(found).resize((64, 128), PILImage.Resampling.BICUBIC))
        errors.append(np.mean((found.astype(float) - image) ** 2))
    assert name == "dil_jpg" or errors[0] == 0.0  # JPEG at quality 100 still halves the colours' resolution
    if name == "dil_motion":  # stretched back to full contrast, so that the last steps differ in kind and not in error
        assert 0.0 < errors[1] < errors[2] < min(errors[3:])
    else:
        assert all(milder < harder for milder, harder in itertools.pairwise(errors)), errors
    for key, (low, high) in RANGES[name].items():
        if name != "dil_res" and key != "angle":
            assert params[key] == (low if key in ("quality", "gain") else high)


def test_images_too_small_are_refused() -> None:
    image = np.zeros((4, 60, 3), dtype=np.uint8)
    with pytest.raises(DataError, match=r"degrade by 'dil_res': got '4 x 60 pixels'; expected at least 5 pixels"):
        apply("dil_res", image, numpy_stream(0))
    with pytest.raises(DataError, match=r"degrade by 'dil_motion': got '4 x 60 pixels'; expected at least 8 pixels"):
        replay(image, {"name": "dil_motion", "length": 5, "angle": 0.0})


def test_a_black_image_stays_black() -> None:
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    for name in DIL:
        if name not in ("dil_noise", "dil_jpg"):
            assert not apply(name, image, numpy_stream(0))[0].any()
