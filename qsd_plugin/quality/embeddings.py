"""Embeddings made elsewhere, read from a file.

Shapes: N images, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality.formats import UNREADABLE

_ARRAYS = "arrays keys [N] (text), embeddings [N, D] and optionally identities [N], no pickled objects"


@dataclass(frozen=True)
class EmbeddingTable:
    """Embeddings by image key.

    Attributes:
        keys: Image keys or paths, N different ones.
        embeddings: [N, D].
        identities: [N], or ``None`` where the file has none.
    """

    keys: tuple[str, ...]
    embeddings: NDArray[Any]
    identities: NDArray[Any] | None


def read_embeddings(path: Path) -> EmbeddingTable:
    """Read ``path``, an ``.npz`` with the arrays ``keys``, ``embeddings`` and optionally ``identities``.

    Raises:
        LabelError: No such file, other contents, arrays of different lengths, or a key that occurs twice.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = tuple(str(key) for key in arrays["keys"])
            embeddings = np.asarray(arrays["embeddings"])
            identities = np.asarray(arrays["identities"]) if "identities" in arrays else None
    except (OSError, *UNREADABLE) as error:
        raise LabelError(
            f"Embedding file {path} cannot be read",
            value=str(error),
            expected=f"an .npz file with the {_ARRAYS}",
            remedy="Write it with numpy.savez(path, keys=..., embeddings=..., identities=...).",
        ) from error
    shapes = [embeddings.shape[:1], *([] if identities is None else [identities.shape])]
    if embeddings.ndim != 2 or any(shape != (len(keys),) for shape in shapes) or len(set(keys)) < len(keys):
        raise LabelError(
            f"Embedding file {path}",
            value=f"{len(keys)} keys, {len(set(keys))} of them different, embeddings {embeddings.shape}"
            + ("" if identities is None else f", identities {identities.shape}"),
            expected=_ARRAYS,
            remedy="One row per image, each image once.",
        )
    return EmbeddingTable(keys, embeddings, identities)
