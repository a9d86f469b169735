"""``QGFACE.VIEWS`` in the train loader: which views come, that every draw can be made again, and what is refused."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_cfg, use_market, write_market

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, RegistryError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations.views import adaface_view, clean_view, degraded_view
from qsd_plugin.hosts.fastreid import datasets, loaders
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.training_views import training_views

SEED = 4
PAIR = {"MODEL.META_ARCHITECTURE": "QGFace", "QGFACE.VIEWS.MODE": "pair"}


@pytest.fixture(autouse=True)
def no_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_records", {})


@pytest.fixture
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_market(tmp_path / "data", num_ids=6, per_id=4)
    use_market(monkeypatch, root)
    return root


def views_cfg(folder: Path, **overrides: Any) -> Any:
    """Persons at 64x32, all images in random order from a seed, mirrored half of the time."""
    options = {
        "DATALOADER.SAMPLER_TRAIN": "SeededTrainingSampler",
        "INPUT.FLIP.ENABLED": True,
        "SOLVER.IMS_PER_BATCH": 4,
        "SEED": SEED,
        **overrides,
    }
    return toy_cfg(folder / "out", **options)


def batches(cfg: Any, count: int, first: int = 0) -> list[dict[str, Any]]:
    from fastreid.data import build_reid_train_loader

    loader = build_reid_train_loader(cfg)
    loader.batch_sampler.sampler.sampler.step = first
    return list(islice(loader, count))


def pixels(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    image = read_image(path)
    return np.asarray(image if size is None else image.resize(size[::-1], Image.Resampling.BICUBIC))


def tensor(view: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(view.transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pair_is_the_clean_and_the_degraded_view_of_the_draw(tmp_path: Path, market: Path, workers: int) -> None:
    """Rectangular images at another size than their own; also in a training that goes on at a later step."""
    size = (48, 24)
    keys = {"INPUT.SIZE_TRAIN": list(size), "DATALOADER.NUM_WORKERS": workers, "QGFACE.VIEWS.ROTATION_PROB": 0.5}
    cfg = views_cfg(tmp_path, **PAIR, **keys)
    found = batches(cfg, 4)
    for number, batch in enumerate(found):
        assert batch["images"].shape == batch["degraded_images"].shape == (4, 3, *size)
        for row, path in enumerate(batch["img_paths"]):
            draw = 4 * number + row
            image = pixels(path, size)
            clean = clean_view(image, numpy_stream(SEED, "other view", 0, draw))[0]
            poor = degraded_view(image, numpy_stream(SEED, "degraded view", 0, draw), rotation_probability=0.5)[0]
            assert torch.equal(batch["images"][row], tensor(clean))
            assert torch.equal(batch["degraded_images"][row], tensor(poor))
    later = batches(cfg, 2, first=2)
    for own, other in zip(later, found[2:], strict=True):
        assert own["img_paths"] == other["img_paths"]
        assert torch.equal(own["degraded_images"], other["degraded_images"])
    assert not torch.equal(later[0]["degraded_images"], found[0]["degraded_images"])


def test_options_reach_the_views(tmp_path: Path, market: Path) -> None:
    """Two degraded views, OpenCV filters, no JPEG, no mirroring, swapped channels."""
    keys = {
        "QGFACE.VIEWS.ALIGNED": False,
        "QGFACE.VIEWS.SIDES": [0.2, 0.3],
        "QGFACE.VIEWS.FILTERS": ["opencv_area", "opencv_linear"],
        "QGFACE.VIEWS.JPEG_QUALITY": 0,
        "QGFACE.VIEWS.CROP_PROB": 1.0,
        "QGFACE.VIEWS.PHOTOMETRIC_PROB": 1.0,
        "QGFACE.VIEWS.COLOUR_ORDER": "bgr",
        "INPUT.FLIP.ENABLED": False,
    }
    (batch,) = batches(views_cfg(tmp_path, **PAIR, **keys), 1)
    options = {
        "crop_probability": 1.0,
        "photometric_probability": 1.0,
        "flip_probability": 0.0,
        "sides": (0.2, 0.3),
        "filters": ("opencv_area", "opencv_linear"),
        "jpeg_quality": 0,
        "colour_order": "bgr",
    }
    for row, path in enumerate(batch["img_paths"]):
        for key, purpose in (("images", "other view"), ("degraded_images", "degraded view")):
            expected, params = degraded_view(pixels(path), numpy_stream(SEED, purpose, 0, row), **options)
            assert torch.equal(batch[key][row], tensor(expected))
            assert params["mirrored"] is False
            assert params["steps"][0]["name"] == "adaface_rescale"  # without a JPEG
            assert 0.19 * 64 - 1 <= params["steps"][0]["height"] <= 0.3 * 64
            assert {params["steps"][0]["down"], params["steps"][0]["up"]} <= set(options["filters"])
    assert not torch.equal(batch["images"], batch["degraded_images"])


@pytest.mark.parametrize(("name", "variant"), [("adaface", "adaface"), ("adaface_qgface", "qgface")])
def test_a_single_view_is_the_only_one_for_any_architecture(
    tmp_path: Path, market: Path, name: str, variant: str
) -> None:
    keys = {"QGFACE.VIEWS.MODE": "single", "QGFACE.VIEWS.DEGRADED": name, "QGFACE.VIEWS.ADAFACE_PROB": 0.9}
    (batch,) = batches(views_cfg(tmp_path, **keys), 1)
    assert set(batch) == {"images", "targets", "camids", "img_paths"}
    for row, path in enumerate(batch["img_paths"]):
        stream = numpy_stream(SEED, "degraded view", 0, row)
        expected = adaface_view(pixels(path), stream, variant=variant, probability=0.9)[0]
        assert torch.equal(batch["images"][row], tensor(expected))


def test_other_augmentations_follow_anew_for_each_view_and_come_again(tmp_path: Path, market: Path) -> None:
    keys = {
        "INPUT.REA.ENABLED": True,
        "INPUT.REA.PROB": 1.0,
        "INPUT.REA.VALUE": [999.0, 999.0, 999.0],
        "INPUT.PADDING.ENABLED": True,
    }
    (first,), (second,) = (batches(views_cfg(tmp_path, **PAIR, **keys), 1) for _ in range(2))
    erased = [(first[key] == 999).any(dim=1) for key in ("images", "degraded_images")]
    assert all(mask.flatten(1).any(dim=1).all() for mask in erased)
    assert not torch.equal(*erased)
    for key in ("images", "degraded_images"):
        assert torch.equal(first[key], second[key])


def test_synthetic_faces_come_in_pairs(tmp_path: Path) -> None:
    sizes = {"NUM_TRAIN_IDENTITIES": 4, "NUM_TEST_IDENTITIES": 20, "NUM_DISTRACTORS": 0, "IMAGES_PER_IDENTITY": 2}
    keys = {
        "DATASETS.NAMES": ("SyntheticFaces",),
        "DATA.CACHE": str(tmp_path / "cache"),
        "INPUT.SIZE_TRAIN": [32, 32],
        **{f"DATA.FACES.{key}": value for key, value in {**sizes, "NUM_PAIRS": 20, "SIZE": 48}.items()},
    }
    cfg = views_cfg(tmp_path, **PAIR, **keys)
    (batch,) = batches(cfg, 1)
    assert batch["images"].shape == batch["degraded_images"].shape == (4, 3, 32, 32)
    # Degraded views have lost their detail: fewer pixels left than half of each side.
    detail = [(batch[key].diff(dim=3)).abs().mean() for key in ("images", "degraded_images")]
    assert detail[1] < detail[0]


def test_precise_bn_s_loader_and_the_host_s_transforms_alone(tmp_path: Path, market: Path) -> None:
    """``none`` leaves the batches of the host as they are."""
    (batch,) = batches(views_cfg(tmp_path, **{"MODEL.META_ARCHITECTURE": "QGFace"}), 1)
    assert "degraded_images" not in batch
    assert training_views(views_cfg(tmp_path)) is None
    _, items = datasets.training_set(views_cfg(tmp_path), "Market1501")
    by_path = {path: tensor(pixels(path)) for path, _, _ in items}
    assert any(torch.equal(batch["images"][row], by_path[path]) for row, path in enumerate(batch["img_paths"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"QGFACE.VIEWS.MODE": "pair"}, "QGFACE.VIEWS.MODE: got 'pair'; expected none or single with .* Baseline"),
        ({"QGFACE.VIEWS.MODE": "two"}, "QGFACE.VIEWS.MODE: got 'two'"),
        ({**PAIR, "QGFACE.VIEWS.DEGRADED": "qgfac"}, "QGFACE.VIEWS.DEGRADED: got 'qgfac'.*Did you mean 'qgface'"),
        ({**PAIR, "QGFACE.VIEWS.COLOUR_ORDER": "gbr"}, "QGFACE.VIEWS.COLOUR_ORDER: got 'gbr'"),
        ({**PAIR, "QGFACE.VIEWS.OUTPUT_ORDER": "bgr"}, "OUTPUT_ORDER: got 'bgr'; expected rgb: .*swapped channels"),
        ({**PAIR, "QGFACE.VIEWS.CROP_PROB": 1.5}, "QGFACE.VIEWS.CROP_PROB: got 1.5"),
        ({**PAIR, "QGFACE.VIEWS.SIDES": [0.5, 0.1]}, r"Shares of a side .* got \[0.5, 0.1\]"),
        ({**PAIR, "QGFACE.VIEWS.SIDES": [0.0, 0.5]}, "Shares of a side"),
        ({**PAIR, "QGFACE.VIEWS.FILTERS": ["pillow_bicubc"]}, "got 'pillow_bicubc'.*Did you mean 'pillow_bicubic'"),
        ({**PAIR, "QGFACE.VIEWS.FILTERS": []}, r"Filters of a degraded view: got \[\]"),
        ({**PAIR, "QGFACE.VIEWS.JPEG_QUALITY": 101}, "JPEG quality of a degraded view: got 101"),
        (
            {
                "QGFACE.VIEWS.MODE": "single",
                "MODEL.META_ARCHITECTURE": "QSD",
                "QSD.PAIR_FLIP": "shared",
                "QUALITY.SOURCE": "embedding_norm",
            },
            "QGFACE.VIEWS.MODE: got 'single'; expected none with QSD.PAIR_FLIP shared",
        ),
        (
            {
                "QGFACE.VIEWS.MODE": "single",
                "MODEL.META_ARCHITECTURE": "QUD",
                "QUD.TEACHER.SOURCE": "cache",
                "INPUT.REA.ENABLED": False,
            },
            "QUD.TEACHER.SOURCE cache.*QGFACE.VIEWS.MODE single",
        ),
    ],
)
def test_impossible_views_are_refused(tmp_path: Path, market: Path, overrides: Any, message: str) -> None:
    with pytest.raises((ConfigError, RegistryError), match=message):
        batches(views_cfg(tmp_path, **overrides), 1)
