"""Alignment: known similarities, least squares, and the textbook form of Umeyama's solution."""

from __future__ import annotations

import numpy as np
import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.align import TEMPLATE_112, five_points, norm_crop, similarity, template


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Umeyama 1991, equations 34 to 43, by singular value decomposition."""
    centre, goal = source.mean(axis=0), target.mean(axis=0)
    covariance = (target - goal).T @ (source - centre) / len(source)
    left, singular, right = np.linalg.svd(covariance)
    signs = np.diag([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    rotation = left @ signs @ right
    scale = np.trace(np.diag(singular) @ signs) / (source - centre).var(axis=0).sum()
    return np.column_stack([scale * rotation, goal - scale * rotation @ centre])


def least_squares(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """a, b, s, t of x' = a x - b y + s, y' = b x + a y + t."""
    rows = [row for x, y in source for row in ([x, -y, 1, 0], [y, x, 0, 1])]
    a, b, s, t = np.linalg.lstsq(np.array(rows), target.ravel(), rcond=None)[0]
    return np.array([[a, -b, s], [b, a, t]])


@pytest.mark.parametrize("angle", [0.0, 0.3, -2.0, np.pi])
@pytest.mark.parametrize("scale", [0.1, 1.0, 7.0])
def test_known_similarity_is_found(angle: float, scale: float) -> None:
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = TEMPLATE_112 @ linear.T + (30.0, -80.0)
    expected = np.column_stack([linear, [30.0, -80.0]])
    np.testing.assert_allclose(similarity(TEMPLATE_112, moved), expected, atol=1e-10)


@pytest.mark.parametrize("mirrored", [False, True])
def test_noisy_points_against_two_other_forms(mirrored: bool) -> None:
    draw = np.random.default_rng(0)
    for number in range(20):
        source = draw.normal(size=(2 + number % 7, 2)) * 50
        target = draw.normal(size=source.shape) * 20 + source @ draw.normal(size=(2, 2))
        if mirrored:
            target = source * (-1.0, 1.0) + draw.normal(size=source.shape)
        found = similarity(source, target)
        np.testing.assert_allclose(found, least_squares(source, target), atol=1e-8)
        np.testing.assert_allclose(found, umeyama(source, target), atol=1e-8)
        assert np.linalg.det(found[:, :2]) >= 0


def test_template_sizes() -> None:
    np.testing.assert_array_equal(template(112), TEMPLATE_112)
    np.testing.assert_allclose(template(224), 2 * TEMPLATE_112)
    np.testing.assert_allclose(template(128), TEMPLATE_112 + np.array([8.0, 0.0]))
    np.testing.assert_allclose(template(256)[0], [92.5892, 103.3926])
    # A multiple of both follows the rule for 112.
    np.testing.assert_allclose(template(896), 8 * TEMPLATE_112)
    for size in (0, -112, 100, 160):
        with pytest.raises(DataError, match=f"got {size}; expected a multiple of 112 or of 128"):
            template(size)


def marked(points: np.ndarray, side: int) -> np.ndarray:
    """A black image with a soft red dot at the first point, green at the second, blue at the third."""
    rows, columns = np.mgrid[:side, :side]
    image = np.zeros((side, side, 3))
    for channel, (x, y) in enumerate(points[:3]):
        image[..., channel] = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 50.0)
    return image.astype(np.uint8)


@pytest.mark.parametrize("size", [112, 128, 224])
def test_landmarks_arrive_at_the_template(size: int) -> None:
    angle, scale = 0.4, 1.7
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = TEMPLATE_112 @ linear.T + (90.0, 20.0)
    crop = norm_crop(marked(points, 320), points, size)
    assert (crop.shape, crop.dtype) == ((size, size, 3), np.uint8)
    rows, columns = np.mgrid[:size, :size]
    for channel, (x, y) in enumerate(template(size)[:3]):
        weights = crop[..., channel].astype(float)
        centre = (columns * weights).sum() / weights.sum(), (rows * weights).sum() / weights.sum()
        np.testing.assert_allclose(centre, (x, y), atol=0.15)


def test_points_on_the_template_leave_the_image_and_outside_is_black() -> None:
    image = np.random.default_rng(0).integers(1, 256, (112, 112, 3), dtype=np.uint8)
    np.testing.assert_array_equal(norm_crop(image, TEMPLATE_112), image)
    wide = norm_crop(image, TEMPLATE_112, 128)
    np.testing.assert_array_equal(wide[:112, 8:120], image)
    assert not wide[:, :8].any()
    assert not wide[:, 120:].any()
    assert not wide[112:].any()


def test_68_points() -> None:
    marks = np.arange(136, dtype=float).reshape(68, 2)
    expected = [(marks[36] + marks[39]) / 2, (marks[42] + marks[45]) / 2, marks[30], marks[48], marks[54]]
    np.testing.assert_array_equal(five_points(marks), expected)
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    face = np.zeros((68, 2))
    face[[36, 39]], face[[42, 45]] = TEMPLATE_112[0], TEMPLATE_112[1]
    face[[30, 48, 54]] = TEMPLATE_112[2:]
    np.testing.assert_array_equal(norm_crop(image, face), image)
    with pytest.raises(DataError, match=r"shape \(5, 2\)'; expected \(68, 2\)"):
        five_points(TEMPLATE_112)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((4, 2)), r"shape \(4, 2\)'; expected \(5, 2\): left eye"),
        (np.full((5, 2), 3.0), "expected points that are not all the same"),
        (np.full((5, 2), np.nan), "finite points"),
    ],
)
def test_wrong_points(points: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        norm_crop(np.zeros((112, 112, 3), np.uint8), points)


def test_wrong_image() -> None:
    with pytest.raises(DataError, match="Repeat a grey image in three channels"):
        norm_crop(np.zeros((112, 112), np.uint8), TEMPLATE_112)
