"""QSD inside fast-reid: what it adds to the losses, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qsd_toy import (
    ANCHORS,
    IDENTITIES,
    LEVELS,
    QUALITY,
    base_model,
    batch,
    build,
    qsd_cfg,
    step,
    use_images,
    with_partners,
)

from qsd_plugin.core.errors import ConfigError, DataError, LabelError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.methods.qsd import QSDLoss, inbatch_pairs
from qsd_plugin.networks.taps import TapRecorder
from qsd_plugin.quality.labels import QualityLabels

host.activate()


@pytest.fixture(autouse=True)
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_images(tmp_path / "data", monkeypatch)


def test_inbatch_adds_one_term_and_keeps_the_base_losses_and_keys(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    model, plain = build(cfg), base_model(cfg)
    assert list(model.state_dict()) == list(plain.state_dict())
    got, expected = step(model, batch()), step(plain, batch())
    assert set(got) == {*expected, "loss_qsd"}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    assert all(loss.dim() == 0 for loss in got.values())


def test_inbatch_term_and_gradient_equal_the_loss_on_separately_recorded_levels(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    model, plain = build(cfg), base_model(cfg)
    got = step(model, batch())["loss_qsd"]
    got.backward()
    with TapRecorder(plain, LEVELS) as taps:
        step(plain, batch())
    levels = {name: tap.flatten(1) if tap.shape[2:] == (1, 1) else tap for name, tap in taps.items()}
    weights = dict(zip(LEVELS, (1.0, 1.0, 1.0, 1.0, 0.1), strict=True))
    first, second = inbatch_pairs(IDENTITIES, QUALITY)
    pair_1, pair_2 = ({name: tap[index] for name, tap in levels.items()} for index in (first, second))
    expected = QSDLoss(weights, missing="tie")(pair_1, pair_2, QUALITY[first], QUALITY[second]).total
    expected.backward()
    torch.testing.assert_close(got, expected)
    assert expected > 0.1
    for (name, parameter), (_, reference) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_partner_pairing_uses_two_forwards_and_host_losses_see_anchors_only(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path, **{"QSD.PAIRING": "partner"})
    model, plain = build(cfg), base_model(cfg)
    got = step(model, with_partners())
    with TapRecorder(plain, LEVELS) as taps_1:
        expected = step(plain, batch())
    with TapRecorder(plain, LEVELS) as taps_2:
        step(plain, {**batch(), "images": with_partners()["partner_images"]})
    flat_1, flat_2 = (
        {n: t.flatten(1) if t.shape[2:] == (1, 1) else t for n, t in taps.items()} for taps in (taps_1, taps_2)
    )
    weights = dict(zip(LEVELS, (1.0, 1.0, 1.0, 1.0, 0.1), strict=True))
    qsd = QSDLoss(weights, missing="tie")(flat_1, flat_2, QUALITY, 100 - QUALITY).total
    torch.testing.assert_close(got["loss_cls"], expected["loss_cls"])
    torch.testing.assert_close(got["loss_qsd"], qsd)
    # Running statistics move twice, as in the authors' program.
    assert model.backbone.bn1.num_batches_tracked == 2


def test_joint_partner_forward_runs_once_and_host_losses_see_anchors_only(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path, **{"QSD.PAIRING": "partner", "QSD.PARTNER_FORWARD": "joint"})
    model, plain = build(cfg), base_model(cfg)
    inputs = with_partners()
    got = step(model, inputs)
    joint = {"images": torch.cat([inputs["images"], inputs["partner_images"]]), "targets": IDENTITIES.repeat(2)}
    with TapRecorder(plain, ["heads:cls_outputs"]) as taps:
        step(plain, joint)
    expected = torch.nn.functional.cross_entropy(taps["heads:cls_outputs"][:8], IDENTITIES)
    torch.testing.assert_close(got["loss_cls"], expected)
    assert model.backbone.bn1.num_batches_tracked == 1


def test_invalid_partner_is_never_taught(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **{"QSD.PAIRING": "partner", "QSD.MISSING": "exclude"}))
    inputs = with_partners()
    inputs["partner_valid"] = torch.zeros(8)
    loss = step(model, inputs)["loss_qsd"]
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_reverse_control_turns_every_direction_round(tmp_path: Path) -> None:
    """The teacher's taps get no gradient; under ``reverse`` it is the other image of each pair."""
    teachers = []
    for control in ("none", "reverse"):
        model = build(qsd_cfg(tmp_path, **{"QUALITY.CONTROL": control, "QSD.TAPS": ["heads.bottleneck"]}))
        taught: list[torch.Tensor] = []
        model.heads.bottleneck.register_forward_hook(
            lambda m, i, out, taught=taught: out.retain_grad() or taught.append(out)
        )
        step(model, batch())["loss_qsd"].backward()
        teachers.append(taught[0].grad.flatten(1).abs().sum(dim=1) == 0)
    best, worst = (torch.tensor([1, 6]), torch.tensor([0, 4]))
    assert teachers[0][best].all()
    assert not teachers[0][worst].any()
    assert teachers[1][worst].all()
    assert not teachers[1][best].any()


