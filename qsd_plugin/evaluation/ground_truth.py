"""Which gallery images count for which query."""

from __future__ import annotations

import numpy as np

from qsd_plugin.core.errors import DataError
from qsd_plugin.evaluation.arrays import Array, Labels, to_numpy


class GroundTruth:
    """Right and ignored gallery images of every query, looked up one query at a time.

    A gallery image of the query's identity is a *positive*, unless it was taken by the query's own camera: then it is
    *junk*, neither right nor wrong, and is left out. Everything else is a negative.

    Attributes:
        num_query: Q.
        num_gallery: G.
        gallery_people: A number >= 0 for whom each gallery image shows, [G]; not the identities' own.

    Args:
        query_ids: Identities, Q of them.
        gallery_ids: Identities, G of them.
        query_cams: Cameras of the queries; ``None`` together with ``gallery_cams`` switches the camera filter off.
        gallery_cams: Cameras of the gallery.

    Raises:
        DataError: Cameras given for one side only, or not as many as identities.
    """

    def __init__(
        self,
        query_ids: Labels,
        gallery_ids: Labels,
        query_cams: Labels | None = None,
        gallery_cams: Labels | None = None,
    ) -> None:
        if (query_cams is None) != (gallery_cams is None):
            missing = "query_cams" if query_cams is None else "gallery_cams"
            raise DataError(
                f"Argument {missing} is None while the other side's cameras are given",
                remedy="Pass both, or neither to switch the camera filter off.",
            )
        query, gallery = _codes(query_ids, gallery_ids, "ids")
        self.num_query, self.num_gallery = len(query), len(gallery)
        self.gallery_people = gallery
        self._query = query
        self._by_identity = np.argsort(gallery, kind="stable")
        self._starts = np.searchsorted(gallery[self._by_identity], np.arange(max(query.max(initial=0), 0) + 2))
        self._cams: tuple[Array, Array] | None = None
        if query_cams is not None and gallery_cams is not None:
            self._cams = _codes(query_cams, gallery_cams, "cams")
            for name, cams, count in zip(("query", "gallery"), self._cams, (len(query), len(gallery)), strict=True):
                if len(cams) != count:
                    raise DataError(
                        f"Number of {name}_cams", value=len(cams), expected=f"{count}, as many as {name}_ids"
                    )

    def matches(self, query: int) -> tuple[Array, Array]:
        """Gallery indices of the query's identity, and which of them are positives (bool), the rest being junk."""
        identity = self._query[query]
        found = self._by_identity[self._starts[identity] : self._starts[identity + 1]]
        if self._cams is None:
            return found, np.ones(len(found), dtype=bool)
        query_cams, gallery_cams = self._cams
        return found, gallery_cams[found] != query_cams[query]

    def check_shape(self, shape: tuple[int, ...], what: str) -> None:
        """Raise a :class:`DataError` unless ``what`` comes in the shape [Q, G]."""
        expected = (self.num_query, self.num_gallery)
        if shape != expected:
            raise DataError(
                f"Number of query and gallery {what}", value=shape, expected=f"{expected}, as many as identities"
            )


def _codes(query: Labels, gallery: Labels, kind: str) -> tuple[Array, Array]:
    """Integer codes >= 0 of both sides' labels, equal exactly where the labels are equal."""
    sides = to_numpy(query), to_numpy(gallery)
    for name, labels in zip(("query", "gallery"), sides, strict=True):
        if labels.ndim != 1:
            raise DataError(f"Shape of {name}_{kind}", value=labels.shape, expected="one dimension")
    codes = np.unique(np.concatenate(sides), return_inverse=True)[1]
    return codes[: len(sides[0])], codes[len(sides[0]) :]
