"""Writing ``deploy/``: what is kept of a config and a checkpoint, what is refused, and that it happens whole."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy import toy_cfg

from qsd_plugin.core.errors import CheckpointError, ConfigError, DataError, ExportError, HostError
from qsd_plugin.hosts import fastreid as host

host.activate()

from fastreid.config import CfgNode  # noqa: E402
from fastreid.layers import any_softmax  # noqa: E402
from fastreid.modeling.backbones import BACKBONE_REGISTRY  # noqa: E402
from fastreid.modeling.heads import REID_HEADS_REGISTRY, EmbeddingHead  # noqa: E402
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY, build_model  # noqa: E402

from qsd_plugin.hosts.fastreid import deploy, deployed, training_stages  # noqa: E402
from qsd_plugin.hosts.fastreid.compose import ComposedArchitecture, base_architecture  # noqa: E402

PROVENANCE: dict[str, Any] = {"metrics": {"mAP": 12.5}, "config_hash": "0123", "command": ["train net.py", "A", "1"]}


def qsd_cfg(folder: Path, **overrides: Any) -> Any:
    """QSD from norms with AGW's losses, a data set of the plugin and files that only this machine has."""
    options: dict[str, Any] = {
        "MODEL.META_ARCHITECTURE": "QSD",
        "MODEL.LOSSES.NAME": ("CrossEntropyLoss", "WeightedTripletLoss", "CenterLoss"),
        "MODEL.WEIGHTS": str(folder / "initial.pth"),
        "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
        "DATASETS.NAMES": ("ReIDFolder", "Market1501"),
        "DATASETS.TESTS": ("SyntheticPedestrians",),
        "QUALITY.SOURCE": "embedding_norm",
        "SEED": 3,
    }
    return toy_cfg(folder, **(options | overrides))


def trained(cfg: Any, folder: Path, num_classes: int = 5) -> tuple[nn.Module, Path]:
    """The model as built for training with that many identities, with batch-norm statistics that matter."""
    cfg = cfg.clone()
    cfg.MODEL.HEADS.NUM_CLASSES = num_classes
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save({"model": model.state_dict(), "epoch": 7}, folder / "model_final.pth")
    return model.eval(), folder / "model_final.pth"


def write(cfg: Any, folder: Path) -> tuple[nn.Module, deployed.Deployed]:
    """A trained model and what is loaded from its deploy folder."""
    model, checkpoint = trained(cfg, folder)
    deploy.write_deploy(folder / "deploy", cfg, checkpoint, **PROVENANCE)
    return model, deployed.load(folder)


