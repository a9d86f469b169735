"""From a pickled module of the authors' kind to a checkpoint of the host, through the command line tool."""

from __future__ import annotations

import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.datasets import training_set
from qsd_plugin.hosts.fastreid.extract import embed, load_model
from qsd_plugin.hosts.fastreid.published import check_pixels, convert_for, match_classes, training_accuracy
from qsd_plugin.networks.agw_resnet import AGWResNet
from tools import convert_weights

host.activate()

IDENTITIES = 12  # the text order of 1 ... 12 is not their order
WIDTH = 2
OPTIONS = {
    "MODEL.BACKBONE.NAME": "build_agw_backbone",
    "MODEL.BACKBONE.DEPTH": "50x",
    "MODEL.BACKBONE.FEAT_DIM": 32 * WIDTH,
    "MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPoolingP",
    "MODEL.HEADS.NECK_FEAT": "before",
}


class GeM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([2.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=1e-6).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


class Authors(nn.Module):
    """The layout of the authors' network around a backbone."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.base = AGWResNet(width=WIDTH)
        self.global_pool = GeM()
        self.bottleneck = nn.BatchNorm1d(32 * WIDTH)
        self.classifier = nn.Linear(32 * WIDTH, num_classes, bias=False)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.global_pool(self.base(images))
        return pooled

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        feature: torch.Tensor = self.bottleneck(self.pooled(images))
        return feature


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=IDENTITIES, per_id=4)


@pytest.fixture
def cfg(market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    use_market(monkeypatch, market)
    return toy_cfg(tmp_path / "out", **OPTIONS)


@pytest.fixture(scope="module")
def images(market: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, torch.Tensor]:
    """Normalised training images by identity number."""
    from fastreid.data.transforms import build_transforms
    from PIL import Image

    cfg = toy_cfg(tmp_path_factory.mktemp("out"), **OPTIONS)
    transform = build_transforms(cfg, is_train=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    folder = next(market.glob("*/bounding_box_train"))
    return {
        number: torch.stack(
            [(transform(Image.open(path)) - mean) / std for path in sorted(folder.glob(f"{number:04d}_*.jpg"))]
        )
        for number in range(1, IDENTITIES + 1)
    }


@pytest.fixture(scope="module")
def authors(images: dict[int, torch.Tensor]) -> Authors:
    """A random network whose neck whitens and whose classifier fits the identities, in the order of their numbers."""
    torch.manual_seed(0)
    network = Authors(IDENTITIES).eval()
    for block in (network.base.NL_2[0], network.base.NL_3[2]):
        nn.init.normal_(block.W[1].weight, std=0.1)
    with torch.no_grad():
        pooled = network.pooled(torch.cat(list(images.values())))
        network.bottleneck.running_mean.copy_(pooled.mean(dim=0))
        network.bottleneck.running_var.copy_(pooled.var(dim=0))
        features = torch.cat([network(own) for own in images.values()])
        targets = torch.arange(IDENTITIES).repeat_interleave(4)
        solution = torch.linalg.lstsq(features, F.one_hot(targets).float()).solution
        network.classifier.weight.copy_(solution.t())
    return network


@pytest.fixture
def published(authors: Authors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The network as a whole-module pickle, of classes that are gone when it is read."""
    for name in ("modeling", "modeling.baseline"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for kind in (Authors, GeM, AGWResNet):
        monkeypatch.setattr(kind, "__module__", "modeling.baseline")
        setattr(sys.modules["modeling.baseline"], kind.__name__, kind)
    torch.save(nn.DataParallel(authors), tmp_path / "authors.pth")
    for name in ("modeling", "modeling.baseline"):
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "authors.pth"


def run_tool(monkeypatch: pytest.MonkeyPatch, market: Path, *arguments: object) -> None:
    options = [str(value) for pair in OPTIONS.items() for value in pair]
    common = ["--config-file", str(Path(__file__).parents[3] / "configs/Base-QSD-original.yml"), *map(str, arguments)]
    sizes = ["DATASETS.NAMES", "('Market1501',)", "INPUT.SIZE_TEST", "[64, 32]", "TEST.IMS_PER_BATCH", "16"]
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *common, *options, *sizes, "DATALOADER.NUM_WORKERS", "0"])
    use_market(monkeypatch, market)
    convert_weights.main()


