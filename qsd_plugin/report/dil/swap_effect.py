"""Does a swapped code do what the degradation does? Measured over pairs of a clean and a degraded picture.

For pair i: a clean picture a with content c_a and code d_a, and a degraded picture b of other content. What the
degradation itself does to a measure is known from b and the clean picture it was made of. A code that carries the
degradation moves ``G(c_a, d_b) - G(c_a, d_a)`` the same way, and ``G(c_b, d_a) - G(c_b, d_b)`` the other way. As a
control both codes of each pair are replaced by codes drawn from all of them, clean or not, without replacement: there
should be no effect.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.panels import Picture
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.report.bootstrap import IdentityBootstrap, Interval
from qsd_plugin.report.dil.measures import MEASURES, measured
from qsd_plugin.report.dil.renderer import Renderer

_COLUMNS = ("input", "degrading", "cleaning", "control_degrading", "control_cleaning")


@dataclass(frozen=True)
class Effect:
    """What happens to one measure: logarithms of ratios for sharpness, grey levels for brightness.

    Args:
        input: Of the degradation itself: degraded picture minus the clean one it was made of.
        degrading: ``G(c_a, d_b) - G(c_a, d_a)``.
        cleaning: ``G(c_b, d_a) - G(c_b, d_b)``.
        control_degrading: As ``degrading``, with permuted codes.
        control_cleaning: As ``cleaning``, with permuted codes.
        share_degrading: Share of the pairs in which ``degrading`` has the sign of ``input``'s mean, 0 to 1.
        share_cleaning: Share of the pairs in which ``cleaning`` has the other one.
        pairs: N.
    """

    input: Interval
    degrading: Interval
    cleaning: Interval
    control_degrading: Interval
    control_cleaning: Interval
    share_degrading: float
    share_cleaning: float
    pairs: int

    @property
    def verdict(self) -> str:
        """In words; an effect counts where its interval excludes zero."""
        if not self.input.excludes_zero:
            return "the degradation does not change it"
        sign = np.sign(self.input.value)
        right = [
            interval.excludes_zero and np.sign(interval.value) == expected
            for interval, expected in ((self.degrading, sign), (self.cleaning, -sign))
        ]
        if not all(right):
            return "wrong way or none" if not any(right) else "one way only"
        if self.control_degrading.excludes_zero or self.control_cleaning.excludes_zero:
            return "both ways, but the control moves, too"
        return "both ways"


def swap_effect(
    renderer: Renderer,
    clean: Sequence[Picture],
    degraded: Sequence[Picture],
    sources: Sequence[Picture],
    identities: Sequence[str],
    *,
    head: str = "syn",
    seed: int = 0,
) -> dict[str, Effect]:
    """Measure pairs.

    Args:
        renderer: Of the run.
        clean: a, N of them, at least 2.
        degraded: b, N of them.
        sources: The clean pictures that ``degraded`` were made of.
        identities: Whom ``clean`` show: pairs with the same one are drawn together by the bootstrap.
        head: Of the encoder, for ``degraded``.
        seed: Of the control's permutation and of the bootstrap.

    Returns:
        By measure, in the order of :data:`~.measures.MEASURES`.

    Raises:
        DataError: Fewer than two pairs, or lists of different lengths.
    """
    count = len(clean)
    if count < 2 or not count == len(degraded) == len(sources) == len(identities):
        raise DataError(
            "Pairs of a swap",
            value=(count, len(degraded), len(sources), len(identities)),
            expected="lists of equal length, at least 2",
        )
    content_a, content_b = renderer.contents(clean), renderer.contents(degraded)
    code_a, code_b = renderer.codes(clean), renderer.codes(degraded, head)
    codes = torch.cat([code_a, code_b])
    order = torch.randperm(2 * count, generator=torch_stream(seed, "swap control")).to(codes.device)
    mixed_a, mixed_b = codes[order[:count]], codes[order[count:]]

    def change(content: torch.Tensor, into: torch.Tensor, of: torch.Tensor) -> NDArray[np.float64]:
        return measured(renderer.render(content, into)) - measured(renderer.render(content, of))

    changes = np.stack(
        [
            measured(renderer.resized(degraded)) - measured(renderer.resized(sources)),
            change(content_a, code_b, code_a),
            change(content_b, code_a, code_b),
            change(content_a, mixed_b, mixed_a),
            change(content_b, mixed_a, mixed_b),
        ],
        axis=1,
    )  # [N, 5, measures]
    bootstrap = IdentityBootstrap([np.asarray(identities)], seed=seed)
    effects = {}
    for place, name in enumerate(MEASURES):
        values = changes[:, :, place]
        sign = np.sign(values[:, 0].mean())
        effects[name] = Effect(
            **dict(zip(_COLUMNS, bootstrap.intervals([values]), strict=True)),
            share_degrading=float(np.mean(np.sign(values[:, 1]) == sign)),
            share_cleaning=float(np.mean(np.sign(values[:, 2]) == -sign)),
            pairs=count,
        )
    return effects


def as_json(effects: Mapping[str, Effect]) -> dict[str, Any]:
    """The effects of :func:`swap_effect` with their verdicts, for JSON."""
    return {name: {**asdict(effect), "verdict": effect.verdict} for name, effect in effects.items()}


def as_table(by_mix: Mapping[str, Mapping[str, Effect]]) -> str:
    """Markdown table; sharpness as ratios, brightness in grey levels, with 95 % intervals.

    Args:
        by_mix: Effects of :func:`swap_effect` by the degradation that ``degraded`` were made with.
    """
    header = [
        *("degradation", "measure", "does itself", "G(clean, degraded code)", "G(degraded, clean code)"),
        *("control", "control back", "pairs", "moves"),
    ]
    rows = []
    for mix, effects in by_mix.items():
        for name, effect in effects.items():
            cells = [_cell(name, getattr(effect, column)) for column in _COLUMNS]
            pairs = f"{effect.share_degrading:.0%} / {effect.share_cleaning:.0%}"
            rows.append([mix, name, *cells, pairs, effect.verdict])
    return tabulate(rows, headers=header, tablefmt="github")


def _cell(measure: str, interval: Interval) -> str:
    numbers = (interval.value, interval.low, interval.high)
    if measure == "sharpness":
        return "x{:.2f} ({:.2f} to {:.2f})".format(*(float(np.exp(number)) for number in numbers))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*numbers)
