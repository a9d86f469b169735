"""Face networks, margins and face weights inside the host, with the settings of configs/Base-Face.yml."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from face_toy import BASE_FACE, SMALL, base_face_cfg, small_options
from torch import nn

from qsd_plugin import networks
from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.meta_arch.qsd import build_loss, resolve_taps
from qsd_plugin.hosts.fastreid.registries import registered_names
from qsd_plugin.hosts.fastreid.taps import default_taps, to_level
from tools import convert_weights

host.activate()

FAMILIES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "18x": ("build_iresnet_backbone", "arcface", networks.iresnet18),
    "50x": ("build_iresnet_backbone", "qud", networks.iresnet50),
    "mbf": ("build_mobilefacenet_backbone", "arcface", networks.mobilefacenet),
    "mbf_large": ("build_mobilefacenet_backbone", "arcface", networks.mobilefacenet_large),
    "qud": ("build_mobilefacenet_backbone", "qud", networks.mobilefacenet_qud),
}
#: In the order of FAMILIES; shapes at 48 pixels and a sixteenth of the width.
TAPS = {
    "18x": {"layer1": (4, 24, 24), "layer2": (8, 12, 12), "layer3": (16, 6, 6), "layer4": (32, 3, 3)},
    "50x": {"layer1": (4, 24, 24), "layer2": (8, 12, 12), "layer3": (16, 6, 6), "layer4": (32, 3, 3)},
    "mbf": {"layers.1": (8, 24, 24), "layers.3": (8, 12, 12), "layers.5": (16, 6, 6), "conv_sep": (32, 3, 3)},
    "mbf_large": {"layers.1": (16, 24, 24), "layers.3": (16, 12, 12), "layers.5": (32, 6, 6), "conv_sep": (32, 3, 3)},
    "qud": {"conv2_dw": (4, 24, 24), "conv_3": (4, 12, 12), "conv_4": (8, 6, 6), "conv_6_sep": (32, 3, 3)},
}


def face_cfg(depth: str = "mbf", **overrides: Any) -> Any:
    return base_face_cfg({**small_options(FAMILIES[depth][0], depth), **overrides})


def build(cfg: Any) -> Any:
    from fastreid.modeling.meta_arch import build_model

    return build_model(cfg)


def trained(depth: str) -> nn.Module:
    """A small network whose batch norms have seen something."""
    torch.manual_seed(3)
    network: nn.Module = FAMILIES[depth][2](**SMALL)
    network(torch.randn(8, 3, 48, 48, generator=torch_stream(4)))
    return network.eval()


def pixels(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 48, 48, generator=torch_stream(5)) * 255


def train_step(model: Any, count: int = 4) -> dict[str, torch.Tensor]:
    from fastreid.utils.events import EventStorage

    targets = torch.arange(count) % 5
    with EventStorage(0):
        losses: dict[str, torch.Tensor] = model.train()({"images": pixels(count), "targets": targets})
    return losses


def run_tool(monkeypatch: pytest.MonkeyPatch, source: str, depth: str, weights: Path, output: Path) -> None:
    options = [item for pair in small_options(FAMILIES[depth][0], depth).items() for item in pair]
    arguments = ["--from", source, "--config-file", BASE_FACE, "--weights", weights, "--output", output, *options]
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    convert_weights.main()


# --- published weights


@pytest.mark.parametrize("depth", FAMILIES)
def test_converted_weights_compute_the_networks_embedding_inside_the_host(
    depth: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    network = trained(depth)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "backbone.pt")
    run_tool(monkeypatch, FAMILIES[depth][1], depth, tmp_path / "backbone.pt", tmp_path / "face.pth")
    text = capsys.readouterr().out
    assert f"{len(state)} matched, 1 missing, 0 unexpected, 0 of another shape" in text
    assert re.search(r"^missing +heads\.weight +keeps its initial value$", text, re.M)
    assert f"MODEL.BACKBONE NAME {FAMILIES[depth][0]} DEPTH {depth} WIDTH 0.0625 FEAT_DIM 24." in text
    assert "ATTENTION" not in text
    model = build(face_cfg(depth)).eval()
    Checkpointer(model).load(str(tmp_path / "face.pth"))
    with torch.no_grad():
        expected = network(pixels() / 127.5 - 1)
        feature = model({"images": pixels()})
    assert feature.shape == (4, 24)
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_depth_are_refused_with_the_right_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.save(networks.iresnet34(**SMALL).state_dict(), tmp_path / "r34.pt")
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, "arcface", "18x", tmp_path / "r34.pt", tmp_path / "face.pth")
    error = capsys.readouterr().err
    assert "r34.pt does not fill the backbone: got '187 matched, 144 unexpected (first backbone.layer1.2.bn1" in error
    assert "NAME build_iresnet_backbone DEPTH 34x WIDTH 0.0625 FEAT_DIM 24" in error
    assert not (tmp_path / "face.pth").exists()


def test_weights_of_another_input_size_are_refused(tmp_path: Path) -> None:
    torch.save(networks.mobilefacenet(24, width=1 / 16, input_size=64).state_dict(), tmp_path / "mbf.pt")
    cfg = face_cfg(**{"MODEL.BACKBONE.PRETRAIN": True, "MODEL.BACKBONE.PRETRAIN_PATH": str(tmp_path / "mbf.pt")})
    with pytest.raises(
        CheckpointError,
        match=r"mbf\.pt does not fill .*1 of another shape \(first backbone\.features\.layers\.0.*SIZE_TR",
    ):
        build(cfg)


@pytest.mark.parametrize("depth", ["18x", "mbf", "qud"])
def test_pretrained_path_takes_a_published_file_as_it_is(depth: str, tmp_path: Path) -> None:
    """A training checkpoint of arcface_torch; the counters of batch norms may be missing."""
    state = trained(depth).state_dict()
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save({"epoch": 3, "state_dict_backbone": kept, "state_dict_softmax_fc": {}}, tmp_path / "gpu_0.pt")
    cfg = face_cfg(
        depth, **{"MODEL.BACKBONE.PRETRAIN": True, "MODEL.BACKBONE.PRETRAIN_PATH": str(tmp_path / "gpu_0.pt")}
    )
    loaded = build(cfg).backbone.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[name].equal(tensor) for name, tensor in kept.items())


def test_pretrained_without_a_file_says_that_none_can_be_downloaded() -> None:
    with pytest.raises(ConfigError, match=r"PRETRAIN_PATH: got ''; .*none can be downloaded\. Name a backbone file"):
        build(face_cfg(**{"MODEL.BACKBONE.PRETRAIN": True}))


# --- the backbone inside the host


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "MODEL.BACKBONE.DEPTH",
            "50x",
            r"DEPTH: got '50x'; expected one of mbf, mbf_large, qud for build_mobilefacenet",
        ),
        ("MODEL.BACKBONE.WIDTH", 16.0, r"Width: got 16\.0; expected a factor"),
        ("MODEL.BACKBONE.FEAT_DIM", 0, r"FEAT_DIM: got 0; expected an integer >= 1"),
        ("MODEL.BACKBONE.NORM", "GhostBN", r"NORM: got 'GhostBN'; expected BN or syncBN for build_mobilefacenet"),
        ("INPUT.SIZE_TEST", [64, 48], r"SIZE_TEST: got \[64, 48\]; expected INPUT\.SIZE_TRAIN \[48, 48\], because"),
        ("MODEL.HEADS.CLS_LAYER", "ArcFaceExakt", r"CLS_LAYER: got 'ArcFaceExakt'\. Did you mean 'ArcFaceExact'"),
        ("MODEL.HEADS.MARGIN", -0.5, r"Margin softmax m2: got -0\.5; expected >= 0"),
    ],
)
def test_impossible_settings_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(face_cfg(**{key: value}))


def test_synchronised_norms_reach_every_layer_and_keep_the_scale_frozen() -> None:
    backbone = build(face_cfg("18x", **{"MODEL.BACKBONE.NORM": "syncBN"})).backbone
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    assert not backbone.features.weight.requires_grad
    assert backbone.state_dict().keys() == networks.iresnet18(**SMALL).state_dict().keys()


def test_doctor_lists_backbones_and_margins_as_ours() -> None:
    names = registered_names()
    assert names["MODEL.BACKBONE.NAME"]["build_iresnet_backbone"]
    assert names["MODEL.HEADS.CLS_LAYER"]["CosFace"]
    assert not names["MODEL.HEADS.CLS_LAYER"]["ArcSoftmax"]


# --- margins


@pytest.mark.parametrize("layer", ["ArcSoftmax", "CosSoftmax", "CircleSoftmax", "Linear"])
def test_the_hosts_margins_work_on_face_networks(layer: str) -> None:
    torch.manual_seed(0)
    model = build(face_cfg(**{"MODEL.HEADS.CLS_LAYER": layer, "MODEL.HEADS.MARGIN": 0.35}))
    loss = sum(train_step(model).values())
    loss.backward()
    assert loss.isfinite()
    assert model.backbone.layers[0].layers[0].weight.grad.abs().sum() > 0
    assert model.heads.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("ours", "theirs"), [("ArcFaceExact", "ArcSoftmax"), ("CosFace", "CosSoftmax")])
def test_exact_margins_are_those_of_the_host(ours: str, theirs: str) -> None:
    from fastreid.layers import any_softmax

    cosine = torch.rand(6, 9, generator=torch_stream(0)) * 1.8 - 0.9
    targets = torch.tensor([3, 0, -1, 8, 3, 5])
    results = []
    for name in (ours, theirs):
        leaf = cosine.clone().requires_grad_()
        logits = getattr(any_softmax, name)(9, 16, 0.4)(leaf.clone(), targets)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits[targets >= 0], targets[targets >= 0]), leaf)
        results.append((logits.detach(), gradient))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "margins", "straight"),
    [
        ("ArcFaceStraightThrough", (1.0, 0.5, 0.0), True),
        ("ArcFaceExact", (1.0, 0.5, 0.0), False),
        ("CosFace", (1.0, 0.0, 0.5), True),
        ("CombinedMarginStraightThrough", (1.1, 0.25, 0.15), True),
        ("CombinedMarginExact", (1.1, 0.25, 0.15), False),
    ],
)
def test_margins_from_the_config_reach_loss_and_gradient(
    layer: str, margins: tuple[float, float, float], straight: bool
) -> None:
    """The host's loss and its gradient at the cosines, against the equation."""
    overrides = {"MODEL.HEADS.CLS_LAYER": layer, "MODEL.HEADS.COMBINED_MARGIN": [1.1, 0.25, 0.15]}
    torch.manual_seed(1)
    model = build(face_cfg(**overrides, **{"MODEL.HEADS.SCALE": 8}))
    seen: list[torch.Tensor] = []

    def capture(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].retain_grad()
        seen.append(inputs[0])

    model.heads.cls_layer.register_forward_pre_hook(capture)
    loss = train_step(model)["loss_cls"]
    loss.backward()
    cosine, targets = seen[0].detach(), torch.arange(4)
    onehot = F.one_hot(targets, 5)
    m1, m2, m3 = margins
    angle = cosine.acos()
    logits = 8 * torch.where(onehot == 1, torch.cos(m1 * angle + m2) - m3, cosine)
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits, targets), rtol=1e-5, atol=1e-5)
    slope = m1 * torch.sin(m1 * angle + m2) / torch.sin(angle)
    factor = torch.ones_like(cosine) if straight else torch.where(onehot == 1, slope, 1)
    assert seen[0].grad is not None
    torch.testing.assert_close(seen[0].grad, 8 * factor * (logits.softmax(dim=1) - onehot) / 4, rtol=1e-4, atol=1e-5)