def test_converted_model_computes_the_authors_feature(
    authors: Authors, published: Path, images: dict[int, torch.Tensor], cfg: Any, tmp_path: Path
) -> None:
    conversion = convert_for(cfg, published, "agw")
    assert not [*conversion.fit.missing, *conversion.fit.unexpected, *conversion.fit.reshaped]
    torch.save({"model": conversion.state_dict()}, tmp_path / "converted.pth")
    cfg.MODEL.HEADS.NUM_CLASSES = IDENTITIES
    model = load_model(cfg, tmp_path / "converted.pth")
    items = sorted(training_set(cfg, "Market1501", combineall=False)[1])
    with torch.no_grad():
        expected = authors(torch.cat(list(images.values())))
    assert expected.std() > 0.5
    torch.testing.assert_close(embed(cfg, model, items), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.heads.weight, authors.classifier.weight)


def test_class_order_is_found_and_repaired(authors: Authors, published: Path, cfg: Any) -> None:
    model = convert_for(cfg, published, "agw").model
    before = training_accuracy(cfg, model, batches=100)
    assert before.num_images == 4 * IDENTITIES
    assert before.accuracy < 0.5
    assert before.agreement > 0.8
    rows, accuracy = match_classes(cfg, model)
    order = [int(number) - 1 for number in sorted(str(n) for n in range(1, IDENTITIES + 1))]
    assert torch.equal(rows, authors.classifier.weight[order])
    model.heads.weight.data.copy_(rows)
    after = training_accuracy(cfg, model, batches=100)
    assert after.accuracy == pytest.approx(accuracy)
    assert after.accuracy > 0.8
    assert training_accuracy(cfg, model, batches=1).num_images == 16


def test_classifier_of_other_identities_is_refused(published: Path, cfg: Any) -> None:
    model = convert_for(cfg, published, "agw").model
    nn.init.zeros_(model.heads.weight)
    with pytest.raises(CheckpointError, match=r"does not know the identities .* in any order.*--drop-classifier"):
        match_classes(cfg, model)
    cfg.MODEL.HEADS.NUM_CLASSES = 5
    model.heads.weight = nn.Parameter(torch.zeros(5, 64))
    with pytest.raises(ConfigError, match=r"12 identities in Market1501.*expected the 5 identities of the classifier"):
        training_accuracy(cfg, model, batches=1)


