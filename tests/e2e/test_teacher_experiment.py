"""An experiment with a teacher on built-in faces: teacher, cache, students with and without it, and the comparison."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ROOT

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host

host.activate()

from qsd_plugin.hosts.fastreid import experiments  # noqa: E402  (needs the activated host)
from qsd_plugin.report.aggregate import summarise  # noqa: E402
from qsd_plugin.report.experiment import read_experiment  # noqa: E402
from qsd_plugin.report.per_trial import PerTrial, load_outcome  # noqa: E402

SMALL = {
    "INPUT": {"SIZE_TRAIN": [32, 32], "SIZE_TEST": [32, 32]},
    "SOLVER": {"MAX_EPOCH": 1, "IMS_PER_BATCH": 16},
    "DATALOADER": {"NUM_WORKERS": 0},
    "DATA": {
        "FACES": {
            "NUM_TRAIN_IDENTITIES": 8,
            "NUM_TEST_IDENTITIES": 20,
            "NUM_DISTRACTORS": 2,
            "IMAGES_PER_IDENTITY": 4,
            "NUM_PAIRS": 40,
            "SIZE": 48,
        }
    },
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> experiments.Plan:
    root = tmp_path_factory.mktemp("teacher")
    projects = ROOT / "projects" / "QUD"
    teacher = {**SMALL, "_BASE_": str(projects / "teachers" / "demo.yml"), "MODEL": {"BACKBONE": {"WIDTH": 0.0625}}}
    (root / "teacher.yml").write_text(yaml.safe_dump(teacher))
    content = yaml.safe_load((projects / "experiments" / "demo.yml").read_text())
    content |= {"config": str(projects / "demo.yml"), "output": str(root / "out")}
    content["overrides"] = {
        **SMALL,
        "MODEL.BACKBONE.WIDTH": 0.125,
        "KD.MODEL_CONFIG": [str(root / "teacher.yml")],
        "QUD.QUEUE_SIZE": 32,
        "DATA.CACHE": str(root / "cache"),
    }
    (root / "toy.yml").write_text(yaml.safe_dump(content, sort_keys=False))
    plan = experiments.Plan(read_experiment(root / "toy.yml"), ["qud", "mse", "supervised"])
    assert experiments.run(plan, announce=lambda _: None) == []
    return plan


@pytest.mark.parametrize("options", [["KD.MODEL_CONFIG", "[]"], ["QUD.TEACHER.SOURCE", "onnx"]])
def test_an_experiment_needs_a_network_for_a_teacher(plan: experiments.Plan, options: list[str]) -> None:
    experiment = plan.experiment
    without = {key: value for key, value in experiment.overrides.items() if key not in options}
    bare = dataclasses.replace(plan, experiment=dataclasses.replace(experiment, overrides=without), options=options)
    with pytest.raises(ConfigError, match=r"Teacher of an experiment.*KD\.MODEL_CONFIG, the config of a network"):
        experiments.check(bare)


def outcome(plan: experiments.Plan, stage: str) -> PerTrial:
    found = load_outcome(Path(plan.experiment.output) / "synthetic" / "seed0" / stage)
    assert isinstance(found, PerTrial)
    return found


def test_teacher_and_cache_are_shared_and_every_arm_has_its_trials(plan: experiments.Plan) -> None:
    assert plan.stages == ["teacher", "cache", "qud", "mse", "supervised"]
    assert experiments.listing(plan) == [("synthetic", "0", *["done"] * 5)]
    block = Path(plan.experiment.output) / "synthetic" / "seed0"
    settings = {arm: json.loads((block / arm / "results.json").read_text())["settings"] for arm in plan.arms}
    assert {settings[arm]["QUD.CACHE.FOLDER"] for arm in ("qud", "mse")} == {str(block / "cache")}
    assert [settings[arm]["QUD.LOSS"] for arm in ("qud", "mse")] == ["qud", "mse"]
    for stage in ("teacher", *plan.arms):
        trials = outcome(plan, stage)
        assert trials.metric_names == ("accuracy", "agreement", "rank-1")
        counts = np.isfinite(trials.values).sum(axis=0).tolist()
        assert counts[0] == 40
        assert counts[1] == len(trials)
        assert counts[2] == len(trials) - 40


def test_agreement_is_the_cosine_to_the_teacher_s_embeddings(plan: experiments.Plan) -> None:
    block = Path(plan.experiment.output) / "synthetic" / "seed0"
    assert np.allclose(outcome(plan, "teacher").values[:, 1], 100)
    name = "SyntheticFacesIdentification"
    theirs, own = (np.load(block / stage / "test_embeddings.npz")[name] for stage in ("teacher", "qud"))
    cosine = (theirs * own).sum(1) / np.linalg.norm(theirs, axis=1) / np.linalg.norm(own, axis=1)
    trials = outcome(plan, "qud")
    probes = trials.test == name
    np.testing.assert_allclose(trials.values[probes, 1], 100 * cosine[: probes.sum()], atol=1e-3)


def test_comparison_has_a_row_for_the_teacher(plan: experiments.Plan) -> None:
    summary = summarise(plan.experiment, reference="mse", draws=200)
    assert list(summary["arms"]) == ["teacher", "qud", "mse", "supervised"]
    assert summary["primary"] == "accuracy"
    assert summary["conditions"].endswith("32x32 crops, 1 epochs from scratch, last epoch")
