"""QGFace inside fast-reid: a step is that of the pure parts, resumes exactly, evaluates as its base and refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from qgface_toy import DIM, ROWS, Formula, batch, build, copied, qgface_cfg, sgd, step, train

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.methods.qgface import NormStatistics, ProxyQueue, QGContrast, unit_and_norm
from qsd_plugin.networks import TapRecorder, ema_update

host.activate()

HEAD = {"threshold": 0.4, "scale": 24.0, "margin": 0.4, "momentum": 0.2}
CONTRAST = {"threshold": 0.4, "scale": 24.0, "momentum": 0.2}
#: Config, and arguments of head, contrastive branch and queue that mean the same.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "figure": ({}, HEAD, CONTRAST, {}),
    "code default": (
        {"QGFACE.PROFILE": "code_default"},
        HEAD,
        {**CONTRAST, "coupling": "double", "detach_positive": False},
        {},
    ),
    "explicit keys win": (
        {
            "QGFACE.PROFILE": "code_default",
            "QGFACE.CONTRAST.COUPLING": "single",
            "QGFACE.CONTRAST.MASK": "instance",
            "QGFACE.CONTRAST.MASK_FILL": "exclude",
            "QGFACE.CONTRAST.WEIGHTING": "cos",
            "QGFACE.CONTRAST.RANGE": "whole",
            "QGFACE.CONTRAST.SELECT": "mean",
            "QGFACE.CONTRAST.MARGIN_METHOD": "dynamic",
            "QGFACE.CONTRAST.RESCALE": False,
            "QGFACE.CONTRAST.REDUCTION": "active",
            "QGFACE.CONTRAST.THRESHOLD": 0.6,
            "QGFACE.CONTRAST.QUEUE": "fifo",
            "QGFACE.START": "zeros",
            "QGFACE.REDUCTION": "active",
        },
        {**HEAD, "start": "zeros", "reduction": "active"},
        {
            **CONTRAST,
            "detach_positive": False,
            "mask": "instance",
            "mask_fill": "exclude",
            "weighting": "cos",
            "weight_range": "whole",
            "select": "mean",
            "margin_method": "dynamic",
            "rescale": False,
            "reduction": "active",
            "threshold": 0.6,
        },
        {"compensate": False},
    ),
    "renormalised, static": (
        {
            "QGFACE.CONTRAST.RENORM": True,
            "QGFACE.CONTRAST.MARGIN_METHOD": "static",
            "QGFACE.CONTRAST.MARGIN": 0.1,
            "QGFACE.CONTRAST.WEIGHTING": "linear",
            "QGFACE.CONTRAST.SELECT": "high",
        },
        HEAD,
        {**CONTRAST, "margin_method": "static", "margin": 0.1, "weighting": "linear", "select": "high"},
        {"renormalise": True},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_eight_steps_are_those_of_the_pure_parts(tmp_path: Path, name: str) -> None:
    """Losses, gradients, queue, statistics and weights; 8 x 12 entries go through 40 slots."""
    overrides, head, contrast, queue = RUNS[name]
    model = build(qgface_cfg(tmp_path, **overrides))
    formula = Formula(copy.deepcopy(model), QGContrast(**contrast), head=head, queue={"size": 40, **queue})
    pairs = {"heads.weight": "head.weight"}
    pairs |= {f"backbone.{key}": f"encoder.{key}" for key, _ in model.backbone.named_parameters()}
    optimizers = sgd(model), sgd(formula)
    contrasted = 0.0
    for index in range(8):
        got, expected = step(model, copied(batch(index))), formula(copied(batch(index)))
        assert got.keys() == expected.keys()
        for loss in expected:
            torch.testing.assert_close(got[loss], expected[loss], rtol=1e-5, atol=1e-6, msg=f"{loss} of {index}")
        for losses, optimizer in zip((got, expected), optimizers, strict=True):
            optimizer.zero_grad()
            sum(losses.values()).backward()
        for own, other in pairs.items():
            gradients = model.get_parameter(own).grad, formula.get_parameter(other).grad
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5, msg=f"{own} of step {index}")
        for optimizer in optimizers:
            optimizer.step()
        contrasted += float(model.qgface_shares()["contrasted"])
        for own, other in zip(model.qgface_queue.buffers(), formula.queue.buffers(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.qgface_contrast.gap, formula.contrast.gap)
        for own, other in zip(model.heads.statistics.buffers(), formula.head.statistics.buffers(), strict=True):
            torch.testing.assert_close(own, other)
    assert contrasted > 0
    assert model.qgface_queue.filled == 40


def test_moco_s_steps_are_those_of_the_pure_parts(tmp_path: Path) -> None:
    """The clean view is the anchor, the degraded one goes through the momentum encoder, which follows afterwards."""
    from fastreid.utils.events import EventStorage

    options = {"QGFACE.CONTRAST.QUEUE": "moco", "QGFACE.CONTRAST.KEY_MOMENTUM": 0.9}
    model = build(qgface_cfg(tmp_path, **options))
    plain = copy.deepcopy(model)
    follower = copy.deepcopy(model.backbone)
    key_statistics, queue = NormStatistics(momentum=0.2, debias=True), ProxyQueue(40, DIM, compensate=False)
    contrast = QGContrast(**CONTRAST)
    optimizers = sgd(model), sgd(plain)
    for index in range(8):
        inputs = batch(index)
        got = step(model, copied(inputs))
        labels = inputs["targets"]
        clean, poor = ((inputs[key] - model.pixel_mean) / model.pixel_std for key in ("images", "degraded_images"))
        with EventStorage(0):
            outputs = plain.heads(plain.backbone(clean), labels)
            losses = plain.losses(outputs, labels)
        with torch.no_grad():
            key, norm = unit_and_norm(follower(poor).flatten(1))
            key_statistics.update(norm)
            ema_update(follower, plain.backbone, 0.9)
        own = queue.enqueue(key[None], labels)
        scaler = key_statistics.scaler(norm)
        result = contrast(
            outputs["unit_embedding"], key, queue.negatives(), labels, outputs["margin_scaler"], scaler, own
        )
        expected = {**losses, "loss_qgface": result.loss}
        assert got.keys() == expected.keys() == {"loss_cls", "loss_qgface"}
        for loss in expected:
            torch.testing.assert_close(got[loss], expected[loss], rtol=1e-4, atol=1e-5, msg=f"{loss} of {index}")
        for terms, optimizer in zip((got, expected), optimizers, strict=True):
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
        torch.testing.assert_close(model.qgface_queue.embeddings, queue.embeddings, rtol=1e-3, atol=1e-4)
    assert model.qgface_queue.filled == 40
    moved = (model.qgface_momentum.backbone.conv1.weight - model.backbone.conv1.weight).abs().max()
    assert moved > 0
    assert not any(parameter.requires_grad for parameter in model.qgface_momentum.parameters())


def test_only_the_degraded_view_learns_from_the_figure_s_contrast(tmp_path: Path) -> None:
    """Exactly no gradient reaches the clean view; with the code's defaults it does."""
    for profile, expected in (("figure", True), ("code_default", False)):
        model = build(qgface_cfg(tmp_path, **{"QGFACE.PROFILE": profile}))
        with TapRecorder(model, ["heads:unit_embedding"]) as seen:
            losses = step(model, copied(batch()))
        (gradient,) = torch.autograd.grad(losses["loss_qgface"], seen["heads:unit_embedding"])
        clean, poor = gradient.chunk(2)
        assert poor.abs().max() > 0
        assert bool(clean.abs().max() == 0) == expected


