"""Cross-fitting: every part of a training set is labelled by a network that never saw its identities.

A network separates the images it was trained on too well: their similarities saturate, and what is left of SDD-FIQA's
distances says little about quality. Cross-fitted labels are taken where the network has to generalise. Two networks'
distances are not comparable, so each fold is drawn, measured and scaled by itself; pairs of images are only ever
compared within an identity, and an identity lies in one fold.

Shapes: N images, K folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import ConfigError, LabelError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.quality.labels import QualityLabels

#: Header entries that differ between folds and are kept as lists, under ``fold_<entry>``.
_PER_FOLD = ("images", "identities", "raw_range", "extractor")


def identity_folds(identities: ArrayLike, folds: int, *, seed: int = 0) -> NDArray[np.int64]:
    """The fold of every image; images of one identity share it.

    Identities are dealt out largest first, those of equal size in an order drawn from the seed, each to the fold with
    the fewest images so far. Two folds differ by at most as many images as the largest identity has.

    Args:
        identities: [N], integers or strings.
        folds: K >= 2.
        seed: Decides between identities of equal size, >= 0.

    Returns:
        [N] int64, 0 to K - 1.

    Raises:
        ConfigError: Fewer than two folds, or fewer than two identities per fold.
    """
    names, identity, counts = np.unique(np.asarray(identities), return_inverse=True, return_counts=True)
    if folds < 2 or len(names) < 2 * folds:
        raise ConfigError(
            f"Folds of {len(names)} identities",
            value=folds,
            expected=f"2 to {len(names) // 2} (two identities per fold)",
            remedy="Choose another QUALITY.FOLDS; 0 labels without cross-fitting.",
        )
    drawn = numpy_stream(seed, "identity folds").permutation(len(names))
    images = np.zeros(folds, dtype=np.int64)
    fold_of_identity = np.empty(len(names), dtype=np.int64)
    for place in drawn[np.argsort(-counts[drawn], kind="stable")]:
        smallest = int(np.argmin(images))
        fold_of_identity[place] = smallest
        images[smallest] += counts[place]
    fold: NDArray[np.int64] = fold_of_identity[identity.reshape(-1)]
    return fold


def merge_folds(parts: Sequence[QualityLabels], keys: Sequence[str]) -> QualityLabels:
    """The labels of all folds in one table, in the order of ``keys``.

    Scores stay as they are, that is on the scale that was fitted to each fold (and, for SDD-FIQA, to each round) by
    itself. ``raw`` values are those of K different networks; the header says so.

    Args:
        parts: Labels of each fold.
        keys: Keys of all images, each in exactly one part.

    Raises:
        LabelError: A key is missing, in two parts, or a part has one more.
    """
    row_of_key = {key: row for row, key in enumerate(key for part in parts for key in part.keys)}
    total = sum(map(len, parts))
    if len(row_of_key) < total or set(row_of_key) != set(keys) or len(keys) != total:
        raise LabelError(
            "Labels of folds", value=f"{total} labels", expected=f"each of {len(keys)} images in exactly one fold"
        )
    rows = np.array([row_of_key[key] for key in keys], dtype=np.int64)
    score, raw, spread = (
        np.concatenate([getattr(part, name) for part in parts])[rows] for name in ("score", "raw", "spread")
    )
    meta: dict[str, Any] = {name: value for name, value in parts[0].meta.items() if name not in _PER_FOLD}
    meta |= {name: sum(part.meta[name] for part in parts) for name in ("images", "identities", "unlabelled")}
    meta |= {"folds": len(parts), "scale_fitted_per": "fold"}
    meta |= {f"fold_{name}": [part.meta.get(name) for part in parts] for name in _PER_FOLD}
    return QualityLabels(score, raw, spread, tuple(keys), meta)
