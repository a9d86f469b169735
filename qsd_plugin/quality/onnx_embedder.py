"""An ONNX model as the network that embeds the images to be labelled.

Shapes: N images, D embedding size, B images per run, H x W image size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.onnx_model import OnnxModel, check_pixels


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
        check_pixels("ONNX model", colour, mean, std)
        if batch < 1:
            raise ConfigError("ONNX model: batch", value=batch, expected="at least 1")
        self._model = OnnxModel(path)
        self.size = self._model.image_size(size, default_size, remedy="Say which one it was trained with: --size H W.")
        self._batch = self._model.batch or batch
        self._mean, self._std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (mean, std))
        self._channels = slice(None) if colour == "RGB" else slice(None, None, -1)

    def embed(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        """Embeddings [N, D] of RGB images, in their order."""
        rows = []
        stream = iter(images)
        while batch := [self._prepared(image) for image in islice(stream, self._batch)]:
            rows.append(self._model.run(np.stack(batch)))
        return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

    def _prepared(self, image: Image.Image) -> NDArray[np.float32]:
        height, width = self.size
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        values = np.asarray(resized, np.float32).transpose(2, 0, 1)[self._channels]
        prepared: NDArray[np.float32] = (values - self._mean) / self._std
        return prepared