def test_base_alone_learns_both_views_without_a_queue(tmp_path: Path) -> None:
    model = build(qgface_cfg(tmp_path, **{"QGFACE.CONTRAST.QUEUE": "none", "MODEL.HEADS.NAME": "AdaFaceHead"}))
    plain_cfg = qgface_cfg(tmp_path, **{"MODEL.META_ARCHITECTURE": "Baseline", "MODEL.HEADS.NAME": "AdaFaceHead"})
    plain_cfg.QGFACE.VIEWS.MODE = "none"
    plain = build(plain_cfg, seed=1)
    plain.load_state_dict(model.state_dict())
    inputs = batch()
    joined = {
        "images": torch.cat([inputs["images"], inputs["degraded_images"]]),
        "targets": inputs["targets"].repeat(2),
    }
    got, expected = step(model, copied(inputs)), step(plain, joined)
    assert got == expected
    assert set(got) == {"loss_cls"}


def test_weight_zero_leaves_the_gradients_of_no_branch(tmp_path: Path) -> None:
    gradients = []
    for overrides in ({"QGFACE.CONTRAST.WEIGHT": 0.0}, {"QGFACE.CONTRAST.QUEUE": "none"}):
        model = build(qgface_cfg(tmp_path, **overrides))
        sum(step(model, copied(batch())).values()).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.requires_grad})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_host_losses_see_both_views(tmp_path: Path) -> None:
    names = ("CrossEntropyLoss", "TripletLoss")
    model = build(qgface_cfg(tmp_path, **{"MODEL.LOSSES.NAME": names, "MODEL.LOSSES.TRI.HARD_MINING": True}))
    got = step(model, copied(batch()))
    assert set(got) == {"loss_cls", "loss_triplet", "loss_qgface"}
    assert got["loss_triplet"] > 0


