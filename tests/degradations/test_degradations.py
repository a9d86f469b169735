from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError, RegistryError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations import apply, names, operations, replay

SEVERITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
#: Peak signal-to-noise ratio that severity 0 must reach, in dB; infinite where it changes nothing at all.
IDENTITY_PSNR = {"compression": 45.0}
#: The toolkit's own; those of the methods have files of tests of their own.
OWN = ["blur", "compression", "darkness", "low_resolution", "motion_blur", "noise", "occlusion"]


def textured_image(height: int = 48, width: int = 32) -> np.ndarray:
    """Edges, gradients, colour and fine grain, so that every degradation has something to damage."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows * 4.0, 255.0 - columns * 6.0, 128 + 90 * np.sin(columns * 1.1)], axis=2)
    picture[height // 4 : height // 2, width // 4 : width // 2] = (230, 40, 40)
    picture += np.random.default_rng(0).normal(0.0, 8.0, size=picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((image.astype(np.float64) - other) ** 2)
    return math.inf if error == 0.0 else 10.0 * math.log10(255.0**2 / error)


def impulse(height: int = 41, width: int = 41) -> np.ndarray:
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[height // 2, width // 2] = 255
    return image


def test_the_degradations_are_these() -> None:
    assert names() == sorted(
        [
            *OWN,
            *("dil_blur", "dil_dark", "dil_ill", "dil_jpg", "dil_motion", "dil_noise", "dil_poisson", "dil_res"),
            *("adaface_crop", "adaface_rescale", "photometric", "qgface_crop", "qgface_rescale", "rotation"),
        ]
    )


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("severity", [None, 0.0, 0.37, 1.0])
def test_replay_is_bit_equal_and_survives_json(name: str, severity: float | None) -> None:
    image = textured_image()
    degraded, params = apply(name, image, numpy_stream(5, name), severity)
    assert np.array_equal(replay(image, params), degraded)
    assert np.array_equal(replay(image, json.loads(json.dumps(params))), degraded)
    assert params["name"] == name
    assert degraded.dtype == np.uint8
    assert degraded.shape == ((params["height"], params["width"], 3) if name == "dil_res" else image.shape)


@pytest.mark.parametrize("name", names())
def test_the_input_is_left_untouched_and_not_shared(name: str) -> None:
    image = textured_image()
    for severity in (0.0, 1.0):
        before = image.copy()
        degraded, _ = apply(name, image, numpy_stream(1), severity)
        degraded[:] = 0
        assert np.array_equal(image, before)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("seed", range(4))
def test_damage_grows_with_severity(name: str, seed: int) -> None:
    image = textured_image()
    quality = [psnr(image, apply(name, image, numpy_stream(seed, name), severity)[0]) for severity in SEVERITIES]
    assert quality[0] >= IDENTITY_PSNR.get(name, math.inf)
    assert all(milder > harder for milder, harder in itertools.pairwise(quality)), quality
    assert quality[-1] < 25.0


@pytest.mark.parametrize("name", names())
def test_equal_generators_give_equal_images_and_others_do_not(name: str) -> None:
    image = textured_image()
    first, second, other = (apply(name, image, numpy_stream(seed))[0] for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_severity_is_drawn_uniformly_and_first() -> None:
    generator = numpy_stream(3)
    drawn = [apply("darkness", np.zeros((1, 1, 3), np.uint8), generator)[1]["severity"] for _ in range(2000)]
    counts, _ = np.histogram(drawn, bins=10, range=(0.0, 1.0))
    assert np.all(np.abs(counts - 200) < 60)  # 4.5 standard deviations of a binomial
    assert apply("motion_blur", textured_image(), numpy_stream(7))[1]["severity"] == numpy_stream(7).uniform()


@pytest.mark.parametrize("name", ["motion_blur", "noise", "occlusion"])
def test_other_choices_do_not_depend_on_severity(name: str) -> None:
    image = textured_image()
    fixed = {"motion_blur": ["angle"], "noise": ["seed"], "occlusion": ["red", "green", "blue"]}[name]
    mild, strong = (apply(name, image, numpy_stream(9), severity)[1] for severity in (0.2, 0.9))
    assert [mild[key] for key in fixed] == [strong[key] for key in fixed]


def test_blur_spreads_a_point_as_a_gaussian() -> None:
    blurred = operations.blur(impulse(), sigma=2.0)[:, :, 0].astype(np.float64)
    offset = np.arange(41) - 20
    profile = np.exp(-(offset**2) / 8.0)
    expected = 255.0 * np.outer(profile, profile) / profile.sum() ** 2
    assert np.abs(blurred - expected).max() <= 1.0
    assert apply("blur", textured_image(100, 50), numpy_stream(0), 0.5)[1]["sigma"] == 0.5 * operations.BLUR_SIGMA * 50


@pytest.mark.parametrize("angle", [0.0, math.pi / 2.0])
def test_motion_blur_spreads_a_point_evenly_along_its_path(angle: float) -> None:
    blurred = operations.motion_blur(impulse(), length=4.0, angle=angle)[:, :, 0]
    along = blurred[20] if angle == 0.0 else blurred[:, 20]
    # Four pixels of movement: the outer two of five pixels are met half as long as the inner ones.
    assert along[18:23].tolist() == [32, 64, 64, 64, 32]
    assert blurred.sum() == along[18:23].sum()


def test_motion_blur_at_a_slant_keeps_light_and_direction() -> None:
    angle = 0.6
    blurred = operations.motion_blur(impulse(), length=16.0, angle=angle)[:, :, 0].astype(np.float64)
    rows, columns = np.mgrid[-20:21, -20:21]
    assert abs(blurred.sum() - 255.0) < 20.0  # every pixel is rounded
    second = [[(blurred * a * b).sum() for a in (columns, rows)] for b in (columns, rows)]
    _, directions = np.linalg.eigh(np.array(second))
    assert abs(directions[:, 1] @ (math.cos(angle), math.sin(angle))) > 0.999


def test_low_resolution_leaves_as_many_pixels_as_it_says() -> None:
    image = textured_image(96, 48)
    degraded, params = apply("low_resolution", image, numpy_stream(0), 2.0 / 3.0)
    assert operations.LOW_RESOLUTION_FACTOR == 8.0
    assert (params["height"], params["width"]) == (24, 12)
    small = Image.fromarray(image).resize((12, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(degraded, np.asarray(small.resize((48, 96), Image.Resampling.BICUBIC)))


def test_noise_has_the_deviation_it_says() -> None:
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noisy = operations.noise(grey, std=20.0, seed=4).astype(np.float64)
    assert abs(noisy.mean() - 128.0) < 0.3
    assert abs(noisy.std() - 20.0) < 0.3
    assert abs(np.corrcoef(noisy[:, :, 0].ravel(), noisy[:, :, 1].ravel())[0, 1]) < 0.02


def test_darkness_follows_its_curve() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert np.array_equal(operations.darkness(ramp, gain=0.5, gamma=1.0)[0, :, 0], np.rint(np.arange(256) * 0.5))
    squared = operations.darkness(ramp, gain=1.0, gamma=2.0)[0, :, 0]
    assert np.array_equal(squared, np.rint(np.arange(256) ** 2 / 255.0))
    both = operations.darkness(ramp, gain=0.5, gamma=2.0)[0, :, 0]
    assert np.array_equal(both, np.rint(0.5 * np.arange(256) ** 2 / 255.0))
    _, params = apply("darkness", ramp, numpy_stream(0), 1.0)
    assert (params["gain"], params["gamma"]) == (operations.DARKNESS_GAIN, operations.DARKNESS_GAMMA)


def test_compression_goes_down_to_the_stated_quality_and_keeps_colour_at_none() -> None:
    image = textured_image()
    found = [apply("compression", image, numpy_stream(0), severity)[1]["quality"] for severity in (0.0, 0.5, 1.0)]
    assert found == [100, 20, 4]  # geometric: 100 * 0.04 ** severity
    untouched, _ = apply("compression", image, numpy_stream(0), 0.0)
    assert np.abs(untouched.astype(int) - image).max() <= 4


@pytest.mark.parametrize("severity", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_occlusion_covers_the_stated_share(severity: float, seed: int) -> None:
    image = np.zeros((200, 100, 3), dtype=np.uint8)  # no drawn colour is black
    degraded, params = apply("occlusion", image, numpy_stream(seed), severity)
    covered = degraded.any(axis=2)
    assert abs(covered.mean() - severity * operations.OCCLUSION_AREA) < 0.01
    assert covered[params["top"] : params["bottom"], params["left"] : params["right"]].all()


def test_occlusion_boxes_of_growing_severity_lie_inside_each_other() -> None:
    image = np.zeros((128, 64, 3), dtype=np.uint8)
    for seed in range(20):
        masks = [apply("occlusion", image, numpy_stream(seed), severity)[0].any(axis=2) for severity in SEVERITIES]
        for inner, outer in itertools.pairwise(masks):
            assert not (inner & ~outer).any()


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), r"float32 array of shape \(8, 8, 3\)"),
        (np.zeros((8, 8), dtype=np.uint8), r"uint8 array of shape \(8, 8\)"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((0, 8, 3), dtype=np.uint8), r"\(0, 8, 3\)"),
        (Image.new("RGB", (8, 8)), "got 'Image'"),
    ],
)
def test_what_is_no_image_is_refused(image: object, found: str) -> None:
    advice = r".*expected a uint8 array of shape \(height, width, 3\), RGB.*convert\('RGB'\)"
    with pytest.raises(DataError, match=found + advice):
        apply("blur", image, numpy_stream(0))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=found + advice):
        replay(image, {"name": "blur", "sigma": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("severity", [-0.1, 1.5, math.nan])
def test_severity_out_of_range_is_refused(severity: float) -> None:
    with pytest.raises(ConfigError, match=rf"Severity of degradation 'blur': got {severity}; expected a number in \[0"):
        apply("blur", textured_image(), numpy_stream(0), severity)


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(RegistryError, match=r"Unknown degradation: got 'motionblur'\. Did you mean 'motion_blur'"):
        apply("motionblur", textured_image(), numpy_stream(0))
    with pytest.raises(RegistryError, match="Did you mean 'noise'"):
        replay(textured_image(), {"name": "nose", "std": 1.0, "seed": 1})


@pytest.mark.parametrize(
    "params",
    [{}, {"sigma": 1.0}, {"name": "blur"}, {"name": "blur", "sigma": 1.0, "extra": 2}, {"name": "blur", "sigma": "a"}],
)
def test_replay_refuses_parameters_that_are_not_a_draw(params: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"Parameters of a degradation: got \{.*dictionary that apply\(\) returned"):
        replay(textured_image(), params)
