"""Quality labels of a training set: one number per image, found again by the paths a host uses.

Higher is better. Labels of different data sets are not comparable. Image names: :mod:`qsd_plugin.quality.keys`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality.formats import LabelTable, read_table, write_table
from qsd_plugin.quality.keys import KeyIndex, PathLike, label_key
from qsd_plugin.quality.scaling import TOP, control, rescale

__all__ = ["PathLike", "QualityLabels", "label_key", "require_coverage"]


@dataclass(frozen=True, eq=False)
class QualityLabels:
    """Scores of N images, with what is known about how they came about.

    Args:
        score: The labels, [N], NaN where an image could not be labelled.
        raw: The measure before scaling, [N] (SDD-FIQA: mean Wasserstein distance over the rounds), NaN where unknown.
        spread: Standard deviation of the score over the rounds, [N], NaN where unknown.
        keys: Image keys, N different ones.
        meta: Header: ``dataset``, ``extractor``, ``scale``, counts, ``seed``, raw range; JSON values only.
        origin: Where the labels come from, for messages; :meth:`load` puts the file name here.

    Raises:
        LabelError: Lengths differ, or a key occurs twice.
    """

    score: NDArray[np.float64]
    raw: NDArray[np.float64]
    spread: NDArray[np.float64]
    keys: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "labels in memory"

    def __post_init__(self) -> None:
        for name in ("score", "raw", "spread"):
            shape = getattr(self, name).shape
            if shape != (len(self.keys),):
                raise LabelError(
                    f"Quality {self.origin}: {name}",
                    value=shape,
                    expected=f"one value for each of {len(self.keys)} keys",
                )
        if len(set(self.keys)) < len(self.keys):
            first = next(key for key, count in Counter(self.keys).items() if count > 1)
            raise LabelError(
                f"Quality {self.origin}: a key occurs twice",
                value=first,
                expected="one label per image",
                remedy="Remove the duplicates, or give the images keys that differ.",
            )

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def load(cls, path: PathLike) -> QualityLabels:
        """Read a label file; the suffix names its format (see :mod:`qsd_plugin.quality.formats`).

        A file without a header is taken to be on the 0 to 100 scale.

        Raises:
            LabelError: The file is missing, unreadable or empty, or a label is not a number or out of range.
        """
        table = read_table(Path(path))
        _validate(f"label file {path}", table)
        columns = table.columns
        return cls(columns["score"], columns["raw"], columns["spread"], table.keys, table.meta, f"label file {path}")

    def save(self, path: PathLike) -> None:
        """Write the labels atomically, in the format of the suffix; unlabelled images are only counted in the header.

        Raises:
            LabelError: Unknown suffix, unwritable folder, or nothing to write.
        """
        known = np.isfinite(self.score)
        keys = tuple(key for key, keep in zip(self.keys, known, strict=True) if keep)
        columns = {"score": self.score[known], "raw": self.raw[known], "spread": self.spread[known]}
        unlabelled = {} if known.all() else {"unlabelled": int((~known).sum())}
        table = LabelTable(keys, columns, {**self.meta, **unlabelled})
        _validate(f"labels for {path}", table)
        write_table(Path(path), table)

    def lookup(
        self, paths: Sequence[PathLike], *, root: PathLike | None = None, basenames: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The labels of images given by the paths a host uses; which path finds which key: :meth:`KeyIndex.rows`.

        Args:
            paths: Image paths, B of them.
            root: The data-set folder on this machine.
            basenames: Whether a basename may identify an image.

        Returns:
            Labels [B], float32, 0 where there is none, and whether there is one, bool [B]; both on the CPU.
        """
        rows = torch.from_numpy(self._index.rows(paths, root=root, basenames=basenames))
        return self._score_after_padding[rows], self._valid_after_padding[rows]

    def lookup_spread(
        self, paths: Sequence[PathLike], *, root: PathLike | None = None, basenames: bool = True
    ) -> torch.Tensor:
        """The spread of the labels that :meth:`lookup` finds, [B] float32 on the CPU; NaN where it is not known."""
        return self._spread_after_padding[torch.from_numpy(self._index.rows(paths, root=root, basenames=basenames))]

    def coverage(self, paths: Sequence[PathLike], *, root: PathLike | None = None, basenames: bool = True) -> float:
        """The share of ``paths`` that have a label, 0 to 1; 1 for no paths."""
        return self.lookup(paths, root=root, basenames=basenames)[1].float().mean().item() if len(paths) else 1.0

    def rescaled(self, kind: str) -> QualityLabels:
        """These labels on another scale, fitted to them; see :func:`qsd_plugin.quality.scaling.rescale`.

        ``none`` leaves them alone, and so does the scale that the header says they are on: SDD-FIQA labels are means of
        minmax-scaled rounds and must not be stretched a second time. ``minmax`` stretches the spread with the labels;
        on the ``rank`` scale, where a step has no fixed size, the spread is unknown (NaN).
        """
        score = rescale(self.score, kind)
        if kind in ("none", self.meta.get("scale")):
            return self
        low, high = float(np.nanmin(self.score)), float(np.nanmax(self.score))
        # Ranks have no unit that a spread could be measured in, and equal labels none either.
        factor = TOP / (high - low) if kind == "minmax" and high > low else np.nan
        meta = {**self.meta, "scale": kind, "scale_fitted_to": [low, high]}
        return replace(self, score=score, spread=self.spread * factor, meta=meta)

    def controlled(self, kind: str, *, seed: int) -> QualityLabels:
        """These labels under a control experiment; see :func:`qsd_plugin.quality.scaling.control`.

        A spread stays with its label: ``shuffle`` deals out both together.
        """
        if kind == "none":
            return self
        meta = {**self.meta, "control": kind}
        score = control(self.score, kind, seed=seed)
        if kind != "shuffle":
            return replace(self, score=score, meta=meta)
        # The same deal, of row numbers instead of scores.
        known = np.isfinite(self.score)
        dealt = control(np.where(known, np.arange(len(self)), np.nan), kind, seed=seed)
        spread = self.spread.copy()
        spread[known] = self.spread[dealt[known].astype(np.int64)]
        return replace(self, score=score, spread=spread, meta=meta)

    def with_meta(self, **entries: Any) -> QualityLabels:
        """These labels with more header entries, e.g. ``dataset="Market1501"``."""
        return replace(self, meta={**self.meta, **entries})

    @cached_property
    def _index(self) -> KeyIndex:
        dataset = self.meta.get("dataset")
        return KeyIndex(self.keys, dataset=None if dataset is None else str(dataset))

    # Row -1, "not found", reads the padding at the end.
    @cached_property
    def _score_after_padding(self) -> torch.Tensor:
        return torch.from_numpy(np.append(np.nan_to_num(self.score), 0.0).astype(np.float32))

    @cached_property
    def _valid_after_padding(self) -> torch.Tensor:
        return torch.from_numpy(np.append(np.isfinite(self.score), False))

    @cached_property
    def _spread_after_padding(self) -> torch.Tensor:
        return torch.from_numpy(np.append(self.spread, np.nan).astype(np.float32))


