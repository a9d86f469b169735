"""What the evaluation functions accept: NumPy arrays, tensors on any device, plain sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Array: TypeAlias = npt.NDArray[Any]
Matrix: TypeAlias = Array | torch.Tensor
Labels: TypeAlias = Array | torch.Tensor | Sequence[int] | Sequence[str]


def to_numpy(values: Matrix | Labels) -> Array:
    """``values`` as a NumPy array, without a copy where they already lie in main memory."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.dtype == torch.bfloat16:  # unknown to NumPy, exact in float32
            values = values.float()
        return values.numpy()
    return np.asarray(values)


def to_features(values: Matrix) -> torch.Tensor:
    """``values`` as a detached tensor of float32 or float64, without a copy where possible."""
    features = (values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))).detach()
    return features if features.dtype in (torch.float32, torch.float64) else features.float()


def squared_norms(features: torch.Tensor) -> torch.Tensor:
    """Squared norms [N] of ``features`` [N, D] without a squared copy of them."""
    norms: torch.Tensor = torch.linalg.vector_norm(features, dim=1)
    return norms.square_()
