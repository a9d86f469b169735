"""``AdaFaceHead`` and ``QGFaceHead`` of fast-reid against the pure heads, and the host's losses beside them.

tests/ddp/test_quality_margin_two_ranks.py has several processes, the mix table trainings.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from face_toy import base_face_cfg, small_options
from margin_toy import TARGETS, batch, build, head_cfg, small, step_losses
from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import deploy, deployed, published, quality_margin_heads
from qsd_plugin.hosts.fastreid.quality_margin_heads import quality_head, smoothed_cross_entropy
from qsd_plugin.methods import qgface

host.activate()

HEADS = ["AdaFaceHead", "QGFaceHead"]
MARKET = Path(__file__).parents[3] / "projects" / "QGFace" / "market.yml"


def pure_head(cfg: Any, model: Any) -> Any:
    """The head of :mod:`qsd_plugin.methods.qgface` with the settings and class centres of the host's."""
    options, heads = cfg.QGFACE, cfg.MODEL.HEADS
    common = {"scale": heads.SCALE, "margin": heads.MARGIN, "h": options.H, "momentum": options.MOMENTUM}
    classes, dim = model.heads.weight.shape
    head = (
        qgface.AdaFaceHead(dim, classes, **common)
        if heads.NAME == "AdaFaceHead"
        else qgface.QGFaceHead(
            dim,
            classes,
            threshold=options.THRESHOLD,
            start=options.START or "debiased",
            reduction=options.REDUCTION,
            **common,
        )
    )
    head.to(model.heads.weight.dtype).load_state_dict(
        {"weight": model.heads.weight, **model.heads.statistics.state_dict(prefix="statistics.")}
    )
    return head.train()


def neck_in(pooled: torch.Tensor, neck: nn.Sequential) -> torch.Tensor:
    """What the batch norm at the end of the neck gets."""
    return neck[:-1](pooled)[..., 0, 0]


# Against the pure formulation.


@pytest.mark.parametrize("norm_from", ["neck_in", "neck_out"])
@pytest.mark.parametrize("reduced", [0, 12])
@pytest.mark.parametrize(
    ("head", "reduction"), [("AdaFaceHead", "all"), ("QGFaceHead", "all"), ("QGFaceHead", "active")]
)
def test_loss_and_gradients_are_those_of_the_pure_head(
    tmp_path: Path, head: str, reduction: str, reduced: int, norm_from: str
) -> None:
    """Three steps, so that the statistics move; every gradient, also of the backbone."""
    options = {"QGFACE.NORM_FROM": norm_from, "QGFACE.REDUCTION": reduction, "QGFACE.THRESHOLD": 0.4}
    cfg = head_cfg(head, tmp_path, **{"MODEL.HEADS.EMBEDDING_DIM": reduced, **options})
    model, other = small(cfg).double().train(), small(cfg).double().train()
    pure = pure_head(cfg, other)
    for step in range(3):
        model.zero_grad()
        loss = step_losses(model, step)["loss_cls"]
        loss.backward()
        other.zero_grad()
        pure.zero_grad()
        pooled = other.heads.pool_layer(other.backbone(other.preprocess_image(batch(step, torch.float64))))
        embedding = other.heads.bottleneck(pooled)[..., 0, 0]
        judged = neck_in(pooled, other.heads.bottleneck) if norm_from == "neck_in" else embedding
        expected = pure(qgface.unit_and_norm(embedding)[0], qgface.unit_and_norm(judged)[1], TARGETS)
        expected.loss.backward()
        torch.testing.assert_close(loss, expected.loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.heads.weight.grad, pure.weight.grad, rtol=1e-8, atol=1e-9)
        gradients = dict(model.named_parameters())
        for name, parameter in other.named_parameters():
            if name != "heads.weight" and parameter.grad is not None:
                torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-7, atol=1e-9, msg=name)
        torch.testing.assert_close(model.heads.statistics.state_dict(), pure.statistics.state_dict())
    if head == "QGFaceHead" and norm_from == "neck_in":
        low = qgface.image_quality(expected.scaler) < 0.4
        assert 0 < low.sum() < 8  # the gate had something to do


