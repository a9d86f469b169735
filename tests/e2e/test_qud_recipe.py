"""The recipe ``qud``: a teacher is trained, a student learns it, what has finished is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import ARGUMENTS, run_recipe_of, toy_cfg, use_market, write_market

from qsd_plugin.core.errors import ConfigError, StageError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import recipes, training_stages

host.activate()

STUDENT: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "QUD",
    "MODEL.BACKBONE.NAME": "build_osnet_backbone",
    "MODEL.BACKBONE.DEPTH": "x0_25",
    "MODEL.BACKBONE.FEAT_DIM": 128,
    "RECIPE.NAME": "qud",
    "SEED": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and a training of a teacher as a user writes it down."""
    folder = tmp_path_factory.mktemp("qud")
    write_market(folder / "data", num_ids=4, per_id=8, test_ids=2)
    cfg = toy_cfg(folder / "unused", **{"INPUT.SIZE_TRAIN": [32, 32], "INPUT.SIZE_TEST": [32, 32]})
    (folder / "teacher.yml").write_text(cfg.dump())
    return folder


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, folder / "data")


def student_cfg(folder: Path, **overrides: Any) -> Any:
    teacher = {"KD.MODEL_CONFIG": [str(folder / "teacher.yml")]}
    cfg = toy_cfg(folder / "run", **(STUDENT | teacher | overrides))
    cfg.freeze()
    return cfg


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_market(patch, folder / "data")
        run_recipe_of(student_cfg(folder))
    return folder / "run"


def test_the_student_learns_the_teacher_that_was_trained_and_is_deployed(folder: Path, finished: Path) -> None:
    from fastreid.config import get_cfg

    names = [stage.name for stage in recipes.build_recipe(student_cfg(folder), ARGUMENTS)]
    assert names == ["teacher", "student", "deploy"]
    assert all(json.loads((finished / name / "stage.json").read_text())["finished"] for name in names)
    teacher, student = get_cfg(), get_cfg()
    teacher.merge_from_file(str(finished / "teacher" / "config.yaml"))
    student.merge_from_file(str(finished / "student" / "config.yaml"))
    assert (teacher.SEED, teacher.INPUT.SIZE_TRAIN, teacher.MODEL.BACKBONE.DEPTH) == (5, [32, 32], "18x")
    assert [str(finished / "teacher" / "model_final.pth")] == student.KD.MODEL_WEIGHTS
    assert [str(finished / "teacher" / "config.yaml")] == student.KD.MODEL_CONFIG
    trained = torch.load(finished / "student" / "model_final.pth", weights_only=True)["model"]
    assert trained["qud_projector.weight"].shape == (512, 128)
    assert trained["qud_queue.filled"] == 32
    deployed = torch.load(finished / "deploy" / "model.pth", weights_only=True)["model"]
    assert {name.partition(".")[0] for name in set(trained) - set(deployed)} == {"qud_projector", "qud_queue"}
    assert all(torch.equal(trained[name], value) for name, value in deployed.items())


def test_what_has_finished_is_skipped_and_another_setting_makes_the_student_stale_only(
    folder: Path, finished: Path
) -> None:
    assert [line.split(":")[1].split(",")[0] for line in run_recipe_of(student_cfg(folder))] == [
        " finished earlier"
    ] * 3
    with pytest.raises(StageError, match=r"Stage 'student' in .*QUD.TEMPERATURE: 0.1 -> 0.2"):
        run_recipe_of(student_cfg(folder, **{"QUD.TEMPERATURE": 0.2}))


def test_eval_only_scores_the_student(folder: Path, finished: Path) -> None:
    scores = training_stages.evaluate(student_cfg(folder), ARGUMENTS)
    assert scores["mAP"] == json.loads((finished / "student" / "results.json").read_text())["mAP"]


