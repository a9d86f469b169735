"""What QGFace and AdaFace do to images, against torchvision's and written-out formulations."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as reference

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations import apply, draw, face_functions, replay
from qsd_plugin.degradations.resampling import OPENCV_FILTERS, PILLOW_FILTERS, resize, resize_matrix


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    rows, columns = np.mgrid[:56, :48].astype(np.float64)
    planes = [127 + 90 * np.sin(columns / 7.0), 40 + 3.5 * rows, 120 + 80 * np.cos((rows + columns) / 9.0)]
    grain = np.random.default_rng(0).normal(0.0, 6.0, size=(56, 48, 3))
    return np.clip(np.stack(planes, axis=2) + grain, 0, 255).astype(np.uint8)


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def test_rescaling_is_resize_jpeg_resize(picture: np.ndarray) -> None:
    params = {"height": 14, "width": 12, "down": "pillow_lanczos", "up": "pillow_box", "quality": 75}
    small = PILImage.fromarray(picture).resize((12, 14), PILImage.Resampling.LANCZOS)
    packed = io.BytesIO()
    small.save(packed, format="JPEG", quality=75)  # Pillow's default halves the chroma
    expected = PILImage.open(packed).resize((48, 56), PILImage.Resampling.BOX)
    found = replay(picture, {"name": "qgface_rescale", **params})
    assert np.array_equal(found, np.asarray(expected))
    del params["quality"]
    expected = small.resize((48, 56), PILImage.Resampling.BOX)
    assert np.array_equal(replay(picture, {"name": "adaface_rescale", **params}), np.asarray(expected))


@pytest.mark.parametrize("resampling", [*PILLOW_FILTERS, *OPENCV_FILTERS])
@pytest.mark.parametrize("target", [(20, 9), (56, 48), (70, 131)])
def test_resizing_is_a_matrix_along_each_side(picture: np.ndarray, resampling: str, target: tuple[int, int]) -> None:
    rows, columns = resize_matrix(56, target[0], resampling), resize_matrix(48, target[1], resampling)
    assert rows.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    found = resize(picture, *target, resampling)
    expected = np.clip(np.einsum("yi,ijc,xj->yxc", rows, picture.astype(np.float64), columns), 0, 255)
    assert found.shape == (*target, 3)
    assert np.abs(found - expected).max() <= 1.6  # the libraries round once or twice on the way


def test_pillow_shrinks_with_antialiasing_and_opencv_without() -> None:
    stripes = np.repeat(np.arange(64) % 2 * 255, 3).reshape(1, 64, 3).repeat(64, axis=0).astype(np.uint8)
    grey = [resize(stripes, 16, 16, name).astype(float) for name in ("pillow_bilinear", "pillow_box", "opencv_area")]
    assert all(np.abs(image[:, 2:-2] - 127.5).max() < 12 for image in grey)
    for name in ("pillow_nearest", "opencv_nearest"):
        assert set(np.unique(resize(stripes, 16, 16, name))) <= {0, 255}


def test_an_unknown_filter_gets_a_suggestion(picture: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"Unknown resampling filter: got 'pillow_bicubc'\. Did you mean 'pillow_bic"):
        resize(picture, 4, 4, "pillow_bicubc")


@pytest.mark.parametrize("order", ["".join(letters) for letters in itertools.permutations("bcs")])
def test_photometric_changes_match_torchvision(picture: np.ndarray, order: str) -> None:
    """torchvision's float formulation, which does not round between the steps."""
    factors = {"b": 0.8, "c": 1.4, "s": 0.6}
    steps = {"b": reference.adjust_brightness, "c": reference.adjust_contrast, "s": reference.adjust_saturation}
    expected = as_tensor(picture).double() / 255.0
    for letter in order:
        expected = steps[letter](expected, factors[letter])
    found = face_functions.photometric(picture, brightness=0.8, contrast=1.4, saturation=0.6, order=order)
    assert np.abs(found - 255.0 * expected.permute(1, 2, 0).numpy()).max() <= 3.5
    assert np.array_equal(
        face_functions.photometric(picture, brightness=1.0, contrast=1.0, saturation=1.0, order=order), picture
    )


@pytest.mark.parametrize("degrees", [-45.0, 13.0, 0.0])
def test_rotation_matches_torchvision(picture: np.ndarray, degrees: float) -> None:
    expected = reference.rotate(as_tensor(picture), degrees, InterpolationMode.NEAREST).permute(1, 2, 0).numpy()
    found = face_functions.rotation(picture, degrees=degrees)
    assert (found != expected).any(axis=2).mean() < 0.01  # ties of the nearest pixel
    assert degrees == 0.0 or not found[0, 0].any()


