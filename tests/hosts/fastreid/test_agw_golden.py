"""The authors' AGW network and one full QSD step of theirs, against the same weights converted into the host.

Recorded from the authors' programs on weights that are made anew here by rule, see ``authors_weights``.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_cfg, use_market, write_market

from qsd_plugin.export.weights import CLASSIFIER, Converted, convert, fit
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.networks.taps import TapRecorder
from qsd_plugin.quality.labels import QualityLabels

host.activate()

DATA = Path(__file__).parents[2] / "data" / "agw_network.npz"
MAPS = ["backbone.NL_2.1", "backbone.NL_3.2", "backbone.layer4.2"]
CLASSES = 7


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA) as arrays:
        return dict(arrays)


def authors_weights(keys: list[str]) -> dict[str, torch.Tensor]:
    """Weights by rule: each entry from a generator seeded by its name, with scales that keep activations moderate."""
    weights = {}
    for entry in keys:
        key, _, text = entry.partition("|")
        shape = tuple(int(n) for n in text.strip("()").split(",") if n.strip())
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        draw = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
        if key.endswith("running_var"):
            value = 1 + 0.1 * draw.rand(*shape)
        elif key.endswith(("running_mean", "bias")):
            value = 0.1 * draw.randn(*shape)
        elif key.endswith(".p"):
            value = np.full(shape, 3.0)
        elif len(shape) == 1:
            value = 1 + 0.1 * draw.randn(*shape)
        else:
            value = draw.randn(*shape) * np.sqrt((1 if len(shape) == 4 else 0.01) / np.prod(shape[1:]))
        weights[key] = torch.tensor(value * damping(key), dtype=torch.float32)
    return weights


def damping(key: str) -> float:
    factor = 1.0
    if key.startswith("base.") and key.endswith("bn3.weight"):
        factor *= 0.2
    if key.startswith("base.NL_") and key.endswith("W.1.weight"):
        factor *= 0.1
    if key.startswith("base.layer4.") and (
        key.endswith(("bn3.weight", "bn3.bias")) or (".downsample.1." in key and "running" not in key)
    ):
        factor *= 0.2
    return factor


@pytest.fixture(scope="module")
def converted(golden: dict[str, np.ndarray]) -> Converted:
    return convert(authors_weights(golden["agw/state_dict_keys"].tolist()), "agw")


def config(folder: Path, **overrides: Any) -> Any:
    options = {
        "MODEL.BACKBONE.NAME": "build_agw_backbone",
        "MODEL.BACKBONE.DEPTH": "50x",
        "MODEL.BACKBONE.FEAT_DIM": 2048,
        "MODEL.BACKBONE.PRETRAIN": False,
        "MODEL.HEADS.NUM_CLASSES": CLASSES,
        "MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPoolingP",
        "MODEL.HEADS.NECK_FEAT": "before",
        "MODEL.HEADS.CLS_LAYER": "Linear",
        # The recorded inputs are normalised images.
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        **overrides,
    }
    return toy_cfg(folder, **options)


def build(cfg: Any, converted: Converted) -> Any:
    from fastreid.modeling.meta_arch.build import build_model

    model = build_model(cfg)
    model.load_state_dict(converted.weights, strict=False)
    return model


def close(ours: torch.Tensor, golden: np.ndarray) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), golden, rtol=1e-4, atol=1e-4 * np.abs(golden).max())


def test_converted_names_and_sizes_are_the_models(
    golden: dict[str, np.ndarray], converted: Converted, tmp_path: Path
) -> None:
    model = build(config(tmp_path), converted)
    result = fit(converted.weights, model.state_dict())
    assert len(result.matched) == len(golden["agw/state_dict_keys"]) == len(model.state_dict())
    assert not [*result.missing, *result.unexpected, *result.reshaped]
    numbers = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False)]
    assert numbers == golden["agw/n_params_7cls"].tolist()


def test_evaluation_feature_and_energy_maps(
    golden: dict[str, np.ndarray], converted: Converted, tmp_path: Path
) -> None:
    model = build(config(tmp_path), converted).eval()
    with torch.no_grad(), TapRecorder(model, MAPS) as taps:
        feature = model({"images": torch.tensor(golden["agw/input"])})
    close(feature, golden["agw/eval_feat"])
    for index, name in enumerate(MAPS):
        assert str(tuple(taps[name].shape)) == golden["agw/eval_shapes"][index]
        close(taps[name].square().mean(dim=1), golden[f"agw/eval_att_{index}"].squeeze())


def test_training_scores_and_batch_statistics(
    golden: dict[str, np.ndarray], converted: Converted, tmp_path: Path
) -> None:
    model = build(config(tmp_path), converted).train()
    images = torch.tensor(golden["agw/input"])
    targets = torch.zeros(4, dtype=torch.int64)
    outputs = model.heads(model.backbone(images), targets)
    close(outputs["cls_outputs"], golden["agw/train_score"])
    close(model.backbone.bn1.running_mean, golden["agw/train_bn1_running_mean_after1"])
    model.backbone(images.flip(0))
    close(model.backbone.bn1.running_mean, golden["agw/train_bn1_running_mean_after2"])


def test_one_full_step(
    golden: dict[str, np.ndarray], converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forwards, all four losses, every gradient, the step of the centres, two updates of the batch statistics."""
    from fastreid.utils.events import EventStorage

    # Only the names of these images matter: quality is looked up by them.
    root = write_market(tmp_path / "data", num_ids=2, per_id=8, test_ids=1)
    use_market(monkeypatch, root)
    paths = sorted(map(str, root.glob("*/bounding_box_train/*.jpg")))
    anchors, partners = paths[:8], paths[8:]
    quality = np.concatenate([golden["step/q1"], golden["step/q2"]])
    keys = tuple(f"Market1501/bounding_box_train/{Path(path).name}" for path in paths)
    labels = QualityLabels(quality, quality, np.zeros(16), keys, {"dataset": "Market1501", "scale": "minmax"})
    labels.save(tmp_path / "labels.npz")
    cfg = config(
        tmp_path / "out",
        **{
            "MODEL.META_ARCHITECTURE": "QSD",
            "QSD.PRESET": "official",
            "QSD.PAIRING": "partner",
            "QUALITY.FILES": (str(tmp_path / "labels.npz"),),
            "QUALITY.SCALE": "none",
            "MODEL.LOSSES.NAME": ("CrossEntropyLoss", "WeightedTripletLoss", "CenterLoss"),
            # The host spreads the smoothing over the K - 1 other classes, the authors over all K.
            "MODEL.LOSSES.CE.EPSILON": 0.1 * (CLASSES - 1) / CLASSES,
        },
    )
    model = build(cfg, converted).train()
    model.center_loss.centers.copy_(torch.tensor(np.random.RandomState(99).randn(CLASSES, 2048)))
    batch = {
        "images": torch.tensor(golden["step/img"]),
        "partner_images": torch.tensor(golden["step/img2"]),
        "targets": torch.tensor(golden["step/target"]),
        "img_paths": anchors,
        "partner_paths": partners,
        "partner_valid": torch.ones(8),
    }
    with EventStorage(0) as storage:
        losses = model(batch)
        accuracy = storage.latest()["cls_accuracy"]
    total = sum(losses.values())
    total.backward()
    loss, expected_accuracy, cls, qsd = golden["step/loss_acc_cls_qsd"]
    assert losses["loss_qsd"].item() == pytest.approx(qsd, rel=1e-4)
    assert (total - losses["loss_qsd"]).item() == pytest.approx(cls, rel=1e-4)
    assert total.item() == pytest.approx(loss, rel=1e-4)
    assert float(np.ravel(accuracy)[0]) == pytest.approx(expected_accuracy)

    ours = {name: p.grad.double().norm().item() for name, p in model.named_parameters() if p.grad is not None}
    names = {converted_from: name for name, converted_from in converted.sources.items()}
    expected = {names[str(k)]: v for k, v in zip(golden["step/param_names"], golden["step/grad_norms"], strict=True)}
    assert ours.keys() == expected.keys()
    np.testing.assert_allclose([ours[name] for name in expected], list(expected.values()), rtol=2e-3, atol=1e-5)
    assert ours[CLASSIFIER] > 0.1

    close(model.center_loss.centers, golden["step/center_after"])
    close(model.backbone.bn1.running_mean, golden["step/bn1_running_mean"])
    assert model.backbone.bn1.num_batches_tracked == golden["step/bn1_num_batches"] == 2
