"""The degradations as functions of float batches: images [B, 3, H, W] of whole numbers 0-255 in, the same out.

Every function takes one dictionary of numbers for each image, those of the one-image function of the same name.
Blurring and resizing are products with a matrix along each side, whose weights come from the library that the one-image
function uses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from qsd_plugin.degradations import dil_functions, face_functions, operations
from qsd_plugin.degradations.batched_jpeg import jpeg
from qsd_plugin.degradations.resampling import PILLOW_FILTERS, resize_matrix

Numbers = Sequence[Mapping[str, Any]]
Weights = npt.NDArray[np.float32]


def sandwich(
    images: torch.Tensor, rows: Sequence[Weights], columns: Sequence[Weights], *, passes: bool = True
) -> torch.Tensor:
    """Multiply each image by a matrix along each side and round to whole numbers in 0-255.

    Args:
        images: [B, 3, H, W].
        rows: For each image [H', H].
        columns: For each image [W', W].
        passes: Round after the columns too, as Pillow does.

    Returns:
        [B, 3, H', W'].
    """
    result = images @ _stacked(columns, images.device).transpose(1, 2).unsqueeze(1)
    if passes:
        result = rounded(result)
    return rounded(_stacked(rows, images.device).unsqueeze(1) @ result)


def rounded(images: torch.Tensor) -> torch.Tensor:
    """Clip to 0-255 and round halves up, as the image libraries do."""
    return (images.clamp(0.0, 255.0) + 0.5).floor()


def blur(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.operations.blur`."""
    height, width = images.shape[2:]
    sigmas = [_only(entry, "sigma") for entry in numbers]
    return sandwich(
        images,
        [_gaussian_matrix(height, sigma) for sigma in sigmas],
        [_gaussian_matrix(width, sigma) for sigma in sigmas],
        passes=False,
    )


def motion_blur(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.operations.motion_blur`."""
    kernels = []
    for entry in numbers:
        _check(entry, "length", "angle")
        unmoved = (np.ones((1, 1)), 0)
        kernels.append(unmoved if entry["length"] == 0.0 else operations.motion_kernel(entry["length"], entry["angle"]))
    return rounded(_correlate(images, kernels, mode="edge"))


def low_resolution(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.operations.low_resolution`."""
    for entry in numbers:
        _check(entry, "height", "width")
    same = {"down": "pillow_bicubic", "up": "pillow_bicubic"}
    return adaface_rescale(images, [{**entry, **same} for entry in numbers])


def noise(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.operations.noise`; the values are drawn on the CPU."""
    added = []
    for entry in numbers:
        _check(entry, "std", "seed")
        drawn = np.random.default_rng(entry["seed"]).standard_normal((*images.shape[2:], 3), dtype=np.float32)
        added.append(np.float32(entry["std"]) * drawn)
    moved = torch.from_numpy(np.stack(added)).permute(0, 3, 1, 2).to(images.device)
    return (images + moved).clamp(0.0, 255.0).round()


def darkness(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.operations.darkness`."""
    return _look_up(images, [operations.dark_levels(**entry) for entry in numbers])


def compression(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.operations.compression`."""
    return jpeg(images, [_only(entry, "quality") for entry in numbers], halved_chroma=False)


def occlusion(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.operations.occlusion`."""
    result = images.clone()
    for image, entry in zip(result, numbers, strict=True):
        _check(entry, "top", "bottom", "left", "right", "red", "green", "blue")
        colour = torch.tensor([entry["red"], entry["green"], entry["blue"]], dtype=image.dtype, device=image.device)
        image[:, entry["top"] : entry["bottom"], entry["left"] : entry["right"]] = colour[:, None, None]
    return result


def dil_res(images: torch.Tensor, numbers: Numbers) -> list[torch.Tensor]:
    """:func:`.dil_functions.dil_res`: images of different sizes."""
    height, width = images.shape[2:]
    small = []
    for image, entry in zip(images, numbers, strict=True):
        _check(entry, "height", "width")
        rows = resize_matrix(height, entry["height"], "pillow_bilinear")
        columns = resize_matrix(width, entry["width"], "pillow_bilinear")
        small.append(sandwich(image[None], [rows], [columns])[0])
    return small


def dil_ill(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.dil_functions.dil_ill`."""
    return _look_up(images, [dil_functions.ill_levels(**entry) for entry in numbers])


def dil_jpg(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.dil_functions.dil_jpg`."""
    return jpeg(images, [_only(entry, "quality") for entry in numbers], halved_chroma=True)


def dil_motion(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.dil_functions.dil_motion`."""
    kernels = []
    for entry in numbers:
        _check(entry, "length", "angle")
        length = entry["length"]
        kernel = np.ones((1, 1)) if length == 1 else dil_functions.line_kernel(length, entry["angle"])
        kernels.append((kernel, length // 2))
    blurred = rounded(_correlate(images, kernels, mode="reflect"))
    low, high = blurred.amin(dim=(1, 2, 3), keepdim=True), blurred.amax(dim=(1, 2, 3), keepdim=True)
    first, last = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    stretched = (blurred - low) * ((last - first) / (high - low).clamp_min(1.0)) + first
    moved = torch.tensor([entry["length"] != 1 for entry in numbers], device=images.device)[:, None, None, None]
    return torch.where(moved, stretched.round(), images)


def dil_blur(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.dil_functions.dil_blur`."""
    radii = [_only(entry, "radius") for entry in numbers]
    sides = []
    for length, size in zip(images.shape[2:], dil_functions.BLUR_SIZE, strict=True):
        there = resize_matrix(length, size, "pillow_bilinear")
        back = resize_matrix(size, length, "pillow_bilinear")
        blurring = [_box_matrix(size, radius) for radius in radii]
        sides.append(([there] * len(radii), blurring, [back] * len(radii)))
    result = images
    for rows, columns in zip(*sides, strict=True):
        result = sandwich(result, rows, columns)
    blurred = torch.tensor([radius != 0.0 for radius in radii], device=images.device)[:, None, None, None]
    return torch.where(blurred, result, images)


def dil_noise(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.dil_functions.dil_noise`; the values are drawn on the CPU."""
    added = []
    for entry in numbers:
        _check(entry, "std", "seed")
        added.append(entry["std"] * np.random.default_rng(entry["seed"]).standard_normal((*images.shape[2:], 3)))
    moved = torch.from_numpy(np.stack(added)).permute(0, 3, 1, 2).to(images.device, torch.float32)
    return (images + moved).clamp(0.0, 255.0).floor()


def adaface_rescale(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.face_functions.adaface_rescale`."""
    for entry in numbers:
        _check(entry, "height", "width", "down", "up")
    return _enlarged(_shrunk(images, numbers), images.shape, numbers)


def qgface_rescale(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.face_functions.qgface_rescale`."""
    for entry in numbers:
        _check(entry, "height", "width", "down", "up", "quality")
    small = _shrunk(images, numbers)
    sizes = [(entry["height"], entry["width"]) for entry in numbers]
    packed = jpeg(small, [entry["quality"] for entry in numbers], halved_chroma=True, sizes=sizes)
    return _enlarged(packed, images.shape, numbers)


def qgface_crop(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.face_functions.qgface_crop`."""
    height, width = images.shape[2:]
    rows: list[Weights] = []
    columns: list[Weights] = []
    for entry in numbers:
        _check(entry, "top", "left", "height", "width")
        for weights, start, length, side in (
            (rows, entry["top"], entry["height"], height),
            (columns, entry["left"], entry["width"], width),
        ):
            placed = np.zeros((side, side), dtype=np.float32)
            placed[:, start : start + length] = resize_matrix(length, side, "pillow_bilinear")
            weights.append(placed)
    return sandwich(images, rows, columns)


def adaface_crop(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.face_functions.adaface_crop`."""
    result = torch.zeros_like(images)
    for image, kept, entry in zip(images, result, numbers, strict=True):
        _check(entry, "top", "left", "height", "width")
        rows, columns = (slice(entry[a], entry[a] + entry[b]) for a, b in (("top", "height"), ("left", "width")))
        kept[:, rows, columns] = image[:, rows, columns]
    return result


def photometric(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.face_functions.photometric`."""
    result = images
    for entry in numbers:
        _check(entry, "brightness", "contrast", "saturation", "order")
        face_functions.check_order(entry["order"])
    names = {"b": "brightness", "c": "contrast", "s": "saturation"}
    for place in range(3):
        letters = [entry["order"][place] for entry in numbers]
        factors = [float(entry[names[letter]]) for entry, letter in zip(numbers, letters, strict=True)]
        luma = _luma(result)
        bases = {
            "b": torch.zeros_like(luma),
            "c": (luma.double().mean((1, 2, 3), keepdim=True) + 0.5).floor().to(luma.dtype),
            "s": luma,
        }
        base = torch.stack([bases[letter].expand_as(luma)[index] for index, letter in enumerate(letters)])
        factor = torch.tensor(factors, dtype=images.dtype, device=images.device)[:, None, None, None]
        result = (base + factor * (result - base)).clamp(0.0, 255.0).floor()
    return result


def rotation(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """:func:`.face_functions.rotation`."""
    height, width = images.shape[2:]
    degrees = torch.tensor([_only(entry, "degrees") for entry in numbers], dtype=torch.float64, device=images.device)
    turn = torch.deg2rad(degrees)[:, None, None]
    down = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5 - height / 2.0
    along = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5 - width / 2.0
    columns = (along * turn.cos() - down * turn.sin() + width / 2.0).floor().long()
    rows = (along * turn.sin() + down * turn.cos() + height / 2.0).floor().long()
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    place = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).flatten(1).unsqueeze(1)
    turned = images.flatten(2).gather(2, place.expand(-1, 3, -1)).view_as(images)
    return turned * inside.unsqueeze(1)


def _shrunk(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """All images at their own smaller sizes, in the corner of one size; the rest is black."""
    height, width = images.shape[2:]
    tallest, widest = max(entry["height"] for entry in numbers), max(entry["width"] for entry in numbers)
    rows, columns = [], []
    for entry in numbers:
        row = resize_matrix(height, entry["height"], entry["down"])
        rows.append(np.pad(row, ((0, tallest - entry["height"]), (0, 0))))
        column = resize_matrix(width, entry["width"], entry["down"])
        columns.append(np.pad(column, ((0, widest - entry["width"]), (0, 0))))
    return _each_library(images, rows, columns, [entry["down"] for entry in numbers])


def _enlarged(small: torch.Tensor, shape: torch.Size, numbers: Numbers) -> torch.Tensor:
    """Back to the size of ``shape``, from the corner that :func:`_shrunk` filled."""
    rows, columns = [], []
    for entry in numbers:
        row = resize_matrix(entry["height"], shape[2], entry["up"])
        rows.append(np.pad(row, ((0, 0), (0, small.shape[2] - entry["height"]))))
        column = resize_matrix(entry["width"], shape[3], entry["up"])
        columns.append(np.pad(column, ((0, 0), (0, small.shape[3] - entry["width"]))))
    return _each_library(small, rows, columns, [entry["up"] for entry in numbers])


def _each_library(
    images: torch.Tensor, rows: list[Weights], columns: list[Weights], filters: list[str]
) -> torch.Tensor:
    """:func:`sandwich`, rounded between the sides where Pillow resizes and not where OpenCV does."""
    pillow = [name in PILLOW_FILTERS for name in filters]
    if all(pillow) or not any(pillow):
        return sandwich(images, rows, columns, passes=pillow[0])
    chosen = torch.tensor(pillow, device=images.device)[:, None, None, None]
    return torch.where(chosen, sandwich(images, rows, columns), sandwich(images, rows, columns, passes=False))


def _stacked(weights: Sequence[Weights], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack(weights)).to(device)


def _correlate(
    images: torch.Tensor, kernels: Sequence[tuple[npt.NDArray[np.float64], int]], *, mode: str
) -> torch.Tensor:
    """Correlate each image with a kernel of its own, given with the place of its anchor on both axes."""
    before = max(anchor for _, anchor in kernels)
    after = max(len(kernel) - 1 - anchor for kernel, anchor in kernels)
    size, (count, _, height, width) = before + after + 1, images.shape
    placed = np.zeros((count, size, size), dtype=np.float32)
    for weights, (kernel, anchor) in zip(placed, kernels, strict=True):
        start = before - anchor
        weights[start : start + len(kernel), start : start + len(kernel)] = kernel
    bordered = images
    for axis, side in ((2, height), (3, width)):
        index = np.pad(np.arange(side), (before, after), mode=mode)  # type: ignore[call-overload]
        bordered = bordered.index_select(axis, torch.from_numpy(index).to(images.device))
    filters = torch.from_numpy(placed).to(images.device).repeat_interleave(3, dim=0).unsqueeze(1)
    return functional.conv2d(bordered.flatten(0, 1).unsqueeze(0), filters, groups=3 * count).view_as(images)


def _look_up(images: torch.Tensor, levels: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    table = torch.from_numpy(np.stack(levels)).to(images.device, images.dtype)
    return table.gather(1, images.flatten(1).long()).view_as(images)


def _luma(images: torch.Tensor) -> torch.Tensor:
    """Pillow's, [B, 1, H, W]: weights in 65536ths, rounded."""
    whole = images.long()
    total = 19595 * whole[:, 0] + 38470 * whole[:, 1] + 7471 * whole[:, 2]
    return ((total + 32768) >> 16).to(images.dtype).unsqueeze(1)


def _gaussian_matrix(length: int, sigma: float) -> Weights:
    """What :func:`.operations.blur` makes of ``length`` unit vectors, [length, length]."""
    unit = np.eye(length, dtype=np.float32)
    if sigma == 0.0:
        return unit
    size = operations.blur_size(sigma)
    return np.asarray(cv2.GaussianBlur(unit, (1, size), sigma, borderType=cv2.BORDER_REPLICATE), dtype=np.float32)


@functools.lru_cache(maxsize=64)
def _box_matrix(length: int, radius: float) -> Weights:
    """Pillow's Gaussian blur of ``radius`` along one side, [length, length]: three box filters with soft ends.

    Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", SSVM 2011.
    """
    if radius == 0.0:
        return np.eye(length, dtype=np.float32)
    variance = radius * radius / 3.0
    whole = math.floor((math.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    share = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance) / (6.0 * (variance - (whole + 1) ** 2))
    box = np.zeros((length, length))
    places = np.arange(length)
    for offset in range(-whole - 1, whole + 2):
        weight = share if abs(offset) > whole else 1.0
        np.add.at(box, (places, (places + offset).clip(0, length - 1)), weight / (2.0 * (whole + share) + 1.0))
    return np.linalg.matrix_power(box, 3).astype(np.float32)


def _check(entry: Mapping[str, Any], *names: str) -> None:
    if set(entry) != set(names):
        raise ValueError(f"expected the numbers {names}")


def _only(entry: Mapping[str, Any], name: str) -> float:
    _check(entry, name)
    return float(entry[name])


def _on_cpu(run: Callable[..., operations.Image]) -> Callable[[torch.Tensor, Numbers], torch.Tensor]:
    """The one-image function, image by image."""

    def kernel(images: torch.Tensor, numbers: Numbers) -> torch.Tensor:
        arrays = images.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        degraded = np.stack([run(np.ascontiguousarray(a), **n) for a, n in zip(arrays, numbers, strict=True)])
        return torch.from_numpy(degraded).permute(0, 3, 1, 2).to(images.device, images.dtype)

    return kernel


KERNELS: dict[str, Callable[[torch.Tensor, Numbers], Sequence[torch.Tensor] | torch.Tensor]] = {
    **{kernel.__name__: kernel for kernel in (blur, motion_blur, low_resolution, noise, darkness, compression)},
    **{kernel.__name__: kernel for kernel in (occlusion, dil_res, dil_ill, dil_jpg, dil_motion, dil_blur, dil_noise)},
    **{kernel.__name__: kernel for kernel in (adaface_rescale, qgface_rescale, adaface_crop, qgface_crop)},
    **{kernel.__name__: kernel for kernel in (photometric, rotation)},
    "dil_poisson": _on_cpu(dil_functions.dil_poisson),
    "dil_dark": _on_cpu(dil_functions.dil_dark),
}
