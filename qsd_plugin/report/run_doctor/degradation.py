"""Checks of DIL: has the generator collapsed, is each discriminator of use to it, do codes differ?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np

from qsd_plugin.core.errors import DataError
from qsd_plugin.report.run_doctor.findings import Finding
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder

#: Least-squares loss of the discriminator on one kind of rendering against pictures: 0 if it is never wrong, 0.5 if it
#: guesses. Outside these limits one side is far ahead. Ours, not measured on trainings that failed.
LOWEST, HIGHEST = 0.02, 0.65
#: Loss of the discriminator of degradations where it tells no picture from another; so near to that it is off.
GUESSES, OFF = 1.0, 1e-3
#: Mean difference of an image and its own rendering, in deviations of ImageNet as after normalisation. The best
#: single picture for all images is 0.71 off (300 images of Market-1501 at 64 x 32).
WORST_RENDERING = 0.6
#: Deviation of the codes among images, share of their root mean square, below which replay changes next to nothing.
SMALLEST_SPREAD = 0.01


@check("degradation")
def degradation(run: Run) -> Iterator[Finding]:
    """Collapse of stage 1's generator, its discriminators, and spread of the bank's codes."""
    for stage in run.training:
        if stage.setting("MODEL.META_ARCHITECTURE") == "DIL":
            yield from _collapse(stage)
            yield _balance(stage)
            yield from _ranking(stage)
    bank = run.stage("bank")
    if bank is not None and (bank.path / "codes.npz").is_file():
        yield _spread(bank)


def _collapse(stage: StageFolder) -> Iterator[Finding]:
    """Whether images are rendered as themselves; silent where the term is off or squared, or nothing is written yet."""
    values = stage.series("loss_dil_self")
    weight = float(stage.setting("DIL.STAGE1_OPTIONS.RECONSTRUCTION", 10.0))
    if not values or not weight or stage.setting("DIL.STAGE1_OPTIONS.PIXEL", "l1") != "l1":
        return
    difference = _last_quarter(values) / weight / 2  # both images of a pair
    collapsed = difference > WORST_RENDERING
    yield Finding(
        "degradation",
        stage.name,
        "warning" if collapsed else "ok",
        "The generator may have collapsed: renderings are no closer to their images than one picture for all would be"
        if collapsed
        else "Images are rendered as themselves",
        f"mean difference {difference:.3g} in the last quarter, in deviations of ImageNet",
        f"at most {WORST_RENDERING}",
        "Train stage 1 for longer; if the curve is flat, lower RECIPE.DIL.STAGE1.BASE_LR." if collapsed else "",
    )


def _balance(stage: StageFolder) -> Finding:
    values = stage.series("dil/discriminator_realness")
    weight = float(stage.setting("DIL.STAGE1_OPTIONS.REALNESS", 1.0))
    if not values or not weight:
        return Finding(
            "degradation",
            stage.name,
            "unknown",
            "metrics.json holds no figures of DIL's discriminators",
            f"{stage.iterations} steps",
            "20 steps, after which they are first written",
            "Train for longer." if weight else "",
        )
    share = float(stage.setting("DIL.PAIRS.PAIRED_PROB", -1.0))
    shown = 2 - (0.5 if share == -1 else share)  # a paired step shows one rendering, another one both
    loss = _last_quarter(values) / weight / shown
    low, high = loss < LOWEST, loss > HIGHEST
    return Finding(
        "degradation",
        stage.name,
        "warning" if low or high else "ok",
        "The discriminator is never wrong, so the generator learns little from it"
        if low
        else "The discriminator is worse than one that guesses"
        if high
        else "Discriminator and generator keep each other busy",
        f"loss {loss:.3g} in the last quarter, 0.5 of one that guesses",
        f"{LOWEST} to {HIGHEST}",
        f"{'Lower' if low else 'Raise'} DIL.STAGE1_OPTIONS.DISCRIMINATOR_LR_FACTOR." if low or high else "",
    )


def _ranking(stage: StageFolder) -> Iterator[Finding]:
    """Whether the discriminator of degradations tells pictures apart; silent where it is off or has nothing written."""
    values = stage.series("dil/discriminator_degradation")
    weight = float(stage.setting("DIL.STAGE1_OPTIONS.DEGRADATION", 1.0))
    if not values or not weight:
        return
    last = [value / weight for value in values[-max(1, len(values) // 4) :]]
    off = all(abs(value - GUESSES) < OFF for value in last)
    yield Finding(
        "degradation",
        stage.name,
        "warning" if off else "ok",
        "The discriminator of degradations tells no picture from another, so codes are not made to carry degradation"
        if off
        else "The discriminator of degradations tells pictures apart",
        f"loss {fmean(last):.4g} in the last quarter, {GUESSES:g} of one that guesses",
        f"not always within {OFF:g} of {GUESSES:g}",
        "Raise DIL.STAGE1_OPTIONS.DISCRIMINATOR_LR_FACTOR, or train with stronger degradations (DIL.PAIRS)."
        if off
        else "",
    )


def _last_quarter(values: Sequence[float]) -> float:
    return fmean(values[-max(1, len(values) // 4) :])


def _spread(bank: StageFolder) -> Finding:
    file = bank.path / "codes.npz"
    try:
        with np.load(file, allow_pickle=False) as archive:
            codes = archive["codes"]
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"Bank {file}", value=str(error), expected="the file of the recipe's stage bank") from error
    spread = float(np.sqrt(codes.var(axis=0).mean()) / max(float(np.sqrt((codes**2).mean())), 1e-12))
    small = spread < SMALLEST_SPREAD
    return Finding(
        "degradation",
        bank.name,
        "warning" if small else "ok",
        "All images have next to the same code, so replay changes nothing" if small else "Codes differ among images",
        f"{spread:.2%} of their size, {len(codes)} codes of {codes.shape[1]} numbers",
        f"at least {SMALLEST_SPREAD:.0%}",
        "Train stage 1 for longer, or with stronger degradations (DIL.PAIRS)." if small else "",
    )