def test_tool_prints_what_fits_and_writes_what_the_host_loads(
    published: Path, market: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "agw.pth"
    run_tool(
        monkeypatch, market, "--from", "agw", "--weights", published, "--output", out, "--match-classes",
        "--check-accuracy", "2",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert "390 matched, 1 missing, 0 unexpected, 0 of another shape" in text
    assert re.search(r"^missing +center_loss\.centers +keeps its initial value$", text, re.M)
    assert "note: Colour order: RGB" in text
    assert "Classes matched:" in text
    assert "ATTENTION" not in text
    assert set(torch.load(out, weights_only=True)) == {"model"}


def test_tool_warns_of_another_class_order(
    published: Path, market: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "agw.pth"
    run_tool(monkeypatch, market, "--from", "qsd", "--weights", published, "--output", out, "--check-accuracy", "9")
    text = capsys.readouterr().out
    assert "ATTENTION: the classes are in another order than fast-reid's. Convert with --match-classes." in text


def test_tool_leaves_the_classifier_out(
    published: Path, market: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "agw.pth"
    run_tool(monkeypatch, market, "--from", "agw", "--weights", published, "--output", out, "--drop-classifier")
    assert "heads.weight" not in torch.load(out, weights_only=True)["model"]
    assert "missing" in capsys.readouterr().out


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_tool_says_what_a_file_wanted_to_run(
    authors: Authors, market: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.save({"state_dict": authors.state_dict(), "extra": Touch(tmp_path / "ran")}, tmp_path / "hostile.pth")
    out = tmp_path / "agw.pth"
    run_tool(monkeypatch, market, "--from", "agw", "--weights", tmp_path / "hostile.pth", "--output", out)
    assert "The file wanted to call posix.system; nothing was run." in capsys.readouterr().out
    assert out.is_file()
    assert not (tmp_path / "ran").exists()


def test_tool_refuses_the_wrong_source(
    published: Path, market: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "agw.pth"
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, market, "--from", "fastreid-zoo", "--weights", published, "--output", out)
    error = capsys.readouterr().err
    assert "authors.pth are not from fastreid-zoo: got ['base.conv1.weight'" in error
    assert "They look like agw or qsd: pass --from agw." in error
    assert not out.exists()


def test_another_architecture_is_refused(published: Path, cfg: Any) -> None:
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FEAT_DIM = 2048
    with pytest.raises(CheckpointError, match=r"authors\.pth belongs to another architecture.*backbone kernels"):
        convert_for(cfg, published, "agw")


def test_zoo_file_of_an_old_version(cfg: Any, tmp_path: Path) -> None:
    from fastreid.modeling.meta_arch import build_model

    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.DEPTH = "build_resnet_backbone", "18x"
    cfg.MODEL.BACKBONE.FEAT_DIM, cfg.MODEL.HEADS.NUM_CLASSES = 512, 5
    state = build_model(cfg).state_dict()
    old = {name.replace("heads.weight", "heads.classifier.weight"): value for name, value in state.items()}
    old |= {"pixel_mean": torch.zeros(1, 3, 1, 1), "heads.bnneck.num_batches_tracked": torch.tensor(9)}
    torch.save({"model": old, "epoch": 3}, tmp_path / "zoo.pth")
    conversion = convert_for(cfg, tmp_path / "zoo.pth", "fastreid-zoo")
    assert conversion.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in conversion.state_dict().items())
    [problem] = check_pixels(cfg, conversion.converted)
    assert "MODEL.PIXEL_MEAN is [123.675" in problem
    assert "trained with [0.0, 0.0, 0.0]" in problem


# --- the backbone's builder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DEPTH", "101x", r"MODEL\.BACKBONE\.DEPTH: got '101x'; expected 50x for build_agw_backbone"),
        ("FEAT_DIM", 100, r"MODEL\.BACKBONE\.FEAT_DIM: got 100; expected a multiple of 32"),
    ],
)
def test_impossible_backbones_are_named(key: str, value: Any, message: str, cfg: Any) -> None:
    from fastreid.modeling.backbones import build_backbone

    cfg.MODEL.BACKBONE[key] = value
    with pytest.raises(ConfigError, match=message):
        build_backbone(cfg)


def test_pretrained_file_reaches_the_backbone(cfg: Any, tmp_path: Path) -> None:
    from fastreid.modeling.backbones import build_backbone

    donor = {name: value for name, value in AGWResNet(width=WIDTH).state_dict().items() if "NL_" not in name}
    torch.save({**donor, "fc.weight": torch.zeros(10, 64)}, tmp_path / "imagenet.pth")
    cfg.MODEL.BACKBONE.PRETRAIN, cfg.MODEL.BACKBONE.PRETRAIN_PATH = True, str(tmp_path / "imagenet.pth")
    state = build_backbone(cfg).state_dict()
    assert all(state[name].equal(value) for name, value in donor.items())
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "imagenet.pth")
    with pytest.raises(CheckpointError, match=r"PRETRAIN_PATH: got .*weights of build_agw_backbone 50x"):
        build_backbone(cfg)


def test_default_levels_of_qsd_are_the_authors(cfg: Any) -> None:
    from fastreid.modeling.meta_arch import build_model

    from qsd_plugin.hosts.fastreid.registries import registered_names
    from qsd_plugin.hosts.fastreid.taps import default_taps

    names = [tap.name for tap in default_taps(build_model(cfg))]
    assert names[:3] == ["backbone.NL_2.1", "backbone.NL_3.2", "backbone.layer4.2"]
    assert names[3:] == ["heads.bottleneck", "heads:pred_class_logits"]
    assert registered_names()["MODEL.BACKBONE.NAME"]["build_agw_backbone"]
