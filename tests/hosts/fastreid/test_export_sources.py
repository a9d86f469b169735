"""What is exported from fast-reid: face networks of finished runs, and projections of a deployed embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import CheckpointError, ExportError
from qsd_plugin.evaluation.retrieval import rank
from qsd_plugin.export.face_networks import FaceModel
from qsd_plugin.hosts import fastreid as host

host.activate()

from fastreid.modeling.meta_arch import build_model  # noqa: E402

from qsd_plugin.hosts.fastreid import deployed, extract, face_runs, projections  # noqa: E402
from qsd_plugin.hosts.fastreid.datasets import test_set as read_test_set  # noqa: E402
from qsd_plugin.hosts.fastreid.datasets import training_set as read_training_set  # noqa: E402

FACE: dict[str, Any] = {
    "MODEL.BACKBONE.NAME": "build_iresnet_backbone",
    "MODEL.BACKBONE.FEAT_DIM": 16,
    "MODEL.BACKBONE.WIDTH": 0.0625,
    "MODEL.HEADS.WITH_BNNECK": False,
    "MODEL.HEADS.POOL_LAYER": "Identity",
    "MODEL.PIXEL_MEAN": [127.5, 127.5, 127.5],
    "MODEL.PIXEL_STD": [127.5, 127.5, 127.5],
    "INPUT.SIZE_TRAIN": [32, 32],
    "INPUT.SIZE_TEST": [32, 32],
}


def face_run(folder: Path, **overrides: Any) -> nn.Module:
    """The host's model, and in ``folder`` what a training leaves."""
    cfg = toy_cfg(folder, **(FACE | overrides))
    cfg.MODEL.HEADS.NUM_CLASSES = 4
    torch.manual_seed(0)
    model: nn.Module = build_model(cfg)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save({"model": model.state_dict(), "epoch": 0}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return model.eval()


def test_exported_network_is_the_run_s_under_published_names(tmp_path: Path) -> None:
    model = face_run(tmp_path)
    assert face_runs.is_face_run(tmp_path)
    face = face_runs.load(tmp_path)
    assert (face.input_size, face.mean, face.std, face.dimension) == ((32, 32), (127.5,) * 3, (127.5,) * 3, 16)
    images = deployed.noise(3, (32, 32))
    with torch.no_grad():
        torch.testing.assert_close(face.network((images - 127.5) / 127.5), model({"images": images.clone()}))
    assert {f"backbone.{name}" for name in face.network.state_dict()} < model.state_dict().keys()
    assert {"conv1.weight", "fc.weight", "features.running_mean"} < face.network.state_dict().keys()


def test_quality_head_s_run_is_exported_with_the_length_that_it_trained(tmp_path: Path) -> None:
    """A run of AdaFace's network and head: what a head adds to train is left out, the length of the embedding stays."""
    names = {"MODEL.BACKBONE.NAME": "build_ir_backbone", "MODEL.HEADS.NAME": "AdaFaceHead"}
    model = face_run(tmp_path, **names)
    assert face_runs.is_face_run(tmp_path)
    face = face_runs.load(tmp_path)
    assert face.names == "ir"
    images = deployed.noise(3, (32, 32))
    with torch.no_grad():
        expected = model({"images": images.clone()})
        torch.testing.assert_close(face.network((images - 127.5) / 127.5), expected)
    assert not torch.allclose(expected.norm(dim=1), torch.ones(2))
    first = model.state_dict()["backbone.input_layer.0.weight"]
    assert torch.equal(face.weights()["input_layer.0.weight"], first.flip(1))


def test_head_that_adds_to_the_embedding_is_refused(tmp_path: Path) -> None:
    face_run(tmp_path, **{"MODEL.HEADS.WITH_BNNECK": True})
    with pytest.raises(ExportError, match=r"HEADS\.WITH_BNNECK of .*config\.yaml: got True; expected False, as in"):
        face_runs.load(tmp_path)


def test_other_folders_are_no_face_runs(tmp_path: Path) -> None:
    assert not face_runs.is_face_run(tmp_path)
    cfg = toy_cfg(tmp_path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "model_final.pth").touch()
    assert not face_runs.is_face_run(tmp_path)
    face_run(tmp_path)
    torch.save({"model": {"heads.weight": torch.zeros(1)}}, tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"model_final\.pth holds no face network: got \[\]"):
        face_runs.load(tmp_path)


def test_both_kinds_of_source_carry_the_same_metadata() -> None:
    contract = {
        "input": dict.fromkeys(("height", "width", "mean", "std", "range", "colour_order", "resize"), 0),
        "embedding": {"tensor": "", "dimension": 0, "normalised": False},
        "metric": "cosine",
    }
    model = FaceModel(nn.Identity(), (112, 112), (1.0,) * 3, (2.0,) * 3, 8, "arcface")
    assert model.metadata().keys() | {"resize"} == deployed.metadata(contract).keys()  # faces are aligned, not resized
    assert model.metadata()["mean"] == "[1.0, 1.0, 1.0]"


class Narrow(nn.Module):
    """Mean colours of a grid, 3 x 8 x 16 = 384 numbers; takes what a host model takes."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(batch["images"], (8, 16)).flatten(1) + self.offset


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=33, per_id=8, test_ids=6, size=(16, 16))


@pytest.fixture
def run(market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> deployed.Deployed:
    use_market(monkeypatch, market)
    cfg = toy_cfg(tmp_path, **{"INPUT.SIZE_TEST": [16, 16], "TEST.IMS_PER_BATCH": 64, "TEST.METRIC": "euclidean"})
    contract = {"embedding": {"dimension": 384}}
    return deployed.Deployed(cfg, Narrow(), contract, {"trained_on": ["Market1501"], "tested_on": ["Market1501"]})


def test_projection_is_fitted_to_the_training_images_and_ranked(run: deployed.Deployed) -> None:
    cfg = projections.with_options(run, ["TEST.IMS_PER_BATCH", "32"])
    projection = projections.projection_for(run, "pca", cfg, None)
    assert projection is not None
    assert (projection.kind, projection.images, projection.matrix.shape) == ("pca", 33 * 8, (256, 384))
    rows = projections.ranking_table(cfg, run, projection)
    assert [(row["numbers"], row["metric"]) for row in rows] == [
        (384, "euclidean"),
        (384, "cosine"),
        (256, "cosine"),
    ]
    _, query, gallery = read_test_set(cfg, "Market1501")
    parts = [projection(extract.embed(cfg, run.model, items)) for items in (query, gallery)]
    columns = [[item[at] for item in items] for at in (1, 2) for items in (query, gallery)]
    result = rank(*parts, *columns)
    assert rows[-1]["mAP"] == pytest.approx(100 * result.mAP)
    assert rows[-1]["Rank-1"] == pytest.approx(100 * result.cmc[0])
    assert rows[-1]["mAP"] == pytest.approx(rows[1]["mAP"], abs=2.0)  # 256 of 384 directions rank nearly alike


def test_projection_is_trained_on_the_people_of_the_training_images(
    run: deployed.Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(embeddings: torch.Tensor, identities: Any, dimension: int, *, seed: int) -> Any:
        seen.append((embeddings, list(identities), dimension))
        return "projection"

    monkeypatch.setattr(projections, "train_linear", train)
    assert projections.projection_for(run, "trained", run.cfg, None) == "projection"
    ((embeddings, identities, dimension),) = seen
    _, items = read_training_set(run.cfg, "Market1501")
    torch.testing.assert_close(embeddings, extract.embed(run.cfg, run.model, items))
    assert identities == [("Market1501", identity) for _, identity, _ in items]
    assert dimension == 256
    with pytest.raises(ExportError, match=r"--images: got '.*'; expected none with --projection trained"):
        projections.projection_for(run, "trained", run.cfg, Path("images"))


def test_projection_is_fitted_to_given_images(run: deployed.Deployed, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(257):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    projection = projections.projection_for(run, "pca", run.cfg, folder)
    assert projection is not None
    assert projection.images == 257
    for path in list(folder.iterdir())[:2]:
        path.unlink()
    with pytest.raises(ExportError, match=r"Images to fit the projection to: got 255; expected at least 256"):
        projections.projection_for(run, "pca", run.cfg, folder)


@pytest.mark.parametrize(("dimension", "kind"), [(100, "zeros"), (256, None), (2048, None)])
def test_only_long_embeddings_need_a_projection_and_none_is_made_unasked(
    run: deployed.Deployed, dimension: int, kind: str | None
) -> None:
    run.contract["embedding"]["dimension"] = dimension
    projection = projections.projection_for(run, "", run.cfg, None)
    assert (None if projection is None else projection.kind) == kind


def test_evaluation_without_a_test_set_says_which_key(run: deployed.Deployed) -> None:
    cfg = projections.with_options(run, ["DATASETS.TESTS", "()"])
    projection = projections.projection_for(run, "pca", run.cfg, None)
    with pytest.raises(ExportError, match=r"DATASETS\.TESTS: got '\(\)'"):
        projections.ranking_table(cfg, run, projection)
