"""The shipped QGFace configs mean what their comments say; the settings of the ablation's rows; the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import use_market, write_market

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import recipes
from qsd_plugin.hosts.fastreid.meta_arch.qgface_config import check_config
from qsd_plugin.model_zoo import get_config_file

host.activate()

#: Architecture, head, start of its statistics, views, what degrades, and the queue of each row.
ROWS = {
    "baseline": ("Baseline", "AdaFaceHead", "adaface", "none", "qgface", "proxy"),
    "A": ("Baseline", "AdaFaceHead", "adaface", "single", "adaface_qgface", "proxy"),
    "B": ("Baseline", "QGFaceHead", "debiased", "single", "adaface_qgface", "proxy"),
    "C": ("QGFace", "QGFaceHead", "debiased", "pair", "adaface_qgface", "proxy"),
    "D": ("QGFace", "QGFaceHead", "debiased", "pair", "qgface", "proxy"),
    "L-view-only": ("QGFace", "AdaFaceHead", "debiased", "pair", "qgface", "none"),
}


def shipped(name: str, **overrides: Any) -> Any:
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(f"QGFace/{name}.yml"))
    cfg.merge_from_list([item for option in overrides.items() for item in option])
    return cfg


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_ablation_differ_in_what_the_table_says(name: str) -> None:
    cfg = shipped(f"ablation/{name}")
    qgface = cfg.QGFACE
    found = (
        cfg.MODEL.META_ARCHITECTURE,
        cfg.MODEL.HEADS.NAME,
        qgface.START,
        qgface.VIEWS.MODE,
        qgface.VIEWS.DEGRADED,
        qgface.CONTRAST.QUEUE,
    )
    assert found == ROWS[name]
    if cfg.MODEL.META_ARCHITECTURE == "QGFace":
        check_config(cfg)
    plain = shipped("vggface2_r34")
    for node in ("SOLVER", "INPUT", "DATASETS", "DATALOADER"):
        assert cfg[node] == plain[node]
    assert cfg.MODEL.BACKBONE == plain.MODEL.BACKBONE


def test_learning_rate_and_decay_of_the_main_run() -> None:
    from fastreid.solver import build_lr_scheduler

    cfg = shipped("vggface2_r34")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.SOLVER.BASE_LR)
    (scheduler,) = build_lr_scheduler(cfg, optimizer, 3069).values()
    found = []
    for _ in range(cfg.SOLVER.MAX_EPOCH):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx([*[0.2] * 6, *[0.02] * 3, *[0.002] * 3])
    decays = (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_BIAS, cfg.SOLVER.WEIGHT_DECAY_NORM)
    assert decays == (0.0005, 0.0005, 0.0)
    assert (cfg.QGFACE.CONTRAST.QUEUE_SIZE, cfg.SOLVER.IMS_PER_BATCH) == (9131, 1024)


def test_demo_builds_at_its_size() -> None:
    from fastreid.modeling.meta_arch import build_model

    cfg = shipped("demo", **{"MODEL.DEVICE": "cpu", "MODEL.HEADS.NUM_CLASSES": 9})
    model = build_model(cfg)
    assert model.qgface_queue.embeddings.shape == (512, 128)
    assert model.qgface_queue.compensate
    assert (model.qgface_contrast.coupling, model.qgface_contrast.detach_positive) == ("single", True)
    assert (model.qgface_contrast.threshold, model.heads.threshold) == (0.4, 0.4)
    assert model.eval()({"images": torch.rand(2, 3, 48, 48) * 255}).shape == (2, 128)


def test_the_recipe_is_one_training_and_does_not_depend_on_what_it_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_market(monkeypatch, write_market(tmp_path / "data", num_ids=6, per_id=4))
    options = {
        "MODEL.BACKBONE.NAME": "build_osnet_backbone",
        "MODEL.BACKBONE.DEPTH": "x0_25",
        "MODEL.BACKBONE.FEAT_DIM": 128,
        "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool",
        "INPUT.SIZE_TRAIN": [64, 32],
        "INPUT.SIZE_TEST": [64, 32],
        "DATASETS.NAMES": ("Market1501",),
        "DATASETS.TESTS": ("Market1501",),
        "SOLVER.IMS_PER_BATCH": 8,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL.DEVICE": "cpu",
    }
    first, last = recipes.build_recipe(shipped("demo", **options), None)
    assert (first.name, last.name) == ("qgface", "deploy")
    assert first.keys["QGFACE.THRESHOLD"] == 0.4
    assert first.outputs == ["model_final.pth", "results.json"]
    plain = {"MODEL.META_ARCHITECTURE": "Baseline", "MODEL.HEADS.NAME": "EmbeddingHead", "QGFACE.VIEWS.MODE": "none"}
    (alone, _) = recipes.build_recipe(shipped("demo", **options, **plain), None)
    assert not any(key.startswith("QGFACE.") for key in alone.keys)
    with pytest.raises(ConfigError, match=r"QGFACE.CONTRAST.QUEUE_SIZE: got 8; expected at least 16"):
        recipes.build_recipe(shipped("demo", **options, **{"QGFACE.CONTRAST.QUEUE_SIZE": 8}), None)