def test_combined_margin_needs_three_numbers() -> None:
    overrides = {"MODEL.HEADS.CLS_LAYER": "CombinedMarginExact", "MODEL.HEADS.COMBINED_MARGIN": [1.0, 0.5]}
    with pytest.raises(ConfigError, match=r"COMBINED_MARGIN: got \(1\.0, 0\.5\); expected three numbers m1, m2, m3"):
        build(face_cfg(**overrides))


# --- QSD's levels


@pytest.mark.parametrize("depth", FAMILIES)
def test_default_levels_are_four_maps_and_the_embedding(depth: str) -> None:
    cfg = face_cfg(depth)
    model = build(cfg)
    taps = default_taps(model)
    assert [tap.role for tap in taps] == ["map"] * 4 + ["vector"]
    with networks.TapRecorder(model, [tap.name for tap in taps]) as recorded:
        train_step(model)
    shapes = {tap.name: tuple(to_level(recorded[tap.name], model, tap.name, tap.role).shape[1:]) for tap in taps}
    assert shapes == {f"backbone.{name}": shape for name, shape in TAPS[depth].items()} | {"heads.bottleneck": (24,)}
    assert set(build_loss(cfg, resolve_taps(cfg, model)).level_weights.values()) == {1.0}


def test_qsd_trains_a_face_network() -> None:
    """Quality from the norms, so that no label file is needed; every level reaches the loss."""
    overrides = {
        "MODEL.META_ARCHITECTURE": "QSD",
        "QUALITY.SOURCE": "embedding_norm",
        "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
        "DATALOADER.NUM_INSTANCE": 2,
    }
    from fastreid.utils.events import EventStorage

    torch.manual_seed(2)
    model = build(face_cfg("qud", **overrides)).train()
    with EventStorage(0):
        losses = model({"images": pixels(6), "targets": torch.arange(6) // 2, "img_paths": list("abcdef")})
    assert losses.keys() == {"loss_cls", "loss_qsd"}
    assert losses["loss_qsd"] > 0
    losses["loss_qsd"].backward()
    reached = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.backbone.named_parameters()}
    assert [name for name, grad in reached.items() if not grad] == []
