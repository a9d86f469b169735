"""AdaFace's IR inside fast-reid: published checkpoints, which see BGR, and QSD's levels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from face_toy import BASE_FACE, SMALL, base_face_cfg, small_options
from torch import nn

from qsd_plugin import networks
from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.export.ir_weights import IR_DEPTHS
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.meta_arch.qsd import build_loss, resolve_taps
from qsd_plugin.hosts.fastreid.registries import registered_names
from qsd_plugin.hosts.fastreid.taps import default_taps, to_level
from tools import convert_weights

host.activate()

PREFIX = {"adaface": "model.", "qgface": "backbone."}
CLASSES = 5


def face_cfg(depth: str = "18x", **overrides: Any) -> Any:
    return base_face_cfg({**small_options("build_ir_backbone", depth), **overrides})


def build(cfg: Any) -> Any:
    from fastreid.modeling.meta_arch import build_model

    torch.manual_seed(0)
    return build_model(cfg)


def trained(depth: str) -> nn.Module:
    """A small network whose batch norms have seen something."""
    torch.manual_seed(3)
    network: nn.Module = getattr(networks, IR_DEPTHS[depth])(**SMALL)
    network(torch.randn(8, 3, 48, 48, generator=torch_stream(4)))
    return network.eval()


def pixels(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 48, 48, generator=torch_stream(5)) * 255


def lightning(network: nn.Module, source: str, **changes: torch.Tensor | None) -> dict[str, Any]:
    """A training checkpoint as the authors' trainer writes them, with an object in it that safe loading refuses."""
    state: dict[str, Any] = {f"{PREFIX[source]}{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {
        "head.kernel": torch.randn(24, CLASSES, generator=torch_stream(6)),
        "head.t": torch.zeros(1),
        "head.batch_mean": torch.full((1, 1), 21.5),
        "head.batch_std": torch.full((1, 1), 3.25),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    state = {name: value for name, value in state.items() if value is not None}
    return {"epoch": 25, "global_step": 9, "state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.1)}


def run_tool(monkeypatch: pytest.MonkeyPatch, source: str, weights: Path, output: Path, *more: str) -> None:
    arguments = ["--from", source, "--config-file", BASE_FACE, "--weights", weights, "--output", output]
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments), *more])
    convert_weights.main()


# Published weights.


@pytest.mark.parametrize(("source", "depth"), [("adaface", "18x"), ("qgface", "se_50x")])
@pytest.mark.parametrize("head", ["EmbeddingHead", "QGFaceHead"])
def test_converted_checkpoint_computes_the_authors_embedding_logits_and_quality(
    source: str,
    depth: str,
    head: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    network = trained(depth)
    content = lightning(network, source)
    torch.save(content, tmp_path / "last.ckpt")
    run_tool(
        monkeypatch,
        source,
        tmp_path / "last.ckpt",
        tmp_path / "face.pth",
        *(str(item) for pair in small_options("build_ir_backbone", depth).items() for item in pair),
        "MODEL.HEADS.NAME",
        head,
    )
    text = capsys.readouterr().out
    statistics = 3 if head == "QGFaceHead" else 0
    assert f"{len(network.state_dict()) + 1 + statistics} matched, 0 missing, 0 unexpected, 0 of another shape" in text
    assert f"MODEL.BACKBONE NAME build_ir_backbone DEPTH {depth} WIDTH 0.0625 FEAT_DIM 24." in text
    assert "sees BGR" in text
    assert "Classifier of 5 identities" in text
    assert "mean 21.5 and deviation 3.25" in text
    assert "Left out: 1 entries beside network and head (first head.t)" in text
    assert "ATTENTION" not in text
    model = build(face_cfg(depth, **{"MODEL.HEADS.NAME": head})).eval()
    Checkpointer(model).load(str(tmp_path / "face.pth"))
    with torch.no_grad():
        expected = network(pixels().flip(1) / 127.5 - 1)  # RGB to BGR
        feature = model({"images": pixels()})
    torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)
    kernel = content["state_dict"]["head.kernel"]
    torch.testing.assert_close(feature @ model.heads.weight.t(), expected @ kernel, rtol=1e-3, atol=1e-3)
    if statistics:
        mean, std = model.heads.statistics.current()
        assert (mean.item(), std.item()) == pytest.approx((21.5, 3.25))