def test_crops_enlarge_or_stay(picture: np.ndarray) -> None:
    box = {"top": 5, "left": 7, "height": 30, "width": 20}
    expected = reference.resized_crop(PILImage.fromarray(picture), 5, 7, 30, 20, [56, 48])
    assert np.array_equal(replay(picture, {"name": "qgface_crop", **box}), np.asarray(expected))
    kept = replay(picture, {"name": "adaface_crop", **box})
    assert np.array_equal(kept[5:35, 7:27], picture[5:35, 7:27])
    assert kept.sum(dtype=int) == picture[5:35, 7:27].sum(dtype=int)


@pytest.mark.parametrize("shape", [(112, 112), (60, 40)])
def test_random_boxes_are_distributed_as_torchvision_s(shape: tuple[int, int]) -> None:
    area, ratio = (0.2, 1.0), (0.75, 4.0 / 3.0)
    generator, image = numpy_stream(6), torch.zeros(3, *shape)
    keys = ("top", "left", "height", "width")
    mine = [face_functions.draw_box(generator, *shape, area, ratio) for _ in range(3000)]
    found = np.array([[box[key] for key in keys] for box in mine], dtype=np.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, area, ratio) for _ in range(3000)], dtype=np.float64)
    assert (found[:, 0] + found[:, 2] <= shape[0]).all()
    assert (found[:, 1] + found[:, 3] <= shape[1]).all()
    error = np.sqrt((found.var(axis=0) + theirs.var(axis=0)) / 3000)
    assert (np.abs(found.mean(axis=0) - theirs.mean(axis=0)) < 4.5 * error).all()
    assert found.std(axis=0) == pytest.approx(theirs.std(axis=0), rel=0.08)


def test_a_box_that_cannot_fit_is_the_middle() -> None:
    box = face_functions.draw_box(numpy_stream(0), 100, 10, (0.9, 1.0), (0.75, 1.33))
    assert box == {"top": 43, "left": 0, "height": 13, "width": 10}


def test_severity_runs_from_no_change_to_the_strongest(picture: np.ndarray) -> None:
    generator = numpy_stream(0)
    for name in ("adaface_rescale", "qgface_crop", "adaface_crop", "photometric", "rotation"):
        assert np.array_equal(apply(name, picture, generator, 0.0)[0], picture)
    big = {"height": 100, "width": 50}
    found = [draw(name, generator, **big, severity=1.0) for name in ("qgface_rescale", "adaface_rescale")]
    assert [(params["height"], params["width"]) for params in found] == [(10, 5), (20, 10)]
    for _ in range(50):
        box = draw("adaface_crop", generator, 100, 100, 1.0)
        assert abs(box["height"] * box["width"] - 2000) < 80
        assert 0.7 < box["width"] / box["height"] < 1.4
        half = draw("photometric", generator, 9, 9, 0.4)
        assert all(0.8 <= half[key] <= 1.2 for key in ("brightness", "contrast", "saturation"))
    assert {draw("rotation", generator, 9, 9, 0.5)["degrees"] for _ in range(20)} == {22.5, -22.5}


@pytest.mark.parametrize("name", ["qgface_crop", "adaface_crop", "photometric", "rotation"])
def test_damage_grows_with_severity(name: str, picture: np.ndarray) -> None:
    for seed in range(4):
        errors = [
            np.mean((apply(name, picture, numpy_stream(seed), severity)[0].astype(float) - picture) ** 2)
            for severity in (0.0, 0.3, 0.6, 1.0)
        ]
        assert errors[0] == 0.0
        if name == "qgface_crop":  # what moves is wrong anywhere
            assert min(errors[1:]) > 0.0
        else:
            assert all(milder < harder for milder, harder in itertools.pairwise(errors)), errors


def test_bad_parameters_are_refused(picture: np.ndarray) -> None:
    params = draw("photometric", numpy_stream(0), 56, 48)
    with pytest.raises(
        DataError, match=r"Parameters of a degradation: got \{.*'order': 'bcc'.*that apply\(\) returned"
    ):
        replay(picture, {**params, "order": "bcc"})
    with pytest.raises(DataError, match=r"degrade by 'qgface_rescale': got '9 x 48 pixels'; expected at least 10"):
        apply("qgface_rescale", picture[:9], numpy_stream(0))
