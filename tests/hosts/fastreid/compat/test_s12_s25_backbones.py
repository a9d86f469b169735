"""S12, S25: RegNet and EffNet from any folder; pretrained weights load, or the message says which file to put where."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import CheckpointError, ConfigError


def build(folder: Path, name: str, depth: str, **options: Any) -> torch.nn.Module:
    from fastreid.modeling.backbones import build_backbone

    overrides = {f"MODEL.BACKBONE.{key}": value for key, value in options.items()}
    cfg = toy_cfg(folder, **{"MODEL.BACKBONE.NAME": name, "MODEL.BACKBONE.DEPTH": depth, **overrides})
    model: torch.nn.Module = build_backbone(cfg)
    return model


@pytest.mark.parametrize(("name", "depth"), [("build_regnet_backbone", "200x"), ("build_effnet_backbone", "b0")])
def test_s12_regnet_builds_from_any_folder(
    name: str, depth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    features = build(tmp_path, name, depth).eval()(torch.zeros(1, 3, 64, 32))
    assert features.dim() == 4
    assert features.isfinite().all()


def test_s12_a_model_does_not_inherit_the_last_ones_options(tmp_path: Path) -> None:
    fresh = build(tmp_path, "build_regnet_backbone", "200x").state_dict().keys()
    with_excitation = build(tmp_path, "build_regnet_backbone", "200y").state_dict().keys()
    assert with_excitation > fresh
    assert build(tmp_path, "build_regnet_backbone", "200x").state_dict().keys() == fresh


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, no gdown, an empty cache; returns the cache folder."""

    def unreachable(url: str, *args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setitem(sys.modules, "gdown", None)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "depth", "file", "reason"),
    [
        ("build_resnet_backbone", "18x", "checkpoints/resnet18-5c106cde.pth", "no network"),
        ("build_resnest_backbone", "50x", "hub/checkpoints/resnest50-528c19ca.pth", "no network"),
        ("build_mobilenetv3_backbone", "Small", "hub/checkpoints/mobilenet_v3_small-047dcff4.pth", "no network"),
        ("build_effnet_backbone", "b0", "checkpoints/EN-B0_dds_8gpu.pyth", "no network"),
        ("build_osnet_backbone", "x0_25", "checkpoints/osnet_x0_25_imagenet.pth", "needs the package gdown"),
    ],
)
def test_s25_a_failed_download_says_which_file_to_put_where(
    name: str, depth: str, file: str, reason: str, offline: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"PRETRAIN True: .*could not be fetched from https://") as caught:
        build(offline, name, depth, PRETRAIN=True)
    message = str(caught.value)
    assert reason in message
    assert f"save it as {offline / file}" in message
    assert "MODEL.BACKBONE.PRETRAIN_PATH" in message


def test_s25_a_file_put_there_is_used(offline: Path) -> None:
    donor = build(offline, "build_resnet_backbone", "18x")
    (offline / "checkpoints").mkdir(parents=True)
    torch.save(donor.state_dict(), offline / "checkpoints" / "resnet18-5c106cde.pth")
    model = build(offline, "build_resnet_backbone", "18x", PRETRAIN=True)
    assert all(value.equal(donor.state_dict()[name]) for name, value in model.state_dict().items())
    assert sys.modules["gdown"] is None  # as the fixture made it


def test_s25_downloads_that_are_not_google_drive_need_no_gdown(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = build(offline, "build_resnet_backbone", "18x").state_dict()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: torch.save(donor, path))
    model = build(offline, "build_resnet_backbone", "18x", PRETRAIN=True)
    assert model.state_dict()["conv1.weight"].equal(donor["conv1.weight"])


def test_s25_google_drive_goes_through_gdown(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = build(offline, "build_osnet_backbone", "x0_25").state_dict()
    gdown = types.ModuleType("gdown")
    vars(gdown)["download"] = lambda url, output, quiet: torch.save(donor, output)
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    model = build(offline, "build_osnet_backbone", "x0_25", PRETRAIN=True)
    assert model.state_dict()["conv1.conv.weight"].equal(donor["conv1.conv.weight"])
    vars(gdown)["download"] = lambda url, output, quiet: None
    (offline / "checkpoints" / "osnet_x0_25_imagenet.pth").unlink()
    with pytest.raises(CheckpointError, match="gdown returned without a file"):
        build(offline, "build_osnet_backbone", "x0_25", PRETRAIN=True)


@pytest.mark.parametrize(
    ("name", "depth"), [("build_mobilenetv2_backbone", "1.0x"), ("build_shufflenetv2_backbone", "0.5x")]
)
def test_s25_backbones_without_published_weights_ask_for_a_file(name: str, depth: str, offline: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"nobody publishes .*{name} {depth}.*PRETRAIN_PATH"):
        build(offline, name, depth, PRETRAIN=True)


@pytest.mark.parametrize("pretrain", [True, False])
def test_s25_an_unknown_depth_is_not_taken_for_missing_weights(pretrain: bool, offline: Path) -> None:
    with pytest.raises(ConfigError, match=r"BACKBONE\.DEPTH: got '17x'.*build_resnet_backbone"):
        build(offline, "build_resnet_backbone", "17x", PRETRAIN=pretrain)


def test_s25_a_missing_pretrain_path_lists_its_neighbours(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "resnet18.pth")
    wrong = tmp_path / "resnet_18.pth"
    with pytest.raises(CheckpointError, match=r"PRETRAIN_PATH: got .*existing file.*Did you mean 'resnet18\.pth'"):
        build(tmp_path, "build_resnet_backbone", "18x", PRETRAIN=True, PRETRAIN_PATH=str(wrong))


def test_s25_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The usual mix-up: a checkpoint of a whole model, of which the host would load nothing and say so in the log."""
    donor = build(tmp_path, "build_resnet_backbone", "18x").state_dict()
    torch.save({"model": {f"backbone.{name}": value for name, value in donor.items()}}, tmp_path / "whole.pth")
    torch.save(build(tmp_path, "build_resnet_backbone", "18x").state_dict(), tmp_path / "bare.pth")
    build(tmp_path, "build_resnet_backbone", "18x", PRETRAIN=True, PRETRAIN_PATH=str(tmp_path / "bare.pth"))
    with pytest.raises(CheckpointError, match=r"Nothing in it reached the backbone.*MODEL\.WEIGHTS"):
        build(tmp_path, "build_resnet_backbone", "18x", PRETRAIN=True, PRETRAIN_PATH=str(tmp_path / "whole.pth"))