def test_pretrained_path_takes_both_authors_files_and_bare_ones(tmp_path: Path) -> None:
    network = trained("18x")
    files: dict[str, Any] = {source: lightning(network, source) for source in PREFIX}
    files["bare"] = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    loaded = []
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.ckpt")
        pretrained = {"MODEL.BACKBONE.PRETRAIN": True, "MODEL.BACKBONE.PRETRAIN_PATH": str(tmp_path / f"{name}.ckpt")}
        loaded.append(build(face_cfg(**pretrained)).backbone)
    own = network.state_dict()
    for backbone in loaded:
        for name, tensor in backbone.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                expected = own[name].flip(1) if name == "input_layer.0.weight" else own[name]
                assert tensor.equal(expected), name


def convert(source: str, content: dict[str, Any], folder: Path, cfg: Any) -> None:
    from qsd_plugin.hosts.fastreid import published

    torch.save(content, folder / "file.ckpt")
    published.convert_for(cfg, folder / "file.ckpt", source)


def test_files_of_others_are_refused_in_both_directions(tmp_path: Path) -> None:
    network, cfg = trained("18x"), face_cfg()
    for source, other in (("adaface", "qgface"), ("qgface", "adaface")):
        with pytest.raises(
            CheckpointError,
            match=rf"file\.ckpt are not from {other}: got .*expected names such as {PREFIX[other]}input_layer.*"
            rf"They look like {source}: pass --from {source}\.",
        ):
            convert(other, lightning(network, source), tmp_path, cfg)
    with pytest.raises(CheckpointError, match=r"not from arcface: .*look like adaface: pass --from adaface\."):
        convert("arcface", lightning(network, "adaface"), tmp_path, cfg)
    with pytest.raises(CheckpointError, match=r"not from adaface: .*look like arcface or qud: pass --from arcface\."):
        convert("adaface", networks.iresnet18(**SMALL).state_dict(), tmp_path, cfg)
    with pytest.raises(CheckpointError, match=r"not from qgface: .*look like fastreid-zoo: pass --from fastreid-zoo"):
        convert("qgface", {"model": build(cfg).state_dict()}, tmp_path, cfg)


def test_networks_of_other_sizes_and_broken_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"does not fill the backbone: .*MODEL\.BACKBONE NAME build_ir_backbone DEPTH 34x WIDTH"
    ):
        convert("adaface", lightning(networks.ir_34(**SMALL), "adaface"), tmp_path, face_cfg())
    turned = lightning(trained("18x"), "qgface", head__kernel=torch.zeros(CLASSES, 24))
    with pytest.raises(CheckpointError, match=r"head\.kernel of the file: got \(5, 24\); expected class centres \[24,"):
        convert("qgface", turned, tmp_path, face_cfg())
    missing = lightning(trained("18x"), "adaface", model__body__3__res_layer__0__weight=None)
    with pytest.raises(CheckpointError, match=r"1 missing \(first backbone\.body\.3\.res_layer\.0\.weight\)"):
        convert("adaface", missing, tmp_path, face_cfg())


# The backbone inside the host.


def test_unknown_depth_is_named_and_the_registry_knows_the_builder() -> None:
    with pytest.raises(ConfigError, match=r"DEPTH: got '200x'; expected one of 18x, 34x, 50x, 100x, se_50x for build_"):
        build(face_cfg("200x"))
    assert registered_names()["MODEL.BACKBONE.NAME"]["build_ir_backbone"]


@pytest.mark.parametrize(
    ("depth", "ends"), [("18x", (1, 3, 5, 7)), ("34x", (2, 6, 12, 15)), ("se_50x", (2, 6, 20, 23))]
)
def test_default_levels_are_the_last_maps_of_the_four_stages_and_the_embedding(
    depth: str, ends: tuple[int, ...]
) -> None:
    from fastreid.utils.events import EventStorage

    cfg = face_cfg(depth)
    model = build(cfg)
    taps = default_taps(model)
    assert [tap.role for tap in taps] == ["map"] * 4 + ["vector"]
    with networks.TapRecorder(model, [tap.name for tap in taps]) as recorded, EventStorage(0):
        model.train()({"images": pixels(), "targets": torch.arange(4)})
    shapes = {tap.name: tuple(to_level(recorded[tap.name], model, tap.name, tap.role).shape[1:]) for tap in taps}
    maps = {f"backbone.body.{end}": (4 * 2**stage, *[24 // 2**stage] * 2) for stage, end in enumerate(ends)}
    assert shapes == maps | {"heads.bottleneck": (24,)}
    assert set(build_loss(cfg, resolve_taps(cfg, model)).level_weights.values()) == {1.0}
