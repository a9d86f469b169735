"""A tiny recipe for ``tools/doctor.py --run``, ways to break its files, and ways to ask what the doctor says.

Importing this activates the host.
"""

from __future__ import annotations

import json
import logging
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT
from toy import use_market

from qsd_plugin.hosts import fastreid as host
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.report import run_doctor
from qsd_plugin.report.run_doctor import Finding

host.activate()

from qsd_plugin.hosts.fastreid.run_checks import open_host_run  # noqa: E402  (needs the activated host)

#: Learns its six identities in 45 steps of 0.1 s; the fine-tunings take 21, and QSD's figures are written every 20.
RECIPE: dict[str, Any] = {
    "MODEL.BACKBONE.NAME": "build_osnet_backbone",
    "MODEL.BACKBONE.DEPTH": "x0_25",
    "MODEL.BACKBONE.FEAT_DIM": 128,
    "INPUT.REA.ENABLED": False,
    "INPUT.PADDING.SIZE": 4,
    "SOLVER.MAX_EPOCH": 7,
    "SOLVER.BASE_LR": 1e-5,
    "SOLVER.CHECKPOINT_PERIOD": 4,
    "RECIPE.BASELINE.MAX_EPOCH": 15,
    "RECIPE.BASELINE.BASE_LR": 3e-3,
    "TEST.EVAL_PERIOD": 50,
    "QUALITY.ROUNDS": 8,
}
Edit = Callable[[dict[str, Any]], dict[str, Any]]


def train(command: list[str], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tools/train_net.py`` in this process, whose log handlers go away with the patch."""
    use_market(monkeypatch, data)
    monkeypatch.setattr("sys.argv", command[1:])
    monkeypatch.setattr(logging.getLogger("fastreid"), "handlers", [])
    runpy.run_path(command[1], run_name="__main__")


def doctor(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of the tool, run in this process."""
    monkeypatch.setattr("sys.argv", ["doctor.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools" / "doctor.py"), run_name="__main__")
    return int(stopped.value.code or 0)


def problems(findings: Sequence[Finding]) -> dict[tuple[str, str], str]:
    """Text of every problem by stage and check; a second one of the same check is joined to the first."""
    found: dict[tuple[str, str], str] = {}
    for finding in findings:
        if finding.verdict == "problem":
            key = (finding.stage, finding.check)
            found[key] = f"{found[key]}\n{finding.text()}" if key in found else finding.text()
            assert finding.figure
            assert finding.limit
            assert finding.next_step
    return found


def without_network(folder: Path) -> list[Finding]:
    """The findings of all checks but those that build a network, for faults that do not touch it."""
    opened = open_host_run(folder)
    names = set(run_doctor.CHECKS) - {"architecture", "preprocessing", "parameters"}
    return [finding for name in sorted(names) for finding in run_doctor.CHECKS.get(name)(opened)]


def texts(findings: Sequence[Finding], verdict: str, stage: str, check: str) -> str:
    """All findings of one verdict, stage and check."""
    wanted = (verdict, stage, check)
    return "\n".join(
        finding.text() for finding in findings if (finding.verdict, finding.stage, finding.check) == wanted
    )


def edit_config(folder: Path, **values: Any) -> None:
    """Set ``A__B=value`` in a stage's stored config."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for name, value in values.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    file.write_text(yaml.safe_dump(config))


def edit_metrics(folder: Path, edit: Edit) -> None:
    """Replace every line of a stage's metrics."""
    file = folder / "metrics.json"
    lines = [edit(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def setting(**values: float) -> Edit:
    """Overwrite figures where they are logged; ``qsd__kept`` stands for ``qsd/kept``."""
    wanted = {name.replace("__", "/"): value for name, value in values.items()}
    return lambda line: line | {name: value for name, value in wanted.items() if name in line}


def edit_weights(file: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights in a checkpoint."""
    content = torch.load(file, weights_only=True)
    edit(content["model"])
    torch.save(content, file)


def freeze(folder: Path, start: Path) -> None:
    """Leave a stage's last checkpoint as row S01 unrepaired does: only BN statistics and the loss's centres are new."""
    before = torch.load(start, weights_only=True)["model"]

    def undo(weights: dict[str, torch.Tensor]) -> None:
        moving = ("running_mean", "running_var", "num_batches_tracked", "centers")
        weights.update({name: value for name, value in before.items() if not name.endswith(moving)})

    edit_weights(folder / "model_final.pth", undo)


def edit_labels(run_folder: Path, edit: Callable[[QualityLabels], QualityLabels]) -> None:
    file = run_folder / "labels" / "Market1501.npz"
    edit(QualityLabels.load(file)).save(file)


def with_score(score: np.ndarray) -> Callable[[QualityLabels], QualityLabels]:
    return lambda labels: QualityLabels(score, labels.raw, labels.spread, labels.keys, labels.meta)


def edit_report(run_folder: Path, arms: dict[str, float]) -> None:
    file = run_folder / "report" / "results.json"
    results = json.loads(file.read_text())
    stored = {arm: {"all": {"rank1": 50.0, "mAP": value, "mINP": 10.0}} for arm, value in arms.items()}
    results["tests"]["Market1501"]["arms"] = stored
    file.write_text(json.dumps(results))
