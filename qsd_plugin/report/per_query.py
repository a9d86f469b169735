"""What one trained model did with every query: the file that all comparisons are made from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.stored_arrays import StoredArrays

#: File of a run that holds its :class:`PerQuery`.
FILE = "per_query.npz"
#: Groups of queries in tables: all of them and the thirds of their quality.
GROUPS = ("all", "worst third", "middle third", "best third")
METRICS = ("rank1", "mAP", "mINP")


@dataclass(frozen=True)
class PerQuery(StoredArrays):
    """Results of the V queries that have a match in the gallery.

    Args:
        query: File of each query relative to the data-set folder, [V]; tells queries apart.
        identity: Whom each query shows, [V]: a name that is the same in every split of the data.
        quality: Of each query image, [V], higher is better; made without any tested model.
        ap: Average precision, [V], 0 to 1.
        inp: Inverse negative penalty, [V], 0 to 1.
        first_hit: Rank of the first match, [V], from 1.
    """

    what: ClassVar[str] = "Results per query"

    query: NDArray[np.str_]
    identity: NDArray[np.str_]
    quality: NDArray[np.float64]
    ap: NDArray[np.float64]
    inp: NDArray[np.float64]
    first_hit: NDArray[np.int64]

    #: The metric that verdicts are about, fixed before any run.
    primary: ClassVar[str] = "mAP"

    def __len__(self) -> int:
        return len(self.query)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """:data:`METRICS`."""
        return METRICS

    def metrics(self) -> NDArray[np.float64]:
        """Rank-1, AP and INP of each query in percent, [V, 3]; their means are :data:`METRICS`."""
        return 100.0 * np.stack([self.first_hit == 1, self.ap, self.inp], axis=1)

    def groups(self) -> dict[str, NDArray[np.intp]]:
        """Rows of each group of :data:`GROUPS` that is not empty."""
        return quality_groups(self.quality)


def quality_groups(quality: NDArray[np.float64]) -> dict[str, NDArray[np.intp]]:
    """Rows of all queries and of each third by ``quality`` [V], worst first, as :data:`GROUPS` names them.

    Where there are three qualities, such as the rates that images were shrunk by, each of them is a third.
    """
    order = np.argsort(quality, kind="stable")
    values = np.unique(quality)
    if len(values) == len(GROUPS) - 1:
        parts = [order, *(order[quality[order] == value] for value in values)]
    else:
        parts = [order, *np.array_split(order, len(GROUPS) - 1)]
    return {name: rows for name, rows in zip(GROUPS, parts, strict=True) if len(rows)}


def identity_names(paths: Sequence[str], identities: Sequence[object]) -> dict[object, str]:
    """A name for each identity of a test set that does not depend on the split: its first image.

    Splits hold out whole identities, so an identity's test images are always the same ones; which of them are queries
    and which number the host gives the identity are not.

    Args:
        paths: Of all test images, queries and gallery.
        identities: Of the same images.
    """
    names: dict[object, str] = {}
    for path, identity in sorted(zip(paths, identities, strict=True), key=lambda pair: pair[0]):
        names.setdefault(identity, path)
    return names


def relative(path: str, folder: Path) -> str:
    """``path`` below ``folder`` in POSIX spelling."""
    return Path(os.path.relpath(path, folder)).as_posix()
