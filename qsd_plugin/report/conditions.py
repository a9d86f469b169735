"""Tables of results under several conditions, whose names are ``<level>/<side>/<number>``."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

#: In the place of a condition: the mean over all degraded ones, of trials.
MEAN = "mixed"


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