def require_coverage(
    labels: QualityLabels,
    paths: Sequence[PathLike],
    minimum: float = 0.99,
    *,
    root: PathLike | None = None,
    basenames: bool = True,
) -> float:
    """The coverage of ``paths``, which must not be below ``minimum``.

    Raises:
        LabelError: Too few paths have a label; shows two that have none and two keys of the file, so that the mismatch
            can be seen.
    """
    coverage = labels.coverage(paths, root=root, basenames=basenames)
    if coverage < minimum:
        valid = labels.lookup(paths, root=root, basenames=basenames)[1].tolist()
        unmatched = [os.fspath(path) for path, matched in zip(paths, valid, strict=True) if not matched]
        raise LabelError(
            f"Quality {labels.origin} covers {sum(valid)} of {len(paths)} training images ({coverage:.1%})",
            expected=f"at least {minimum:.1%}. Images without a label: {', '.join(unmatched[:2])}. "
            f"Keys in the file: {', '.join(labels.keys[:2])}",
            remedy="Use the label file of this data set, pass its folder as root, or make new labels with "
            "tools/quality_labels.py; QUALITY.MIN_COVERAGE sets the limit.",
        )
    return coverage


def _validate(name: str, table: LabelTable) -> None:
    """Refuse an empty table, labels that are not numbers, and labels outside the scale the header declares."""
    if not table.keys:
        raise LabelError(f"Quality {name} holds no labels", remedy="Make it again with tools/quality_labels.py.")
    score = table.columns["score"]
    bad = ~np.isfinite(score)
    expected = "a finite number"
    remedy = "Leave out images that have no label, or make the labels again."
    if not bad.any() and table.meta.get("scale") != "none":
        bad = (score < 0) | (score > TOP)
        expected = f"a label from 0 to {TOP:g}"
        remedy = (
            "Rescale the scores, or declare them unscaled with '# scale: none' in the header and set QUALITY.SCALE."
        )
    if bad.any():
        first = int(np.argmax(bad))
        raise LabelError(
            f"Quality {name}: label of {table.keys[first]!r} ({int(bad.sum())} of {len(score)} labels are wrong)",
            value=float(score[first]),
            expected=expected,
            remedy=remedy,
        )
