"""Tables about quality labels: one file's fitness, and several files' agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from qsd_plugin.quality.checks import PERCENTILES, LabelCheck
from qsd_plugin.report.label_agreement import CLEAR_GAP, Direction, TruthAgreement


def check_table(checks: Mapping[str, LabelCheck]) -> str:
    """One row per data set, then its warnings."""
    headers = [
        "data set",
        "images",
        "covered",
        f"labels at {' / '.join(map(str, PERCENTILES))} %",
        "at the ends (low / high)",
        "median spread",
        "pairs, gap > spread",
        "identities, constant",
    ]
    rows = [
        (
            name,
            check.images,
            f"{check.covered / check.images:.2%}" if check.images else "-",
            " / ".join(f"{check.percentiles[at]:.1f}" for at in check.percentiles) or "-",
            f"{check.at_bottom:.1%} / {check.at_top:.1%}",
            "-" if check.spread is None else f"{check.spread:.2f}",
            f"{check.pairs}, {'-' if check.clear_pairs is None else f'{check.clear_pairs:.1%}'}",
            f"{check.identities}, {check.constant_identities}",
        )
        for name, check in checks.items()
    ]
    warnings = [f"WARNING {name}: {text}" for name, check in checks.items() for text in check.warnings]
    return "\n".join([tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True), *warnings])


def agreement_table(names: Sequence[str], agreement: Mapping[tuple[str, str], tuple[float, Direction]]) -> str:
    """Every labelling against every other: rank correlation, and how often the row chooses as the column does.

    Args:
        names: Labellings, in order.
        agreement: Rank correlation and direction by (row, column).
    """
    rows = [[row, *("" if row == column else _both(*agreement[row, column]) for column in names)] for row in names]
    title = "Rank correlation / same direction on same-identity pairs"
    return f"{title}\n\n{tabulate(rows, headers=['labels', *names], tablefmt='github', disable_numparse=True)}"


def truth_table(results: Mapping[str, TruthAgreement]) -> str:
    """Every labelling against the true severity, overall and per degradation."""
    kinds = list(next(iter(results.values())).by_degradation)
    headers = [
        "labels",
        "all images",
        *(f"{kind} ({next(iter(results.values())).images[kind]})" for kind in kinds),
        "right direction",
        f"severity gap >= {CLEAR_GAP:g}",
    ]
    rows = [
        [
            name,
            _number(result.correlation),
            *(_number(result.by_degradation[kind]) for kind in kinds),
            f"{_number(result.direction.agreement, 3)} of {result.direction.pairs}",
            f"{_number(result.clear_direction.agreement, 3)} of {result.clear_direction.pairs}",
        ]
        for name, result in results.items()
    ]
    title = (
        "Rank correlation of label and true quality (minus severity; number of images in brackets), and share of "
        "same-identity pairs whose better image has the higher label (ties count half, 0.5 is chance)"
    )
    return f"{title}\n\n{tabulate(rows, headers=headers, tablefmt='github', disable_numparse=True)}"


def _both(correlation: float, direction: Direction) -> str:
    return f"{_number(correlation)} / {_number(direction.agreement, 3)}"


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
