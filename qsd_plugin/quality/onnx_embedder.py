"""An ONNX model as the network that embeds the images to be labelled.

Shapes: N images, D embedding size, B images per run, H x W image size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.core.errors import CheckpointError, ConfigError

COLOURS = ("RGB", "BGR")
_FLOATS: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}


class OnnxEmbedder:
    """An ONNX model that turns images into embeddings, run by ONNX Runtime.

    The model takes one input [B, 3, H, W] of floats; its first output, flattened, is the embedding. An image is resized
    to H x W (bicubic), its channels are put in the order ``colour``, and ``(value - mean) / std`` is taken of values
    from 0 to 255.

    Args:
        path: The model.
        size: (H, W); ``None`` takes the model's own, where that is fixed, and else ``default_size``.
        default_size: (H, W).
        mean: Per channel, in the model's channel order, 0 to 255.
        std: The same, above 0.
        colour: Channel order the model wants, ``RGB`` or ``BGR``.
        batch: Images per run; a model with a fixed batch size gets that.

    Raises:
        ConfigError: ONNX Runtime is not installed, or an option does not fit the model.
        CheckpointError: The file is missing or no model that takes images.
    """

    def __init__(
        self,
        path: Path,
        *,
        size: tuple[int, int] | None = None,
        default_size: tuple[int, int] | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        colour: str = "RGB",
        batch: int = 64,
    ) -> None:
        if colour not in COLOURS:
            raise ConfigError("ONNX model: colour order", value=colour, expected=" or ".join(COLOURS))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(
                "ONNX model: mean and std", value=(*mean, *std), expected="three numbers each, std above 0"
            )
        if batch < 1:
            raise ConfigError("ONNX model: batch", value=batch, expected="at least 1")
        self._session = _session(path)
        entry = _image_input(self._session, path)
        fixed_batch, _, *own = (length if isinstance(length, int) and length > 0 else None for length in entry.shape)
        self.size = _image_size(own, size, default_size, path)
        self._input, self._dtype = entry.name, _FLOATS[entry.type]
        self._pads, self._batch = fixed_batch is not None, fixed_batch or batch
        self._mean, self._std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (mean, std))
        self._channels = slice(None) if colour == "RGB" else slice(None, None, -1)

    def embed(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        """Embeddings [N, D] of RGB images, in their order."""
        rows = []
        stream = iter(images)
        while batch := [self._prepared(image) for image in islice(stream, self._batch)]:
            # A model of fixed batch size gets the last image again and again until the batch is full.
            missing = self._batch - len(batch) if self._pads else 0
            values = np.stack(batch + [batch[-1]] * missing).astype(self._dtype)
            output = self._session.run(None, {self._input: values})[0]
            rows.append(np.asarray(output, np.float32).reshape(len(values), -1)[: len(batch)])
        return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

    def _prepared(self, image: Image.Image) -> NDArray[np.float32]:
        height, width = self.size
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        values = np.asarray(resized, np.float32).transpose(2, 0, 1)[self._channels]
        prepared: NDArray[np.float32] = (values - self._mean) / self._std
        return prepared


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


def _image_size(
    own: Sequence[int | None], wanted: tuple[int, int] | None, default: tuple[int, int] | None, path: Path
) -> tuple[int, int]:
    height, width = wanted or (default if None in own and default else own)
    if height is None or width is None:
        raise ConfigError(
            f"ONNX model {path} takes images of any size", remedy="Say which one it was trained with: --size H W."
        )
    if any(length not in (None, chosen) for length, chosen in zip(own, (height, width), strict=True)):
        raise ConfigError(f"ONNX model {path}: image size (H, W)", value=wanted, expected=f"the model's {tuple(own)}")
    return height, width
