"""QSD on some rows of a batch of ten pairs, for any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qsd import QSDLoss

PAIRS = 10
WEIGHTS = {"stage": 1.0, "embedding": 1.0, "logits": 0.1}
SHAPES = {"stage": (6, 4, 3), "embedding": (8,), "logits": (5,)}
# Pair 0 falls below the bound of the whole batch (10.8), but not below that of rank 0 alone in an uneven split (8.9).
QUALITY_1 = torch.tensor([90.0, 20.0, 70.0, 15.0, 50.0, 40.0, 30.0, 95.0, 62.0, 61.0])
QUALITY_2 = torch.tensor([79.5, 55.0, 68.0, 75.0, 50.0, 80.0, 90.0, 35.0, 20.0, 10.0])
#: Pairs 1 and 9 are within the spread of their labels (gaps 35 and 51), pair 6 is of unknown spread.
SPREAD_1 = torch.tensor([1.0, 40.0, 2.0, 1.0, 9.0, 3.0, float("nan"), 5.0, 6.0, 50.0])
SPREAD_2 = torch.tensor([1.0, 2.0, 60.0, 1.0, 9.0, 3.0, 80.0, 5.0, 6.0, 20.0])
#: Everything beside the authors' settings at once, and what it leaves of the batch.
OPTIONS: dict[str, dict[str, Any]] = {
    "official": {},
    "extended": {"gap_power": 1.5, "confidence": 1.0, "map_norm": "rms"},
}
KEPT = {"official": 7, "extended": 5}


def whole_taps(stream: int, shared_extremes: bool) -> dict[str, Tensor]:
    taps = {level: torch.randn(PAIRS, *shape, generator=torch_stream(stream, level)) for level, shape in SHAPES.items()}
    if shared_extremes:
        row = {1: 1, 2: 8}[stream]  # pair 1 has its student in stream 1 and lies on rank 0, pair 8 the other way round
        taps["stage"][row, :, 0, 0] = 3.0
        taps["stage"][row, :, 1, 1] = 0.01
    return taps


def qsd_case(rows: Tensor, split: str, distance: str, scale_grad: str, options: str) -> dict[str, Any]:
    """Loss, stats and tap gradients for some rows of the whole batch; "shared" is a split with shared extremes."""
    streams = [
        {level: tap[rows].clone().requires_grad_() for level, tap in whole_taps(stream, split == "shared").items()}
        for stream in (1, 2)
    ]
    loss = QSDLoss(WEIGHTS, map_distance=distance, scale_grad=scale_grad, **OPTIONS[options])
    result = loss(*streams, QUALITY_1[rows], QUALITY_2[rows], spread_1=SPREAD_1[rows], spread_2=SPREAD_2[rows])
    result.total.backward()
    return {
        "total": result.total.detach(),
        "levels": {name: level.detach() for name, level in result.levels.items()},
        "stats": result.stats,
        "gradients": [{level: tap.grad for level, tap in taps.items()} for taps in streams],
    }


def largest_difference(parts: list[Tensor], rows: list[Tensor], whole: Tensor) -> float:
    """Between the averaged gradients of the ranks and that of the whole batch."""
    joined = torch.zeros_like(whole)
    for part, index in zip(parts, rows, strict=True):
        joined[index] = part / len(parts)
    return (joined - whole).abs().max().item()


def qsd_difference(parts: list[dict[str, Any]], rows: list[Tensor], case: tuple[str, ...]) -> float:
    """Between the tap gradients of the ranks, which hold these rows, and those of one process."""
    whole = qsd_case(torch.arange(PAIRS), *case)["gradients"]
    return max(
        largest_difference([part["gradients"][stream][level] for part in parts], rows, gradient)
        for stream, gradients in enumerate(whole)
        for level, gradient in gradients.items()
    )


def assert_whole_batch(part: dict[str, Any], case: tuple[str, ...]) -> None:
    """A rank's values and statistics are those of one process on the whole batch."""
    whole = qsd_case(torch.arange(PAIRS), *case)
    torch.testing.assert_close(part["total"], whole["total"], rtol=1e-6, atol=0)
    for kind in ("levels", "stats"):
        assert part[kind].keys() == whole[kind].keys()
        for name, value in whole[kind].items():
            torch.testing.assert_close(part[kind][name], value, rtol=1e-6, atol=0)
    assert whole["stats"]["kept"].item() == KEPT[case[-1]]
    assert whole["stats"]["pairs"].item() == PAIRS
