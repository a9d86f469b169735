"""The sheets of DIL: swap matrix, replay, severity slider, and what stage 1 renders while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsd_plugin.core.panels import Panels, Picture, draw_panels
from qsd_plugin.methods.dil.exchange import DegradationAxis, render_all
from qsd_plugin.report.dil.renderer import Renderer


def swap_matrix(
    renderer: Renderer,
    contents: Sequence[Picture],
    degradations: Sequence[Picture],
    codes: Tensor,
    headings: Sequence[str],
) -> Panels:
    """Content of the row's picture with the degradation of the column's; the pictures themselves stand at the edges.

    Args:
        renderer: Of the run.
        contents: One for each row.
        degradations: One for each column, M of them.
        codes: Of ``degradations``, [M, K].
        headings: Text above the columns, M.
    """
    rendered = render_all(renderer.generator, renderer.contents(contents), codes)
    pictures = {(0, 1 + column): picture for column, picture in enumerate(renderer.resized(degradations))}
    for row, images in enumerate(rendered, 1):
        pictures[row, 0] = renderer.resized([contents[row - 1]])[0]
        pictures |= {(row, column): picture for column, picture in enumerate(renderer.pictures(images), 1)}
    return draw_panels(pictures, rows=["", *[""] * len(contents)], columns=["", *headings])


def replay_sheet(renderer: Renderer, pictures: Sequence[Picture], codes: Tensor) -> Panels:
    """Every picture, and its content with every code of a bank.

    Args:
        renderer: Of the run.
        pictures: One for each row.
        codes: One for each column behind the first, [M, K].
    """
    rendered = render_all(renderer.generator, renderer.contents(pictures), codes)
    columns = ["image", *(f"code {number}" for number in range(1, 1 + len(codes)))]
    return _with_first(renderer, pictures, rendered, columns)


def slider_sheet(
    renderer: Renderer, pictures: Sequence[Picture], axis: DegradationAxis, positions: Sequence[float]
) -> tuple[Panels, list[list[Picture]]]:
    """Every picture, and its rendering with its own code moved along the axis.

    Args:
        renderer: Of the run.
        pictures: One for each row.
        axis: From clean to degraded.
        positions: On the axis: 0 is the clean, 1 the degraded centre.

    Returns:
        The sheet, and the renderings: for each position those of all pictures.
    """
    places = torch.tensor(list(positions), dtype=axis.clean.dtype, device=axis.clean.device)
    codes = axis.moved(renderer.codes(pictures), places)
    contents = renderer.contents(pictures)
    rendered = torch.stack(
        [render_all(renderer.generator, contents[row : row + 1], own)[0] for row, own in enumerate(codes)]
    )
    sheet = _with_first(renderer, pictures, rendered, ["image", *(f"{position:g}" for position in positions)])
    return sheet, [renderer.pictures(rendered[:, column]) for column in range(len(positions))]


def training_sheet(rows: Sequence[tuple[str, Sequence[Picture]]]) -> Panels:
    """Named rows of pictures, one column for each sample."""
    pictures = {(row, column): picture for row, (_, shown) in enumerate(rows) for column, picture in enumerate(shown)}
    return draw_panels(pictures, rows=[name for name, _ in rows], columns=[""] * len(rows[0][1]))


def _with_first(renderer: Renderer, first: Sequence[Picture], rendered: Tensor, columns: Sequence[str]) -> Panels:
    pictures: dict[tuple[int, int], Picture] = {}
    for row, (own, images) in enumerate(zip(renderer.resized(first), rendered, strict=True)):
        pictures[row, 0] = own
        pictures |= {(row, column): picture for column, picture in enumerate(renderer.pictures(images), 1)}
    return draw_panels(pictures, rows=[""] * len(first), columns=columns)