def test_zero_weight_computes_but_does_not_train(tmp_path: Path) -> None:
    losses = step(build(qsd_cfg(tmp_path, **{"QSD.WEIGHT": 0.0})), batch())
    assert losses["loss_qsd"] == 0


def test_precise_bn_pass_and_evaluation_are_the_base_alone(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    model, plain = build(cfg), base_model(cfg)
    with torch.no_grad():
        # The host's precise-BN pass: training mode, no gradients, targets of -1, images of another data set.
        losses = step(model, {**batch(), "img_paths": ["unknown.jpg"] * 8, "targets": torch.full((8,), -1)})
    assert "loss_qsd" not in losses
    step(plain, batch())
    model.eval(), plain.eval()
    torch.testing.assert_close(model(batch()), plain(batch()))


def test_statistics_reach_the_event_storage_at_the_logging_period(tmp_path: Path) -> None:
    from fastreid.utils.events import EventStorage

    model = build(qsd_cfg(tmp_path))
    with EventStorage(0) as storage:
        for index in range(model._qsd_stats.period):
            # In the first step all images have the same label, and no pair teaches.
            model(batch() if index else {**batch(), "img_paths": ANCHORS[:1] * 8})
        written = storage.latest()
    assert written["qsd/empty"][0] == pytest.approx(1 / model._qsd_stats.period)
    assert written["qsd/pairs"][0] == 12
    assert 0 < written["qsd/kept"][0] <= 12
    assert written[f"qsd/loss/{LEVELS[0]}"][0] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"QSD.BASE": "Basline"}, r"QSD.BASE: got 'Basline'.*Did you mean 'Baseline'"),
        ({"QSD.BASE": "QSD"}, r"QSD.BASE: got 'QSD -> QSD'"),
        ({"QSD.PAIRING": "batch"}, "QSD.PAIRING: got 'batch'; expected inbatch or partner"),
        ({"QSD.PRESET": "oficial"}, "Did you mean 'official'"),
        ({"DATALOADER.NUM_INSTANCE": 1}, "NUM_INSTANCE: got 1"),
        ({"DATALOADER.SAMPLER_TRAIN": "TrainingSampler"}, "SAMPLER_TRAIN.*NaiveIdentitySampler"),
        ({"QSD.TAPS": ["backbone.layer5"]}, r"backbone\.layer5.*Did you mean"),
        ({"QSD.TAPS": ["backbone=heavy"]}, "Weight in QSD.TAPS: got 'backbone=heavy'"),
        ({"QSD.TAPS": ["backbone", "backbone"]}, "each level once"),
        ({"QSD.WEIGHT": -1.0}, "QSD.WEIGHT: got -1.0"),
        ({"QUALITY.FILES": ("a.npz", "b.npz")}, "one label file per training set"),
        ({"QUALITY.CONTROL": "revers"}, "Did you mean 'reverse'"),
        ({"QUALITY.SOURCE": "embedding_norm", "QUALITY.CONTROL": "shuffle"}, "act on stored labels"),
    ],
)
def test_impossible_settings_are_refused_when_the_model_is_built(tmp_path: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(qsd_cfg(tmp_path, **overrides))


def test_tap_that_is_never_called_says_which_to_use(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **{"QSD.TAPS": ["backbone.layer3"]}))
    with pytest.raises(ConfigError, match=r"no output in the forward pass.*backbone.layer3.*the last block"):
        step(model, batch())


def test_final_stage_without_its_baseline_prints_the_command_that_makes_it(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **{"RECIPE.NAME": "qsd"}))
    with pytest.raises(ConfigError, match=r"MODEL.WEIGHTS is empty.*--stage baseline"):
        step(model, batch())


def test_missing_label_file_prints_the_command_that_makes_it(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **{"QUALITY.FILES": ("missing.npz",)}))
    model.eval()(batch())  # evaluation needs no labels
    with pytest.raises(LabelError, match=r"missing\.npz.*--stage labels"):
        step(model.train(), batch())


