"""Checks of QSD's own figures: what became of the pairs, and what the loss consists of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean

from qsd_plugin.report.run_doctor.findings import Finding, Verdict
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder

#: Share of pairs that must be kept; below the second value there is next to nothing to learn from.
KEPT, HARDLY_KEPT = 0.5, 0.1
#: Largest share of pairs that a reason may take away. The low bound takes 19 % of normally spread gaps.
ALLOWED_LOSS = {"dropped_low": 0.5, "dropped_high": 0.05, "ties": 0.2, "unlabelled": 0.05}
_OTHER_REASONS = 0.5
#: Share of steps without a single kept pair: worth a look, and a problem.
EMPTY_STEPS, MOSTLY_EMPTY = 0.01, 0.5
#: Share of the whole loss that QSD's term may have, and what a single level may have of QSD's term.
LARGE_TERM, DOMINANT_TERM, DOMINANT_LEVEL = 0.7, 0.9, 0.9
#: Factor by which QSD's term may grow over the training.
GROWTH = 10.0
_LEVEL = "qsd/loss/"
_REASONS = {
    "dropped_low": "Label gaps are below the low bound: lower QSD.TAU, or see the spread of the labels.",
    "dropped_high": "Label gaps are above the high bound: outliers stretch the scale; set QUALITY.SCALE rank.",
    "ties": "Both images have the same label: see the labels' spread, and QUALITY.ROUNDS.",
    "unlabelled": "Images have no label: see the labels' coverage.",
}
_ADVICE_OTHER = "See the method's page for the key that sets this bound."


@check("pairs")
def pairs(run: Run) -> Iterator[Finding]:
    """Pairs that teach, and those that each bound takes away."""
    for stage in _qsd_stages(run):
        total = _mean(stage, "qsd/pairs")
        if not total:
            yield _no_figures(stage, "pairs")
            continue
        kept = _mean(stage, "qsd/kept") / total
        names = sorted({name.removeprefix("qsd/") for event in stage.events for name in event})
        reasons = {name: _mean(stage, f"qsd/{name}") / total for name in names if _is_reason(name)}
        verdict: Verdict = "problem" if kept < HARDLY_KEPT else "warning" if kept < KEPT else "ok"
        listed = ", ".join(f"{name} {share:.0%}" for name, share in reasons.items())
        figure = f"{kept:.0%} of {total:.0f} pairs a step ({listed})"
        sentence = "Hardly a pair teaches" if verdict == "problem" else "Pairs that teach"
        culprit = max(reasons, key=reasons.__getitem__, default="")
        step = "" if verdict == "ok" else _REASONS.get(culprit, _ADVICE_OTHER)
        yield Finding("pairs", stage.name, verdict, sentence, figure, f"{KEPT:.0%}", step)
        for name, share in reasons.items():
            limit = ALLOWED_LOSS.get(name, _OTHER_REASONS)
            told = name == culprit and verdict != "ok"
            if share > limit and not told:
                advice = _REASONS.get(name, _ADVICE_OTHER)
                sentence = f"Many pairs are lost as {name}"
                yield Finding("pairs", stage.name, "warning", sentence, f"{share:.0%}", f"{limit:.0%}", advice)
        yield from _empty_steps(stage)


@check("loss")
def loss(run: Run) -> Iterator[Finding]:
    """QSD's share of the whole loss, and whether it grows."""
    for stage in _qsd_stages(run):
        term, total = stage.series("loss_qsd"), stage.series("total_loss")
        if not term or not total:
            yield _no_figures(stage, "loss")
            continue
        share = fmean(term) / fmean(total) if fmean(total) else 0.0
        figure = f"{share:.1%} of the total loss ({fmean(term):.3g} of {fmean(total):.3g})"
        verdict: Verdict = "ok"
        sentence, limit, step = "QSD's term", f"{LARGE_TERM:.0%}", ""
        if max(term) == 0 and float(stage.setting("QSD.WEIGHT", 1.0)) > 0:
            verdict, sentence, limit = "problem", "QSD's term is zero, so this stage trained without it", "above 0"
            step = "See the pairs and the labels."
        elif share > LARGE_TERM:
            verdict = "problem" if share > DOMINANT_TERM else "warning"
            sentence = "QSD's term outweighs the host's losses"
            step = "Lower QSD.WEIGHT, or see whether one level dominates it."
        yield Finding("loss", stage.name, verdict, sentence, figure, limit, step)
        if term[-1] > GROWTH * term[0] > 0:
            grown = f"from {term[0]:.3g} to {term[-1]:.3g}"
            step = "Lower SOLVER.BASE_LR or QSD.WEIGHT; QSD.SCALE_GRAD detached takes out the term that raises maxima."
            yield Finding("loss", stage.name, "problem", "QSD's term explodes", grown, f"a factor of {GROWTH:g}", step)


def level_shares(stage: StageFolder, weights: Mapping[str, float]) -> Iterator[Finding]:
    """What each level contributes to QSD's term.

    Args:
        stage: A training with QSD.
        weights: Weight of each logged level.
    """
    values = {name: weights.get(name, 0.0) * _mean(stage, f"{_LEVEL}{name}") for name in logged_levels(stage)}
    total = sum(values.values())
    if not total:
        return
    shares = {name: value / total for name, value in values.items()}
    largest = max(shares, key=shares.__getitem__)
    dominated = shares[largest] > DOMINANT_LEVEL and sum(weights.get(name, 0.0) > 0 for name in values) > 1
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    yield Finding(
        "levels",
        stage.name,
        "problem" if dominated else "ok",
        f"One level, {largest}, dominates QSD's term, so the others hardly count" if dominated else "Share per level",
        listed,
        f"{DOMINANT_LEVEL:.0%} for one level",
        f"Lower its weight, as in QSD.TAPS \"['{largest}={weights[largest] / 10:g}', ...]\", or set QSD.MAP_NORM l2."
        if dominated
        else "",
    )


def logged_levels(stage: StageFolder) -> list[str]:
    """Names of the levels whose loss was logged."""
    return sorted({name.removeprefix(_LEVEL) for event in stage.events for name in event if name.startswith(_LEVEL)})


def _qsd_stages(run: Run) -> list[StageFolder]:
    return [stage for stage in run.training if stage.setting("MODEL.META_ARCHITECTURE") == "QSD"]


def _is_reason(name: str) -> bool:
    return name.startswith("dropped_") or name in ALLOWED_LOSS


def _mean(stage: StageFolder, name: str) -> float:
    values = stage.series(name)
    return fmean(values) if values else 0.0


def _empty_steps(stage: StageFolder) -> Iterator[Finding]:
    shares = stage.series("qsd/empty")
    if not shares:  # runs of earlier versions: a mean of 0 over 20 steps says the same about all of them
        kept = stage.series("qsd/kept")
        shares = [float(value == 0) for value in kept]
    share = fmean(shares) if shares else 0.0
    if share > EMPTY_STEPS:
        verdict: Verdict = "problem" if share > MOSTLY_EMPTY else "warning"
        step = "Raise DATALOADER.NUM_INSTANCE or SOLVER.IMS_PER_BATCH, lower QSD.TAU, and see the labels' spread."
        yield Finding(
            "pairs", stage.name, verdict, "Steps have no pair at all", f"{share:.1%}", f"{EMPTY_STEPS:.0%}", step
        )


def _no_figures(stage: StageFolder, name: str) -> Finding:
    return Finding(
        name,
        stage.name,
        "unknown",
        "metrics.json holds no figures of QSD",
        f"{stage.iterations} steps",
        "20 steps, after which they are first written",
        "Let an epoch of at least 20 steps finish.",
    )
