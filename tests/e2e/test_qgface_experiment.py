"""An experiment from scratch on built-in faces: QGFace beside AdaFace, without shared stages, and its shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import ROOT
from test_teacher_experiment import SMALL

from qsd_plugin.hosts import fastreid as host

host.activate()

from qsd_plugin.hosts.fastreid import experiments  # noqa: E402  (needs the activated host)
from qsd_plugin.report.aggregate import summarise  # noqa: E402
from qsd_plugin.report.experiment import read_experiment  # noqa: E402
from qsd_plugin.report.run_doctor import StageFolder, diagnose, open_run  # noqa: E402


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> experiments.Plan:
    root = tmp_path_factory.mktemp("qgface")
    projects = ROOT / "projects" / "QGFace"
    content = yaml.safe_load((projects / "experiments" / "demo.yml").read_text())
    content |= {"config": str(projects / "demo.yml"), "output": str(root / "out"), "seeds": [1]}
    content["overrides"] = {
        **SMALL,
        "MODEL.BACKBONE.WIDTH": 0.0625,
        "SOLVER.STEPS": [],
        "QGFACE.THRESHOLD": 0.5,
        "QGFACE.CONTRAST.QUEUE_SIZE": 48,
        "DATA.CACHE": str(root / "cache"),
    }
    (root / "toy.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    plan = experiments.Plan(read_experiment(root / "toy.yml"), ["adaface", "qgface"])
    assert experiments.run(plan, announce=lambda _: None) == []
    return plan


def test_arms_share_no_stage_and_are_compared(plan: experiments.Plan) -> None:
    assert plan.stages == ["adaface", "qgface"]
    assert experiments.listing(plan) == [("synthetic", "1", "done", "done")]
    summary = summarise(plan.experiment, reference="adaface", draws=200)
    assert set(summary["arms"]) >= {"adaface", "qgface"}
    assert summary["conditions"].endswith("1 epochs from scratch, last epoch")


def test_shares_of_low_quality_are_stored(plan: experiments.Plan) -> None:
    block = Path(plan.experiment.output) / "synthetic" / "seed1"
    results = {arm: json.loads((block / arm / "results.json").read_text()) for arm in plan.arms}
    names = {f"qgface/{name}" for name in ("low_quality", "low_quality_clean", "low_quality_degraded", "contrasted")}
    assert names <= results["qgface"].keys()
    assert not names & results["adaface"].keys()
    assert 0 < results["qgface"]["qgface/contrasted"] <= 1
    stored = StageFolder(block / "qgface").series("qgface/contrasted")
    assert stored[-1] == pytest.approx(results["qgface"]["qgface/contrasted"])
    assert "of the views are of a quality below 0.5 (clean" in StageFolder(block / "qgface").log


def test_doctor_looks_at_the_contrast(plan: experiments.Plan) -> None:
    run = open_run(Path(plan.experiment.output) / "synthetic" / "seed1" / "qgface")
    told = {finding.figure for finding in diagnose(run) if finding.check == "contrast"}
    assert any("views of a quality below 0.5" in figure for figure in told)
