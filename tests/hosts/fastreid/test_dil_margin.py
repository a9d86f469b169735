"""``DILReID`` with ``QGFaceHead``: its loss by hand in the place of one cross entropy, nothing of it in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dil_toy import CLASSES, build, dil_cfg, step

from qsd_plugin.hosts import fastreid as host
from qsd_plugin.methods.dil.losses import identity_loss
from qsd_plugin.methods.qgface import NormStatistics, adaface_logits, classification_gate

host.activate()

MARGIN = {
    "MODEL.HEADS.NAME": "QGFaceHead",
    "MODEL.HEADS.SCALE": 64,
    "MODEL.HEADS.MARGIN": 0.4,
    "QGFACE.THRESHOLD": 0.4,
    "QGFACE.NORM_FROM": "neck_in",
}


def model_of(folder: Path, **overrides: Any) -> Any:
    return build(dil_cfg(folder, "DILReID", **{"DIL.REPLAY.MODE": "none", "DIL.DROPOUT": 0.0, **overrides}))


def batch() -> dict[str, Any]:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    return {"images": images, "targets": torch.arange(8) // 4}


def test_the_joined_feature_is_classified_by_the_gated_margin(tmp_path: Path) -> None:
    model, pure = model_of(tmp_path, **MARGIN), model_of(tmp_path, **MARGIN)
    inputs = batch()
    losses, labels = step(model, inputs), inputs["targets"]
    assert losses.keys() == {f"loss_dil_{name}" for name in ("fuse", "inv", "sen", "margin")}
    outputs = pure.reid(pure.normalised(inputs["images"]))
    joined = outputs.features["fuse"]
    head = pure.margin_head
    unit = F.normalize(head.bottleneck(joined[..., None, None])[..., 0, 0])
    statistics = NormStatistics(momentum=0.01, mean_init=0.0, std_init=0.0, debias=True)
    norm = joined.detach().norm(dim=1, keepdim=True)
    statistics.update(norm)
    scaler = statistics.scaler(norm, 0.333)
    logits = adaface_logits(
        unit @ F.normalize(head.weight).T,
        labels,
        scaler,
        margin=0.4,
        scale=64,
        gate=classification_gate(scaler, 0.4, 64),
    )
    assert logits.shape == (8, CLASSES)
    torch.testing.assert_close(losses["loss_dil_margin"], F.cross_entropy(logits, labels), rtol=1e-4, atol=1e-5)
    triplet = identity_loss(outputs.logits["fuse"], joined, labels, "tri")
    torch.testing.assert_close(losses["loss_dil_fuse"], triplet, rtol=1e-4, atol=1e-5)
    losses["loss_dil_margin"].backward()
    assert model.margin_head.weight.grad.abs().sum() > 0
    assert next(model.reid.content_encoder.model.parameters()).grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.reid.fuse_classifier.parameters())


def test_evaluation_is_that_without_the_head(tmp_path: Path) -> None:
    model, plain = model_of(tmp_path, **MARGIN).eval(), model_of(tmp_path).eval()
    assert plain.margin_head is None
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    inputs = batch()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), plain(inputs), rtol=0, atol=0)
