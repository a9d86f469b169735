"""Pairs and the fusion with the mirror image against numbers recorded from QGFace's program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.evaluation.verification import normalised, sum_with_flip, verify_pairs


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "qgface.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name.startswith("E_")}


def test_pairs(golden: dict[str, np.ndarray]) -> None:
    result = verify_pairs(golden["E_verif/emb"], golden["E_verif/issame"])
    assert result.fold_accuracy.tolist() == golden["E_verif/acc_folds"].tolist()
    assert result.fold_threshold.tolist() == golden["E_verif/best_thresholds"].tolist()
    assert result.fold_threshold.mean() == golden["E_verif/threshold"]
    assert result.accuracy == golden["E_verif/acc"]
    assert result.tpr.tolist() == golden["E_verif/tpr"].tolist()
    assert result.fpr.tolist() == golden["E_verif/fpr"].tolist()


def test_fusion_by_the_norms(golden: dict[str, np.ndarray]) -> None:
    """``pre_norm_vector_add``: the raw embeddings of an image and its mirror image, added."""
    total = sum_with_flip(*(golden["E_fuse/emb"] * golden["E_fuse/norm"]))
    np.testing.assert_allclose(normalised(total), golden["E_fuse/pre_norm_vector_add_feat"], rtol=0, atol=1e-9)
    lengths = np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(lengths, golden["E_fuse/pre_norm_vector_add_norm"], rtol=1e-9)
