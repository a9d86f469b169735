"""Arms of different recipes in one experiment: what they share, and one that runs from the baseline to DIL with QSD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from commands import ROOT, TINY_RECIPE
from toy import write_market

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host

host.activate()

from qsd_plugin.hosts.fastreid import experiments  # noqa: E402  (needs the activated host)
from qsd_plugin.report.aggregate import summarise  # noqa: E402
from qsd_plugin.report.comparison import as_markdown, means_over_levels  # noqa: E402
from qsd_plugin.report.experiment import read_experiment  # noqa: E402
from qsd_plugin.report.per_trial import PerTrial, load_outcome  # noqa: E402

DIL = {"config": "dil.yml", "overrides": {}}
ARMS: dict[str, Any] = {
    "agw": {"overrides": {"MODEL.META_ARCHITECTURE": "Baseline"}},
    "degraded": {
        "overrides": {"RECIPE.NAME": "", "MODEL.META_ARCHITECTURE": "Baseline", "INPUT.DEGRADE.ENABLED": True}
    },
    "student": {
        "overrides": {
            "RECIPE.NAME": "qud",
            "MODEL": {"META_ARCHITECTURE": "QUD"},
            "KD.MODEL_CONFIG": ["teacher.yml"],
            "QUD.QUEUE_SIZE": 16,
        }
    },
    "fuse": DIL,
    "inv": {**DIL, "overrides": {"DIL.STAGE2_OPTIONS.FEATURE": "inv"}},
    "off": {**DIL, "overrides": {"DIL.REPLAY.MODE": "none"}},
    "narrow": {**DIL, "overrides": {"DIL.WIDTH": 0.03125}},
    "both": {
        **DIL,
        "overrides": {
            "MODEL.META_ARCHITECTURE": "QSD",
            "QSD": {"BASE": "DILReID", "TAPS": ["reid.sensitive.model.layer4=1"], "PAIRING": "inbatch"},
        },
    },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed_recipes")
    write_market(root / "data", num_ids=4, per_id=4, test_ids=3)
    dil = {
        "_BASE_": str(ROOT / "projects" / "DIL" / "demo.yml"),
        "DIL": {"WIDTH": 0.0625, "BLOCKS": [1, 1, 1, 1]},
        "RECIPE": {"DIL": {"TEACHER": {"MAX_EPOCH": 1}, "STAGE1": {"MAX_EPOCH": 2}}},
    }
    (root / "dil.yml").write_text(yaml.safe_dump(dil))
    (root / "teacher.yml").write_text(yaml.safe_dump({"_BASE_": str(ROOT / "configs" / "Base-AGW.yml")}))
    return root


def plan(root: Path, names: list[str], chosen: list[str] | None = None, **fields: Any) -> experiments.Plan:
    """An experiment of some of :data:`ARMS` on toy images, queries at two levels."""
    own = {key: value for key, value in TINY_RECIPE.items() if key not in ("SEED", "RECIPE.CONTROL", "QSD.PAIRING")}
    content = {
        "config": str(ROOT / "configs" / "Base-QSD.yml"),
        "output": str(root / "out"),
        "seeds": [0],
        "overrides": {
            **own,
            "INPUT.SIZE_TRAIN": [32, 32],
            "INPUT.SIZE_TEST": [32, 32],
            "SOLVER.IMS_PER_BATCH": 8,
            "RECIPE.BASELINE.MAX_EPOCH": 1,
            "QUALITY.NEGATIVES": 4,
            "DATA.ROOT": str(root / "data"),
            "DATASETS": {"NAMES": ["Market1501"], "TESTS": ["Market1501Mixed"]},
            "EVALUATION.MIXED.LEVELS": ["lowres-0.25", "blur-1"],
        },
        "arms": {name: ARMS[name] for name in names},
        **fields,
    }
    file = root / "toy.yml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return experiments.Plan(read_experiment(file), chosen or names)


def test_stages_of_all_recipes_come_in_order_with_what_they_are_made_from(root: Path) -> None:
    needs = plan(root, list(ARMS)).needs
    assert list(needs)[-len(ARMS) :] == list(ARMS)
    assert needs["agw"] == ("baseline",)
    assert needs["degraded"] == ()
    assert needs["student"] == ("teacher",)
    # Features share all, replay off shares stage 1, another width shares nothing.
    assert needs["fuse"] == needs["inv"] == ("dil_stage2",)
    assert needs["dil_stage2"] == ("dil_teacher", "dil_stage1", "dil_bank")
    assert needs["off"] == ("dil_stage2-off",)
    assert needs["dil_stage2-off"] == ("dil_teacher", "dil_stage1")
    assert needs["dil_stage2-narrow"] == ("dil_teacher-narrow", "dil_stage1-narrow", "dil_bank-narrow")
    assert needs["dil_stage2-both"] == ("dil_teacher", "dil_stage1", "dil_bank", "labels")
    places = {name: place for place, name in enumerate(needs)}
    assert all(places[before] < places[name] for name, own in needs.items() for before in own)


def test_stages_have_the_same_names_whichever_arms_are_run(root: Path) -> None:
    some = plan(root, list(ARMS), ["off", "narrow"])
    assert list(some.needs) == [
        *("dil_teacher", "dil_teacher-narrow", "dil_stage1", "dil_stage1-narrow"),
        *("dil_bank-narrow", "dil_stage2-off", "dil_stage2-narrow", "off", "narrow"),
    ]
    assert some.made_from("dil_stage1") == {"dil_stage2-off", "off"}
    assert plan(root, list(ARMS), ["both"]).needs["labels"] == ("baseline",)


def test_what_cannot_be_in_one_experiment_is_refused(root: Path) -> None:
    scratch = {"RECIPE.NAME": "qgface", "MODEL.META_ARCHITECTURE": "Baseline"}
    arms = {"both": {**ARMS["both"]}, "plain": {"overrides": scratch}}
    with pytest.raises(ConfigError, match=r"QUALITY.FILES of arm both: .*an arm of the recipe qsd in the experiment"):
        _ = plan(root, [], ["both"], arms=arms, config="dil.yml").needs
    with pytest.raises(ConfigError, match=r"pictures of .*: got True; expected false with RECIPE.NAME dil"):
        _ = plan(root, ["agw", "fuse"], pictures=True).needs
    with pytest.raises(ConfigError, match=r"arms: got 'dil_stage1-x'"):
        plan(root, [], ["x"], arms={"dil_stage1-x": {}})
    with pytest.raises(ConfigError, match=r"arm x: config: got 'none.yml'; expected a config file, found at"):
        plan(root, [], ["x"], arms={"x": {"config": "none.yml"}})
    other = {**ARMS["student"]["overrides"], "KD.MODEL_CONFIG": ["other.yml"]}
    with pytest.raises(ConfigError, match=r"KD.MODEL_CONFIG of arm other: got \['other.yml'\]; expected that of stud"):
        _ = plan(root, [], ["student", "other"], arms={"student": ARMS["student"], "other": {"overrides": other}}).needs


@pytest.fixture(scope="module")
def finished(root: Path) -> experiments.Plan:
    """The baseline fine-tuned, DIL with two features, and QSD on top of DIL."""
    made = plan(root, ["agw", "fuse", "inv", "both"], methods=["fuse"], reference="agw")
    assert experiments.run(made, announce=lambda _: None) == []
    return made


def outcome(finished: experiments.Plan, arm: str) -> PerTrial:
    found = load_outcome(Path(finished.experiment.output) / "all" / "seed0" / arm)
    assert isinstance(found, PerTrial)
    return found


def test_features_of_one_training_are_evaluated_by_themselves(finished: experiments.Plan) -> None:
    block = Path(finished.experiment.output) / "all" / "seed0"
    assert not (block / "inv" / "model_final.pth").exists()
    assert "dil_stage2/model_final.pth" in json.loads((block / "inv" / "stage.json").read_text())["inputs"]
    assert not np.array_equal(outcome(finished, "fuse").values, outcome(finished, "inv").values)
    used = json.loads((block / "dil_stage2-both" / "stage.json").read_text())
    assert {"labels/Market1501.npz", "dil_stage1/model_final.pth"} <= used["inputs"].keys()
    assert experiments.listing(finished) == [("all", "0", *["done"] * len(finished.stages))]


def test_the_comparison_has_levels_and_what_each_arm_took(finished: experiments.Plan) -> None:
    summary = summarise(finished.experiment, reference="agw", draws=100)
    assert summary["primary"] == "mixed/mAP"
    cost = summary["arms"]["fuse"]["training"]
    assert list(cost) == ["dil_teacher", "dil_stage1", "dil_stage2"]
    assert cost["dil_stage1"]["images"] == 2 * 8 * cost["dil_stage1"]["steps"]  # pairs
    assert cost["dil_stage1"]["seconds_per_step"] > 0
    assert list(summary["arms"]["agw"]["training"]) == ["baseline", "agw"]
    text = as_markdown(summary)
    assert "| blur-1/mAP " in text
    assert "trainings: steps x time per step" in text
    panels = means_over_levels(summary)
    assert list(panels) == ["lowres", "blur"]
    assert panels["lowres"].ticks == ["clean", "0.25"]
    assert panels["blur"].means["fuse"][1] == summary["arms"]["fuse"]["metrics"]["all"]["blur-1/mAP"]["mean"]
