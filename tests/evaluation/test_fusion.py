"""Fusion with the mirror image against numbers recorded from QGFace's program (see tests/data), and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.fusion import FUSIONS, fuse
from qsd_plugin.evaluation.verification import normalised, sum_with_flip


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "qgface_fusion.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("rule", FUSIONS)
def test_as_recorded(rule: str, golden: dict[str, np.ndarray]) -> None:
    fused = fuse(*(golden["emb"] * golden["norm"]), rule)
    lengths = np.linalg.norm(fused, axis=1, keepdims=True)
    np.testing.assert_allclose(normalised(fused), normalised(golden[f"{rule}_feat"]), rtol=0, atol=1e-9)
    np.testing.assert_allclose(lengths, golden[f"{rule}_norm"], rtol=1e-9)


def test_recorded_helper_is_the_sum(golden: dict[str, np.ndarray]) -> None:
    """``utils``: the stand-alone validators' function, which is ``pre_norm_vector_add``."""
    fused = fuse(*(golden["emb"] * golden["norm"]))
    np.testing.assert_allclose(normalised(fused), golden["utils_feat"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(fused, sum_with_flip(*(golden["emb"] * golden["norm"])), rtol=1e-12)


def test_concat_gives_the_mean_of_both_cosines() -> None:
    random = np.random.default_rng(2)
    plain, mirrored = random.standard_normal((2, 6, 5))
    unit = normalised(fuse(plain, mirrored, "concat"))
    assert unit.shape == (6, 10)
    one, other = normalised(plain), normalised(mirrored)
    np.testing.assert_allclose(unit @ unit.T, (one @ one.T + other @ other.T) / 2, rtol=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Fusion with the mirror image: got 'averag'. Did you mean 'average'"):
        fuse(np.eye(2), np.eye(2), "averag")
    with pytest.raises(DataError, match=r"mirror images' embeddings: got \(3, 2\); expected \(2, 2\)"):
        fuse(np.eye(2), np.ones((3, 2)), "average")