def test_a_given_checkpoint_takes_the_place_of_the_teacher_s_stage(folder: Path, finished: Path) -> None:
    given = {
        "KD.MODEL_CONFIG": [str(finished / "teacher" / "config.yaml")],
        "KD.MODEL_WEIGHTS": [str(finished / "teacher" / "model_final.pth")],
    }
    student, deploy = recipes.build_recipe(student_cfg(folder, **given), ARGUMENTS)
    assert (student.name, deploy.name) == ("student", "deploy")
    assert list(map(str, student.inputs)) == [*given["KD.MODEL_CONFIG"], *given["KD.MODEL_WEIGHTS"]]


def test_a_cache_is_made_of_the_trained_teacher_and_the_student_needs_no_other(folder: Path, finished: Path) -> None:
    given = {
        "KD.MODEL_CONFIG": [str(finished / "teacher" / "config.yaml")],
        "KD.MODEL_WEIGHTS": [str(finished / "teacher" / "model_final.pth")],
    }
    cached = {"QUD.TEACHER.SOURCE": "cache", "QUD.TEACHER.DIM": 512, "OUTPUT_DIR": str(folder / "cached")}
    cfg = student_cfg(folder, **given, **cached)
    assert list(dict.fromkeys(line.split(":")[0] for line in run_recipe_of(cfg))) == [
        "Stage cache",
        "Stage student",
        "Stage deploy",
    ]
    features = np.load(folder / "cached" / "cache" / "features.npy")
    assert (features.shape, features.dtype) == ((32, 2, 512), np.float16)
    live, from_cache = (
        [line["loss_qud"] for line in map(json.loads, (root / "student" / "metrics.json").open()) if "loss_qud" in line]
        for root in (finished, folder / "cached")
    )
    # The same teacher, images and flips; what is left is the rounding of the stored features.
    assert from_cache == pytest.approx(live, abs=5e-3)
    assert all("finished earlier" in line for line in run_recipe_of(cfg))
    # The folder of that cache in another run: no teacher is named, none is trained and none is asked.
    other = student_cfg(
        folder, **cached | {"QUD.CACHE.FOLDER": str(folder / "cached" / "cache"), "OUTPUT_DIR": str(folder / "third")}
    )
    student, deploy = recipes.build_recipe(other, ARGUMENTS)
    assert (student.name, deploy.name) == ("student", "deploy")
    assert student.inputs == [folder / "cached" / "cache" / "cache.json"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"RECIPE.NAME": "qdu"}, r"RECIPE.NAME: got 'qdu'.*Did you mean 'qud'"),
        ({"MODEL.META_ARCHITECTURE": "Baseline"}, r"MODEL.META_ARCHITECTURE: got 'Baseline'; expected QUD with RECIPE"),
        ({"KD.MODEL_CONFIG": []}, "KD.MODEL_CONFIG is empty"),
        ({"KD.MODEL_CONFIG": ["gone.yml"]}, "KD.MODEL_CONFIG: got 'gone.yml'; expected a file, or a shipped one"),
        ({"DATASETS.TESTS": ("VerificationBin",)}, r"DATA.VERIFICATION: got \[\]; expected .bin files"),
        ({"QUD.LOSS": "qdu"}, "QUD.LOSS: got 'qdu'"),  # before the teacher's hours, not after
    ],
)
def test_mistakes_come_to_light_before_the_first_stage(folder: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.build_recipe(student_cfg(folder, **overrides), ARGUMENTS)


def test_a_teacher_with_a_recipe_of_its_own_is_trained_by_it_first(folder: Path) -> None:
    (folder / "recipe.yml").write_text(f"_BASE_: {folder / 'teacher.yml'}\nRECIPE: {{NAME: qsd}}\n")
    with pytest.raises(ConfigError, match=r"RECIPE.NAME in KD.MODEL_CONFIG .*recipe\.yml: got 'qsd'"):
        recipes.build_recipe(student_cfg(folder, **{"KD.MODEL_CONFIG": [str(folder / "recipe.yml")]}), ARGUMENTS)