def outputs_of(model: Any, step: int = 0) -> dict[str, torch.Tensor]:
    maps = model.backbone(model.preprocess_image(batch(step, model.pixel_mean.dtype)))
    outputs: dict[str, torch.Tensor] = model.heads(maps, TARGETS)
    return outputs


def test_outputs_hold_what_the_contrastive_branch_needs(tmp_path: Path) -> None:
    model = build(head_cfg("QGFaceHead", tmp_path)).train()
    head = quality_head(model)
    outputs = outputs_of(model)
    assert {name: tuple(outputs[name].shape) for name in ("unit_embedding", "norm", "margin_scaler")} == {
        "unit_embedding": (8, 512),
        "norm": (8, 1),
        "margin_scaler": (8, 1),
    }
    torch.testing.assert_close(outputs["unit_embedding"].norm(dim=1), torch.ones(8))
    assert outputs["unit_embedding"].requires_grad
    assert not outputs["norm"].requires_grad
    torch.testing.assert_close(outputs["norm"], outputs["features"].norm(dim=1, keepdim=True))  # NECK_FEAT before
    torch.testing.assert_close(outputs["margin_scaler"], head.statistics.scaler(outputs["norm"], 0.333))
    cosine = outputs["unit_embedding"] @ F.normalize(head.weight).t()
    torch.testing.assert_close(outputs["pred_class_logits"], 16 * cosine)
    assert torch.equal(head.proxies(TARGETS), head.weight[TARGETS].detach())
    assert not head.proxies(TARGETS).requires_grad
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(5))
    assert "active" not in outputs


def test_threshold_may_be_moved_between_steps(tmp_path: Path) -> None:
    model = build(head_cfg("QGFaceHead", tmp_path, **{"QGFACE.THRESHOLD": 0.0})).train()
    head = quality_head(model)
    open_gate = outputs_of(model)["cls_outputs"]
    head.threshold = 1.0
    assert head.threshold == 1.0
    shut = outputs_of(model)["cls_outputs"]
    assert open_gate.abs().max() > 1
    assert shut.abs().max() < 0.2 * open_gate.abs().max()
    with pytest.raises(ConfigError, match=r"QGFACE\.THRESHOLD: got -0\.1; expected a number in \[0, 1\]\. Quality is"):
        head.threshold = -0.1


# The host around it.


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_and_features_are_those_of_the_hosts_head(tmp_path: Path, head: str) -> None:
    from fastreid.utils.events import EventStorage

    terms = ("CrossEntropyLoss", "TripletLoss", "WeightedTripletLoss")
    for feat in ("before", "after"):
        options = {"MODEL.LOSSES.NAME": terms, "MODEL.HEADS.NECK_FEAT": feat}
        plain = build(head_cfg("EmbeddingHead", tmp_path, **options)).train()
        ours = build(head_cfg(head, tmp_path, **options)).train()
        missing = ours.load_state_dict(plain.state_dict(), strict=False)
        assert missing.missing_keys == [f"heads.statistics.{name}" for name in ("mean", "std", "updates")]
        with EventStorage(0):
            expected, found = plain(batch()), ours(batch())
        assert list(found) == list(expected) == ["loss_cls", "loss_triplet", "loss_wtri"]
        for name in ("loss_triplet", "loss_wtri"):
            torch.testing.assert_close(found[name], expected[name])
        assert torch.equal(ours.eval()(batch()), plain.eval()(batch()))
        assert build(head_cfg(head, tmp_path, **{"MODEL.HEADS.NUM_CLASSES": 0})).eval()(batch()).shape == (8, 512)


