"""Paired bootstrap over identities: how sure a difference between two models is.

The unit is the test identity: images of a person succeed and fail together, so queries are not independent. A draw
takes as many identities as there are, with replacement, and averages over all queries of those drawn (a cluster
bootstrap; Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). Both models keep their
result on each query, so what is hard for both cancels. With several splits of the data, an identity that is tested in
two of them is drawn for both at once: pooling splits does not make one person into two.

Shapes: S splits, Q_s queries of split s, N identities over all splits, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.streams import numpy_stream

DRAWS = 10_000
LEVEL = 0.95
#: Smallest detectable difference in standard errors: a two-sided test at 5 % sees it with a power of 80 %; 2.80.
DETECTABLE = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean difference and how sure it is, in the unit of the values.

    Args:
        value: The mean over queries, then over splits.
        low: Lower end of the 95 % percentile interval.
        high: Upper end.
        standard_error: Standard deviation of the draws.
        detectable: :data:`DETECTABLE` standard errors: a true difference of this size would have been found at the 5 %
            level in 80 % of such experiments.
        identities: N.
    """

    value: float
    low: float
    high: float
    standard_error: float
    detectable: float
    identities: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


class IdentityBootstrap:
    """Draws of identities, the same ones for everything that is asked of it.

    Args:
        identities: Per split the identity of each query, [Q_s].
        draws: B.
        seed: Of the draws, >= 0.

    Raises:
        DataError: No split, or one without queries.
    """

    def __init__(self, identities: Sequence[NDArray[np.str_]], *, draws: int = DRAWS, seed: int = 0) -> None:
        if not identities or not all(len(split) for split in identities):
            raise DataError("Bootstrap without queries", value=[len(split) for split in identities])
        names = np.unique(np.concatenate([np.asarray(split) for split in identities]))
        self.num_identities = len(names)
        self._rows = [np.searchsorted(names, split) for split in identities]
        count = self.num_identities
        stream = numpy_stream(seed, "identity bootstrap")
        # How often each identity is drawn, [B, N].
        self._drawn = stream.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)

    def intervals(self, values: Sequence[Values]) -> list[Interval]:
        """Mean and interval of each of K kinds of values.

        Args:
            values: Per split the values of its queries, [Q_s, K], in the order of the identities; NaN where a kind of
                value is not about a query.
        """
        columns = values[0].shape[1]
        means = np.mean([np.nanmean(split, axis=0) for split in values], axis=0)
        drawn = np.zeros((len(self._drawn), columns))
        for split, rows in zip(values, self._rows, strict=True):
            sums = self._drawn @ self._per_identity(rows, np.nan_to_num(split))
            counts = self._drawn @ self._per_identity(rows, np.isfinite(split).astype(np.float64))
            # A draw in which no identity of this split occurs has no mean there; it is left out below.
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn += sums / counts / len(values)
        drawn = drawn[np.isfinite(drawn).all(axis=1)]
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
        errors = drawn.std(axis=0, ddof=1)
        return [
            Interval(
                float(means[k]),
                float(low[k]),
                float(high[k]),
                float(errors[k]),
                float(DETECTABLE * errors[k]),
                self.num_identities,
            )
            for k in range(columns)
        ]

    def _per_identity(self, rows: NDArray[np.intp], values: Values) -> Values:
        """Sums of ``values`` [Q_s, K] over the queries of each identity, [N, K]."""
        return np.stack([np.bincount(rows, column, minlength=self.num_identities) for column in values.T], axis=1)
