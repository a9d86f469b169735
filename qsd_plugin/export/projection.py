"""Embeddings of any length as vectors of the length that a runtime demands, with their cosines kept as well as can be.

Shapes: N images, B images of a batch, D length of the embedding, K length after projection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ExportError
from qsd_plugin.export.weights import read_weights


@dataclass(frozen=True)
class Projection:
    """A linear map behind the L2-normalised embedding.

    Args:
        matrix: [K, D] float32.
        bias: [K] float32, or ``None``.
        kind: ``pca``, ``trained``, ``linear`` (trained elsewhere) or ``zeros`` (D <= K: zeros are appended).
        kept: Share of the squared length of the unit embeddings that is left, 0 to 1; ``None`` where not measured.
        images: Number of images that it was fitted to.
        identities: Number of people that it was trained to tell apart.
    """

    matrix: Tensor
    bias: Tensor | None
    kind: str
    kept: float | None = None
    images: int = 0
    identities: int = 0

    def __call__(self, embeddings: Tensor) -> Tensor:
        """[B, D] of any lengths to [B, K]."""
        return F.linear(F.normalize(embeddings.float()), self.matrix, self.bias)

    def describe(self) -> dict[str, str]:
        """For the metadata of the file that holds it."""
        length, dimension = self.matrix.shape
        text = {"projection": self.kind, "projection_sizes": f"{dimension} to {length}, behind L2 normalisation"}
        if self.kept is not None:
            text["projection_kept"] = f"{self.kept:.6f} of the squared length of {self.images} unit embeddings"
        if self.identities:
            text["projection_trained_on"] = f"{self.images} images of {self.identities} people"
        return text


class Projected(nn.Module):
    """A network with a projection behind its embedding.

    Args:
        network: Images to embeddings [B, D].
        projection: See :class:`Projection`.
    """

    matrix: Tensor
    bias: Tensor | None

    def __init__(self, network: nn.Module, projection: Projection) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("matrix", projection.matrix)
        self.register_buffer("bias", projection.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to [B, K]."""
        return F.linear(F.normalize(self.network(images)), self.matrix, self.bias)


def fit_pca(batches: Iterable[Tensor], dimension: int) -> Projection:
    """The ``dimension`` directions that keep most of the inner products between unit embeddings.

    Hosts compare by cosine, so embeddings are normalised first and **not centred**: among all linear maps to K numbers
    the leading eigenvectors of the second moment change the matrix of cosines least (Eckart and Young, Psychometrika
    1936). Embeddings are seen once and only their second moment [D, D] is held, in float64.

    Args:
        batches: Embeddings [B, D], in any number of parts.
        dimension: K.

    Raises:
        ExportError: Fewer images than K, embeddings that are not finite or zero, or not longer than K.
    """
    moment, count = torch.zeros(0, 0, dtype=torch.float64), 0
    for part in batches:
        unit = part.detach().cpu().double()
        length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
        if not bool((torch.isfinite(length) & (length > 0)).all()):
            raise ExportError("Embeddings to fit the projection to", value="zero or not finite", expected="numbers")
        unit = unit / length
        moment = unit.T @ unit if count == 0 else moment + unit.T @ unit
        count += len(unit)
    if len(moment) <= dimension and count:
        raise ExportError("PCA", value=f"{len(moment)} to {dimension}", expected="embeddings longer than the result")
    if count < dimension:
        raise ExportError(
            "Images to fit the projection to",
            value=count,
            expected=f"at least {dimension}, one for each direction; thousands are better",
            remedy="Name more of them: --images FOLDER.",
        )
    values, vectors = torch.linalg.eigh(moment / count)  # ascending
    kept = float(values[-dimension:].sum() / values.sum())
    leading = vectors[:, -dimension:].flip(1).T
    # The sign of an eigenvector is arbitrary: the largest entry is made positive, so that a fit can be repeated.
    signs = leading.gather(1, leading.abs().argmax(dim=1, keepdim=True)).sign()
    return Projection((leading * signs).float().contiguous(), None, "pca", kept, count)


def pad_with_zeros(given: int, dimension: int) -> Projection:
    """D <= K numbers and zeros behind them: every cosine stays what it is."""
    return Projection(torch.eye(dimension, given), None, "zeros", 1.0)


def read_linear(path: Path, *, given: int, dimension: int) -> Projection:
    """A trained linear layer: a state dict with ``weight`` [K, D] and perhaps ``bias`` [K].

    Raises:
        CheckpointError: The file is missing, damaged or holds something else.
    """
    tensors = read_weights(path).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes not in ({"weight": (dimension, given)}, {"weight": (dimension, given), "bias": (dimension,)}):
        raise CheckpointError(
            f"Projection {path}",
            value=dict(list(shapes.items())[:4]),
            expected=f"weight [{dimension}, {given}] and perhaps bias [{dimension}], of a layer behind the normalised "
            "embedding",
        )
    bias = tensors.get("bias")
    return Projection(tensors["weight"].float(), None if bias is None else bias.float(), "linear")
