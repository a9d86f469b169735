"""An image and its mirror image as one embedding, by QGFace's four rules (arXiv 2312.17494, released program).

Shapes: N images, D embedding dimension.
"""

from __future__ import annotations

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.evaluation.arrays import Array, Matrix, to_numpy
from qsd_plugin.evaluation.verification import normalised

#: In words: sum of the raw embeddings; mean weighted by their lengths; mean of the unit ones; both side by side.
FUSIONS = ("pre_norm_vector_add", "norm_weighted_avg", "average", "concat")


def fuse(plain: Matrix, mirrored: Matrix, rule: str = FUSIONS[0]) -> Array:
    """One raw embedding per image, float64: its direction is the fused feature, its length the fused norm.

    With z, z' the unit embeddings and n, n' their lengths:

    - ``pre_norm_vector_add``: the sum ``z n + z' n'``, with its own length. InsightFace's rule; the host's
      ``TEST.FLIP`` gives half of it.
    - ``norm_weighted_avg``: the same direction with the length ``(n + n') / 2``. Differs from the first one only where
      lengths weigh, in templates.
    - ``average``: direction of ``z + z'``, length ``(n + n') / 2``.
    - ``concat``: ``[z, z']``, [N, 2D], direction and length alike: cosines are means of the two cosines.

    Args:
        plain: Raw embeddings [N, D] of the images.
        mirrored: Raw embeddings [N, D] of their mirror images.
        rule: One of :data:`FUSIONS`.

    Returns:
        [N, D]; ``concat``: [N, 2D].

    Raises:
        ConfigError: Unknown rule.
        DataError: Shapes that differ.
    """
    check_fusion(rule)
    first, second = (to_numpy(part).astype(np.float64) for part in (plain, mirrored))
    if first.shape != second.shape or first.ndim != 2:
        raise DataError("Shape of the mirror images' embeddings", value=second.shape, expected=f"{first.shape}, [N, D]")
    if rule == "pre_norm_vector_add":
        total: Array = first + second
        return total
    lengths = (np.linalg.norm(first, axis=1) + np.linalg.norm(second, axis=1))[:, None] / 2
    if rule == "norm_weighted_avg":
        feature = first + second
    else:
        units = normalised(first), normalised(second)
        feature = np.concatenate(units, axis=1) if rule == "concat" else units[0] + units[1]
    fused: Array = normalised(feature) * lengths
    return fused


def check_fusion(rule: str) -> None:
    """Refuse an unknown rule.

    Raises:
        ConfigError: It is none of :data:`FUSIONS`.
    """
    if rule not in FUSIONS:
        raise ConfigError("Fusion with the mirror image", value=rule, remedy=did_you_mean(str(rule), FUSIONS))
