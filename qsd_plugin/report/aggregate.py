"""Runs of an experiment -> means, spread over seeds, paired differences with intervals; as plain data for JSON.

Means are over the queries of a split, then over its seeds, then over the splits; the spread is the standard deviation
over the seeds of a split (pooled over splits). A difference of two arms is taken query by query in every (split, seed)
that both have finished, averaged over the seeds, and bootstrapped over identities (:mod:`qsd_plugin.report.bootstrap`).
So the interval is about which people are tested; how much the seed matters is the spread beside it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.report import per_query, per_trial
from qsd_plugin.report.bootstrap import DETECTABLE, DRAWS, IdentityBootstrap
from qsd_plugin.report.experiment import TRAINED, Experiment
from qsd_plugin.report.per_query import GROUPS, PerQuery
from qsd_plugin.report.per_trial import PerTrial, load_outcome

#: Results by (split, seed).
Runs = dict[tuple[str, int], PerQuery | PerTrial]

#: Settings that differ between arms without making a difference.
_INDIFFERENT = ("OUTPUT_DIR", "MODEL.WEIGHTS", "QUALITY.FILES", "DIL.TEACHER", "DIL.STAGE1", "DIL.BANK")


def load_runs(experiment: Experiment) -> dict[str, Runs]:
    """Finished runs by arm, the baseline or teacher first, then in the order of the experiment's file.

    Raises:
        DataError: Two arms of a block were evaluated on different queries, or nothing has finished.
    """
    arms: dict[str, Runs] = {}
    for arm in (*TRAINED, *experiment.arms):
        found = {block: load_outcome(experiment.folder(*block) / arm) for block in experiment.blocks}
        arms[arm] = {block: outcome for block, outcome in found.items() if outcome is not None}
    if not any(arms.values()):
        files = f"files {per_query.FILE} or {per_trial.FILE}"
        raise DataError("Experiment without finished runs", value=experiment.output, expected=files)
    measured = {arm: next(iter(runs.values())).metric_names for arm, runs in arms.items() if runs}
    if len(set(measured.values())) > 1:
        raise DataError(
            "Arms with different metrics",
            value=", ".join(f"{arm}: {'/'.join(names)}" for arm, names in measured.items()),
            expected="the same test sets, and embeddings of one length, in all arms",
        )
    for split in experiment.splits:
        queries = {
            (arm, seed): run.query for arm, runs in arms.items() for (name, seed), run in runs.items() if name == split
        }
        first = next(iter(queries), None)
        for key, query in queries.items():
            if not np.array_equal(query, queries[first or key]):
                raise DataError(
                    f"Split {split}: arm {key[0]} seed {key[1]} has other queries than arm {first and first[0]}",
                    expected="the same test set for all runs of a split",
                    remedy="Run the older one again with tools/experiment.py --from-stage.",
                )
    return {arm: runs for arm, runs in arms.items() if runs}


def summarise(experiment: Experiment, *, reference: str, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Everything a table, a picture or a verdict needs.

    Args:
        experiment: With finished runs in its folder.
        reference: The arm differences are taken to.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        DataError: No run of the reference has finished, or see :func:`load_runs`.
    """
    arms = load_runs(experiment)
    if reference not in arms:
        raise DataError("Reference arm without a finished run", value=reference, expected=", ".join(arms))
    pairs = [(arm, reference) for arm in arms if arm != reference]
    if experiment.methods and experiment.methods[0] in arms:
        method = experiment.methods[0]
        pairs += [(method, control) for control in experiment.controls if control in arms and control != reference]
    settings = {arm: _results(experiment, arm, next(iter(runs))) for arm, runs in arms.items()}
    one = settings[reference]
    example = next(iter(arms[reference].values()))
    return {
        "experiment": experiment.name,
        "reference": reference,
        "methods": [arm for arm in experiment.methods if arm in arms],
        "controls": [arm for arm in experiment.controls if arm in arms],
        "seeds": experiment.seeds,
        "splits": list(experiment.splits),
        "unfinished": _unfinished(experiment, arms),
        "metrics": list(example.metric_names),
        "primary": example.primary,
        "test": {key: one[key] for key in ("test", "quality", "environment")},
        "sizes": {split: _sizes(experiment, reference, arms[reference], split) for split in experiment.splits},
        "conditions": _conditions(one["settings"]),
        "bootstrap": {"draws": draws, "seed": seed, "detectable_in_standard_errors": DETECTABLE},
        "arms": {
            arm: {
                "about": experiment.arms[arm].about if arm in experiment.arms else TRAINED[arm],
                "runs": len(runs),
                "metrics": _means(runs),
                "training": _trainings(experiment, arm, runs),
                "config": _config_difference(one["settings"], settings[arm]["settings"]),
            }
            for arm, runs in arms.items()
        },
        "differences": _differences(arms, pairs, draws, seed),
    }


def difference(summary: Mapping[str, Any], arm: str, reference: str, group: str = "all") -> dict[str, Any] | None:
    """The entry of ``summary["differences"]`` for two arms and a group of queries; ``None`` where there is none."""
    for entry in summary["differences"]:
        if (entry["arm"], entry["reference"], entry["group"]) == (arm, reference, group):
            return dict(entry)
    return None


