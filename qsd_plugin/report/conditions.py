"""Tables of results under several conditions, whose names are ``<level>/<side>/<number>`` or ``<level>/<number>``."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

from qsd_plugin.report.curve_pictures import LevelPanel

#: In the place of a condition: the mean over all degraded ones, of trials.
MEAN = "mixed"
#: The condition of images as they are.
CLEAN = "clean"
#: Degradations whose amount is what is left of the image: the smaller, the worse.
_REMAINS = ("lowres", "px")


def has_conditions(numbers: Mapping[str, float]) -> bool:
    """Whether results are named by condition."""
    return any("/" in name for name in numbers)


def condition_table(numbers: Mapping[str, float]) -> str:
    """One model's results as Markdown: a condition per row, a number per column, two decimals."""
    named = [name.rpartition("/") for name in numbers if "/" in name]
    columns = list(dict.fromkeys(number for *_, number in named))
    body = []
    for condition in dict.fromkeys(condition for condition, *_ in named):
        found = [numbers.get(f"{condition}/{column}") for column in columns]
        body.append([condition, *("" if value is None else f"{value:.2f}" for value in found)])
    return tabulate(body, headers=["images", *columns], tablefmt="github", disable_numparse=True)


def arm_table(arms: Mapping[str, Mapping[str, float]]) -> str:
    """Several models' results as Markdown: a condition's number per row, a model per column, one decimal."""
    names = [name for name in next(iter(arms.values())) if "/" in name]
    body = [[name, *(f"{numbers[name]:.1f}" for numbers in arms.values())] for name in names]
    return tabulate(body, headers=["result", *arms], tablefmt="github", disable_numparse=True)


def level_panels(arms: Mapping[str, Mapping[str, float]], number: str) -> dict[str, LevelPanel]:
    """One number of several models over the levels of each degradation, for a picture.

    Args:
        arms: Results by name, by model; the same names for all.
        number: Last part of the names, such as ``mAP``.

    Returns:
        A panel per degradation, and per side where there are sides; the images as they are come first in each, where
        they have a result.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for name in next(iter(arms.values())):
        condition, _, own = name.rpartition("/")
        level, *side = condition.split("/")
        kind, dash, amount = level.rpartition("-")
        if own == number and dash:
            worse = -float(amount) if kind in _REMAINS else float(amount)
            found.setdefault(", ".join([kind, *side]), []).append((worse, name))
    clean = f"{CLEAN}/{number}"
    panels = {}
    for title, levels in found.items():
        names = [name for _, name in sorted(levels)]
        ticks = [name.split("/")[0].rpartition("-")[2] for name in names]
        if all(clean in numbers for numbers in arms.values()):
            names, ticks = [clean, *names], [CLEAN, *ticks]
        panels[title] = LevelPanel(ticks, {arm: [numbers[name] for name in names] for arm, numbers in arms.items()})
    return panels
