"""``ShardedEmbeddingHead`` in one process: the host's head in loss, gradients, steps and checkpoints; what it refuses.

tests/ddp/test_sharded_training.py has several processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from face_toy import base_face_cfg, small_options
from toy import use_market, write_market

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import deploy, deployed, recipes, sharded_head, training_stages
from qsd_plugin.hosts.fastreid.sharded_checkpoints import ROWS, SHARDS

host.activate()

SHARDED = "ShardedEmbeddingHead"
SMALL: dict[str, Any] = {
    **small_options("build_mobilefacenet_backbone", "mbf"),
    "INPUT.FLIP.ENABLED": False,
    "DATASETS.NAMES": ("Market1501",),
    "DATASETS.TESTS": ("Market1501",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.AMP.ENABLED": False,
    "SEED": 3,
}


def face_cfg(head: str = SHARDED, **overrides: Any) -> Any:
    return base_face_cfg({**SMALL, "MODEL.HEADS.NAME": head, **overrides})


def build(cfg: Any) -> Any:
    from fastreid.modeling.meta_arch import build_model

    torch.manual_seed(0)
    return build_model(cfg)


def batch(step: int = 0) -> dict[str, Any]:
    images = torch.rand(8, 3, 48, 48, generator=torch_stream(5, step)) * 255
    return {"images": images, "targets": torch.tensor([0, 1, 2, 3, 4, 4, 2, 0])}


def losses(model: Any, step: int = 0) -> tuple[dict[str, torch.Tensor], float]:
    """The losses of a step, and the accuracy that was logged."""
    from fastreid.utils.events import EventStorage

    images = batch(step)
    with EventStorage(step) as storage:
        terms: dict[str, torch.Tensor] = model({**images, "images": images["images"].to(model.pixel_mean.dtype)})
        return terms, storage.latest()["cls_accuracy"][0]


def both(layer: str, **overrides: Any) -> tuple[Any, Any]:
    """The host's head and ours on the same network, in double precision, which batch norm over eight images needs."""
    options = {"MODEL.HEADS.CLS_LAYER": layer, "MODEL.LOSSES.CE.SCALE": 0.5, **overrides}
    plain, ours = build(face_cfg("EmbeddingHead", **options)), build(face_cfg(**options))
    ours.load_state_dict(plain.state_dict())
    return plain.double().train(), ours.double().train()


@pytest.mark.parametrize("layer", ["ArcFaceStraightThrough", "CombinedMarginExact", "ArcSoftmax", "CircleSoftmax"])
def test_all_classes_in_one_process_are_the_hosts_head(layer: str) -> None:
    plain, ours = both(layer)
    with torch.no_grad():  # well apart, so that the accuracy is neither 0 nor decided by rounding
        for model in (plain, ours):
            model.heads.weight.copy_(torch.randn(5, 24, generator=torch_stream(6)))
    (expected, accuracy), (found, our_accuracy) = losses(plain), losses(ours)
    assert found.keys() == {"loss_cls"}
    assert our_accuracy == pytest.approx(accuracy)
    (expected["loss_cls"] + found["loss_cls"]).backward()
    torch.testing.assert_close(found["loss_cls"], expected["loss_cls"])
    gradients = dict(ours.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)
    assert torch.equal(ours.float().eval()(batch()), plain.float().eval()(batch()))


def test_optimizer_follows_the_hosts_settings_and_steps() -> None:
    from fastreid.engine import DefaultTrainer

    settings = {"SOLVER.HEADS_LR_FACTOR": 2.0, "SOLVER.WEIGHT_DECAY": 0.01, "SOLVER.BASE_LR": 0.05}
    plain, ours = both("CosFace", **settings)
    (first, _), (second, parameters) = (
        DefaultTrainer.build_optimizer(face_cfg(head, **settings), model)
        for head, model in (("EmbeddingHead", plain), (SHARDED, ours))
    )
    *others, own = second.param_groups
    assert own["params"][0] is ours.heads.weight
    assert (own["lr"], own["weight_decay"], own["momentum"], own["freeze_status"]) == (0.1, 0.01, 0.9, "normal")
    assert (
        sum(group["params"][0].numel() for group in others)
        == sum(parameter.numel() for parameter in plain.parameters() if parameter.requires_grad) - 5 * 24
    )
    for step in range(3):
        for model, optimizer in ((plain, first), (ours, second)):
            terms, _ = losses(model, step)
            optimizer.zero_grad()
            terms["loss_cls"].backward()
            optimizer.step()
    parameters.assert_buffer_is_valid()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_frozen_head_is_frozen_in_its_group() -> None:
    from fastreid.engine import DefaultTrainer

    cfg = face_cfg(**{"MODEL.FREEZE_LAYERS": ["heads"], "SOLVER.FREEZE_ITERS": 5})
    optimizer, _ = DefaultTrainer.build_optimizer(cfg, build(cfg))
    assert [group["freeze_status"] for group in optimizer.param_groups][-1] == "freeze"