def _means(runs: Runs) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean and standard deviation over seeds of each group and metric."""
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    names = next(iter(runs.values())).metric_names
    for group in GROUPS:
        per_split: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
        for (split, _), run in runs.items():
            rows = run.groups().get(group)
            if rows is not None:
                per_split[split].append(np.nanmean(run.metrics()[rows], axis=0))
        if per_split:
            mean = np.mean([np.mean(values, axis=0) for values in per_split.values()], axis=0)
            spread = _pooled_spread(per_split.values())
            table[group] = {
                metric: {"mean": float(mean[k]), "std": None if spread is None else float(spread[k])}
                for k, metric in enumerate(names)
            }
    return table


def _differences(
    arms: Mapping[str, Runs], pairs: Sequence[tuple[str, str]], draws: int, seed: int
) -> list[dict[str, Any]]:
    entries = []
    names = next(iter(next(iter(arms.values())).values())).metric_names
    for group in GROUPS:
        bootstraps: dict[tuple[str, ...], IdentityBootstrap] = {}
        for arm, reference in pairs:
            shared = sorted(arms[arm].keys() & arms[reference].keys())
            splits = tuple(sorted({split for split, _ in shared}))
            chosen = {split: [block for block in shared if block[0] == split] for split in splits}
            rows = {split: arms[arm][blocks[0]].groups().get(group) for split, blocks in chosen.items()}
            if not splits or any(kept is None for kept in rows.values()):
                continue
            if splits not in bootstraps:
                identities = [arms[arm][blocks[0]].identity[rows[split]] for split, blocks in chosen.items()]
                bootstraps[splits] = IdentityBootstrap(identities, draws=draws, seed=seed)
            per_run = {
                split: [
                    (arms[arm][block].metrics() - arms[reference][block].metrics())[rows[split]] for block in blocks
                ]
                for split, blocks in chosen.items()
            }
            intervals = bootstraps[splits].intervals([np.mean(values, axis=0) for values in per_run.values()])
            spread = _pooled_spread([[np.nanmean(run, axis=0) for run in values] for values in per_run.values()])
            entries.append(
                {
                    "arm": arm,
                    "reference": reference,
                    "group": group,
                    "runs": len(shared),
                    "metrics": {
                        metric: {
                            **asdict(interval),
                            "excludes_zero": interval.excludes_zero,
                            "std": None if spread is None else float(spread[k]),
                            "per_run": [float(np.nanmean(run[:, k])) for values in per_run.values() for run in values],
                        }
                        for k, (metric, interval) in enumerate(zip(names, intervals, strict=True))
                    },
                }
            )
    return entries


def _pooled_spread(per_split: Any) -> NDArray[np.float64] | None:
    """Root mean square over splits of the standard deviation over seeds; ``None`` with one seed per split."""
    variances = [np.var(values, axis=0, ddof=1) for values in per_split if len(values) > 1]
    return np.sqrt(np.mean(variances, axis=0)) if variances else None


def _results(experiment: Experiment, arm: str, block: tuple[str, int]) -> dict[str, Any]:
    file = experiment.folder(*block) / arm / "results.json"
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _trainings(experiment: Experiment, arm: str, runs: Runs) -> dict[str, dict[str, float]]:
    """Steps, images and seconds per step of each training behind an arm, means over its runs."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for block in runs:
        for stage, cost in _results(experiment, arm, block).get("training", {}).items():
            if cost:
                found[stage].append(cost)
    return {
        stage: {
            key: float(np.mean([cost[key] for cost in costs if key in cost]))
            for key in dict.fromkeys(key for cost in costs for key in cost)
        }
        for stage, costs in found.items()
    }


def _sizes(experiment: Experiment, arm: str, runs: Runs, split: str) -> dict[str, int]:
    block = next((block for block in runs if block[0] == split), None)
    if block is None:
        return {}
    return {
        "training_images": int(_results(experiment, arm, block)["training_images"]),
        "queries": len(runs[block]),
        "identities": len(set(runs[block].identity.tolist())),
    }


def _unfinished(experiment: Experiment, arms: Mapping[str, Runs]) -> list[str]:
    return [
        f"{split} seed {seed} {arm}"
        for split, seed in experiment.blocks
        for arm in experiment.arms
        if (split, seed) not in arms.get(arm, {})
    ]


def _config_difference(reference: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys whose values differ, with the reference's and the arm's."""
    return {
        key: [reference.get(key), own.get(key)]
        for key in sorted({*reference, *own})
        if reference.get(key) != own.get(key) and key not in _INDIFFERENT
    }


def _conditions(settings: Mapping[str, Any]) -> str:
    """One line with what every figure must name."""
    height, width = settings["INPUT.SIZE_TEST"]
    network = " ".join(
        (settings["MODEL.BACKBONE.NAME"].removeprefix("build_"), settings["MODEL.BACKBONE.DEPTH"])
    ).strip()
    if str(settings.get("MODEL.META_ARCHITECTURE")).startswith("DIL"):
        network = f"DIL's networks at width {settings['DIL.WIDTH']:g}"
    epochs = settings["SOLVER.MAX_EPOCH"]
    if settings["RECIPE.NAME"] == "dil":
        before = f"{settings['RECIPE.DIL.TEACHER.MAX_EPOCH']} and {settings['RECIPE.DIL.STAGE1.MAX_EPOCH']} epochs"
        training = f"teacher and stage 1 {before}, stage 2 {epochs} epochs"
    elif settings["RECIPE.NAME"] == "qsd":
        training = f"baseline {settings['RECIPE.BASELINE.MAX_EPOCH']} epochs, fine-tuning {epochs} epochs"
    else:
        training = f"{epochs} epochs from scratch"
    return f"{network}, {height}x{width} crops, {training}, last epoch"
