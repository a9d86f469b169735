"""Checks of QGFace's contrastive branch: has it pairs to work on, is its queue full, what does it weigh?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from qsd_plugin.report.run_doctor.findings import Finding
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder

#: Share of pairs that must be contrasted, and from which on hardly an image is left to the classifier.
FEWEST, MOST = 0.01, 0.9
#: Share of the whole loss that active pairs may have.
LARGE_TERM = 0.7
#: Size of the queue whose loss the rescaled one is.
_REFERENCE = 128


@check("contrast")
def contrast(run: Run) -> Iterator[Finding]:
    """Share of contrasted pairs, fill of the queue, and share of the loss."""
    for stage in run.training:
        chain = (stage.setting("MODEL.META_ARCHITECTURE"), stage.setting("QSD.BASE"))
        if "QGFace" not in chain[: 2 if chain[0] == "QSD" else 1] or stage.setting("QGFACE.CONTRAST.QUEUE") == "none":
            continue
        shares = stage.series("qgface/contrasted")
        if not shares:
            yield Finding(
                "contrast",
                stage.name,
                "unknown",
                "metrics.json holds no figures of QGFace",
                f"{stage.iterations} steps",
                "one epoch, after which they are first written",
                "Let an epoch finish.",
            )
            continue
        yield _pairs(stage, shares)
        yield from _queue(stage)
        yield from _term(stage, fmean(shares))


def _pairs(stage: StageFolder, shares: list[float]) -> Finding:
    share, threshold = fmean(shares), _threshold(stage)
    views = [
        f"{name} {fmean(stage.series(f'qgface/low_quality_{name}') or [0.0]):.1%}" for name in ("clean", "degraded")
    ]
    few, many = share < FEWEST, share > MOST and threshold > 0
    return Finding(
        "contrast",
        stage.name,
        "warning" if few or many else "ok",
        "Hardly a pair is contrasted, so QGFace is next to its base"
        if few
        else "Most pairs are contrasted"
        if many
        else "Pairs that are contrasted",
        f"{share:.1%}, views of a quality below {threshold:g}: {', '.join(views)}",
        f"{FEWEST:.0%} to {MOST:.0%}",
        f"{'Raise' if few else 'Lower'} QGFACE.THRESHOLD, or QGFACE.CONTRAST.THRESHOLD." if few or many else "",
    )


def _queue(stage: StageFolder) -> Iterator[Finding]:
    filled, size = stage.series("qgface/negatives"), int(stage.setting("QGFACE.CONTRAST.QUEUE_SIZE", 0))
    if not filled or not size:
        return
    full = filled[-1] >= size
    yield Finding(
        "contrast",
        stage.name,
        "ok" if full else "warning",
        "The queue is full" if full else "The training ended before the queue was full",
        f"{filled[-1]:.0f} of {size} entries",
        f"{size}",
        "" if full else "Lower QGFACE.CONTRAST.QUEUE_SIZE, or train for more steps.",
    )


def _term(stage: StageFolder, active: float) -> Iterator[Finding]:
    term, total = stage.series("loss_qgface"), stage.series("total_loss")
    if not term or not total:
        return
    constant = 0.0
    if stage.setting("QGFACE.CONTRAST.REDUCTION", "all") == "all":
        # A pair without weight has the loss of equal logits, and no gradient.
        entries = stage.series("qgface/negatives")
        size = _REFERENCE if stage.setting("QGFACE.CONTRAST.RESCALE", True) else (entries or [_REFERENCE])[-1]
        constant = float(stage.setting("QGFACE.CONTRAST.WEIGHT", 1.0)) * (1 - active) * math.log(1 + size)
    own, whole = max(fmean(term) - constant, 0.0), fmean(total)
    share = own / max(whole - constant, 1e-12)
    large = share > LARGE_TERM
    yield Finding(
        "contrast",
        stage.name,
        "warning" if large else "ok",
        "The contrastive loss outweighs the others" if large else "Share of the contrastive loss",
        f"{share:.1%} of the loss that has a gradient ({own:.3g}, beside {constant:.3g} of pairs without weight)",
        f"{LARGE_TERM:.0%}",
        "Lower QGFACE.CONTRAST.WEIGHT." if large else "",
    )


def _threshold(stage: StageFolder) -> float:
    own = float(stage.setting("QGFACE.CONTRAST.THRESHOLD", -1))
    return float(stage.setting("QGFACE.THRESHOLD", 0.0)) if own == -1 else own
