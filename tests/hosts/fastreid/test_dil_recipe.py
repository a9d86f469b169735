"""The recipe ``dil`` from teacher to stage 2 on toy data: what a stage leaves, what is done again, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dil_toy import build, dil_cfg
from toy import ARGUMENTS, run_recipe_of, use_market, write_market

from qsd_plugin.core.errors import CheckpointError, ConfigError, StageError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import recipes, training_stages
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.datasets import test_set as read_test_set
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import check_config, stage1_options, stage2_options
from qsd_plugin.hosts.fastreid.recipes_dil import stage1_config, teacher_config
from qsd_plugin.methods.dil import Stage1Options, Stage2Options
from qsd_plugin.model_zoo import get_config_file

host.activate()

STAGES = ["teacher", "stage1", "bank", "stage2", "report"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dil_recipe")
    write_market(folder / "data", num_ids=4, per_id=4, test_ids=2)
    return folder


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, folder / "data")


def recipe_cfg(folder: Path, **overrides: Any) -> Any:
    options = {
        "RECIPE.NAME": "dil",
        "RECIPE.DIL.TEACHER.MAX_EPOCH": 1,
        "RECIPE.DIL.STAGE1.MAX_EPOCH": 1,
        "RECIPE.DIL.STAGE1.IMS_PER_BATCH": 8,
        "MODEL.HEADS.NUM_CLASSES": 0,
    }
    cfg = dil_cfg(folder, "DILReID", **(options | overrides))
    cfg.freeze()
    return cfg


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_market(patch, folder / "data")
        run_recipe_of(recipe_cfg(folder))
    return folder / "out"


def test_every_stage_starts_from_the_ones_before(folder: Path, finished: Path) -> None:
    assert [stage.name for stage in recipes.build_recipe(recipe_cfg(folder), ARGUMENTS)] == STAGES
    assert all(json.loads((finished / name / "stage.json").read_text())["finished"] for name in STAGES)
    from fastreid.config import get_cfg

    used = {}
    for name in ("teacher", "stage1", "stage2"):
        used[name] = get_cfg()
        used[name].merge_from_file(str(finished / name / "config.yaml"))
    found = [cfg.MODEL.META_ARCHITECTURE for cfg in used.values()]
    assert found == ["DILTeacher", "DIL", "DILReID"]
    teacher, first = (str(finished / name / "model_final.pth") for name in ("teacher", "stage1"))
    assert used["stage1"].DIL.TEACHER == used["stage2"].DIL.TEACHER == teacher
    second = used["stage2"].DIL
    assert [first, str(finished / "bank" / "codes.npz")] == [second.STAGE1, second.BANK]
    steps = torch.load(finished / "stage1" / "model_final.pth")["model"]["stage.adam.steps"]
    assert (int(steps), used["stage1"].DATALOADER.SAMPLER_TRAIN) == (2, "SeededTrainingSampler")


def test_the_bank_holds_the_codes_of_the_training_images(folder: Path, finished: Path) -> None:
    from fastreid.data.transforms import build_transforms

    cfg = recipe_cfg(folder)
    model = build(dil_cfg(folder, **{"MODEL.HEADS.NUM_CLASSES": 4})).eval()
    model.load_state_dict(torch.load(finished / "stage1" / "model_final.pth")["model"])
    codes = np.load(finished / "bank" / "codes.npz")["codes"]
    items = training_stages.training_items(cfg)["Market1501"]
    assert codes.shape == (len(items), 8)
    for row in (0, 9):
        image = build_transforms(cfg, is_train=False)(read_image(items[row][0]))[None]
        encode = model.stage.degradation_encoder
        with torch.no_grad():
            images = model.normalised(image)
            expected = (encode(images) + encode(images.flip(3))) / 2
        np.testing.assert_allclose(codes[row], expected[0].numpy(), rtol=1e-4, atol=1e-5)


def test_what_has_finished_is_not_done_again_and_the_last_stage_is_evaluated(folder: Path, finished: Path) -> None:
    said = run_recipe_of(recipe_cfg(folder))
    assert len(said) == len(STAGES)
    assert all("finished earlier" in line for line in said)
    results = training_stages.evaluate(recipe_cfg(folder), ARGUMENTS)
    stored = json.loads((finished / "stage2" / "results.json").read_text())
    assert results == pytest.approx(stored)


def test_the_report_has_the_teacher_every_feature_and_what_stage_1_renders(folder: Path, finished: Path) -> None:
    report = json.loads((finished / "report" / "results.json").read_text())
    arms = report["tests"]["Market1501"]["arms"]
    assert list(arms) == ["teacher", "stage 2, fuse", "stage 2, inv", "stage 2, sen"]
    stored = json.loads((finished / "stage2" / "results.json").read_text())
    assert arms["stage 2, fuse"]["all"]["mAP"] == pytest.approx(stored["mAP"], abs=0.01)  # the host's evaluation
    errors = report["reconstruction"]["Market1501"]
    assert errors["self"] > 0
    assert f"{errors['self']:.3f}" in (finished / "report" / "results.md").read_text()
    from fastreid.data.transforms import build_transforms

    cfg = recipe_cfg(folder)
    query, transform = read_test_set(cfg, "Market1501")[1], build_transforms(cfg, is_train=False)
    std = torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1)
    images = torch.stack([transform(read_image(path)) for path, _, _ in query]) / std
    assert errors["mean_image"] == pytest.approx(float((images - images.mean(dim=0)).abs().mean()), rel=1e-4)


def test_a_changed_setting_makes_only_its_stages_stale(folder: Path, finished: Path) -> None:
    cfg = recipe_cfg(folder, **{"DIL.STAGE2_OPTIONS.REPLAY_WEIGHT": 1.0})
    with pytest.raises(StageError, match=r"Stage 'stage2'.*DIL.STAGE2_OPTIONS.REPLAY_WEIGHT: 5.0 -> 1.0"):
        run_recipe_of(cfg)
    with pytest.raises(StageError, match=r"Stage 'stage1'.*DIL.PAIRS.MIX: 'res' -> 'ill'"):
        run_recipe_of(recipe_cfg(folder, **{"DIL.PAIRS.MIX": "ill", "DIL.STAGE1_OPTIONS.DEGRADATION_SCALES": 1}))


def test_given_files_are_used_and_not_made(folder: Path, finished: Path) -> None:
    given = {
        "DIL.TEACHER": str(finished / "teacher" / "model_final.pth"),
        "DIL.STAGE1": str(finished / "stage1" / "model_final.pth"),
    }
    built = recipes.build_recipe(recipe_cfg(folder, **given), ARGUMENTS)
    assert [stage.name for stage in built] == ["bank", "stage2", "report"]
    shuffled = recipe_cfg(folder, **given, **{"DIL.REPLAY.MODE": "shuffle"})
    assert [stage.name for stage in recipes.build_recipe(shuffled, ARGUMENTS)] == ["stage2", "report"]
    without = recipe_cfg(folder, **{"RECIPE.DIL.TEACHER.MAX_EPOCH": 0})
    assert [stage.name for stage in recipes.build_recipe(without, ARGUMENTS)] == ["stage1", "bank", "stage2", "report"]
    given["DIL.STAGE1"] = str(finished / "stage2" / "model_final.pth")
    second = recipe_cfg(folder / "other", **given)
    with pytest.raises(CheckpointError, match=r"got 'a checkpoint of stage 2 \(DILReID\)'; expected a trained stage 1"):
        run_recipe_of(second)


def test_mistakes_are_refused_before_anything_is_trained(folder: Path) -> None:
    for options, message in (
        ({"MODEL.META_ARCHITECTURE": "DIL"}, "expected DILReID with RECIPE.NAME dil"),
        ({"DIL.PAIRS.OTHER": "unpaired"}, "DIL.PAIRS.DEGRADED_CAMERAS is empty"),
        ({"DIL.PAIRS.OTHER": "unpaired", "DIL.PAIRS.DEGRADED_CAMERAS": [9]}, r"The cameras are \[0, 1, 2\]"),
        ({"DIL.STAGE2_OPTIONS.FEATURE": "both"}, "DIL.STAGE2_OPTIONS.FEATURE"),
        ({"TEST.GALLERY": "some"}, "TEST.GALLERY: got 'some'; expected auto or all or single"),
        ({"TEST.SINGLE_SHOT.DRAWS": -1}, "TEST.SINGLE_SHOT.DRAWS: got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipes.build_recipe(recipe_cfg(folder, **options), ARGUMENTS)


SHIPPED = [("market", 12_936, 29_106), ("mlr_market", 12_936, 29_106), ("msmt17", 30_248, 30_248)]


@pytest.mark.parametrize(("name", "images", "iterations"), SHIPPED)
def test_shipped_configs_have_the_authors_length_and_sizes(name: str, images: int, iterations: int) -> None:
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(f"DIL/{name}.yml"))
    first = stage1_config(cfg, Path("logs"))
    for own in (cfg, first, teacher_config(cfg, Path("logs"))):
        check_config(own)
    assert images // first.SOLVER.IMS_PER_BATCH * first.SOLVER.MAX_EPOCH == iterations
    assert (first.SOLVER.BASE_LR, first.SOLVER.WEIGHT_DECAY_BIAS, first.DIL.WIDTH) == (1e-4, 5e-4, 1.0)
    assert stage1_options(first) == Stage1Options()
    assert stage2_options(cfg) == Stage2Options()


def test_qsd_on_top_reads_labels_in_the_last_stage_alone(folder: Path) -> None:
    on_top = {"MODEL.META_ARCHITECTURE": "QSD", "QSD.BASE": "DILReID", "QSD.TAPS": ["reid.sensitive.model.layer4=1"]}
    stages = {stage.name: stage for stage in recipes.build_recipe(recipe_cfg(folder, **on_top), ARGUMENTS)}
    assert list(stages) == STAGES
    assert folder / "out" / "labels" / "Market1501.npz" in stages["stage2"].inputs
    assert stages["stage2"].keys["QSD.BASE"] == "DILReID"
    assert not any(key.startswith(("QSD.", "QUALITY.")) for name in STAGES[:3] for key in stages[name].keys)
    own = str(folder / "given.pth")
    by_stage1 = recipe_cfg(folder, **on_top, **{"QUALITY.SOURCE": "dil_severity", "QUALITY.SEVERITY.STAGE1": own})
    inputs = {stage.name: stage for stage in recipes.build_recipe(by_stage1, ARGUMENTS)}["stage2"].inputs
    assert Path(own) in inputs
    assert not any("labels" in str(path) for path in inputs)


def test_degraded_training_images_are_those_of_teacher_and_stage_2(folder: Path) -> None:
    degraded = recipe_cfg(folder, **{"INPUT.DEGRADE.ENABLED": True, "INPUT.DEGRADE.MIX": "ill"})
    keys = {stage.name: stage.keys for stage in recipes.build_recipe(degraded, ARGUMENTS)}
    for name in ("teacher", "stage2"):
        assert keys[name]["INPUT.DEGRADE.MIX"] == "ill"
    assert "INPUT.DEGRADE.MIX" not in keys["stage1"]
