"""Checks of quality labels that need the label files only: data set, spread, saturation, noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.quality.scaling import TOP
from qsd_plugin.report.run_doctor.findings import Finding, Verdict
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run

#: Standard deviation of labels, on the scale 0 to 100, below which gaps between images are hardly more than rounding.
LEAST_SPREAD = 2.0
#: Labels within this share of the scale from its ends count as saturated ...
END = 0.01
#: ... and this share of them is worth a look, or leaves too few gaps to learn from.
SATURATED, MOSTLY_SATURATED = 0.1, 0.5
#: Noise of a label (standard deviation over the rounds) relative to the spread of all labels.
MOSTLY_NOISE = 0.5
_REMAKE = "Make them again with --from-stage labels or tools/quality_labels.py"


@check("labels")
def labels(run: Run) -> Iterator[Finding]:
    """Judge the labels as training sees them, scaled by ``QUALITY.SCALE``."""
    for path, stage in run.label_files():
        if not path.is_file():
            step = f"{_REMAKE}, or name them in QUALITY.FILES."
            yield Finding("labels", stage.name, "problem", "The label file is gone", str(path), "a file", step)
            continue
        user = run.label_user or stage
        try:
            table = QualityLabels.load(path).rescaled(str(user.setting("QUALITY.SCALE", "none")))
        except LabelError as error:
            yield Finding("labels", stage.name, "problem", "The label file is unusable", str(error), "a valid file")
            continue
        score = table.score[np.isfinite(table.score)]
        names = [str(name) for name in user.setting("DATASETS.NAMES", ())]
        yield _data_set(stage.name, table, path, names)
        yield _spread(stage.name, score)
        yield _saturation(stage.name, score)
        noise = table.spread[np.isfinite(table.spread)]
        if len(noise) and score.std() > 0:
            yield _noise(stage.name, float(np.median(noise)) / float(score.std()))


def _data_set(stage: str, table: QualityLabels, path: Path, names: list[str]) -> Finding:
    name = str(table.meta.get("dataset", ""))
    foreign = bool(name and names and name not in names)
    return Finding(
        "labels",
        stage,
        "problem" if foreign else "ok",
        f"The labels in {path.name} belong to another data set" if foreign else "Labels",
        f"{len(table)} images of {name or 'an unnamed data set'}",
        ", ".join(names),
        f"{_REMAKE}; labels of one data set say nothing about another." if foreign else "",
    )


def _spread(stage: str, score: NDArray[np.float64]) -> Finding:
    spread = float(score.std())
    sentence, step = "Labels are spread", ""
    result: Verdict = "ok"
    if score.max() - score.min() < 1e-6:
        result, sentence = "problem", "All labels are equal, so no image can teach another"
        step = (
            f"{_REMAKE}, with a baseline that has learnt (see its training accuracy) and identities of at least two "
            "images."
        )
    elif spread < LEAST_SPREAD:
        result, sentence = "warning", "Labels hardly differ"
        step = "Set QUALITY.SCALE minmax or rank; see whether a few outliers take up the scale."
    figure = f"standard deviation {spread:.1f}, range {score.min():.1f} to {score.max():.1f}"
    return Finding("labels", stage, result, sentence, figure, f"{LEAST_SPREAD:g} of {TOP:g}", step)


def _saturation(stage: str, score: NDArray[np.float64]) -> Finding:
    low, high = float((score <= END * TOP).mean()), float((score >= (1 - END) * TOP).mean())
    share = low + high
    result: Verdict = "problem" if share > MOSTLY_SATURATED else "warning" if share > SATURATED else "ok"
    return Finding(
        "labels",
        stage,
        result,
        "Labels are not saturated" if result == "ok" else "Labels pile up at the ends of the scale",
        f"{share:.1%} within {END:.0%} of the ends ({low:.1%} at 0, {high:.1%} at {TOP:g})",
        f"{SATURATED:.0%}",
        ""
        if result == "ok"
        else "Set QUALITY.SCALE rank, or make labels with an earlier checkpoint: a network that knows its training "
        "images by heart finds all of them good.",
    )


def _noise(stage: str, ratio: float) -> Finding:
    noisy = ratio > MOSTLY_NOISE
    return Finding(
        "labels",
        stage,
        "warning" if noisy else "ok",
        "Labels change from round to round nearly as much as from image to image" if noisy else "Labels are stable",
        f"round-to-round deviation {ratio:.0%} of the spread",
        f"{MOSTLY_NOISE:.0%}",
        "Raise QUALITY.ROUNDS, QUALITY.POSITIVES or QUALITY.NEGATIVES." if noisy else "",
    )
