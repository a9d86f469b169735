"""Face networks built from nothing but their weights, for export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.export.face_weights import FaceShape, face_shape, is_arcface, is_qud
from qsd_plugin.export.ir_weights import PREFIXES, is_bare_ir, is_ir, read_ir, turned_round
from qsd_plugin.export.weights import FACE_PIXELS, read_weights
from qsd_plugin.networks.face_shapes import InputSize, grid, height_width
from qsd_plugin.networks.ir import IR
from qsd_plugin.networks.iresnet import IResNet
from qsd_plugin.networks.mobilefacenet import MobileFaceNet
from qsd_plugin.networks.mobilefacenet_qud import MobileFaceNetQUD

#: Side in pixels of the faces that published networks take.
FACE_SIZE = 112


@dataclass(frozen=True)
class FaceModel:
    """A face network as it is exported.

    Args:
        network: In eval mode, on the CPU; normalised RGB images [B, 3, H, W] to embeddings [B, D].
        input_size: Height and width in pixels.
        mean: What is subtracted from pixel values of 0 to 255, per channel in the order RGB.
        std: What they are divided by.
        dimension: D.
        names: Whose names the weights have: ``arcface`` (arcface_torch), ``qud`` or ``ir`` (AdaFace, QGFace).
    """

    network: nn.Module
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dimension: int
    names: str

    def weights(self) -> dict[str, Tensor]:
        """The state dict as the published files have it: an IR network sees BGR there."""
        state = self.network.state_dict()
        return turned_round(state) if self.names == "ir" else state

    def metadata(self) -> dict[str, str]:
        """What a file without anything beside it has to carry, as for person networks."""
        height, width = self.input_size
        return {
            "height": json.dumps(height),
            "width": json.dumps(width),
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "range": "[0, 255]",
            "colour_order": "RGB",
            "normalisation": "outside this file: (pixel - mean) / std",
            "feature": f"output of {type(self.network).__name__} in eval mode, of an aligned face",
            "feature_dimension": json.dumps(self.dimension),
            "feature_normalised": "false",
            "metric": "cosine",
        }


def face_model(
    weights: Mapping[str, Tensor],
    *,
    title: str,
    input_size: InputSize = FACE_SIZE,
    mean: tuple[float, ...] = FACE_PIXELS,
    std: tuple[float, ...] = FACE_PIXELS,
) -> FaceModel:
    """The network that ``weights`` fill exactly.

    Args:
        weights: State dict under arcface_torch's, QUD's or AdaFace's names, of a network for RGB images; counters of
            batch norms may lack.
        title: What the weights are to the user, for messages.
        input_size: Pixels, or (height, width); the weights do not tell it apart from sizes nearby.
        mean: See :class:`FaceModel`.
        std: See :class:`FaceModel`.

    Raises:
        CheckpointError: The names are of no face network, something is missing, left over or of another shape, or the
            weights are for another input size.
    """
    if not is_arcface(weights) and not is_qud(weights) and not is_bare_ir(weights):
        raise CheckpointError(
            f"{title} holds no face network",
            value=list(weights)[:4],
            expected="names such as layer1.0.prelu.weight, conv_sep.layers.0.weight, conv_6_sep.conv.weight or "
            "body.0.res_layer.4.weight",
            remedy="A person network is exported from the folder of its finished run.",
        )
    shape, size = face_shape(weights), height_width(input_size)
    rows, columns = grid(size)
    if shape.pooled != rows * columns:
        raise CheckpointError(
            f"{title}: input size",
            value=size,
            expected=f"one whose last map has {shape.pooled} positions, as the weights have; {size} has "
            f"{rows} x {columns}",
            remedy="Say which one it was trained with: --input-size PIXELS.",
        )
    network = _build(shape, size)
    own = network.state_dict()
    given = {name: value for name, value in weights.items() if name in own or not _is_counter(name)}
    for name in own.keys() - given.keys():
        if _is_counter(name):
            given[name] = own[name]
    try:
        network.load_state_dict(given)
    except RuntimeError as error:
        _, _, first = str(error).partition("\n")
        raise CheckpointError(f"{title} does not fill the network", value=first.strip().splitlines()[0]) from error
    names = "arcface" if is_arcface(weights) else "qud" if is_qud(weights) else "ir"
    return FaceModel(network.eval(), size, mean, std, shape.dimension, names)


def read_face_model(path: Path, *, input_size: InputSize = FACE_SIZE) -> FaceModel:
    """The network in a file of arcface_torch, QUD, AdaFace or QGFace: a state dict, or a checkpoint that holds one.

    Files of AdaFace and QGFace, whose network sees BGR, are turned round to see RGB.

    Raises:
        CheckpointError: See :func:`face_model`; or the file is missing or damaged.
    """
    weights = read_weights(path).tensors
    source = next((name for name in PREFIXES if is_ir(weights, name)), None)
    if source is not None:
        converted = read_ir(weights, source).weights
        backbone = "backbone."
        weights = {name.removeprefix(backbone): value for name, value in converted.items() if name.startswith(backbone)}
    return face_model(weights, title=str(path), input_size=input_size)


def _build(shape: FaceShape, size: tuple[int, int]) -> nn.Module:
    if shape.family == "iresnet":
        return IResNet(shape.blocks, embedding_dim=shape.dimension, input_size=size, width=shape.width)
    if shape.family == "ir":
        excite = shape.variant == "se"
        return IR(shape.blocks, embedding_dim=shape.dimension, input_size=size, width=shape.width, excite=excite)
    if shape.variant == "qud":
        return MobileFaceNetQUD(embedding_dim=shape.dimension, input_size=size, width=shape.width)
    large = shape.variant == "mbf_large"
    blocks, scale = ((2, 8, 12, 4), 4) if large else ((1, 4, 6, 2), 2)
    return MobileFaceNet(blocks=blocks, scale=scale, embedding_dim=shape.dimension, input_size=size, width=shape.width)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")
