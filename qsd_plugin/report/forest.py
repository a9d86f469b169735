"""Forest plot: the differences of an experiment with their intervals, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsd_plugin.report.aggregate import difference

_METHOD, _OTHER = "#3b6fb6", "#555555"


def draw_differences(summary: Mapping[str, Any], path: Path) -> None:
    """Differences of every arm to the reference, then of the first method to its controls, as a PNG at ``path``.

    Lines are 95 % intervals; the pale band around zero is what could not have been detected.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reference, methods, primary = summary["reference"], summary["methods"], summary["primary"]
    pairs = [(arm, reference) for arm in summary["arms"]]
    pairs += [(methods[0], control) for control in summary["controls"]] if methods else []
    entries = [entry for entry in (difference(summary, *pair) for pair in dict.fromkeys(pairs)) if entry]
    figure = Figure(figsize=(7.0, 0.9 + 0.32 * max(len(entries), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, entry in enumerate(entries):
        found = entry["metrics"][primary]
        colour = _METHOD if entry["arm"] in methods else _OTHER
        axis.barh(place, 2 * found["detectable"], left=-found["detectable"], height=0.7, color="#eeeeee", zorder=0)
        axis.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=2)
        axis.plot([found["value"]], [place], "o", color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(entries)), [f"{entry['arm']} - {entry['reference']}" for entry in entries], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"difference in {primary}, percentage points (line: 95 %, band: not detectable)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