@pytest.mark.parametrize("queue", ["proxy", "moco"])
def test_resumed_training_goes_on_bit_for_bit_and_not_without_the_queue(tmp_path: Path, queue: str) -> None:
    """From a queue that is partly filled."""
    from fastreid.utils.checkpoint import Checkpointer

    cfg = qgface_cfg(
        tmp_path,
        **{"QGFACE.CONTRAST.QUEUE": queue, "QGFACE.CONTRAST.MARGIN_METHOD": "dynamic", "QGFACE.THRESHOLD": 0.5},
    )
    batches = [batch(index) for index in range(6)]
    whole = build(cfg)
    curve = train(whole, sgd(whole), list(map(copied, batches)))

    def resumed(state: dict[str, Any]) -> tuple[list[float], Any]:
        model = build(cfg, seed=1)
        optimizer = sgd(model)
        torch.save(state, tmp_path / "model_0001.pth")
        Checkpointer(model, str(tmp_path), optimizer=optimizer).load(str(tmp_path / "model_0001.pth"))
        return train(model, optimizer, list(map(copied, batches[2:]))), model

    first = build(cfg)
    optimizer = sgd(first)
    assert train(first, optimizer, list(map(copied, batches[:2]))) == curve[:2]
    assert 0 < first.qgface_queue.filled < 40
    state = {"model": dict(first.state_dict()), "optimizer": optimizer.state_dict()}
    losses, model = resumed(copy.deepcopy(state))
    assert losses == curve[2:]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    for name in [name for name in state["model"] if name.startswith("qgface_queue.")]:
        state["model"].pop(name)
    assert resumed(state)[0][0] != pytest.approx(curve[2], rel=1e-3)


def test_a_plain_checkpoint_fills_the_momentum_encoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = build(qgface_cfg(tmp_path), seed=5)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("qgface_")}
    model = build(qgface_cfg(tmp_path, **{"QGFACE.CONTRAST.QUEUE": "moco"}))
    model.load_state_dict(state, strict=False)
    for name, value in model.qgface_momentum.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    assert "of the momentum encoder (QGFACE.CONTRAST.QUEUE moco): they start as copies" in caplog.text


def test_evaluation_and_precise_bn_are_the_base_s(tmp_path: Path) -> None:
    model = build(qgface_cfg(tmp_path))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # the host's precise-BN pass: training mode, targets of -1
        for inputs in (batch(), {key: value for key, value in batch().items() if key != "degraded_images"}):
            losses = step(model, {**copied(inputs), "targets": torch.full((ROWS,), -1)})
            assert "loss_qgface" not in losses
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    model.eval()
    embedding = model(copied(batch()))
    assert embedding.shape == (ROWS, DIM)
    cfg = qgface_cfg(tmp_path, **{"MODEL.META_ARCHITECTURE": "Baseline", "QGFACE.VIEWS.MODE": "none"})
    plain = build(cfg, seed=2)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("qgface_")})
    assert torch.equal(plain.eval()(copied(batch())), embedding)


def test_schedules_follow_the_epoch(tmp_path: Path) -> None:
    options = {
        "SOLVER.MAX_EPOCH": 5,
        "QGFACE.CONTRAST.START_EPOCH": 1,
        "QGFACE.CONTRAST.STOP_EPOCH": 4,
        "QGFACE.CONTRAST.WARMUP_EPOCHS": 2,
        "QGFACE.CONTRAST.PROGRESSIVE": True,
        "QGFACE.CONTRAST.WEIGHT": 2.0,
        "QGFACE.CONTRAST.THRESHOLD": 0.6,
    }
    model = build(qgface_cfg(tmp_path, **options))
    losses = step(model, copied(batch()))
    assert losses["loss_qgface"] == 0
    assert model.qgface_queue.filled == 2 * ROWS  # filled all the same
    found = []
    for epoch in range(6):
        model.start_qgface_epoch(epoch)
        found.append((model._qgface_weight, model.heads.threshold, model.qgface_threshold, model.qgface_queue.limit))
    assert found == [
        (0.0, 0.0, 0.0, 12),
        (2.0, 0.2, 0.3, 19),
        (2.0, 0.4, 0.6, 26),
        (2.0, 0.4, 0.6, 33),
        (0.0, 0.4, 0.6, 40),
        (0.0, 0.4, 0.6, 40),
    ]


