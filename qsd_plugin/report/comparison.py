"""A summary of an experiment as Markdown, with a verdict in words that follows from the numbers by rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from qsd_plugin.report.aggregate import difference
from qsd_plugin.report.conditions import MEAN, level_panels
from qsd_plugin.report.curve_pictures import LevelPanel
from qsd_plugin.report.per_query import GROUPS

_TITLES = {"rank1": "R1"}

Summary = Mapping[str, Any]


def as_markdown(summary: Summary) -> str:
    """The whole page: conditions, table, thirds, verdict, config differences."""
    arms = summary["arms"]
    parts = [
        f"## {summary['experiment']}",
        _conditions(summary),
        _arm_table(summary),
        f"Difference in {summary['primary']} to `{summary['reference']}` by third of the queries "
        f"({summary['test']['quality']}), [95 % interval]:",
        _thirds_table(summary),
    ]
    if summary["methods"] and summary["controls"]:
        parts += [f"`{summary['methods'][0]}` minus each control, {summary['primary']}:", _controls_table(summary)]
    parts += [
        *_conditions_of_images(summary),
        *_training_cost(summary),
        "**Verdict, by rule.** " + " ".join(verdict(summary)),
        f"Settings that differ from `{summary['reference']}`:",
    ]
    lines = [
        f"- `{arm}` ({row['about']}): "
        + (", ".join(f"{key} {_shown(old)} -> {_shown(new)}" for key, (old, new) in row["config"].items()) or "none")
        for arm, row in arms.items()
        if arm != summary["reference"]
    ]
    parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def verdict(summary: Summary) -> list[str]:
    """Sentences about the primary metric: each method against the reference, then the first method's controls.

    The rules: a difference is shown when its 95 % interval excludes zero, with more than one seed. A control that takes
    quality away and is not told apart from the method means that quality is not what helps.
    """
    lines = []
    if len(summary["seeds"]) == 1:
        lines.append("One seed, no claim.")
    if summary["unfinished"]:
        lines.append(f"{len(summary['unfinished'])} runs are unfinished.")
    for method in summary["methods"]:
        entry = difference(summary, method, summary["reference"])
        if entry is not None:
            lines.append(_against_reference(method, summary, entry["metrics"][summary["primary"]]))
    for control in summary["controls"]:
        entry = difference(summary, summary["methods"][0], control) if summary["methods"] else None
        if entry is not None:
            lines.append(
                _against_control(summary["methods"][0], control, summary, entry["metrics"][summary["primary"]])
            )
    return lines or ["Nothing to say: the experiment names no methods, or they have not finished."]


def _against_reference(method: str, summary: Summary, found: Mapping[str, Any]) -> str:
    text = f"`{method}` against `{summary['reference']}`: {_difference(found)} {summary['primary']}"
    # The interval is about the people tested; what another seed would give is not in it.
    claim = "is shown" if len(summary["seeds"]) > 1 else "with this seed, which more seeds must confirm"
    if found["low"] > 0:
        return f"{text}: a gain {claim}."
    if found["high"] < 0:
        return f"{text}: a loss {claim}."
    return (
        f"{text}: no difference is shown (one of {found['detectable']:.2f} would have been found with a probability of "
        "80 %)."
    )


def _against_control(method: str, control: str, summary: Summary, found: Mapping[str, Any]) -> str:
    text = f"`{method}` against its control `{control}`: {_difference(found)} {summary['primary']}"
    if found["low"] > 0:
        return f"{text}: better than without what this control takes away."
    if found["high"] < 0:
        return f"{text}: the control is better; quality is not what helps here."
    return f"{text}: not told apart; there is no evidence that quality is what helps here."


def _conditions(summary: Summary) -> str:
    sizes = "; ".join(
        f"split {split}: {size['training_images']} training images, {size['queries']} queries of "
        f"{size['identities']} identities"
        for split, size in summary["sizes"].items()
        if size
    )
    note = "one seed, no claim" if len(summary["seeds"]) == 1 else f"{len(summary['seeds'])} seeds"
    boot = summary["bootstrap"]
    return (
        f"{summary['test']['test']}, {summary['conditions']}, "
        f"{summary['test']['environment']['device']}. {note}, {len(summary['splits'])} split(s); {sizes}. "
        f"± is the standard deviation over the seeds of a split. Intervals: paired bootstrap over test identities, "
        f"{boot['draws']} draws, after averaging over seeds; they do not cover the choice of seed and are not "
        f"corrected for the number of comparisons. Detectable: "
        f"{boot['detectable_in_standard_errors']:.2f} bootstrap standard errors (two-sided 5 %, power 80 %)."
    )


def _arm_table(summary: Summary) -> str:
    reference = summary["reference"]
    # Results under many conditions have a table of their own; here are their means.
    shown = [metric for metric in summary["metrics"] if "/" not in metric or metric.startswith(f"{MEAN}/")]
    rows = []
    for arm, row in summary["arms"].items():
        means = [_mean(row["metrics"]["all"][metric]) for metric in shown]
        entry = difference(summary, arm, reference)
        found = entry["metrics"][summary["primary"]] if entry else None
        rows.append(
            [
                arm,
                row["runs"],
                *means,
                _difference(found) if found else ("reference" if arm == reference else ""),
                f"{found['std']:.2f}" if found and found["std"] is not None else "",
                f"{found['detectable']:.2f}" if found else "",
            ]
        )
    titles = [_TITLES.get(metric, metric) for metric in shown]
    headers = ["arm", "runs", *titles, f"{summary['primary']} - {reference} [95 %]", "± seeds", "detectable"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _conditions_of_images(summary: Summary) -> list[str]:
    """Every result under its condition: the reference's mean, and the others' differences to it."""
    reference = summary["reference"]
    others = [arm for arm in summary["arms"] if arm != reference]
    entries = [difference(summary, arm, reference) for arm in others]
    rows = []
    for metric in summary["metrics"]:
        if "/" in metric and not metric.startswith(f"{MEAN}/"):
            found = [_difference(entry["metrics"][metric]) if entry else "" for entry in entries]
            rows.append([metric, _mean(summary["arms"][reference]["metrics"]["all"][metric]), *found])
    if not rows:
        return []
    headers = ["images", f"{reference}", *(f"{arm} - {reference}" for arm in others)]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return [f"By quality of the images (`{MEAN}/` above is the mean over the degraded ones), [95 % interval]:", table]


def _training_cost(summary: Summary) -> list[str]:
    """Images seen and time per step of all trainings behind each arm; nothing where no run has stored them."""
    rows = []
    for arm, row in summary["arms"].items():
        stages = row.get("training", {})
        if stages:
            times = {stage: cost.get("seconds_per_step", math.nan) for stage, cost in stages.items()}
            steps = "; ".join(f"{stage} {stages[stage]['steps']:.0f} x {time:.3f} s" for stage, time in times.items())
            seconds = sum(stages[stage]["steps"] * time for stage, time in times.items())
            rows.append([arm, f"{sum(cost['images'] for cost in stages.values()):.0f}", steps, f"{seconds:.0f}"])
    if not rows:
        return []
    headers = ["arm", "images seen", "trainings: steps x time per step", "seconds"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return ["What the trainings took, by the host's timing (median; mean over the runs):", table]


def means_over_levels(summary: Summary) -> dict[str, LevelPanel]:
    """Mean of the primary number of every arm over the levels of each degradation; empty where there are no levels."""
    means = {
        arm: {metric: found["mean"] for metric, found in row["metrics"]["all"].items()}
        for arm, row in summary["arms"].items()
    }
    return level_panels(means, summary["primary"].rpartition("/")[2])


def _thirds_table(summary: Summary) -> str:
    rows = []
    for arm in summary["arms"]:
        entries = [difference(summary, arm, summary["reference"], group) for group in GROUPS]
        if any(entries):
            rows.append(
                [arm, *(_difference(entry["metrics"][summary["primary"]]) if entry else "" for entry in entries)]
            )
    return tabulate(rows, headers=["arm", *GROUPS], tablefmt="github", disable_numparse=True)


def _controls_table(summary: Summary) -> str:
    rows = []
    for control in summary["controls"]:
        entry = difference(summary, summary["methods"][0], control)
        if entry is not None:
            found = entry["metrics"][summary["primary"]]
            rows.append([control, summary["arms"][control]["about"], _difference(found), f"{found['detectable']:.2f}"])
    headers = ["control", "what it is", "difference [95 %]", "detectable"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _mean(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")


def _difference(found: Mapping[str, Any]) -> str:
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _shown(value: Any) -> str:
    return "(absent)" if value is None else str(value) if value != "" else "''"
