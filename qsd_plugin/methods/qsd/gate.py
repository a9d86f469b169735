"""Which pairs of a batch teach, and in which direction (the equation of QSD's pair gate).

Shapes: B pairs on this rank. Labels are quality scores in [0, q_max], higher is better.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsd_plugin.core.distributed import all_reduce_sum
from qsd_plugin.core.errors import LabelError


class PairGate(NamedTuple):
    """The outcome of :func:`pair_gate`; the bounds are those of the whole batch on every rank."""

    keep: Tensor
    """[B] bool: the pair contributes to the loss."""
    teacher_1: Tensor
    """[B] bool: stream 1 has the higher label and teaches."""
    labelled: Tensor
    """[B] bool: both images have a usable label."""
    gap: Tensor
    """[B] float64: absolute difference of the labels; 0 where one is missing."""
    unsure: Tensor
    """[B] bool: dropped because the gap, though between the bounds, is within the labels' own uncertainty."""
    out_of_range: Tensor
    """[B] bool: a label lies outside [0, q_max]; for warnings only, nothing is dropped for it."""
    mean_gap: Tensor
    lower: Tensor
    upper: Tensor

    def counts(self) -> dict[str, Tensor]:
        """0-d counts over all ranks: ``pairs``, disjoint what became of them, and two subsets of their own."""
        differ = self.gap > 0  # so they are labelled, too
        local = {
            "pairs": torch.ones_like(self.keep),
            "kept": self.keep,
            "dropped_low": differ & (self.gap < self.lower),
            "dropped_high": self.gap > self.upper,
            "dropped_unsure": self.unsure,
            "ties": self.labelled ^ differ,
            "unlabelled": ~self.labelled,
            "out_of_range": self.out_of_range,
            "taught_by_1": self.keep & self.teacher_1,
        }
        whole = all_reduce_sum(torch.stack(list(local.values())).sum(1))
        return dict(zip(local, whole.unbind(), strict=True))


@torch.no_grad()
def pair_gate(
    quality_1: Tensor,
    quality_2: Tensor,
    valid_1: Tensor | None = None,
    valid_2: Tensor | None = None,
    *,
    tau: float = 0.3,
    q_max: float = 100.0,
    missing: str = "exclude",
    spread_1: Tensor | None = None,
    spread_2: Tensor | None = None,
    confidence: float = 0.0,
    compat_empty_test: bool = False,
) -> PairGate:
    """Keep the pairs whose label gap d = |q1 - q2| is neither too small nor too large.

    With mu the mean gap of the whole batch (all ranks), a pair is kept if ``tau mu <= d <= q_max - tau (q_max - mu)``
    and the labels differ. Bounds are inclusive and computed in float64, so they do not depend on the training
    precision. Labels that are not finite count as missing. Nothing is modified and the host is never waited for.

    With ``confidence`` k and the labels' standard deviations s, a pair with ``d < k sqrt(s1^2 + s2^2)`` is dropped too:
    who teaches would be a matter of chance. It stays in the mean gap, so that the bounds are the authors'.

    Args:
        quality_1: Labels of stream 1, [B].
        quality_2: Labels of stream 2, [B].
        valid_1: Which labels of stream 1 exist, [B] bool; default: all.
        valid_2: Likewise for stream 2.
        tau: Share of the mean gap below which a pair is dropped, in [0, 1).
        q_max: Upper end of the label range.
        missing: A pair without both labels is never kept; ``"exclude"`` also leaves it out of the mean gap, ``"tie"``
            counts it there as a gap of 0, as the authors' program does by labelling both images 50.
        spread_1: Standard deviation of each label of stream 1 (SDD-FIQA: over the rounds), [B], in label units; NaN, or
            ``None`` for all, where unknown: such a pair is not dropped for it.
        spread_2: Likewise for stream 2.
        confidence: k >= 0; 0 switches this off.
        compat_empty_test: Drop every pair when the kept labels of stream 1 sum to 0, as the authors' program does.

    Source: Ou et al., IEEE TMM 2024, doi 10.1109/TMM.2024.3358697; constants as in the authors' program.
    """
    q1, q2 = quality_1.double(), quality_2.double()
    worse, better = torch.minimum(q1, q2), torch.maximum(q1, q2)
    distance = better - worse
    labelled = distance < torch.inf  # false for NaN, and a label that is not finite makes it NaN or infinite
    for valid in (valid_1, valid_2):
        if valid is not None:
            labelled = labelled & valid.bool()
    gap = torch.where(labelled, distance, 0.0)
    counted = labelled if missing == "exclude" else torch.ones_like(labelled)
    gap_sum, count = all_reduce_sum(torch.stack([gap.sum(), counted.sum(dtype=gap.dtype)])).unbind()
    mean_gap = gap_sum / count.clamp(min=1)
    lower = tau * mean_gap
    upper = q_max - tau * (q_max - mean_gap)
    outside = labelled & ((worse < 0) | (better > q_max))
    keep = (gap > 0) & (gap >= lower) & (gap <= upper)
    unsure = torch.zeros_like(labelled)
    if confidence > 0 and spread_1 is not None and spread_2 is not None:
        unsure = keep & (gap < confidence * torch.hypot(spread_1.double(), spread_2.double()))
        keep = keep & ~unsure
    if compat_empty_test:
        keep = keep & (all_reduce_sum(torch.where(keep, q1, 0.0).sum()) != 0)
    return PairGate(keep, q1 > q2, labelled, gap, unsure, outside, mean_gap, lower, upper)


def gap_weights(gate: PairGate, pairs: Tensor, power: float) -> Tensor:
    """Weight ``d^power`` of each kept pair, scaled to mean 1 over the kept pairs of the whole batch (all ranks).

    Args:
        gate: Of this rank's pairs.
        pairs: P, the kept pairs of the whole batch, 0-d.
        power: >= 0. 0 weighs all kept pairs alike, as the authors do; 1 in proportion to the gap.

    Returns:
        [B] float64, 0 for pairs that are not kept. Across ranks: reduces statistics.
    """
    # Relative to the mean gap, which is positive when a pair is kept, so that no power leaves the range of float64.
    relative = gate.gap / gate.mean_gap.clamp(min=torch.finfo(torch.float64).tiny)
    raw = torch.where(gate.keep, relative**power, 0.0)
    total = all_reduce_sum(raw.sum())
    return raw * pairs / total.clamp(min=torch.finfo(torch.float64).tiny)


def check_quality(quality: Tensor, q_max: float = 100.0, valid: Tensor | None = None, *, name: str = "labels") -> None:
    """Refuse labels outside [0, q_max]. Reads values, so it waits for the device: call it now and then, not each step.

    Args:
        quality: Labels, [B].
        q_max: Upper end of the label range.
        valid: Which labels exist, [B] bool; the others are not looked at.
        name: What they are called in the message.

    Raises:
        LabelError: A label is NaN, infinite or out of range.
    """
    labels = (quality if valid is None else quality[valid.bool()]).detach()
    wrong = labels[~((labels >= 0) & (labels <= q_max))]
    if wrong.numel():
        shown = ", ".join(f"{value:g}" for value in wrong[:5].tolist())
        raise LabelError(
            f"Quality {name}: {wrong.numel()} of {labels.numel()} out of range, e.g. {shown}",
            expected=f"finite values in [0, {q_max:g}]",
            remedy="Rescale the labels (QUALITY.SCALE), or set q_max to the upper end of their range.",
        )
