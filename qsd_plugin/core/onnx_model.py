"""A network from an ONNX file, run by ONNX Runtime: images in, one vector per image out.

Shapes: B images, H x W image size, D length of the vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import CheckpointError, ConfigError

COLOURS = ("RGB", "BGR")
_FLOATS: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}


class OnnxModel:
    """An ONNX model with one input [B, 3, H, W] of floats; of its outputs the first is used.

    Args:
        path: The file.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        CheckpointError: The file is missing or no model that takes images.
    """

    batch: int | None
    """The batch size the model is fixed to, ``None`` if it takes any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session = _session(path)
        entry = _image_input(self._session, path)
        self.batch, _, *own = (length if isinstance(length, int) and length > 0 else None for length in entry.shape)
        self._own = tuple(own)
        self._input, self._dtype = entry.name, _FLOATS[entry.type]

    def image_size(
        self, wanted: tuple[int, int] | None = None, default: tuple[int, int] | None = None, *, remedy: str
    ) -> tuple[int, int]:
        """The (H, W) to feed: ``wanted``, else the model's own where that is fixed, else ``default``.

        Args:
            wanted: What the user asked for.
            default: For models that take images of any size.
            remedy: What the user can do when nothing says the size.

        Raises:
            ConfigError: Nothing says it, or it is not the model's.
        """
        height, width = wanted or (default if None in self._own and default else self._own)
        if height is None or width is None:
            raise ConfigError(f"ONNX model {self.path} takes images of any size", remedy=remedy)
        if any(length not in (None, chosen) for length, chosen in zip(self._own, (height, width), strict=True)):
            raise ConfigError(
                f"ONNX model {self.path}: image size (H, W)", value=(height, width), expected=f"the model's {self._own}"
            )
        return height, width

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The first output for images [B, 3, H, W], flattened to [B, D]; B may be 0.

        A model of fixed batch size gets them in parts, the last one filled up with black images.
        """
        step = self.batch or max(len(images), 1)
        parts = [images[first : first + step] for first in range(0, max(len(images), 1), step)]
        return np.concatenate([self._run(part, step) for part in parts])

    def _run(self, images: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
        filling = np.zeros((batch - len(images), *images.shape[1:]), np.float32)
        values = np.concatenate([images, filling]).astype(self._dtype)
        output = self._session.run(None, {self._input: values})[0]
        return np.asarray(output, np.float32).reshape(batch, -1)[: len(images)]


def check_pixels(what: str, colour: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a colour order, mean or std that no network can have been trained with.

    Raises:
        ConfigError: One is impossible; ``what`` names the network.
    """
    if colour not in COLOURS:
        raise ConfigError(f"{what}: colour order", value=colour, expected=" or ".join(COLOURS))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"{what}: mean and std", value=(*mean, *std), expected="three numbers each, std above 0")


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "ONNX models need the package onnxruntime, which is not installed", remedy="pip install onnxruntime"
        ) from error
    if not path.is_file():
        raise CheckpointError("ONNX model", value=str(path), expected="an existing file")
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # the runtime's own classes have no common base
        raise CheckpointError(
            "ONNX model", value=str(path), expected="a model that ONNX Runtime can load", remedy=f"It says: {error}"
        ) from error


def _image_input(session: Any, path: Path) -> Any:
    entries = session.get_inputs()
    shape = entries[0].shape
    if (
        len(entries) > 1
        or len(shape) != 4
        or (isinstance(shape[1], int) and shape[1] != 3)
        or entries[0].type not in _FLOATS
    ):
        raise CheckpointError(
            f"ONNX model {path}: input",
            value=", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in entries),
            expected="one image batch [B, 3, H, W] of floats",
            remedy="Export the model with a single image input.",
        )
    return entries[0]