def test_steps_of_a_training_draw_other_classes_and_leave_the_rest_alone() -> None:
    model = build(face_cfg(**{"MODEL.HEADS.NUM_CLASSES": 40, "MODEL.HEADS.SAMPLE_RATE": 0.25})).train()
    used = []
    for step in (0, 1, 0):
        model.zero_grad()
        losses(model, step)[0]["loss_cls"].backward()
        used.append(model.heads.weight.grad.abs().sum(1).nonzero().flatten().tolist())
    assert used[0] == used[2] != used[1]
    assert all(len(rows) == 10 and {0, 1, 2, 3, 4} < set(rows) for rows in used)


@pytest.mark.parametrize("teacher", [False, True])
def test_qsd_works_on_top(teacher: bool) -> None:
    more = {"QUALITY.SOURCE": "embedding_norm", "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler"}
    cfg = face_cfg(**{"MODEL.META_ARCHITECTURE": "QSD", "QSD.EMA.ENABLED": teacher, **more})
    model = build(cfg).train()
    from fastreid.utils.events import EventStorage

    with EventStorage(0):
        images = {**batch(), "targets": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])}
        terms = model({**images, "img_paths": [str(index) for index in range(8)]})
    assert terms.keys() == {"loss_cls", "loss_qsd"}
    sum(terms.values()).backward()
    assert model.heads.weight.grad.abs().sum() > 0


# Checkpoints and deploying.


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=5, per_id=7, test_ids=2)


def trainer(folder: Path, head: str = SHARDED, **overrides: Any) -> Any:
    from fastreid.engine import DefaultTrainer

    options = {"MODEL.HEADS.NUM_CLASSES": 0, "OUTPUT_DIR": str(folder), "SOLVER.MAX_EPOCH": 1, **overrides}
    running = DefaultTrainer(face_cfg(head, **options))
    running.test = lambda cfg, model: {"metric": 1.0}  # evaluation is not what is tested
    return running


