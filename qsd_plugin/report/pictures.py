"""Pictures for people: rank lists, pairs, label histograms, the worst and best images of a training set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.data.images import read_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RIGHT, _WRONG = "#2a9d3a", "#c8372d"


@dataclass(frozen=True)
class RankList:
    """One query and what a model puts first.

    Args:
        title: Text on the left, e.g. the model's name.
        query: Path of the query image.
        gallery: Paths of the first gallery images, nearest first.
        right: Which of them show the query's identity.
    """

    title: str
    query: str
    gallery: Sequence[str]
    right: Sequence[bool]


@dataclass(frozen=True)
class ShownPair:
    """Two images that were compared.

    Args:
        first: One of them.
        second: The other.
        title: Text above them.
        right: Whether they were told apart, or found to be the same, rightly.
    """

    first: Image.Image
    second: Image.Image
    title: str
    right: bool


def draw_rank_lists(lists: Sequence[RankList], path: Path) -> None:
    """Rows of query and gallery images, framed green where right and red where wrong, as a PNG at ``path``."""
    columns = 1 + max(len(entry.gallery) for entry in lists)
    figure, axes = _grid(len(lists), columns, (0.75, 1.55))
    for row, entry in zip(axes, lists, strict=True):
        _show(row[0], entry.query, None)
        row[0].set_ylabel(entry.title, rotation=0, ha="right", va="center", fontsize=8)
        for axis, image, right in zip(row[1:], entry.gallery, entry.right, strict=False):
            _show(axis, image, _RIGHT if right else _WRONG)
    figure.suptitle("Query, then the gallery by rank (green: same person)", fontsize=9)
    _save(figure, path)


def draw_pairs(pairs: Sequence[ShownPair], title: str, path: Path) -> None:
    """Pairs side by side, one below the other, framed as in :func:`draw_rank_lists`, as a PNG at ``path``."""
    figure, axes = _grid(2, len(pairs), (0.9, 1.2))
    for column, pair in enumerate(pairs):
        for row, image in zip(axes, (pair.first, pair.second), strict=True):
            _show(row[column], image, _RIGHT if pair.right else _WRONG)
        axes[0][column].set_title(pair.title, fontsize=7)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def draw_label_histogram(labels: dict[str, NDArray[np.float64]], path: Path) -> None:
    """Histogram of quality labels per data set, as a PNG at ``path``.

    Args:
        labels: Labels in [0, 100] by data-set name.
        path: Where to write.
    """
    figure, axes = _grid(1, len(labels), (4.0, 2.6), frames=True)
    for axis, (name, scores) in zip(axes[0], labels.items(), strict=True):
        axis.hist(scores, bins=50, range=(0, 100), color="#3b6fb6")
        axis.set_title(f"{name}: {len(scores)} images, mean {scores.mean():.1f}", fontsize=9)
        axis.set_xlabel("quality label")
        axis.set_ylabel("images")
    _save(figure, path)


def draw_worst_and_best(paths: Sequence[str], scores: NDArray[np.float64], path: Path, *, count: int = 12) -> None:
    """The ``count`` images with the lowest and the highest labels, as a PNG at ``path``."""
    order = np.argsort(scores, kind="stable")
    count = min(count, len(order))
    figure, axes = _grid(2, count, (0.8, 1.75))
    for row, title, chosen in ((axes[0], "worst", order[:count]), (axes[1], "best", order[::-1][:count])):
        for axis, index in zip(row, chosen, strict=True):
            _show(axis, paths[index], None)
            axis.set_title(f"{scores[index]:.0f}", fontsize=8)
        row[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    _save(figure, path)


def _grid(
    rows: int, columns: int, inches: tuple[float, float], *, frames: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    # The object interface and no pyplot: nothing global, and no display needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(inches[0] * columns + 0.8, inches[1] * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    if not frames:
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
    return figure, [list(row) for row in axes]


def _show(axis: Axes, image: str | Image.Image, frame: str | None) -> None:
    opened = read_rgb(image) if isinstance(image, str) else image
    # Every person as the network's 2:1 crop, every face as a square, so that rows line up whatever the crops' sizes.
    width = 64 if opened.height > 1.3 * opened.width else 128
    axis.imshow(np.asarray(opened.resize((width, 128))))
    if frame:
        for spine in axis.spines.values():
            spine.set_visible(True)
            spine.set_color(frame)
            spine.set_linewidth(2.5)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