def test_classification_loss_is_only_computed_where_it_is_asked_for(tmp_path: Path) -> None:
    model = build(head_cfg("AdaFaceHead", tmp_path, **{"MODEL.LOSSES.NAME": ("TripletLoss",)})).train()
    assert list(step_losses(model)) == ["loss_triplet"]
    scaled = {"MODEL.LOSSES.CE.SCALE": 0.25, "MODEL.LOSSES.CE.EPSILON": 0.1}
    whole = step_losses(build(head_cfg("AdaFaceHead", tmp_path, **{"MODEL.LOSSES.CE.EPSILON": 0.1})).train())
    quarter = step_losses(build(head_cfg("AdaFaceHead", tmp_path, **scaled)).train())
    torch.testing.assert_close(quarter["loss_cls"], whole["loss_cls"] / 4)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_label_smoothing_is_the_hosts(epsilon: float) -> None:
    from fastreid.modeling.losses import cross_entropy_loss

    logits = torch.randn(8, 5, generator=torch_stream(1), dtype=torch.float64).requires_grad_()
    expected = cross_entropy_loss(logits, TARGETS, epsilon)
    found = smoothed_cross_entropy(logits, TARGETS, epsilon).mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_rows_of_loss_zero_count_in_the_mean_as_in_the_paper(tmp_path: Path) -> None:
    """The host's own cross entropy divides by the rows whose loss is not exactly 0."""
    model = build(head_cfg("AdaFaceHead", tmp_path, **{"MODEL.LOSSES.CE.SCALE": 1.0})).train()
    logits = torch.full((8, 5), -200.0).scatter(1, TARGETS[:, None], 0.0)
    logits[0] = torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0])
    outputs = {**outputs_of(model), "cls_outputs": logits}
    from fastreid.utils.events import EventStorage

    with EventStorage(0):
        loss = model.losses(outputs, TARGETS)["loss_cls"]
    torch.testing.assert_close(loss, F.cross_entropy(logits[:1], TARGETS[:1]) / 8)


