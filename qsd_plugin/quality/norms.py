"""Feature norms as quality labels, to be compared with SDD-FIQA's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.quality.scaling import minmax


def norm_labels(
    features: NDArray[Any] | torch.Tensor, identities: Sequence[Any], *, keys: Sequence[str] | None = None
) -> QualityLabels:
    """Label every image by the Euclidean norm of its feature, scaled linearly to [0, 100].

    Networks trained with a softmax loss give clear images longer features (MagFace, arXiv 2103.06627; AdaFace, arXiv
    2204.00964). The feature must not have passed a normalisation: take it before the BN neck.

    Args:
        features: [N, D]; the norm is computed in float64.
        identities: [N]; only counted, for the header.
        keys: Image keys for the label file; the row numbers by default.

    Returns:
        Labels in the order of the input; ``raw`` is the norm, ``spread`` is unknown (NaN). Equal norms become 50.

    Raises:
        LabelError: A feature is not finite.
    """
    matrix = torch.as_tensor(features).detach().cpu().double()
    names = tuple(keys) if keys is not None else tuple(str(row) for row in range(len(matrix)))
    norm = torch.linalg.vector_norm(matrix, dim=1).numpy()
    bad = np.flatnonzero(~np.isfinite(norm))
    if len(bad):
        raise LabelError(
            f"{len(bad)} of {len(norm)} features are not finite",
            value=", ".join(names[row] for row in bad[:3]),
            expected="finite vectors",
            remedy="Check the model and these images; without mixed precision the overflow may go away.",
        )
    meta: dict[str, Any] = {
        "method": "norm",
        "scale": "minmax",
        "images": len(names),
        "identities": len(set(identities)),
        "unlabelled": 0,
        "raw_range": [float(norm.min()), float(norm.max())],
    }
    return QualityLabels(minmax(norm), norm, np.full(len(norm), np.nan), names, meta)
