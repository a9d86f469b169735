"""Degradation codes in the plane, coloured by what is known about their images.

Shapes: N codes of K numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from qsd_plugin.core.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 110


@dataclass(frozen=True)
class Plane:
    """The first two principal components of codes.

    Args:
        points: [N, 2].
        explained: Share of the variance on each of the two, 0 to 1.
    """

    points: NDArray[np.float64]
    explained: tuple[float, float]


def principal_plane(codes: NDArray[np.float64]) -> Plane:
    """Principal component analysis of codes [N, K] by the singular values of the centred matrix.

    The sign of a component is that of its largest weight, so that equal codes give equal pictures.

    Raises:
        DataError: Fewer than three codes or fewer than two numbers in each, or all codes are equal.
    """
    if codes.ndim != 2 or min(len(codes), codes.shape[1] + 1) < 3:
        raise DataError("Codes to plot", value=codes.shape, expected="at least three codes of at least two numbers")
    left, sizes, right = np.linalg.svd(codes - codes.mean(axis=0), full_matrices=False)
    total = float(np.sum(sizes**2))
    if not total > 1e-20 * max(float(np.sum(codes**2)), 1e-30):
        raise DataError(
            "Codes to plot: all are equal",
            expected="codes that differ among images",
            remedy="Train stage 1 for longer: tools/doctor.py says whether its codes have collapsed.",
        )
    signs = np.sign(right[np.arange(2), np.abs(right[:2]).argmax(axis=1)])
    shares = sizes[:2] ** 2 / total
    return Plane(left[:, :2] * sizes[:2] * signs, (float(shares[0]), float(shares[1])))


def axis_correlation(codes: NDArray[np.float64], severity: NDArray[np.float64], held_out: NDArray[np.bool_]) -> float:
    """Rank correlation of severity with the position along the line from the clean to the most degraded codes.

    Args:
        codes: [N, K].
        severity: Of the images' degradation, [N].
        held_out: Which codes are correlated, [N]; the centres of the lowest and of the highest severity are made of the
            others.
    """
    low, high = severity == severity.min(), severity == severity.max()
    direction = codes[high & ~held_out].mean(axis=0) - codes[low & ~held_out].mean(axis=0)
    return float(spearmanr(codes[held_out] @ direction, severity[held_out]).statistic)


def draw_codes(plane: Plane, colours: Mapping[str, NDArray[np.float64] | NDArray[np.str_]], path: Path) -> None:
    """A panel for each colouring, as a PNG at ``path``.

    Args:
        plane: Of the codes.
        colours: By title, [N] each: numbers get a colour bar, words a legend. NaN or an empty word: not shown there.
        path: Where to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(colours), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, values) in zip(figure.subplots(1, len(colours), squeeze=False)[0], colours.items(), strict=True):
        if values.dtype.kind == "f":
            shown = np.isfinite(values)
            across, up = plane.points[shown].T
            dots = axis.scatter(across, up, c=values[shown], s=8, cmap="viridis", linewidths=0)
            figure.colorbar(dots, ax=axis)
        else:
            _words(axis, plane.points, values)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"first component ({plane.explained[0]:.0%} of the variance)")
        axis.set_ylabel(f"second ({plane.explained[1]:.0%})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def _words(axis: Axes, points: NDArray[np.float64], words: NDArray[np.str_] | NDArray[np.float64]) -> None:
    for word in sorted({str(word) for word in words} - {""}):
        across, up = points[words == word].T
        axis.scatter(across, up, s=8, label=word, linewidths=0, alpha=0.7)
    axis.legend(fontsize=7, markerscale=2)