def test_labels_of_other_images_are_refused_with_examples(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    labels = QualityLabels(np.ones(1), np.ones(1), np.ones(1), ("Other/train/1.jpg",), {"scale": "minmax"})
    labels.save(tmp_path / "labels.npz")
    with pytest.raises(LabelError, match=r"covers 0 of 16 training images.*Other/train/1.jpg"):
        step(build(cfg), batch())


def test_embedding_norm_source_ranks_by_the_norm_before_the_neck_and_keeps_its_state(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **{"QUALITY.SOURCE": "embedding_norm", "QUALITY.FILES": ()}))
    with TapRecorder(model, ["heads.pool_layer"]) as taps:
        step(model, batch())
    norms = taps["heads.pool_layer"].flatten(1).norm(dim=1)
    quality, valid = model._qsd_quality(ANCHORS, taps["heads.pool_layer"].flatten(1), torch.device("cpu"))
    assert valid.all()
    assert torch.equal(quality.argsort(), norms.argsort())
    torch.testing.assert_close(model.state_dict()["_qsd_quality.source.mean"], norms.mean().detach())


def test_partner_pairing_without_partner_images_is_explained(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **{"QSD.PAIRING": "partner"}))
    with pytest.raises(DataError, match="partner_images"):
        step(model, batch())


FAMILIES = {
    "ResNet": ({}, [(128, 8, 4), (256, 4, 2), (512, 4, 2), (512,), (2,)]),
    "ResNet50 with non-local blocks": (
        {"MODEL.BACKBONE.DEPTH": "50x", "MODEL.BACKBONE.FEAT_DIM": 2048, "MODEL.BACKBONE.WITH_NL": True},
        [(512, 8, 4), (1024, 4, 2), (2048, 4, 2), (2048,), (2,)],
    ),
    "ResNeSt": (
        {
            "MODEL.BACKBONE.NAME": "build_resnest_backbone",
            "MODEL.BACKBONE.DEPTH": "50x",
            "MODEL.BACKBONE.FEAT_DIM": 2048,
        },
        [(512, 8, 4), (1024, 4, 2), (2048, 4, 2), (2048,), (2,)],
    ),
    "OSNet": (
        {
            "MODEL.BACKBONE.NAME": "build_osnet_backbone",
            "MODEL.BACKBONE.DEPTH": "x0_25",
            "MODEL.BACKBONE.FEAT_DIM": 128,
        },
        [(96, 4, 2), (128, 4, 2), (128, 4, 2), (128,), (2,)],
    ),
    "MobileNetV2": (
        {
            "MODEL.BACKBONE.NAME": "build_mobilenetv2_backbone",
            "MODEL.BACKBONE.DEPTH": "1.0x",
            "MODEL.BACKBONE.FEAT_DIM": 1280,
        },
        [(32, 8, 4), (96, 4, 2), (320, 2, 1), (1280,), (2,)],
    ),
    "ViT": (
        {
            "MODEL.BACKBONE.NAME": "build_vit_backbone",
            "MODEL.BACKBONE.DEPTH": "small",
            "MODEL.BACKBONE.FEAT_DIM": 768,
        },
        [(768, 4, 2), (768, 4, 2), (768, 4, 2), (768,), (2,)],
    ),
    "MGN": (
        {
            "QSD.BASE": "MGN",
            "MODEL.BACKBONE.DEPTH": "50x",
            "MODEL.BACKBONE.FEAT_DIM": 2048,
            "MODEL.HEADS.EMBEDDING_DIM": 256,
        },
        [(1024, 6, 2), (2048, 6, 2), (2048, 6, 2), (2048, 6, 2), (256,), (2,)],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_levels_of_every_backbone_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Shapes for 64x32 inputs (MGN: 96x32, for its three parts); the gradient must reach the first layer."""
    overrides, shapes = FAMILIES[family]
    model = build(qsd_cfg(tmp_path, **{"MODEL.BACKBONE.LAST_STRIDE": 1, **overrides}))
    seen: dict[str, tuple[int, ...]] = {}
    original = QSDLoss.in_batch

    def spy(self: QSDLoss, taps: Any, *rest: Any) -> Any:
        seen.update({name: tuple(tap.shape[1:]) for name, tap in taps.items()})
        return original(self, taps, *rest)

    monkeypatch.setattr(QSDLoss, "in_batch", spy)
    inputs = batch()
    if family == "MGN":
        inputs["images"] = torch.rand(8, 3, 96, 32, generator=torch.Generator().manual_seed(3)) * 255
    step(model, inputs)["loss_qsd"].backward()
    assert list(seen.values()) == shapes
    first = next(parameter for parameter in model.parameters() if parameter.dim() == 4)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_unknown_backbone_family_asks_for_levels(tmp_path: Path) -> None:
    overrides = {
        "MODEL.BACKBONE.NAME": "build_repvgg_backbone",
        "MODEL.BACKBONE.DEPTH": "A0",
        "MODEL.BACKBONE.FEAT_DIM": 1280,
    }
    with pytest.raises(ConfigError, match=r"QSD.TAPS is empty.*QSD.TAPS \"\["):
        build(qsd_cfg(tmp_path, **overrides))
