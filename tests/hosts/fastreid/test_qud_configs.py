"""The shipped QUD configs: they build, and train as the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import write_market

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import recipes, recipes_qud
from qsd_plugin.hosts.fastreid.meta_arch.qud_teacher import teacher_config
from qsd_plugin.model_zoo import get_config_file, list_configs

host.activate()

#: Per config: the student's embedding, the layer behind it, images per step, the teacher's embedding.
STUDENTS = {
    "QUD/ms1mv2_r50_to_mbf.yml": (512, None, 512, 512),
    "QUD/folder.yml": (512, None, 512, 512),
    "QUD/market.yml": (512, (2048, 512), 64, 2048),
    "QUD/market_small.yml": (128, (512, 128), 64, 512),
    "QUD/real_faces.yml": (128, None, 64, 128),
}
#: Learning rate of every epoch: a tenth in front of milestones 8, 14, 20, 25 and 22, 30, 40 that count from 1.
RATES = {
    "QUD/ms1mv2_r50_to_mbf.yml": [*[0.1] * 7, *[0.01] * 6, *[0.001] * 6, *[0.0001] * 5, *[0.00001] * 2],
    "QUD/folder.yml": [*[0.1] * 21, *[0.01] * 8, *[0.001] * 10, 0.0001],
}


def shipped(name: str, **overrides: Any) -> Any:
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(name))
    cfg.merge_from_list([item for option in overrides.items() for item in option])
    return cfg


def build(cfg: Any) -> Any:
    from fastreid.modeling.meta_arch import build_model

    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.PRETRAIN, cfg.MODEL.HEADS.NUM_CLASSES = "cpu", False, 9
    return build_model(cfg)


def test_every_leaf_with_a_teacher_is_checked_here() -> None:
    assert set(STUDENTS) <= {name for name in list_configs() if name.startswith("QUD/")}


@pytest.mark.parametrize("name", STUDENTS)
def test_student_of_a_shipped_config_learns_from_images_alone(name: str) -> None:
    own, projector, batch, dim = STUDENTS[name]
    cfg = shipped(name, **{"QUD.TEACHER.SOURCE": "cache", "QUD.TEACHER.DIM": dim})
    settings = (cfg.RECIPE.NAME, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.SAMPLER_TRAIN)
    assert settings == ("qud", batch, "SeededTrainingSampler")
    assert (cfg.QUD.LOSS, cfg.QUD.TEMPERATURE, cfg.QUD.QUEUE_SIZE, cfg.QUD.MASK_ABOVE) == ("qud", 0.1, 1024, 1.0)
    model = build(cfg)
    assert model._qud_label_free
    assert model.qud_queue.features.shape == (1024, dim)
    assert (None if model.qud_projector is None else tuple(model.qud_projector.weight.shape)) == projector
    size = cfg.INPUT.SIZE_TRAIN
    inputs = {"images": torch.rand(2, 3, *size) * 255, "teacher_features": torch.rand(2, dim)}
    losses = model.train()(inputs)
    assert list(losses) == ["loss_qud"]
    assert model.eval()(inputs).shape == (2, own)


@pytest.mark.parametrize("name", RATES)
def test_paper_s_learning_rates(name: str) -> None:
    from fastreid.solver import build_lr_scheduler

    cfg = shipped(name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    (scheduler,) = build_lr_scheduler(cfg, optimizer, 11372).values()  # no warm-up beside it
    found = []
    for _ in range(cfg.SOLVER.MAX_EPOCH):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(RATES[name])


def test_paper_s_optimizer_clips_the_total_norm_and_decays_all_parameters_alike() -> None:
    from fastreid.solver import build_optimizer

    cfg = shipped("QUD/ms1mv2_r50_to_mbf.yml", **{"QUD.TEACHER.SOURCE": "cache", "QUD.TEACHER.DIM": 64})
    cfg.SOLVER.WEIGHT_DECAY = cfg.SOLVER.WEIGHT_DECAY_NORM = cfg.SOLVER.WEIGHT_DECAY_BIAS = decay = 0.0005
    model = build(cfg)  # with a projector, which counts
    start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    optimizer, _ = build_optimizer(cfg, model)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.9, False, decay)
    assert group["params"][0].numel() == sum(value.numel() for value in start.values())
    generator = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm > 1000
    for name, value in model.named_parameters():
        if name in gradients:
            value.grad.copy_(gradients[name])
    optimizer.step()
    for name, value in model.named_parameters():
        if name in gradients:
            expected = start[name] - 0.1 * (gradients[name] * (5 / norm) + decay * start[name])
            torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-7)
    assert not cfg.SOLVER.AMP.ENABLED


def test_shipped_teachers_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for student, depth in (("QUD/ms1mv2_r50_to_mbf.yml", "50x"), ("QUD/market.yml", "101x")):
        (name,) = shipped(student).KD.MODEL_CONFIG
        found = teacher_config(name).MODEL.BACKBONE.DEPTH
        assert found == depth
    (tmp_path / "QUD" / "teachers").mkdir(parents=True)
    (tmp_path / "QUD" / "teachers" / "agw_r101.yml").write_text("MODEL: {BACKBONE: {DEPTH: 18x}}\n")
    assert teacher_config("QUD/teachers/agw_r101.yml").MODEL.BACKBONE.DEPTH == "18x"
    with pytest.raises(ConfigError, match=r"KD.MODEL_CONFIG: got 'QUD/teachers/agw.yml'; expected a file, or a"):
        teacher_config("QUD/teachers/agw.yml")


def test_folder_s_first_error_asks_for_the_teacher(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "crops" / "x").mkdir(parents=True)
    Image.new("RGB", (112, 112)).save(tmp_path / "crops" / "x" / "1.jpg")
    cfg = shipped("QUD/folder.yml", **{"DATA.FOLDER": str(tmp_path / "crops"), "OUTPUT_DIR": str(tmp_path / "out")})
    with pytest.raises(ConfigError, match=r"QUD.TEACHER.ONNX is empty; expected the ONNX file of the teacher"):
        recipes.build_recipe(cfg, None)


def test_market_trains_its_teacher_first(tmp_path: Path) -> None:
    write_market(tmp_path / "data", num_ids=2, per_id=2, test_ids=2)
    data = {"DATA.ROOT": str(tmp_path / "data"), "OUTPUT_DIR": str(tmp_path / "out"), "SEED": 4}
    cfg = shipped("QUD/market.yml", **data)
    assert [stage.name for stage in recipes.build_recipe(cfg, None)] == ["teacher", "student", "deploy"]
    teacher = recipes_qud.teacher_stage_config(cfg, tmp_path / "out" / "teacher")
    settings = (teacher.SEED, teacher.DATA.ROOT, teacher.MODEL.BACKBONE.DEPTH)
    assert settings == (4, str(tmp_path / "data"), "101x")
    assert teacher.MODEL.LOSSES.NAME == ("CrossEntropyLoss", "WeightedTripletLoss", "CenterLoss")


def test_a_teacher_that_is_trained_gets_the_records_of_the_student_unless_it_has_its_own(tmp_path: Path) -> None:
    files = {"DATA.RECORD": "/student/train.rec", "DATA.VERIFICATION": ["/student/lfw.bin"]}
    cfg = shipped("QUD/ms1mv2_r50_to_mbf.yml", **files)
    teacher = recipes_qud.teacher_stage_config(cfg, tmp_path)
    assert (teacher.DATA.RECORD, teacher.DATA.VERIFICATION) == ("/student/train.rec", ["/student/lfw.bin"])
    assert (teacher.MODEL.META_ARCHITECTURE, teacher.DATASETS.NAMES) == ("Baseline", ("FaceRecord",))
    (tmp_path / "own.yml").write_text("DATA: {RECORD: /teacher/train.rec}\n")
    cfg.KD.MODEL_CONFIG = [str(tmp_path / "own.yml")]
    teacher = recipes_qud.teacher_stage_config(cfg, tmp_path)
    assert (teacher.DATA.RECORD, teacher.DATA.VERIFICATION) == ("/teacher/train.rec", ["/student/lfw.bin"])
    cfg = shipped("QUD/real_faces.yml", **{"DATA.LIST": "/student/train.csv", "DATA.PAIRS": "/student/pairs.csv"})
    teacher = recipes_qud.teacher_stage_config(cfg, tmp_path)
    assert (teacher.DATA.LIST, teacher.DATA.PAIRS) == ("/student/train.csv", "/student/pairs.csv")
    assert teacher.DATA.FACES == cfg.DATA.FACES
