"""Pictures of error rates: DET curves of several sets, error-versus-discard curves of several quality measures.

And results over the severity of a degradation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.evaluation.quality_curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]


@dataclass(frozen=True)
class LevelPanel:
    """Results under one degradation.

    Args:
        ticks: Of the levels, mildest first, L of them.
        means: L results of each arm, by its name.
    """

    ticks: Sequence[str]
    means: Mapping[str, Sequence[float]]


def draw_det(curves: Mapping[str, tuple[Array, Array]], path: Path) -> None:
    """Detection error trade-off as a PNG at ``path``: 1 - TAR over FAR, both logarithmic.

    Args:
        curves: False acceptance rates [K] and true acceptance rates [K], fractions, by the legend's text. Points at
            which a rate is 0 cannot be drawn and are left out.
        path: Where to write.
    """
    figure, axis = _axes()
    for name, (far, tar) in curves.items():
        shown = (far > 0) & (tar < 1)
        axis.plot(far[shown], 1 - tar[shown], label=name if shown.any() else f"{name} (no errors to trade)")
    axis.set_xscale("log")
    axis.set_yscale("log")
    if not any(np.size(line.get_xdata()) for line in axis.get_lines()):
        axis.axis((1e-3, 1, 1e-3, 1))  # logarithmic axes without a point have no limits
    axis.set_xlabel("false acceptance rate (FAR)")
    axis.set_ylabel("false rejection rate (1 - TAR)")
    _finish(figure, axis, path)


def draw_error_discard(curves: Mapping[str, Curve], path: Path) -> None:
    """Error-versus-discard staircases as a PNG at ``path``, the protocol as title and the areas in the legend.

    Args:
        curves: By the legend's text.
        path: Where to write.
    """
    figure, axis = _axes()
    for name, curve in curves.items():
        ends = np.append(curve.discard, curve.max_discard), np.append(curve.error, curve.error[-1])
        axis.step(*ends, where="post", label=f"{name}: area {curve.pauc:.4g} (best {curve.pauc_best:.4g})")
    axis.set_title("; ".join(dict.fromkeys(curve.protocol for curve in curves.values())), fontsize=8)
    axis.set_xlabel("share of pairs put aside, lowest quality first")
    axis.set_ylabel("error rate of the others")
    axis.set_ylim(bottom=0)
    _finish(figure, axis, path)


def draw_over_severity(panels: Mapping[str, LevelPanel], metric: str, path: Path) -> None:
    """Results over the levels of each degradation as a PNG at ``path``: a panel per degradation, a line per arm.

    Args:
        panels: By title.
        metric: Text of the vertical axis.
        path: Where to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels) + 1.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        for arm, points in panel.means.items():
            axis.plot(range(len(points)), points, marker="o", markersize=3, linewidth=1.2, label=arm)
        axis.set_xticks(range(len(panel.ticks)), panel.ticks, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.grid(True, linewidth=0.3)
    axes[0].set_ylabel(metric)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finish(figure: Figure, axis: Axes, path: Path) -> None:
    axis.grid(True, which="both", linewidth=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
