"""The degradations on batches of images as tensors, on any device, with the parameters of the one-image functions.

Images are [B, 3, H, W] uint8 RGB. What a batch becomes differs from what :mod:`.operations` makes of each image at the
same parameters by rounding; :data:`TOLERANCES` says how much, and a test holds both together.

The numbers of a draw are made on the CPU as for one image. So is Gaussian noise, whose values then travel to the
device; the two degradations with Poisson numbers, whose law depends on the image, work on the CPU altogether.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.degradations.batched_kernels import KERNELS, sandwich
from qsd_plugin.degradations.operations import check_size, draw, parameters_error, registered
from qsd_plugin.degradations.resampling import resize_matrix
from qsd_plugin.degradations.views import check_view

Params = Mapping[str, Any]
#: Filter that enlarges images which a degradation left small, as DIL's transform does.
ENLARGEMENT = "pillow_bicubic"


@dataclass(frozen=True)
class Tolerance:
    """How far a batch may be from the images one by one, in grey levels.

    Args:
        largest: Of any value.
        mean: Absolute, over the values of one image.
    """

    largest: float
    mean: float


_EXACT, _ROUNDING = Tolerance(0, 0.0), Tolerance(3, 0.5)
#: A number that lies between two levels of a JPEG may fall to either, and changes a block of 8 x 8; so few of them do
#: that the mean stays small. An image that is enlarged from few blocks shows it most.
_JPEG = Tolerance(255, 1.0)
TOLERANCES = {
    **dict.fromkeys(("adaface_crop", "darkness", "dil_dark", "dil_ill", "dil_poisson", "noise", "occlusion"), _EXACT),
    **dict.fromkeys(("blur", "dil_noise", "motion_blur", "photometric", "qgface_crop"), Tolerance(1, 0.1)),
    **dict.fromkeys(("adaface_rescale", "dil_blur", "dil_motion", "dil_res", "low_resolution"), _ROUNDING),
    **dict.fromkeys(("compression", "dil_jpg"), _JPEG),
    "qgface_rescale": Tolerance(255, 3.0),
    # Pixels whose source lies on the border of two.
    "rotation": Tolerance(255, 0.1),
}


def apply(
    name: str,
    images: torch.Tensor,
    generator: np.random.Generator,
    severity: float | Sequence[float] | None = None,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Degrade every image of a batch in one way.

    Args:
        name: A registered degradation.
        images: [B, 3, H, W] uint8 RGB; left as they are.
        generator: Source of every random choice, used image by image: the parameters are those that B calls of
            :func:`.operations.apply` would draw.
        severity: In [0, 1], of all images or one for each; ``None`` as in :func:`.operations.apply`.

    Returns:
        The degraded images, [B, 3, H, W] uint8 on the same device (what ``dil_res`` makes small is enlarged again), and
        the parameters of each, for :func:`replay` here or for one image.

    Raises:
        RegistryError: Unknown name.
        DataError: Not such images, or too small ones.
        ConfigError: Severity outside [0, 1], or not one for each image.
    """
    check_images(images)
    count, _, height, width = images.shape
    severities = [severity] * count if severity is None or isinstance(severity, (int, float)) else list(severity)
    if len(severities) != count:
        raise ConfigError(
            "Severities of a batch",
            value=len(severities),
            expected=f"one number, or one for each of {count} images",
            remedy="Pass None to draw them.",
        )
    params = [draw(name, generator, height, width, None if one is None else float(one)) for one in severities]
    return replay(images, params), params


def replay(images: torch.Tensor, params: Sequence[Params | Sequence[Params]]) -> torch.Tensor:
    """Degrade every image by parameters that were drawn before.

    Args:
        images: [B, 3, H, W] uint8 RGB; left as they are.
        params: For each image one dictionary of :func:`apply`, or the steps of a :class:`.mixing.Mix`.

    Returns:
        [B, 3, H, W] uint8 on the same device. Images of another size at the end are enlarged with Pillow's bicubic.

    Raises:
        RegistryError: Unknown name.
        DataError: Not such images, too small ones, or not such parameters.
    """
    check_images(images)
    if len(params) != len(images):
        raise DataError(
            "Parameters of a batch",
            value=len(params),
            expected=f"one entry for each of {len(images)} images",
            remedy="Pass on the list that came with them.",
        )
    height, width = images.shape[2:]
    steps = [[entry] if isinstance(entry, Mapping) else list(entry) for entry in params]
    current = list(images.float())
    for place in range(max(map(len, steps), default=0)):
        # Equal operations on equally large images run as one batch.
        groups: dict[tuple[str, torch.Size], list[int]] = {}
        for index, chain in enumerate(steps):
            if place < len(chain):
                registered(chain[place])
                groups.setdefault((chain[place]["name"], current[index].shape), []).append(index)
        for (name, shape), members in groups.items():
            check_size(name, shape[1], shape[2])
            degraded = _run(
                name, torch.stack([current[index] for index in members]), [steps[i][place] for i in members]
            )
            for index, image in zip(members, degraded, strict=True):
                current[index] = image
    return torch.stack([_enlarged(image, height, width) for image in current]).to(torch.uint8)


def replay_views(images: torch.Tensor, params: Sequence[Params]) -> torch.Tensor:
    """The views that :mod:`.views` drew, of a batch.

    Args:
        images: [B, 3, H, W] uint8 RGB; left as they are.
        params: What came with each view.

    Raises:
        RegistryError, DataError: As :func:`replay`.
    """
    check_images(images)
    for entry in params:
        check_view(entry)

    def where(chosen: list[bool], changed: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.tensor(chosen, device=same.device)[:, None, None, None], changed, same)

    if len(params) == len(images):  # replay() refuses the other case
        swapped = [entry["colour_order"] == "bgr" for entry in params]
        images = where(swapped, images.flip(1), images)
    result = replay(images, [entry["steps"] for entry in params])
    result = where(swapped, result.flip(1), result)
    return where([entry["mirrored"] for entry in params], result.flip(3), result)


def check_images(images: object) -> None:
    """Refuse what is not [B, 3, H, W] uint8.

    Raises:
        DataError: It is something else.
    """
    found: object = type(images).__name__
    if isinstance(images, torch.Tensor):
        if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3 and images.numel():
            return
        found = f"{images.dtype} tensor of shape {tuple(images.shape)}"
    raise DataError(
        "Batch of images to degrade",
        value=found,
        expected="a torch.uint8 tensor of shape (batch, 3, height, width), RGB",
        remedy="Float images: undo the normalisation, scale to 0-255, round, convert to uint8.",
    )


def _run(name: str, images: torch.Tensor, params: list[Params]) -> list[torch.Tensor]:
    numbers = [{key: value for key, value in entry.items() if key not in ("name", "severity")} for entry in params]
    try:
        return list(KERNELS[name](images, numbers))
    except (KeyError, TypeError, ValueError) as error:  # a number is missing, impossible or no number
        raise parameters_error(params[0]) from error


def _enlarged(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if image.shape[1:] == (height, width):
        return image
    rows = resize_matrix(image.shape[1], height, ENLARGEMENT)
    columns = resize_matrix(image.shape[2], width, ENLARGEMENT)
    return sandwich(image[None], [rows], [columns])[0]