def test_state_is_left_out_of_broadcasts_and_nothing_else(tmp_path: Path) -> None:
    model = build(qgface_cfg(tmp_path, **{"QGFACE.CONTRAST.QUEUE": "moco"}))
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert {"qgface_queue.embeddings", "qgface_contrast.gap", "heads.statistics.mean"} <= ignored
    assert ignored <= {name for name, _ in model.named_buffers()}
    assert not any(name.startswith(("backbone.", "qgface_momentum.")) for name in ignored)


def test_deployed_network_is_the_base_s(tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid import deploy, deployed

    person = {
        "MODEL.BACKBONE.NAME": "build_osnet_backbone",
        "MODEL.BACKBONE.DEPTH": "x0_25",
        "MODEL.BACKBONE.FEAT_DIM": 128,
        "MODEL.BACKBONE.WIDTH": 1.0,
        "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool",
        "MODEL.HEADS.WITH_BNNECK": True,
        "QGFACE.CONTRAST.QUEUE": "moco",
    }
    cfg = qgface_cfg(tmp_path, **person)
    model = build(cfg)
    step(model, copied(batch()))
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    deploy.write_deploy(
        tmp_path / "deploy", cfg, tmp_path / "model_final.pth", metrics={}, config_hash="", command=["train"]
    )
    state = torch.load(tmp_path / "deploy" / "model.pth", weights_only=True)["model"]
    assert not any("qgface" in name or "statistics" in name for name in state)
    assert "QGFACE" not in (tmp_path / "deploy" / "config.yaml").read_text()
    network = deployed.load(tmp_path / "deploy").model
    torch.testing.assert_close(network(copied(batch())), model.eval()(copied(batch())))


def test_qsd_on_top_distils_the_clean_views(tmp_path: Path) -> None:
    """Its levels are those of the first N of 2 N images; the degraded views change nothing but batch norm."""
    options = {
        "MODEL.META_ARCHITECTURE": "QSD",
        "QSD.BASE": "QGFace",
        "QSD.TAPS": ["heads.bottleneck"],
        "QUALITY.SOURCE": "embedding_norm",
        "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
        "DATALOADER.NUM_INSTANCE": 2,
    }
    model = build(qgface_cfg(tmp_path, **options))
    inputs = {**batch(), "targets": torch.arange(ROWS) // 2}
    seen: list[Any] = []
    whole = model._qsd_loss.in_batch
    model._qsd_loss.in_batch = lambda levels, *rest: seen.append(levels) or whole(levels, *rest)
    got = step(model, copied(inputs))
    assert set(got) == {"loss_cls", "loss_qgface", "loss_qsd"}
    assert [level.shape for level in seen[0].values()] == [(ROWS, DIM)]
    alone = build(qgface_cfg(tmp_path))
    with TapRecorder(alone, ["heads:features"]) as recorded:
        expected = step(alone, copied(inputs))
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    torch.testing.assert_close(next(iter(seen[0].values())), recorded["heads:features"][:ROWS])


def test_epoch_s_shares_are_told_with_a_warning(tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid.qgface_epochs import shares_of_all_ranks, warnings

    model = build(qgface_cfg(tmp_path))
    shares = []
    for index in range(3):
        with TapRecorder(model, ["heads:margin_scaler"]) as outputs:
            step(model, copied(batch(index)))
        low = ((outputs["heads:margin_scaler"][:, 0] + 1) / 2 < 0.4).float()
        pair = (low[:ROWS] + low[ROWS:] > 0).float()
        shares.append([low.mean(), low[:ROWS].mean(), low[ROWS:].mean(), pair.mean()])
    expected = torch.tensor(shares).mean(dim=0).tolist()
    names = ("low_quality", "low_quality_clean", "low_quality_degraded", "contrasted")
    assert shares_of_all_ranks(model) == pytest.approx(dict(zip(names, expected, strict=True)))
    assert expected[3] > 0
    assert warnings(shares_of_all_ranks(model), 0.4) == []
    few = {"low_quality": 0.004, "low_quality_clean": 0.0, "low_quality_degraded": 0.008, "contrasted": 0.006}
    (told,) = warnings(few, 0.2)
    assert told.startswith(
        "0.4% of the views are of a quality below 0.2 (clean 0.0%, degraded 0.8%), 0.6% of the pairs are contrasted: "
        "less than 1%"
    )
    (told,) = warnings({**few, "low_quality": 0.02, "contrasted": 0.0}, 0.2)
    assert "0.0% of the pairs are contrasted: less than 1%, so the contrastive branch hardly learns" in told


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"QGFACE.CONTRAST.QUEUE_SIZE": 11},
            r"QGFACE.CONTRAST.QUEUE_SIZE: got 11; expected at least 12 = 2 views x 6 images x 1 ranks",
        ),
        ({"QGFACE.CONTRAST.QUEUE": "moco", "QGFACE.CONTRAST.QUEUE_SIZE": 5}, "expected at least 6 = 1 views x 6"),
        ({"QGFACE.THRESHOLD": 1.5}, r"QGFACE.THRESHOLD: got 1.5; expected a number in \[0, 1\]"),
        ({"QGFACE.THRESHOLD": -0.1}, "got -0.1"),
        ({"QGFACE.CONTRAST.THRESHOLD": 1.2}, "QGFACE.CONTRAST.THRESHOLD: got 1.2"),
        (
            {"QGFACE.VIEWS.OUTPUT_ORDER": "bgr"},
            "QGFACE.VIEWS.OUTPUT_ORDER: got 'bgr'; expected rgb: fast-reid evaluates and deploys with RGB images",
        ),
        (
            {"MODEL.HEADS.NAME": "EmbeddingHead"},
            "MODEL.HEADS.NAME: got 'EmbeddingHead'; expected a head with norm statistics",
        ),
        ({"QGFACE.VIEWS.MODE": "single"}, "QGFACE.VIEWS.MODE: got 'single'; expected pair"),
        ({"QGFACE.VIEWS.MODE": "pairs"}, "QGFACE.VIEWS.MODE: got 'pairs'.*Did you mean 'pair'"),
        ({"QGFACE.PROFILE": "figur"}, "QGFACE.PROFILE: got 'figur'.*Did you mean 'figure'"),
        ({"QGFACE.CONTRAST.QUEUE": "proxi"}, "QGFACE.CONTRAST.QUEUE: got 'proxi'.*Did you mean 'proxy'"),
        ({"QGFACE.CONTRAST.COUPLING": "duble"}, "coupling: got 'duble'.*Did you mean 'double'"),
        ({"QGFACE.CONTRAST.POSITIVE": "cut"}, "QGFACE.CONTRAST.POSITIVE: got 'cut'"),
        ({"QGFACE.CONTRAST.WEIGHT": -1.0}, "QGFACE.CONTRAST.WEIGHT: got -1.0; expected a number >= 0"),
        ({"QGFACE.CONTRAST.KEY_MOMENTUM": 1.1}, "QGFACE.CONTRAST.KEY_MOMENTUM: got 1.1"),
        ({"QGFACE.CONTRAST.START_EPOCH": 1}, "QGFACE.CONTRAST.START_EPOCH: got 1; expected 0 to 0"),
        ({"QGFACE.CONTRAST.STOP_EPOCH": -1}, "QGFACE.CONTRAST.STOP_EPOCH: got -1; expected above START_EPOCH 0"),
        ({"QGFACE.CONTRAST.WARMUP_EPOCHS": 2}, "QGFACE.CONTRAST.WARMUP_EPOCHS: got 2"),
        ({"QGFACE.BASE": "QSD"}, "QGFACE.BASE: got 'QSD'.*QSD goes on top: .*QSD.BASE QGFace"),
        ({"QGFACE.BASE": "QGFace"}, "QGFACE.BASE: got 'QGFace -> QGFace'"),
        ({"QGFACE.BASE": "Basline"}, "QGFACE.BASE: got 'Basline'.*Did you mean 'Baseline'"),
        ({"MODEL.META_ARCHITECTURE": "QUD", "QUD.BASE": "QGFace", "QUD.HOST_LOSSES": True}, "expected QUD or QGFace"),
        (
            {"MODEL.META_ARCHITECTURE": "QSD", "QSD.BASE": "QGFace", "QSD.PAIRING": "partner"},
            "QSD.PAIRING: got 'partner'; expected inbatch over QGFace",
        ),
    ],
)
def test_impossible_settings_are_refused_when_the_model_is_built(tmp_path: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(qgface_cfg(tmp_path, **overrides))


def test_a_batch_of_single_views_is_refused(tmp_path: Path) -> None:
    model = build(qgface_cfg(tmp_path))
    inputs = {key: value for key, value in batch().items() if key != "degraded_images"}
    with pytest.raises(DataError, match=r"single view .*degraded_images beside images.*QGFACE.VIEWS.MODE pair"):
        step(model, inputs)