def test_one_process_keeps_one_ordinary_checkpoint(
    tmp_path: Path, market: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_market(monkeypatch, market)
    folder = tmp_path / "out"
    folder.mkdir()
    running = trainer(folder)
    running.resume_or_load(resume=False)
    running.train()
    assert sorted(file.name for file in folder.glob("*.p*")) == ["model_best.pth", "model_final.pth"]
    again = trainer(folder, **{"SOLVER.MAX_EPOCH": 2})
    again.resume_or_load(resume=True)
    rows = running.model.heads.weight
    assert tuple(rows.shape) == (5, 24)
    assert torch.equal(again.model.heads.weight, rows)
    momentum = again.optimizer.state[again.model.heads.weight]["momentum_buffer"]
    assert torch.equal(momentum, running.optimizer.state[rows]["momentum_buffer"])
    assert momentum.abs().sum() > 0

    # What does not go together is said; what does not matter is not.
    with pytest.raises(
        CheckpointError, match=r"Classes and embedding size of .*got \(5, 24\); expected \(9, 24\)\. Go on"
    ):
        trainer(folder, **{"MODEL.HEADS.NUM_CLASSES": 9}).resume_or_load(resume=True)
    other = trainer(folder, **{"MODEL.HEADS.NUM_CLASSES": 9, "MODEL.WEIGHTS": str(folder / "model_final.pth")})
    before = other.model.heads.weight.detach().clone()
    other.resume_or_load(resume=False)
    assert torch.equal(other.model.heads.weight, before)
    name = "backbone.features.layers.2.weight"
    assert torch.equal(other.model.state_dict()[name], running.model.state_dict()[name])
    with pytest.raises(ConfigError, match=r"NUM_CLASSES: got 3; expected at least 5, the identities of the training"):
        trainer(folder, **{"MODEL.HEADS.NUM_CLASSES": 3})


def test_resuming_another_heads_training_is_refused(
    tmp_path: Path, market: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_market(monkeypatch, market)
    plain = trainer(tmp_path, "EmbeddingHead")
    plain.checkpointer.save("model_final", epoch=0)
    with pytest.raises(CheckpointError, match=r"Optimizer of checkpoint .*; expected one of a training with Sharded"):
        trainer(tmp_path).resume_or_load(resume=True)
    weights = trainer(tmp_path, **{"MODEL.WEIGHTS": str(tmp_path / "model_final.pth")})
    weights.resume_or_load(resume=False)
    assert torch.equal(weights.model.heads.weight, plain.model.heads.weight)


@pytest.mark.parametrize("processes", [1, 2])
def test_deployed_network_has_no_class_rows(tmp_path: Path, processes: int) -> None:
    resnet = {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.BACKBONE.DEPTH": "18x"}
    pooled = {"MODEL.BACKBONE.FEAT_DIM": 512, "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool"}
    cfg = face_cfg(**resnet, **pooled)
    model = build(cfg).eval()
    content: dict[str, Any] = {"model": model.state_dict()}
    if processes == 2:
        content["model"][ROWS] = torch.zeros(0, 512)
        content[SHARDS] = {"num_classes": 5, "token": "0123", "files": ["a", "b"]}  # not looked at
    torch.save(content, tmp_path / "model_final.pth")
    deploy.write_deploy(
        tmp_path / "deploy", cfg, tmp_path / "model_final.pth", metrics={}, config_hash="0", command=["train"]
    )
    run = deployed.load(tmp_path)
    assert run.cfg.MODEL.HEADS.NAME == "EmbeddingHead"
    assert tuple(run.model.heads.weight.shape) == (0, 512)
    assert run.contract["classes"] == 5
    images = deployed.noise(3, (48, 48))
    torch.testing.assert_close(run.model({"images": images.clone()}), model({"images": images.clone()}))


# Mistakes.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL.HEADS.SAMPLE_RATE": 0.0}, r"MODEL\.HEADS\.SAMPLE_RATE: got 0\.0; expected above 0, up to 1"),
        ({"MODEL.HEADS.SAMPLE_RATE": 1.1}, r"MODEL\.HEADS\.SAMPLE_RATE: got 1\.1; expected above 0, up to 1"),
        (
            {"MODEL.LOSSES.NAME": ("CrossEntropyLoss", "TripletLoss")},
            r"LOSSES\.NAME: got .*TripletLoss.*the only loss that",
        ),
        ({"MODEL.LOSSES.NAME": ("TripletLoss",)}, r"MODEL\.LOSSES\.NAME: got .*expected \('CrossEntropyLoss',\)"),
        ({"MODEL.LOSSES.CE.EPSILON": 0.1}, r"CE\.EPSILON: got 0\.1; expected 0 with ShardedEmbeddingHead"),
        ({"MODEL.HEADS.CLS_LAYER": "Linear"}, r"CLS_LAYER: got 'Linear'; expected a layer that takes cosines"),
        ({"MODEL.META_ARCHITECTURE": "MoCo"}, r"META_ARCHITECTURE: got 'MoCo'; expected Baseline, or QSD on top"),
        ({"MODEL.META_ARCHITECTURE": "MGN"}, r"META_ARCHITECTURE: got 'MGN'; expected Baseline, or QSD on top"),
        (
            {"MODEL.META_ARCHITECTURE": "QSD", "QSD.BASE": "Distiller"},
            r"META_ARCHITECTURE: got 'Distiller'; .*Distiller needs the logits of all classes: use EmbeddingHead",
        ),
    ],
)
def test_what_the_head_cannot_serve_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sharded_head.check_config(face_cfg(**overrides))


def test_several_processes_need_as_many_classes_one_head_and_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(face_cfg(**{"MODEL.META_ARCHITECTURE": "QSD", "QSD.EMA.ENABLED": True, "QSD.PAIRING": "partner"}))
    monkeypatch.setattr(sharded_head, "world_size", lambda: 6)
    with pytest.raises(ConfigError, match=r"Number of classes: got 5; expected at least 6, one for each process"):
        build(face_cfg())
    clip = {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm"}
    with pytest.raises(
        ConfigError, match=r"CLIP_TYPE: got 'norm'; expected value with ShardedEmbeddingHead in several"
    ):
        build(face_cfg(**clip))
    with pytest.raises(
        ConfigError, match=r"QSD\.EMA\.ENABLED: got .*qsd_teacher\.heads.*expected one head with class rows"
    ):
        sharded_head.leave_out_of_data_parallel(model)


def test_training_without_classes_is_named_and_evaluation_needs_none() -> None:
    model = build(face_cfg(**{"MODEL.HEADS.NUM_CLASSES": 0}))
    assert model.eval()(batch()).shape == (8, 24)
    assert "no classes" in repr(model.heads)
    with pytest.raises(ConfigError, match=r"NUM_CLASSES: got 0; expected the number of identities, in training"):
        losses(model.train())


def test_recipe_tries_the_head_with_enough_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_head, "world_size", lambda: 6)
    monkeypatch.setattr(training_stages, "world_size", lambda: 6)
    recipes.check_final_stage(face_cfg(**{"MODEL.HEADS.NUM_CLASSES": 0, "DATASETS.TESTS": ()}))
