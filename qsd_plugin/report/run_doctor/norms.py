"""Checks of the heads whose margin follows the norm: do the norms differ, and does the gate do anything?"""

from __future__ import annotations

from collections.abc import Iterator

from qsd_plugin.report.run_doctor.findings import Finding
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder

HEADS = ("AdaFaceHead", "QGFaceHead")
#: Deviation of the norms as a share of their mean, below which all images look equally good; faces have about 0.15.
SPREAD = 0.02
#: Share of norms that may lie outside the range to which they are clipped.
CLIPPED = 0.05
#: What of the statistics' start may be left at the end: (1 - momentum)^steps.
START_LEFT = 0.1
#: Share of images that the gate must at least and may at most take out.
FEWEST_LOW, MOST_LOW = 0.01, 0.5


@check("norms")
def norms(run: Run) -> Iterator[Finding]:
    """The moving statistics of the norms at the end, and the share of images of low quality."""
    for stage in run.training:
        if stage.setting("MODEL.HEADS.NAME") not in HEADS:
            continue
        mean, std = stage.series("norms/mean"), stage.series("norms/std")
        if not mean or not std:
            yield Finding(
                "norms",
                stage.name,
                "unknown",
                "metrics.json holds no figures of the norms",
                f"{stage.iterations} steps",
                "20 steps, after which they are first written",
                "Let an epoch of at least 20 steps finish.",
            )
            continue
        collapsed = std[-1] < SPREAD * mean[-1]
        yield Finding(
            "norms",
            stage.name,
            "problem" if collapsed else "ok",
            "All images have about the same norm, so the margin follows chance" if collapsed else "Norms differ",
            f"mean {mean[-1]:.3g}, deviation {std[-1]:.3g}",
            f"a deviation of {SPREAD:.0%} of the mean",
            "Take the norm in front of the BN neck (QGFACE.NORM_FROM neck_in), or a head without norms (EmbeddingHead)."
            if collapsed
            else "",
        )
        yield from _start(stage)
        yield from _clipped(stage)
        yield from _gate(stage)


def _start(stage: StageFolder) -> Iterator[Finding]:
    default = "adaface" if stage.setting("MODEL.HEADS.NAME") == "AdaFaceHead" else "debiased"
    momentum, steps = float(stage.setting("QGFACE.MOMENTUM", 0.01)), stage.iterations
    left = (1 - momentum) ** steps
    # A fine-tuning starts with the statistics of its checkpoint.
    if (stage.setting("QGFACE.START") or default) == "debiased" or stage.setting("MODEL.WEIGHTS") or left <= START_LEFT:
        return
    yield Finding(
        "norms",
        stage.name,
        "warning",
        "The statistics of the norms have hardly left their start",
        f"{left:.0%} of it is left after {steps} steps",
        f"{START_LEFT:.0%}",
        "Set QGFACE.START debiased, or QGFACE.MOMENTUM higher.",
    )


def _clipped(stage: StageFolder) -> Iterator[Finding]:
    clipped = stage.series("norms/clipped")
    if clipped and clipped[-1] > CLIPPED:
        yield Finding(
            "norms",
            stage.name,
            "warning",
            "Norms lie outside 0.001 to 100, where all count alike",
            f"{clipped[-1]:.0%} of the images",
            f"{CLIPPED:.0%}",
            "Make the features shorter: MODEL.HEADS.EMBEDDING_DIM, or average instead of maximum pooling.",
        )


def _gate(stage: StageFolder) -> Iterator[Finding]:
    low = stage.series("norms/low_quality")
    if not low:
        return
    share, threshold = sum(low) / len(low), stage.setting("QGFACE.THRESHOLD")
    fits = FEWEST_LOW <= share <= MOST_LOW
    few = share < FEWEST_LOW
    yield Finding(
        "norms",
        stage.name,
        "ok" if fits else "warning",
        "Images of low quality"
        if fits
        else "Hardly an image is of low quality, so the gate does nothing"
        if few
        else "Most images are of low quality and not classified",
        f"{share:.1%} at QGFACE.THRESHOLD {threshold}",
        f"{FEWEST_LOW:.0%} to {MOST_LOW:.0%}",
        "" if fits else f"{'Raise' if few else 'Lower'} QGFACE.THRESHOLD; an image of average norm has quality 0.5.",
    )
