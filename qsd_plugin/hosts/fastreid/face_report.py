"""The last stage of a recipe on faces: every arm by the same protocols, as one table, with pictures of the labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

from qsd_plugin.core.files import write_atomically
from qsd_plugin.evaluation.results import to_json
from qsd_plugin.hosts.fastreid import extract
from qsd_plugin.hosts.fastreid.face_protocol import FaceTest, Score
from qsd_plugin.hosts.fastreid.face_tests import build_test, host_flips
from qsd_plugin.hosts.fastreid.protocols import FaceImages
from qsd_plugin.hosts.fastreid.report_frame import write_framed
from qsd_plugin.report.conditions import arm_table, has_conditions
from qsd_plugin.report.curve_pictures import draw_det


def write_report(model_cfg: Any, cfg: Any, arms: dict[str, Path], label_files: Sequence[Path], folder: Path) -> None:
    """Evaluate all arms and write ``results.json``, ``results.md``, curves and pictures to ``folder``.

    Args:
        model_cfg: Config of the network all arms share (the baseline's).
        cfg: Config of the recipe.
        arms: Checkpoint of each arm, by name, in the order of the table.
        label_files: Quality labels of the training sets.
        folder: Where to write.
    """

    def evaluated(name: str) -> dict[str, Any]:
        test = build_test(cfg, name)
        scores = {
            arm: evaluate(model_cfg, extract.load_model(model_cfg, checkpoint), test, title=f"Evaluating {arm}")
            for arm, checkpoint in arms.items()
        }
        details = {arm: to_json(score.details) for arm, score in scores.items()}
        write_atomically(folder / f"{name}.json", json.dumps(details, indent=1).encode())
        curves = {f"{arm} {key}": curve for arm, score in scores.items() for key, curve in score.curves.items()}
        if curves:
            draw_det(curves, folder / f"{name}_det.png")
        numbers = {arm: {key: float(score.numbers[key]) for key in score.numbers} for arm, score in scores.items()}
        return {"images": len(test.names), "arms": numbers}

    write_framed(cfg, label_files, folder, evaluate=evaluated, as_table=as_table)


def evaluate(cfg: Any, model: nn.Module, test: FaceTest, *, title: str) -> Score:
    """A model's score on a test set, in this process alone."""
    from fastreid.data.transforms import build_transforms

    images = FaceImages(test, build_transforms(cfg, is_train=False))
    return test.score(extract.embed_images(cfg, model, images, title=title, mirrored=host_flips(cfg)))


def as_table(results: dict[str, Any]) -> str:
    """Markdown text of ``results``: one table per test set, arms in rows."""
    parts = []
    for name, test in results["tests"].items():
        about = f"{name}, {test['images']} images, {results['note']} (seed {results['seed']}), percent"
        if has_conditions(next(iter(test["arms"].values()))):
            parts.append(f"{about}\n\n{arm_table(test['arms'])}\n")
            continue
        columns = [key for key in next(iter(test["arms"].values())) if key != "metric"]
        body = [[arm, *(f"{numbers[key]:.1f}" for key in columns)] for arm, numbers in test["arms"].items()]
        table = tabulate(body, headers=["arm", *columns], tablefmt="github", disable_numparse=True)
        parts.append(f"{about}\n\n{table}\n")
    return "\n".join(parts)
