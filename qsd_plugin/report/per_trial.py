"""What one trained model did with every trial of face test sets: a pair to verify, a probe to identify, an image."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.stored_arrays import StoredArrays
from qsd_plugin.report import per_query
from qsd_plugin.report.per_query import GROUPS, PerQuery, quality_groups

#: File of a run that holds its :class:`PerTrial`.
FILE = "per_trial.npz"


@dataclass(frozen=True)
class PerTrial(StoredArrays):
    """Results of V trials of one or more test sets under M metrics.

    Args:
        query: Name of each trial, [V]; tells trials apart.
        test: The test set it belongs to, [V].
        identity: Whom it shows, [V]; of a pair the person of the first image.
        quality: Of each trial, [V], higher is better; made without any tested model. Of a pair its worse image's. NaN
            for all trials of a test set whose images have no known quality.
        values: In percent, [V, M]; NaN where a metric is not about a trial.
        names: Of the metrics, [M]; the first is the one that verdicts are about.
    """

    what: ClassVar[str] = "Results per trial"

    query: NDArray[np.str_]
    test: NDArray[np.str_]
    identity: NDArray[np.str_]
    quality: NDArray[np.float64]
    values: NDArray[np.float64]
    names: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.query)

    @property
    def primary(self) -> str:
        """The metric that verdicts are about."""
        return self.metric_names[0]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the columns of :meth:`metrics`."""
        return tuple(self.names.tolist())

    def metrics(self) -> NDArray[np.float64]:
        """The values of each trial in percent, [V, M], with NaN."""
        return self.values

    def groups(self) -> dict[str, NDArray[np.intp]]:
        """Rows of all trials and of each third by quality; the thirds are taken within each test set.

        Without thirds where one of the test sets has no quality: its metrics would have none of its trials in them.
        """
        if np.isnan(self.quality).any():
            return {GROUPS[0]: np.arange(len(self))}
        parts: dict[str, list[NDArray[np.intp]]] = {name: [] for name in GROUPS}
        for test in np.unique(self.test):
            rows = np.flatnonzero(self.test == test)
            for name, chosen in quality_groups(self.quality[rows]).items():
                parts[name].append(rows[chosen])
        return {name: np.concatenate(rows) for name, rows in parts.items() if rows}


def join(parts: list[PerTrial]) -> PerTrial:
    """The trials of several test sets as one; a metric of one part is NaN in the others.

    Args:
        parts: At least one, with different test sets.
    """
    names = list(dict.fromkeys(name for part in parts for name in part.metric_names))
    values = []
    for part in parts:
        block = np.full((len(part), len(names)), np.nan)
        block[:, [names.index(name) for name in part.metric_names]] = part.values
        values.append(block)
    columns = {
        entry.name: np.concatenate([getattr(part, entry.name) for part in parts])
        for entry in fields(PerTrial)
        if entry.name not in ("values", "names")
    }
    return PerTrial(**columns, values=np.concatenate(values), names=np.array(names))


def load_outcome(folder: Path) -> PerQuery | PerTrial | None:
    """What the run in ``folder`` did with its test set; ``None`` while it has not finished."""
    if (folder / FILE).is_file():
        return PerTrial.load(folder / FILE)
    file = folder / per_query.FILE
    return PerQuery.load(file) if file.is_file() else None
