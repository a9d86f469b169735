"""The run doctor on DIL: a generator that has collapsed, one side that is far ahead, codes that are all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsd_plugin.report.run_doctor import degradation, diagnose, open_run


def stage1(folder: Path, losses: list[float], **options: Any) -> Path:
    """A stage 1 with these losses of D_real in its metrics."""
    stage = folder / "stage1"
    stage.mkdir()
    own = {
        "REALNESS": 2.0,
        "DEGRADATION": 2.0,
        "RECONSTRUCTION": options.get("weight", 5.0),
        "PIXEL": options.get("pixel", "l1"),
    }
    node = {"PAIRS": {"PAIRED_PROB": options.get("paired", -1.0)}, "STAGE1_OPTIONS": own}
    settings = {"MODEL": {"META_ARCHITECTURE": options.get("architecture", "DIL")}, "DIL": node}
    (stage / "config.yaml").write_text(json.dumps(settings))
    name = options.get("name", "dil/discriminator_realness")
    lines = [json.dumps({"iteration": 20 * step, name: value}) for step, value in enumerate(losses)]
    (stage / "metrics.json").write_text("\n".join(lines))
    return stage


@pytest.mark.parametrize(
    ("losses", "paired", "verdict", "figure"),
    [
        ([0.0] * 6 + [1.5, 1.5], -1.0, "ok", "loss 0.5 "),  # 2 (weight) x 1.5 renderings x 0.5
        ([1.5] * 6 + [0.03, 0.03], -1.0, "warning", "loss 0.01 "),
        ([1.5] * 6 + [3.0, 3.0], -1.0, "warning", "loss 1 "),
        ([1.0] * 8, 1.0, "ok", "loss 0.5 "),
        ([2.0] * 8, 0.0, "ok", "loss 0.5 "),
        ([], -1.0, "unknown", "0 steps"),
    ],
)
def test_balance_is_told_by_the_last_quarter(
    tmp_path: Path, losses: list[float], paired: float, verdict: str, figure: str
) -> None:
    (found,) = degradation.degradation(open_run(stage1(tmp_path, losses, paired=paired)))
    assert (found.verdict, found.figure.startswith(figure)) == (verdict, True)


@pytest.mark.parametrize(
    ("losses", "options", "verdicts", "figure"),
    [
        ([20.0] * 6 + [2.0, 2.0], {}, ["ok"], "mean difference 0.2 "),  # 5 (weight) x 2 images x 0.2
        ([2.0] * 6 + [7.0, 7.0], {}, ["warning"], "mean difference 0.7 "),
        ([7.0] * 8, {"pixel": "l2"}, [], ""),
        ([7.0] * 8, {"weight": 0.0}, [], ""),
        ([], {}, [], ""),
    ],
)
def test_collapse_is_told_by_images_that_are_not_rendered_as_themselves(
    tmp_path: Path, losses: list[float], options: dict[str, Any], verdicts: list[str], figure: str
) -> None:
    run = open_run(stage1(tmp_path, losses, name="loss_dil_self", **options))
    *found, balance = degradation.degradation(run)
    assert balance.verdict == "unknown"
    assert [finding.verdict for finding in found] == verdicts
    assert all(finding.figure.startswith(figure) for finding in found)


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([0.4] * 6 + [2.0, 2.0006], "warning"),  # weight 2
        ([2.0] * 6 + [2.0, 1.8], "ok"),
        ([2.0] * 6 + [0.0, 0.0], "ok"),
    ],
)
def test_a_discriminator_of_degradations_that_is_off_is_told(tmp_path: Path, losses: list[float], verdict: str) -> None:
    run = open_run(stage1(tmp_path, losses, name="dil/discriminator_degradation"))
    balance, ranking = degradation.degradation(run)
    assert (balance.verdict, ranking.verdict) == ("unknown", verdict)


def test_other_trainings_are_none_of_its_business(tmp_path: Path) -> None:
    assert not list(degradation.degradation(open_run(stage1(tmp_path, [0.0], architecture="DILReID"))))


@pytest.mark.parametrize(("spread", "verdict"), [(1e-4, "warning"), (0.5, "ok")])
def test_codes_must_differ_and_are_no_labels(tmp_path: Path, spread: float, verdict: str) -> None:
    stage = stage1(tmp_path, [1.5])
    (stage / "stage.json").write_text(json.dumps({"keys": {}, "inputs": {}, "data": "", "finished": True}))
    bank = tmp_path / "bank"
    bank.mkdir()
    (bank / "stage.json").write_text((stage / "stage.json").read_text())
    codes = 1 + spread * np.random.default_rng(0).standard_normal((50, 8))
    np.savez(bank / "codes.npz", codes=codes, encoder=np.array("0"))
    run = open_run(tmp_path)
    assert not run.label_files()
    found = [finding for finding in diagnose(run) if finding.check == "degradation"]
    assert {finding.stage: finding.verdict for finding in found} == {"stage1": "ok", "bank": verdict}
