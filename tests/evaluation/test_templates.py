"""IJB 1:1 against the host's own results (see tests/data), scikit-learn's ROC and pooling written as plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.curves import exact_tar, nearest_tar, roc
from qsd_plugin.evaluation.templates import FAR_TARGETS, pool_templates, score_pairs, verify_templates


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    with np.load(Path(__file__).parents[1] / "data" / "verification.npz", allow_pickle=False) as file:
        return dict(file)


def test_equals_the_host(golden: dict[str, Array]) -> None:
    plain, flipped = np.hsplit(golden["F_feats"], 2)
    options = {"flipped": flipped, "detector_score": golden["F_faceness"]}
    images = plain, golden["F_templates"], golden["F_medias"]
    names, embeddings = pool_templates(*images, **options)
    assert names.tolist() == golden["F_unique_templates"].tolist()
    np.testing.assert_allclose(embeddings, golden["F_template_feats"], atol=1e-6, rtol=0)
    scores = score_pairs(names, embeddings, golden["F_pairs"][:500])
    np.testing.assert_allclose(scores, golden["F_score_first"], atol=1e-6, rtol=0)
    result = verify_templates(*images, golden["F_pairs"], golden["F_label"], **options)
    assert result.tar.tolist() == golden["F_tpr_at"].tolist()
    assert result.switches == "N1 D1 F1"
    assert result.far_targets.tolist() == list(FAR_TARGETS)


def test_equals_the_family_s_functions(golden: dict[str, Array]) -> None:
    plain, flipped = np.hsplit(golden["IJB_feat2"], 2)
    options = {"flipped": flipped, "detector_score": golden["IJB_det_score"]}
    images = plain, golden["IJB_template"], golden["IJB_media"]
    np.testing.assert_allclose(pool_templates(*images, **options)[1], golden["IJB_template_feat"], atol=1e-6, rtol=0)
    result = verify_templates(
        *images, golden["IJB_pairs"], golden["IJB_label"], far_targets=golden["IJB_far_targets"].tolist(), **options
    )
    assert result.tar.tolist() == golden["IJB_tar"].tolist()
    assert result.tar == pytest.approx([0.727626] * 3 + [0.904669, 0.970817, 1.0], abs=5e-7)


@pytest.mark.parametrize("use_norm", [True, False])
def test_norm_switch_as_qgface_evaluates(use_norm: bool, golden: dict[str, Array]) -> None:
    result = verify_templates(
        golden["ijbq_emb"] * golden["ijbq_norm"],
        golden["ijbq_template"],
        golden["ijbq_media"],
        golden["ijbq_pairs"],
        golden["ijbq_label"],
        use_norm=use_norm,
        use_detector_score=False,
        use_flip=False,
        far_targets=golden["ijbq_far"].tolist(),
    )
    expected = golden[f"ijbq_{'normweighted' if use_norm else 'unit'}_tar_insightface_flip"]
    assert 100 * result.tar == pytest.approx(expected, abs=1e-9)
    assert result.switches == f"N{use_norm:d} D0 F0"


def by_loop(images: dict[str, Array], *, norm: bool, detector: bool, flip: bool) -> Array:
    rows = []
    for template in sorted(set(images["templates"])):
        total = np.zeros(images["features"].shape[1])
        chosen = images["templates"] == template
        for media in set(images["medias"][chosen]):
            members = []
            for image in np.flatnonzero(chosen & (images["medias"] == media)):
                vector = images["features"][image] + (images["flipped"][image] if flip else 0)
                vector = vector if norm else vector / np.sqrt((vector**2).sum())
                members.append(vector * (images["detector_score"][image] if detector else 1))
            total += sum(members) / len(members)
        rows.append(total / np.sqrt((total**2).sum()))
    return np.array(rows)


@pytest.mark.parametrize("switches", range(8))
def test_every_switch_by_plain_loops_in_tiny_blocks(switches: int) -> None:
    norm, detector, flip = bool(switches & 1), bool(switches & 2), bool(switches & 4)
    random = np.random.default_rng(switches)
    images = {
        "features": random.standard_normal((60, 5)),
        "flipped": random.standard_normal((60, 5)),
        "detector_score": random.random(60),
        "templates": random.integers(0, 12, 60),
        "medias": random.integers(0, 4, 60),
    }
    names, pooled = pool_templates(
        **images, use_norm=norm, use_detector_score=detector, use_flip=flip, block_bytes=8 * 5 * 7
    )
    assert names.tolist() == sorted(set(images["templates"].tolist()))
    np.testing.assert_allclose(pooled, by_loop(images, norm=norm, detector=detector, flip=flip), rtol=1e-12)
    pairs = names[random.integers(0, len(names), (50, 2))]
    scores = score_pairs(names, pooled, pairs, block_bytes=1)
    np.testing.assert_allclose(scores, [pooled[names == a][0] @ pooled[names == b][0] for a, b in pairs], rtol=1e-12)


def scores_and_labels(seed: int, decimals: int | None) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    genuine = random.random(800) < 0.1
    scores = random.standard_normal(800).astype(np.float32) + genuine
    return (scores if decimals is None else scores.round(decimals)), genuine


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_roc_is_scikit_learn_s(decimals: int | None) -> None:
    from sklearn.metrics import roc_curve

    scores, genuine = scores_and_labels(0, decimals)
    curve = roc(scores, genuine)
    far, tar, threshold = roc_curve(genuine, scores)
    assert curve.far.tolist() == far.tolist()
    assert curve.tar.tolist() == tar.tolist()
    assert curve.threshold[1:].tolist() == threshold[1:].tolist()
    assert (curve.num_genuine, curve.num_impostor) == (genuine.sum(), (~genuine).sum())
    targets = [1e-6, 1e-3, 0.01, 0.1, 0.5]
    nearest = [np.abs(far - target).min() for target in targets]
    expected = [tar[np.abs(far - target) == least].max() for target, least in zip(targets, nearest, strict=True)]
    assert nearest_tar(curve, targets)[0].tolist() == expected


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_exact_rule_by_search(decimals: int | None) -> None:
    scores, genuine = scores_and_labels(1, decimals)
    targets = [0.0, 1e-4, 0.01, 0.1, 0.5, 1.0]
    thresholds = np.append(np.unique(scores), np.inf)
    points = [((scores[~genuine] >= t).mean(), (scores[genuine] >= t).mean()) for t in thresholds]
    tar, far = exact_tar(scores, genuine, targets)
    for found, at, target in zip(tar, far, targets, strict=True):
        assert found == pytest.approx(max(rate for share, rate in points if share <= target), abs=1e-12)
        assert at <= target


def test_rules_differ_where_pairs_are_few() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    genuine = np.array([True, False, True, False, False])
    assert nearest_tar(roc(scores, genuine), [0.3])[0].tolist() == [1.0]  # the point at 1/3, above what was asked for
    assert exact_tar(scores, genuine, [0.3])[0].tolist() == [0.5]


def small() -> dict[str, Any]:
    return {
        "features": np.eye(4),
        "templates": np.arange(4),
        "medias": np.arange(4),
        "pairs": np.array([[0, 1], [2, 3]]),
        "genuine": np.array([True, False]),
        "use_flip": False,
        "use_detector_score": False,
    }


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"use_flip": True}, ConfigError, "use_flip=True without flipped. Pass flipped, or use_flip=False"),
        ({"use_detector_score": True}, ConfigError, "use_detector_score=True without detector_score"),
        ({"use_flip": True, "flipped": np.eye(3)}, DataError, r"Shape of flipped: got \(3, 3\); expected \(4, 4\)"),
        ({"medias": np.arange(3)}, DataError, r"Shape of medias: got \(3,\); expected \(4,\), one per image"),
        ({"pairs": np.array([[0, 1], [2, 7]])}, DataError, r"name templates without images: got \[7\]"),
        ({"pairs": np.arange(4)}, DataError, r"Shape of template pairs: got \(4,\)"),
        ({"genuine": np.array([True, True])}, DataError, "No impostor pairs among 2"),
        ({"genuine": np.array([1, 3])}, DataError, r"Values of genuine: got \[1, 3\]"),
        ({"features": np.diag([1, np.nan, 1, 1])}, DataError, "of 1 images are NaN, first of image 1"),
        ({"rule": "neares"}, ConfigError, "Did you mean 'nearest'"),
        ({"far_targets": (2.0,)}, ConfigError, "Wanted false acceptance rate: got 2.0"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        verify_templates(**(small() | changes))
    with pytest.raises(DataError, match="1 scores are NaN, the first one of pair 2"):
        roc(np.array([0, 1, np.nan]), np.array([0, 1, 1]))