def embedding(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model({"images": deployed.noise(3, (64, 32))})


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        embedding(model)
    return counter.get_total_flops()


def test_deployed_network_is_the_baseline_in_keys_parameters_flops_and_embedding(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    model, run = write(cfg, tmp_path)
    plain_losses = {"MODEL.META_ARCHITECTURE": "Baseline", "MODEL.LOSSES.NAME": ("CrossEntropyLoss",)}
    baseline = build_model(qsd_cfg(tmp_path, **plain_losses, **{"MODEL.HEADS.NUM_CLASSES": 5})).eval()
    assert list(model.state_dict()) != list(baseline.state_dict())  # else this shows nothing
    shapes = {name: tensor.shape for name, tensor in baseline.state_dict().items()}
    assert {name: tensor.shape for name, tensor in run.model.state_dict().items()} == shapes
    assert list(torch.load(tmp_path / "deploy" / "model.pth", weights_only=True)) == ["model"]
    assert sum(p.numel() for p in run.model.parameters()) == sum(p.numel() for p in baseline.parameters())
    assert flops(run.model) == flops(baseline) > 1e8
    torch.testing.assert_close(embedding(run.model), embedding(model))


def test_config_has_the_keys_of_the_host_s_source_and_no_name_of_the_plugin(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    _, run = write(cfg, tmp_path)
    with (tmp_path / "deploy" / "config.yaml").open() as file:
        written = CfgNode.load_cfg(file)
    shipped: dict[str, Any] = {}
    source = (host.host_folder() / "config" / "defaults.py").read_text().replace("from .config", "from fastreid.config")
    exec(source, shipped)
    assert set(training_stages.flatten(written)) == set(training_stages.flatten(shipped["_C"]))
    assert written.DATASETS.NAMES == ["Market1501"]
    assert written.DATASETS.TESTS == []
    assert written.MODEL.LOSSES.NAME == ["CrossEntropyLoss"]
    assert written.MODEL.WEIGHTS == ""
    assert written.OUTPUT_DIR == shipped["_C"].OUTPUT_DIR
    assert written.MODEL.HEADS.NUM_CLASSES == 5
    assert written.DATALOADER.SAMPLER_TRAIN == "NaiveIdentitySampler"  # whatever else the run changed is kept
    assert str(tmp_path) not in (tmp_path / "deploy" / "config.yaml").read_text()
    assert run.results["trained_on"] == ["ReIDFolder", "Market1501"]
    assert run.results["tested_on"] == ["SyntheticPedestrians"]


def test_contract_and_results_say_what_the_run_was(tmp_path: Path) -> None:
    _, run = write(qsd_cfg(tmp_path, **{"TEST.METRIC": "euclidean", "INPUT.SIZE_TEST": [48, 24]}), tmp_path)
    images = run.contract["input"]
    assert (images["height"], images["width"], images["colour_order"], images["range"]) == (48, 24, "RGB", [0, 255])
    assert images["mean"] == [123.675, 116.28, 103.53]
    assert images["std"] == pytest.approx([58.395, 57.12, 57.375])
    assert run.contract["embedding"]["dimension"] == 512
    assert run.contract["embedding"]["normalised"] is False
    assert "after the BN neck" in run.contract["embedding"]["tensor"]
    assert (run.contract["metric"], run.contract["classes"]) == ("euclidean", 5)
    assert run.results["metrics"] == {"mAP": 12.5}
    assert run.results["command"] == "'train net.py' A 1"
    assert (run.results["config_hash"], run.results["seed"], run.results["method"]) == ("0123", 3, "QSD")
    assert run.results["versions"]["torch"] == torch.__version__
    assert run.results["hardware"]["device"].startswith("CPU")
    metadata = deployed.metadata(run.contract)
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["std"]) == images["std"]
    assert {"height", "width", "colour_order", "mean", "feature", "metric", "normalisation"} <= set(metadata)


def test_chain_of_architectures_ends_in_its_base_and_training_only_bases_in_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Outer(nn.Module):
        """A mix-in with a network of its own, as a teacher would be."""

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.outer_teacher = nn.Linear(3, 3)

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "OUTER", ComposedArchitecture("OUTER", Outer))
    cfg = qsd_cfg(tmp_path, **{"QSD.BASE": "MoCo", "MODEL.QUEUE_SIZE": 16})
    cfg.MODEL.META_ARCHITECTURE = "OUTER"
    cfg.OUTER = CfgNode({"BASE": "QSD"})
    assert base_architecture(cfg) == "MoCo"
    model, run = write(cfg, tmp_path)
    assert run.cfg.MODEL.META_ARCHITECTURE == "Baseline"
    left = {name.split(".")[0] for name in {*model.state_dict()} - {*run.model.state_dict()}}
    assert left == {"outer_teacher", "memory", "center_loss", "_qsd_quality"}
    torch.testing.assert_close(embedding(run.model), embedding(model))


def test_head_of_the_plugin_becomes_the_host_s_where_it_evaluates_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SameHead(EmbeddingHead):
        """Differs in training only."""

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.extra = nn.Parameter(torch.zeros(2))

    class OtherHead(SameHead):
        """Also evaluates differently."""

        def forward(self, features: torch.Tensor, targets: Any = None) -> Any:
            return 2 * super().forward(features)

    class Margin(any_softmax.Linear):
        """A class layer of the plugin."""

    for part in (SameHead, OtherHead, Margin):
        part.__module__ = "qsd_plugin.hosts.fastreid.heads"
    for head in (SameHead, OtherHead):
        monkeypatch.setitem(REID_HEADS_REGISTRY._obj_map, head.__name__, head)
    monkeypatch.setattr(any_softmax, "Margin", Margin, raising=False)
    parts = {"MODEL.HEADS.NAME": "SameHead", "MODEL.HEADS.CLS_LAYER": "Margin"}
    _, run = write(qsd_cfg(tmp_path, **parts), tmp_path)
    assert (run.cfg.MODEL.HEADS.NAME, run.cfg.MODEL.HEADS.CLS_LAYER) == ("EmbeddingHead", "Linear")
    assert "heads.extra" not in run.model.state_dict()
    with pytest.raises(
        ConfigError, match="got 'OtherHead'; expected a head that evaluates as the host's EmbeddingHead"
    ):
        write(qsd_cfg(tmp_path, **{"MODEL.HEADS.NAME": "OtherHead"}), tmp_path)


def test_backbone_of_the_plugin_cannot_be_deployed_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def build_own_backbone(cfg: Any) -> nn.Module:
        raise AssertionError("not built")

    build_own_backbone.__module__ = "qsd_plugin.hosts.fastreid.backbones"
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_own_backbone", build_own_backbone)
    cfg = qsd_cfg(tmp_path, **{"MODEL.BACKBONE.NAME": "build_own_backbone"})
    message = "MODEL.BACKBONE.NAME: got 'build_own_backbone'; expected a part of the plain host"
    with pytest.raises(ConfigError, match=message):
        deploy.plain_config(cfg)
    torch.save({"model": {}}, tmp_path / "model_final.pth")
    monkeypatch.setattr(training_stages, "train", lambda cfg, arguments, resume: {"mAP": 1.0})
    with caplog.at_level(logging.WARNING):
        assert training_stages.train_and_deploy(cfg, None, resume=False) == {"mAP": 1.0}
    assert f"No deploy folder: {message}" in caplog.text
    assert not (tmp_path / "deploy").exists()


@pytest.mark.parametrize(
    ("size", "crop", "expected"), [([64], False, (64, 64)), ([70, 40], True, (64, 32)), ([0], False, None)]
)
def test_input_size_is_what_evaluation_feeds(
    tmp_path: Path, size: list[int], crop: bool, expected: tuple[int, int] | None
) -> None:
    overrides = {"INPUT.SIZE_TEST": size, "INPUT.CROP.ENABLED": crop, "INPUT.CROP.SIZE": [64, 32]}
    cfg = qsd_cfg(tmp_path, **overrides)
    if expected is None:
        with pytest.raises(ConfigError, match=r"INPUT.SIZE_TEST: got \(0,\); expected a fixed size"):
            deploy.input_size(cfg)
    else:
        assert deploy.input_size(cfg) == expected


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    model, checkpoint = trained(cfg, tmp_path)
    state = model.state_dict()
    del state["backbone.layer1.0.conv1.weight"]
    torch.save({"model": state}, checkpoint)
    with pytest.raises(CheckpointError, match=r"no backbone.layer1.0.conv1.weight.*all tensors of Baseline"):
        deploy.write_deploy(tmp_path / "deploy", cfg, checkpoint, **PROVENANCE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model_final.pth"]


def test_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = qsd_cfg(tmp_path)
    _, run = write(cfg, tmp_path)
    (tmp_path / "deploy" / "stage.json").write_text("{}")
    again = PROVENANCE | {"metrics": {"mAP": 99.0}}
    with monkeypatch.context() as broken:
        broken.setattr(deployed, "load", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            deploy.write_deploy(tmp_path / "deploy", cfg, tmp_path / "model_final.pth", **again)
    assert deployed.load(tmp_path).results == run.results
    deploy.write_deploy(tmp_path / "deploy", cfg, tmp_path / "model_final.pth", **again)
    assert deployed.load(tmp_path / "deploy").results["metrics"] == {"mAP": 99.0}
    files = ["config.yaml", "contract.json", "model.pth", "results.json"]
    assert sorted(file.name for file in (tmp_path / "deploy").iterdir()) == files
    assert sorted(file.name for file in tmp_path.iterdir()) == ["deploy", "model_final.pth"]


def test_unwritable_folder_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    _, checkpoint = trained(cfg, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Cannot write"):
        deploy.write_deploy(tmp_path / "file" / "deploy", cfg, checkpoint, **PROVENANCE)
    deploy.write_deploy(tmp_path / "deploy", cfg, checkpoint, **PROVENANCE)
    torch.save({"model": {"heads.weight": torch.zeros(5, 512)}}, tmp_path / "deploy" / "model.pth")
    with pytest.raises(CheckpointError, match=r"deploy/model.pth do not belong to this network: got 'Missing key"):
        deployed.load(tmp_path)
    (tmp_path / "deploy" / "contract.json").unlink()
    with pytest.raises(HostError, match="There is no finished run in this folder"):
        deployed.load(tmp_path)


def test_only_networks_that_normalise_in_one_place_can_be_exported(tmp_path: Path) -> None:
    model = build_model(qsd_cfg(tmp_path, **{"MODEL.META_ARCHITECTURE": "Baseline"})).eval()
    network = deployed.without_normalisation(model, (64, 32))
    images = deployed.noise(3, (64, 32))
    normalised = (images - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        torch.testing.assert_close(network(normalised), embedding(model))
    assert (embedding(model) - network(images)).abs().max() > 0.1  # the original still normalises, the copy does not
    with pytest.raises(ExportError, match="cannot be exported: got 'Sequential'; expected the host's preprocess_image"):
        deployed.without_normalisation(nn.Sequential(), (64, 32))

    class TwoPlaces(type(model)):  # type: ignore[misc]
        def forward(self, images: Any) -> Any:
            return self.heads(self.backbone((images - self.pixel_mean) / self.pixel_std))

    model.__class__ = TwoPlaces
    with pytest.raises(ExportError, match="got 'TwoPlaces'; expected a forward that normalises its images with prep"):
        deployed.without_normalisation(model, (64, 32))
