"""Settings, labels and heads that ``AdaFaceHead``, ``QGFaceHead`` and the gate cannot work with, named by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from margin_toy import batch, build, head_cfg
from torch import nn

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.quality_margin_heads import quality_head

host.activate()


@pytest.mark.parametrize(
    ("head", "overrides", "message"),
    [
        (
            "QGFaceHead",
            {"QGFACE.THRESHOLD": 1.2},
            r"QGFACE\.THRESHOLD: got 1\.2; expected a number in \[0, 1\]\. Quality",
        ),
        ("QGFaceHead", {"QGFACE.THRESHOLD": -0.1}, r"QGFACE\.THRESHOLD: got -0\.1; expected a number in \[0, 1\]"),
        ("AdaFaceHead", {"QGFACE.NORM_FROM": "neckin"}, r"QGFACE\.NORM_FROM: got 'neckin'\. Did you mean 'neck_in'"),
        ("QGFaceHead", {"QGFACE.START": "debias"}, r"QGFACE\.START: got 'debias'\. Did you mean 'debiased'"),
        ("QGFaceHead", {"QGFACE.REDUCTION": "some"}, r"QGFACE\.REDUCTION: got 'some'\. Known names: active, all"),
        ("AdaFaceHead", {"QGFACE.H": 0.0}, r"QGFACE\.H: got 0\.0; expected a number > 0"),
        ("AdaFaceHead", {"QGFACE.MOMENTUM": 0.0}, r"QGFACE\.MOMENTUM: got 0\.0; expected above 0, up to 1"),
        ("AdaFaceHead", {"QGFACE.MOMENTUM": 1.5}, r"QGFACE\.MOMENTUM: got 1\.5; expected above 0, up to 1"),
        (
            "AdaFaceHead",
            {"MODEL.HEADS.SCALE": 0},
            r"MODEL\.HEADS\.SCALE: got 0; expected a number > 0; the paper's is 64",
        ),
        ("AdaFaceHead", {"MODEL.HEADS.MARGIN": -0.1}, r"MODEL\.HEADS\.MARGIN: got -0\.1; expected a number >= 0"),
        ("AdaFaceHead", {"MODEL.HEADS.NECK_FEAT": "behind"}, r"NECK_FEAT: got 'behind'; expected before or after"),
        (
            "AdaFaceHead",
            {"MODEL.LOSSES.CE.EPSILON": -1.0},
            r"CE\.EPSILON: got -1\.0; expected at least 0 and below 1 with",
        ),
        (
            "QGFaceHead",
            {"MODEL.META_ARCHITECTURE": "MGN", "QGFACE.REDUCTION": "active"},
            r"QGFACE\.REDUCTION: got 'active'; expected all with MGN, which has losses of its own",
        ),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, head: str, overrides: dict[str, Any], message: str) -> None:
    from fastreid.modeling.heads import build_heads

    with pytest.raises(ConfigError, match=message):
        build_heads(head_cfg(head, tmp_path, **overrides))


def test_labels_beyond_the_head_and_training_without_classes_are_named(tmp_path: Path) -> None:
    model = build(head_cfg("QGFaceHead", tmp_path)).train()
    images = {**batch(), "targets": torch.tensor([0, 1, 2, 3, 4, 5, 7, 0])}
    with pytest.raises(
        DataError, match=r"Labels of a head of 5 classes: 2 of 8 beyond it, e\.g\. 5, 7; expected 0 to 4"
    ):
        model(images)
    model = build(head_cfg("QGFaceHead", tmp_path, **{"MODEL.HEADS.NUM_CLASSES": 0})).train()
    with pytest.raises(ConfigError, match=r"NUM_CLASSES: got 0; expected the number of identities, in training"):
        model(batch())


def test_gate_needs_a_head_with_norm_statistics(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"MODEL\.HEADS\.NAME: got 'EmbeddingHead'; expected a head with norm statistics, .*Use QGFaceHead",
    ):
        quality_head(build(head_cfg("EmbeddingHead", tmp_path)))
    model = build(head_cfg("AdaFaceHead", tmp_path))
    assert quality_head(model) is model.heads
    wrapped = nn.Module()
    wrapped.module = model
    assert quality_head(wrapped) is model.heads
