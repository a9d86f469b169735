"""Checks of DIL: do discriminators and generator keep each other busy, and do the bank's codes differ?"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import numpy as np

from qsd_plugin.core.errors import DataError
from qsd_plugin.report.run_doctor.findings import Finding
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder

#: Least-squares loss of the discriminator on one kind of rendering against pictures: 0 if it is never wrong, 0.5 if it
#: guesses. Outside these limits one side is far ahead. Ours, not measured on trainings that failed.
LOWEST, HIGHEST = 0.02, 0.65
#: Deviation of the codes among images, share of their root mean square, below which replay changes next to nothing.
SMALLEST_SPREAD = 0.01


@check("degradation")
def degradation(run: Run) -> Iterator[Finding]:
    """Balance of stage 1's two sides, and spread of the bank's codes."""
    for stage in run.training:
        if stage.setting("MODEL.META_ARCHITECTURE") == "DIL":
            yield _balance(stage)
    bank = run.stage("bank")
    if bank is not None and (bank.path / "codes.npz").is_file():
        yield _spread(bank)


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
    loss = fmean(values[-max(1, len(values) // 4) :]) / weight / shown
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