def test_precise_batch_norm_and_evaluation_leave_the_statistics_alone(tmp_path: Path) -> None:
    model = build(head_cfg("QGFaceHead", tmp_path)).train()
    step_losses(model)
    before = {name: value.clone() for name, value in model.heads.statistics.state_dict().items()}
    assert before["updates"] == 1
    with torch.no_grad():
        step_losses(model, 1)
        model.eval()(batch(2))
    torch.testing.assert_close(dict(model.heads.statistics.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("head", "start", "expected"),
    [
        ("AdaFaceHead", "", (20, 100, False)),
        ("QGFaceHead", "", (0, 0, True)),
        ("QGFaceHead", "zeros", (0, 0, False)),
        ("QGFaceHead", "adaface", (20, 100, False)),
        ("AdaFaceHead", "debiased", (0, 0, True)),
    ],
)
def test_statistics_start_as_the_config_says(
    tmp_path: Path, head: str, start: str, expected: tuple[float, float, bool]
) -> None:
    statistics = build(head_cfg(head, tmp_path, **{"QGFACE.START": start})).heads.statistics
    assert (statistics.mean.item(), statistics.std.item(), statistics.debias) == expected
    assert statistics.momentum == 0.2


def test_mixed_precision_takes_norms_and_logits_in_single_precision(tmp_path: Path) -> None:
    for reduced in (0, 12):
        model = build(head_cfg("QGFaceHead", tmp_path, **{"MODEL.HEADS.EMBEDDING_DIM": reduced})).train()
        exact = outputs_of(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = outputs_of(model)
        for name in ("norm", "margin_scaler", "cls_outputs", "unit_embedding"):
            assert outputs[name].dtype == torch.float32, name
        torch.testing.assert_close(outputs["norm"], exact["norm"], rtol=0.03, atol=0.05)


def test_norms_are_logged(tmp_path: Path) -> None:
    from fastreid.utils.events import EventStorage

    model = build(head_cfg("QGFaceHead", tmp_path, **{"QGFACE.THRESHOLD": 0.5})).train()
    model.heads._logged.period = 2
    with EventStorage(0) as storage:
        low = []
        for step in range(2):
            model(batch(step))
            mean, std = model.heads.statistics.current()
            with torch.no_grad():
                low.append(float((outputs_of(model, step)["margin_scaler"] < 0).double().mean()))
        logged = {name: value for name, (value, _) in storage.latest().items() if name.startswith("norms/")}
    assert logged.keys() == {"norms/mean", "norms/std", "norms/clipped", "norms/low_quality"}
    assert 0.5 * mean < logged["norms/mean"] < 2 * mean
    assert logged["norms/std"] > 0.1 * std
    assert logged["norms/clipped"] == 0
    assert logged["norms/low_quality"] == pytest.approx(sum(low) / 2)


def test_norm_behind_the_neck_is_warned_of_once_and_tells_less(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)
    quality_margin_heads._warn_of_norms_behind_the_neck.cache_clear()
    for _ in range(2):
        model = build(head_cfg("AdaFaceHead", tmp_path, **{"QGFACE.NORM_FROM": "neck_out"})).train()
    # A record comes twice where an earlier test has left the host's logger with a handler of its own.
    warned = {id(record): record.message for record in caplog.records if "neck_out" in record.message}
    assert list(warned.values()) == [
        "QGFACE.NORM_FROM neck_out: batch norm has brought the features to one scale, so their length hardly tells "
        "quality any more, and the margin follows little but chance. Use neck_in."
    ]
    outputs = outputs_of(model)
    torch.testing.assert_close(
        outputs["norm"],
        model.heads.bottleneck(outputs["features"][..., None, None]).flatten(1).norm(dim=1, keepdim=True),
    )


def face_cfg(**overrides: Any) -> Any:
    return base_face_cfg({**small_options("build_ir_backbone", "18x"), "MODEL.HEADS.NAME": "AdaFaceHead", **overrides})


@pytest.mark.parametrize("norm_from", ["neck_in", "neck_out"])
def test_face_networks_have_one_norm_that_of_their_embedding(
    norm_from: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)
    quality_margin_heads._warn_of_norms_behind_the_neck.cache_clear()
    model = build(face_cfg(**{"QGFACE.NORM_FROM": norm_from})).train()
    embedding = torch.randn(8, 24, 1, 1, generator=torch_stream(3))
    outputs = model.heads(embedding, TARGETS)
    torch.testing.assert_close(outputs["norm"], embedding.flatten(1).norm(dim=1, keepdim=True))
    assert "neck_out" not in caplog.text


def test_classifier_of_a_trained_head_is_read_as_cosines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --match-classes and --check-accuracy do, whatever the unread CLS_LAYER says."""
    cfg = head_cfg("AdaFaceHead", tmp_path)
    assert cfg.MODEL.HEADS.CLS_LAYER == "Linear"
    model = build(cfg)
    model.heads.weight.data[1].mul_(50)
    features = torch.randn(6, 512, generator=torch_stream(2))
    monkeypatch.setattr(published, "embed", lambda *_args, **_kwargs: features)
    expected = F.normalize(features) @ F.normalize(model.heads.weight).t() * 16
    torch.testing.assert_close(published._logits(cfg, model, []), expected.detach())


@pytest.mark.parametrize("head", HEADS)
def test_deployed_network_is_the_plain_hosts(tmp_path: Path, head: str) -> None:
    cfg = head_cfg(head, tmp_path)
    model = build(cfg)
    step_losses(model.train())
    model.eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    deploy.write_deploy(
        tmp_path / "deploy", cfg, tmp_path / "model_final.pth", metrics={}, config_hash="0", command=["train"]
    )
    run = deployed.load(tmp_path)
    assert run.cfg.MODEL.HEADS.NAME == "EmbeddingHead"
    assert not [name for name in run.model.state_dict() if "statistics" in name]
    assert torch.equal(run.model(batch()), model(batch()))


@pytest.mark.parametrize("head", HEADS)
def test_person_config_trains_on_cpu_with_the_options_it_names(head: str) -> None:
    """The command line is read out of the file's own comment."""
    from fastreid.config import get_cfg
    from fastreid.utils.events import EventStorage

    comment = MARKET.read_text().partition("On two CPU cores add:")[2].partition("_BASE_")[0]
    cfg = get_cfg()
    cfg.merge_from_file(str(MARKET))
    cfg.merge_from_list(shlex.split(comment.replace("#", " ")))
    cfg.merge_from_list(["MODEL.HEADS.NUM_CLASSES", 5, "MODEL.HEADS.NAME", head])
    model = build(cfg).train()
    with EventStorage(0):
        losses = model(batch())
    assert list(losses) == ["loss_cls", "loss_wtri", "loss_center"]
    sum(losses.values()).backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    assert (model.heads.cls_layer.s, model.heads.cls_layer.m, model.heads.statistics.debias) == (64, 0.4, True)
    assert (model.heads.threshold, model.heads.reduction) == {"A": (0, "all"), "Q": (0.2, "active")}[head[0]]
