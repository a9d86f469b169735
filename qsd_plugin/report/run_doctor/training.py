"""Checks of every training stage: finished, finite, parameters moved, learning rate, training accuracy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.report.run_doctor.findings import Finding, Verdict
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run, StageFolder, Weights

#: Training accuracy above chance, as a share of the way from chance to 1: below the first the classifier has not
#: learnt, below the second it has not finished. A re-identification baseline ends close to 1.
LEARNT, WELL_LEARNT = 0.2, 0.8
#: How far the accuracy at the start of a fine-tuning may lie below that at the end of its baseline.
ACCURACY_DROP = 0.2
#: Relative change of all kernels above which a fine-tuning has left its baseline behind.
FINE_TUNING_CHANGE = 0.5

_NOT_FINITE = re.compile(r"Loss became infinite or NaN at iteration=(\d+)")
_STOPPED = re.compile(r"Training stopped \((\w+)\)")


@check("finished")
def finished(run: Run) -> Iterator[Finding]:
    """Stages that were cut off, a recipe that ended early, and training images that could not be decoded."""
    for stage in run.stages:
        marked = (stage.marker or {}).get("finished")
        complete = marked if marked is not None else (stage.path / "model_final.pth").is_file()
        if complete:
            steps = f"{stage.iterations} steps" if stage.is_training else "yes"
            yield Finding("finished", stage.name, "ok", "The stage finished", steps)
        else:
            yield _unfinished(stage)
        yield from _damaged_images(stage)
    name = run.final_stage
    if name and run.stage(name) is None:
        done = ", ".join(stage.name for stage in run.stages)
        yield Finding(
            "finished",
            "",
            "warning",
            "The recipe has not reached its last training",
            f"only {done} begun",
            f"stage {name}",
            "Give the same tools/train_net.py command again: it goes on where it stopped.",
        )


@check("finite")
def finite(run: Run) -> Iterator[Finding]:
    """Losses, logged figures and final weights must be numbers."""
    for stage in run.training:
        crashed = _NOT_FINITE.findall(stage.log)
        bad = sorted({name for event in stage.events for name, value in event.items() if _not_finite(value)})
        checkpoint = _last_checkpoint(stage)
        try:
            weights = _not_finite_weights(run.read_weights(checkpoint)) if checkpoint else []
        except CheckpointError as error:
            step = f"Copy it again, or repeat the stage with --from-stage {stage.name}."
            yield Finding("finite", stage.name, "problem", "Checkpoint unreadable", error.what, "readable", step)
            continue
        if crashed and not (stage.path / "model_final.pth").is_file():
            figure = f"iteration {crashed[-1]}"
            what = "The loss became infinite or NaN and the host stopped"
        elif bad:
            figure, what = ", ".join(bad), "Logged figures are infinite or NaN"
        elif weights and checkpoint:
            figure = f"{len(weights)} tensors, first {weights[0]}"
            what = f"{checkpoint.name} holds weights that are infinite or NaN"
        else:
            events = len(stage.events)
            yield Finding("finite", stage.name, "ok", "All figures and weights are finite", f"{events} log lines")
            continue
        yield Finding(
            "finite",
            stage.name,
            "problem",
            what,
            figure,
            "none",
            "Lower SOLVER.BASE_LR, switch on SOLVER.CLIP_GRADIENTS or switch off SOLVER.AMP, look at the weight of the "
            "loss that log.txt names (QSD.WEIGHT, MODEL.LOSSES), and run the stage again with "
            f"--from-stage {stage.name}.",
        )


@check("parameters")
def parameters(run: Run) -> Iterator[Finding]:
    """Did training change the network it started from?"""
    for stage in run.training:
        start, last = _first_checkpoint(run, stage), _last_checkpoint(stage)
        if start is None or last is None or start == last or not start.is_file():
            gone = start is not None and not start.is_file()
            reason = "no checkpoint" if last is None else f"{start} is gone" if gone else "one checkpoint only"
            step = "Set SOLVER.CHECKPOINT_PERIOD 1 in a short trial run and look again."
            yield Finding(
                "parameters", stage.name, "unknown", "Whether parameters moved cannot be told", reason, next_step=step
            )
            continue
        yield _movement(stage, _relative(run, start), last.name, run.read_weights(start), run.read_weights(last))


@check("learning rate")
def learning_rate(run: Run) -> Iterator[Finding]:
    """Was there a learning rate, and did it leave the warm-up?"""
    for stage in run.training:
        rates = stage.series("lr")
        if not rates:
            yield _unlogged("learning rate", stage, "lr")
            continue
        base, top = float(stage.setting("SOLVER.BASE_LR", 0.0)), max(rates)
        warm_up, steps = int(stage.setting("SOLVER.WARMUP_ITERS", 0)), stage.iterations
        verdict: Verdict = "ok"
        sentence, limit, step = "The learning rate was above zero and left the warm-up", "above 0", ""
        figure = f"up to {top:.3g}"
        if top == 0:
            verdict, sentence = "problem", "The learning rate was zero, so nothing was trained"
            step = f"Set SOLVER.BASE_LR (config.yaml: {base:g}) above 0 and run again with --from-stage {stage.name}."
        elif 0 < steps < warm_up:
            verdict = "problem" if top < base / 2 else "warning"
            sentence = "The training ended inside its warm-up"
            figure = f"{steps} of {warm_up} warm-up steps, learning rate up to {top:.3g} of {base:.3g}"
            limit = f"at least {warm_up} steps"
            step = "Lower SOLVER.WARMUP_ITERS (baseline: RECIPE.BASELINE.WARMUP_ITERS) or train for more epochs."
        yield Finding("learning rate", stage.name, verdict, sentence, figure, limit, step)


@check("training accuracy")
def training_accuracy(run: Run) -> Iterator[Finding]:
    """Has the classifier learnt, and does a fine-tuning start where its baseline ended?"""
    for stage in run.training:
        accuracy, classes = stage.series("cls_accuracy"), int(stage.setting("MODEL.HEADS.NUM_CLASSES", 0))
        if not accuracy or classes < 2:
            yield _unlogged("training accuracy", stage, "cls_accuracy")
            continue
        yield _learnt(stage, accuracy[-1], classes)
        origin = run.origin(stage)
        before = origin.series("cls_accuracy") if origin else []
        if origin and before:
            yield _start_of_fine_tuning(stage, before[-1], accuracy[0], origin.name)


def _unfinished(stage: StageFolder) -> Finding:
    stopped = _STOPPED.findall(stage.log)
    reason = f", stopped by {stopped[-1]}" if stopped else ""
    kept = " (model_interrupted.pth was kept)" if (stage.path / "model_interrupted.pth").is_file() else ""
    epochs = stage.setting("SOLVER.MAX_EPOCH")
    wanted = f"{epochs} epochs" if epochs else "a finished stage"
    return Finding(
        "finished",
        stage.name,
        "problem",
        "The stage has not finished (cut off, or still running)",
        f"{stage.iterations} steps logged{reason}{kept}",
        wanted,
        "Give the same command again (with --resume outside a recipe): it goes on from the last checkpoint.",
    )


def _damaged_images(stage: StageFolder) -> Iterator[Finding]:
    file = stage.path / "corrupt_images.txt"
    if not file.is_file():
        return
    paths = file.read_text(encoding="utf-8").splitlines()
    yield Finding(
        "finished",
        stage.name,
        "warning",
        f"Training images could not be decoded, first {paths[0] if paths else '(none)'}",
        f"{len(paths)} images",
        f"0; DATA.MAX_CORRUPT {stage.setting('DATA.MAX_CORRUPT', '')}",
        f"Repair or remove those listed in {file.name}; tools/build_data.py reid-check finds all.",
    )


def _movement(stage: StageFolder, start: str, end: str, before: Weights, after: Weights) -> Finding:
    shared = [name for name, tensor in after.items() if name in before and before[name].shape == tensor.shape]
    frozen = tuple(stage.setting("MODEL.FREEZE_LAYERS", ()))
    # Kernels of backbone and heads alone: BN statistics and the centres of a centre loss move without an optimizer
    # step of the network.
    kernels = [name for name in shared if after[name].dim() > 1 and _in_network(name)]
    kernels = [name for name in kernels if not (frozen and name.startswith(frozen))]
    still = [name for name in kernels if torch.equal(before[name], after[name])]
    relative = _relative_change(before, after, kernels)
    figure = f"{len(kernels) - len(still)} of {len(kernels)} kernels changed, by {relative:.2%} overall"
    verdict: Verdict = "ok"
    sentence, limit, step = f"Parameters moved from {start} to {end}", "every kernel that is not frozen", ""
    if len(still) == len(kernels):
        verdict, sentence = "problem", f"No parameter of the network moved from {start} to {end}"
        step = (
            "See the learning rate; run tools/doctor.py and see that row S01 is active (unset QSD_PLUGIN_DISABLE); in "
            "a trainer of your own keep gradients with zero_grad(set_to_none=False)."
        )
    elif still:
        verdict, sentence = "warning", f"Some kernels did not move from {start} to {end}, first {still[0]}"
        step = "See MODEL.FREEZE_LAYERS and SOLVER.FREEZE_ITERS, and whether these layers take part in the forward."
    elif stage.setting("MODEL.WEIGHTS") and not relative <= FINE_TUNING_CHANGE:
        verdict, sentence, limit = "warning", f"Fine-tuning left {start} far behind", f"{FINE_TUNING_CHANGE:.0%}"
        step = "Lower SOLVER.BASE_LR: the published fine-tuning uses a hundredth of the baseline's."
    return Finding("parameters", stage.name, verdict, sentence, figure, limit, step)


def _in_network(name: str) -> bool:
    top = name.partition(".")[0]
    return top == "backbone" or "head" in top


def _relative_change(before: Weights, after: Weights, names: list[str]) -> float:
    size = sum(float(before[name].double().square().sum()) for name in names)
    change = sum(float((after[name].double() - before[name].double()).square().sum()) for name in names)
    return math.sqrt(change / size) if size else math.inf


def _learnt(stage: StageFolder, accuracy: float, classes: int) -> Finding:
    least, good = (1 / classes + share * (1 - 1 / classes) for share in (LEARNT, WELL_LEARNT))
    verdict: Verdict = "ok"
    sentence, limit, step = "The classifier knows its training images", f"{good:.0%}", ""
    if accuracy < least:
        verdict, sentence, limit = "problem", "The classifier has not learnt its training identities", f"{least:.0%}"
        step = "Train longer or with another SOLVER.BASE_LR; quality labels of such a network mean nothing."
    elif accuracy < good:
        verdict, sentence = "warning", "The classifier has only partly learnt its training identities"
        step = "Train longer, or weaken augmentation (INPUT.REA, INPUT.PADDING), before labels are made with it."
    if verdict != "ok":
        sentence += f" ({classes} identities, chance is {1 / classes:.1%})"
    return Finding("training accuracy", stage.name, verdict, sentence, f"{accuracy:.1%} at the end", limit, step)


def _start_of_fine_tuning(stage: StageFolder, before: float, first: float, origin: str) -> Finding:
    lost = first < before - ACCURACY_DROP
    return Finding(
        "training accuracy",
        stage.name,
        "problem" if lost else "ok",
        f"Fine-tuning starts far below the end of {origin} ({before:.1%})"
        if lost
        else f"It starts where {origin} ended",
        f"{first:.1%} at the first log line",
        f"{max(before - ACCURACY_DROP, 0):.1%}",
        "The classifier was not taken over or its identities are numbered otherwise: compare DATASETS.NAMES, "
        "DATASETS.COMBINEALL, INPUT.SIZE_TRAIN and MODEL.PIXEL_MEAN with that stage's config.yaml."
        if lost
        else "",
    )


def _unlogged(name: str, stage: StageFolder, key: str) -> Finding:
    step = "The host writes it every 200 steps and after each epoch: let one epoch finish."
    return Finding(name, stage.name, "unknown", "metrics.json does not say", f"no {key} in it", next_step=step)


def _first_checkpoint(run: Run, stage: StageFolder) -> Path | None:
    start = run.start(stage)
    return start or (stage.checkpoints[0] if stage.checkpoints else None)


def _last_checkpoint(stage: StageFolder) -> Path | None:
    return stage.checkpoints[-1] if stage.checkpoints else None


def _relative(run: Run, path: Path) -> str:
    return path.relative_to(run.root).as_posix() if path.is_relative_to(run.root) else str(path)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _not_finite_weights(weights: Weights) -> list[str]:
    return [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
