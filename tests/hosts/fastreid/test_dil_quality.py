"""``QUALITY.SOURCE dil_severity``: labels by stage 1 against codes and direction by hand, and where they come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dil_toy import build, dil_cfg, stored
from PIL import Image
from toy import use_market, write_market

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import dil_quality, quality, samplers, training_stages
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.dil_pairs import degradation_of
from qsd_plugin.methods.dil import flip_averaged_codes
from qsd_plugin.quality.labels import QualityLabels

host.activate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty training images, of which every other one is dark, and a stage 1 that nobody has trained."""
    folder = tmp_path_factory.mktemp("dil_quality")
    write_market(folder / "data", num_ids=5, per_id=8, test_ids=1)
    files = sorted((folder / "data" / "Market-1501-v15.09.15" / "bounding_box_train").glob("*.jpg"))
    for file in files[::2]:
        with Image.open(file) as image:
            dark = image.point(lambda value: value * 0.15)
        dark.save(file, quality=95)
    model = build(dil_cfg(folder))
    stored(model, folder / "stage1.pth")
    with torch.no_grad():
        for parameter in model.stage.degradation_encoder.parameters():
            parameter.mul_(1.1)
    stored(model, folder / "other.pth")
    return folder


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, folder / "data")


def config(folder: Path, output: Path, **options: Any) -> Any:
    shared = {
        "QUALITY.SOURCE": "dil_severity",
        "QUALITY.SEVERITY.STAGE1": str(folder / "stage1.pth"),
        "QUALITY.SEVERITY.IMAGES": 30,
        "DIL.PAIRS.MIX": "ill",
        "OUTPUT_DIR": str(output),
    }
    return dil_cfg(folder, "DILReID", **{**shared, **options})


def paths_of(cfg: Any) -> list[str]:
    return [path for path, _, _ in training_stages.training_items(cfg)["Market1501"]]


def codes_of(cfg: Any, images: list[Image.Image]) -> np.ndarray:
    from fastreid.data.transforms import build_transforms

    encoder = dil_quality.load_encoder(cfg)
    mean, std = (torch.tensor(cfg.MODEL[key]).view(3, 1, 1) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    pixels = torch.stack([(build_transforms(cfg, is_train=False)(image) - mean) / std for image in images])
    return flip_averaged_codes(encoder, pixels).double().numpy()


def test_labels_are_the_place_of_the_code_along_the_direction_of_worse_images(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, tmp_path)
    (file,) = dil_quality.severity_files(cfg)
    labels, paths = QualityLabels.load(file), paths_of(cfg)
    images = [read_image(path) for path in paths]
    chosen = [images[row] for row in numpy_stream(3, "dil severity images").permutation(len(images))[:30]]
    worse = [degradation_of(cfg)(image, numpy_stream(3, "dil severity", row)) for row, image in enumerate(chosen)]
    found = dil_quality.find_direction(cfg, dil_quality.load_encoder(cfg), paths)
    direction = found.direction.double().numpy()
    # The direction leads from images to their degraded copies; it is the best linear one, not the difference of means.
    assert np.mean((codes_of(cfg, worse) - codes_of(cfg, chosen)) @ direction) > 0
    assert labels.meta["accuracy"] == found.accuracy
    raw = -codes_of(cfg, images) @ direction
    np.testing.assert_allclose(labels.raw, raw, rtol=1e-4, atol=1e-6)
    expected = 100 * (raw - raw.min()) / (raw.max() - raw.min())
    np.testing.assert_allclose(labels.lookup(paths)[0], expected, rtol=1e-3, atol=1e-2)


def test_dark_images_get_lower_labels_from_a_stage_1_that_was_never_trained(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, tmp_path)
    (file,) = dil_quality.severity_files(cfg)
    scores = QualityLabels.load(file).lookup(paths_of(cfg))[0].numpy()
    dark = np.array([np.asarray(read_image(path)).mean() < 60 for path in paths_of(cfg)])
    assert 10 < dark.sum() < 30
    assert np.median(scores[dark]) < np.median(scores[~dark])


def test_a_training_step_and_a_sampler_read_them_and_they_are_made_once(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, tmp_path)
    source, paths = quality.ImageQuality(cfg), paths_of(cfg)
    assert not source.needs_embeddings
    scores, valid = source(paths[:4], None, torch.device("cpu"))
    file = tmp_path / "dil_severity" / "Market1501.npz"
    expected = QualityLabels.load(file).lookup(paths[:4])[0]
    assert valid.all()
    torch.testing.assert_close(scores, expected)
    made = file.stat().st_mtime_ns
    shuffled = config(folder, tmp_path, **{"QUALITY.CONTROL": "shuffle"})
    assert not torch.equal(quality.ImageQuality(shuffled)(paths, None, torch.device("cpu"))[0][:4], expected)
    chooses = config(folder, tmp_path, **{"DATALOADER.SAMPLER_TRAIN": "QualityIdentitySampler"})
    items = training_stages.training_items(chooses)["Market1501"]
    assert samplers.build_sampler(chooses, items, [0] * len(items)) is not None
    assert file.stat().st_mtime_ns == made
    other = config(folder, tmp_path, **{"QUALITY.SEVERITY.STAGE1": str(folder / "other.pth")})
    dil_quality.severity_files(other)
    assert file.stat().st_mtime_ns > made


def test_the_tool_writes_the_same_labels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import quality_labels

    cfg = config(folder, tmp_path)
    (file,) = dil_quality.severity_files(cfg)
    (tmp_path / "config.yml").write_text(cfg.dump())
    command = ["--config-file", str(tmp_path / "config.yml"), "--dil-stage1", str(folder / "stage1.pth")]
    monkeypatch.setattr(sys, "argv", ["quality_labels.py", *command, "--output", str(tmp_path / "labels")])
    quality_labels.main()
    assert "Market1501" in capsys.readouterr().out
    np.testing.assert_array_equal(
        QualityLabels.load(tmp_path / "labels" / "Market1501.npz").score, QualityLabels.load(file).score
    )


def test_what_is_no_stage_1_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"QUALITY.SEVERITY.STAGE1: got ''; expected a checkpoint of DIL's stage 1"):
        dil_quality.severity_files(config(folder, tmp_path, **{"QUALITY.SEVERITY.STAGE1": ""}))
    with pytest.raises(ConfigError, match=r"QUALITY.SEVERITY.IMAGES: got 5; expected an integer >= 10"):
        dil_quality.severity_files(config(folder, tmp_path, **{"QUALITY.SEVERITY.IMAGES": 5}))
    second = stored(build(dil_cfg(folder, "DILReID", **{"DIL.REPLAY.MODE": "none"})), tmp_path / "second.pth")
    with pytest.raises(CheckpointError, match=r"a checkpoint of stage 2 \(DILReID\)"):
        dil_quality.severity_files(config(folder, tmp_path, **{"QUALITY.SEVERITY.STAGE1": second}))
