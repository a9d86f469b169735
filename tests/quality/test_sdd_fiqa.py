"""SDD-FIQA labels: the authors' numbers, SciPy on the same draws, and what the draws must and must not depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from qsd_plugin.core.errors import ConfigError, LabelError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.quality import sampling, sdd_fiqa_labels
from qsd_plugin.quality.sampling import SimilaritySampler
from qsd_plugin.quality.sdd_fiqa import sample_distances, wasserstein_1d

GOLDEN = Path(__file__).parents[1] / "data" / "qsd_labels.npz"


def golden(group):
    """Names, identities, embeddings in the order of the authors' output, and that group's outputs."""
    with np.load(GOLDEN) as arrays:
        values = {name.split("/")[1]: arrays[name] for name in arrays if name.startswith(f"{group}/")}
    names = values["names"].tolist()
    row = {f"ROOT{name}": place for place, name in enumerate(names)}
    order = [row[path] for path in values["out_paths"]]
    return (
        [names[place] for place in order],
        [names[place].split("/")[1] for place in order],
        values["feats"][order],
        values,
    )


def clusters(sizes, dim=16, *, seed=0, noise=1.0):
    """Embeddings and identities of noisy clusters with the given numbers of images, shuffled."""
    generator = np.random.default_rng(seed)
    identities = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = generator.normal(size=(len(sizes), dim))
    return centres[identities] + noise * generator.normal(size=(len(identities), dim)), identities


def sampler_of(embeddings, identities, **options):
    defaults = {"positives": 24, "negatives": 24, "seed": 0, "keys": [str(row) for row in range(len(embeddings))]}
    return SimilaritySampler(embeddings, identities, **{**defaults, **options})


@pytest.mark.parametrize("block", [4096, 20])
def test_exhaustive_pools_give_the_authors_labels(block, monkeypatch):
    """T16: 11 positives and exactly 24 negatives per image leave nothing to chance, however the images are cut up."""
    monkeypatch.setattr(sampling, "BLOCK", block)
    names, identities, embeddings, expected = golden("pseudo_exhaustive")
    labels = sdd_fiqa_labels(embeddings, identities, keys=names)
    np.testing.assert_allclose(labels.score, expected["labels"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(labels.raw, expected["wd_round0"], atol=1e-9, rtol=0)
    np.testing.assert_allclose(labels.spread, 0.0, atol=1e-9)
    assert labels.meta["raw_range"] == pytest.approx(
        [expected["wd_round0"].min(), expected["wd_round0"].max()], abs=1e-12
    )


def test_sampled_labels_agree_with_the_authors_under_another_random_stream():
    """T17."""
    names, identities, embeddings, expected = golden("pseudo_sampled_seed0")
    labels = sdd_fiqa_labels(embeddings, identities, keys=names)
    assert np.corrcoef(labels.score, expected["labels"])[0, 1] > 0.9
    # Means of rounds that each span the whole scale reach neither end.
    assert 0 < labels.score.min() < labels.score.max() < 100
    single = sdd_fiqa_labels(embeddings, identities, keys=names, rounds=1)
    assert (single.score.min(), single.score.max()) == (0.0, 100.0)
    np.testing.assert_array_equal(single.spread, 0.0)


@pytest.mark.parametrize("sizes", [(24, 24), (1, 24), (24, 1), (7, 24), (16, 24), (5, 3), (1, 1)])
def test_w1_is_scipys(sizes):
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(40, sizes[0])), generator.normal(0.5, 2.0, size=(40, sizes[1]))
    first[:5] = np.round(first[:5])  # ties
    second[:5] = np.round(second[:5])
    expected = [wasserstein_distance(a, b) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(wasserstein_1d(first, second), expected, atol=1e-12, rtol=0)


def test_w1_closed_forms():
    shifted = wasserstein_1d([[0.0, 1.0, 5.0]], [[3.0, 8.0, 4.0]])  # the same points moved by 3, in another order
    point_masses = wasserstein_1d([[0.0]], [[1.0, -1.0, 2.0, 0.0]])
    assert shifted == pytest.approx([3.0])
    assert point_masses == pytest.approx([1.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_w1_of_the_drawn_similarities_is_scipys_for_every_image(dtype):
    embeddings, identities = clusters([2, 3, 9, 25, 26, 40])
    sample = sampler_of(embeddings.astype(dtype), identities).sample(0, 5)
    assert sample.positive.dtype == dtype
    assert set(sample.sizes) == {1, 2, 8, 24}
    expected = [
        wasserstein_distance(positive[:size].astype(np.float64), negative.astype(np.float64))
        for positive, size, negative in zip(sample.positive, sample.sizes, sample.negative, strict=True)
    ]
    np.testing.assert_allclose(sample_distances(sample), expected, atol=1e-9, rtol=0)


def test_draws_are_distinct_images_of_the_right_identities(monkeypatch):
    """Every drawn similarity is found in the dense similarity matrix, in the right part of it, and no image twice."""
    monkeypatch.setattr(sampling, "BLOCK", 16)
    embeddings, identities = clusters([1, 5, 30, 9, 1, 7])
    sampler = sampler_of(embeddings, identities, negatives=20)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    dense = unit @ unit.T
    seen = []
    for block in range(sampler.blocks):
        sample = sampler.sample(block, 0)
        for place, positive, size, negative in zip(
            range(sample.rows.start, sample.rows.stop), sample.positive, sample.sizes, sample.negative, strict=True
        ):
            image = sampler.order[place]
            seen.append(image)
            drawn = [np.flatnonzero(np.isclose(dense[image], value, rtol=0, atol=1e-12)) for value in positive[:size]]
            others = [np.flatnonzero(np.isclose(dense[image], value, rtol=0, atol=1e-12)) for value in negative]
            assert all(len(match) == 1 for match in drawn + others)
            drawn, others = {int(match[0]) for match in drawn}, {int(match[0]) for match in others}
            same = set(np.flatnonzero(identities == identities[image]).tolist())
            assert len(drawn) == size == min(24, len(same) - 1)
            assert drawn <= same - {image}
            assert len(others) == 20
            assert not others & same
    assert sorted(seen) == np.flatnonzero(np.isin(identities, [1, 2, 3, 5])).tolist()


def test_every_image_is_drawn_equally_often():
    generator = np.random.default_rng(0)
    pool = np.array([6, 9] * 20000)
    chosen = sampling._distinct(generator, pool, 4)
    assert (np.diff(chosen, axis=1) > 0).all()
    for size in (6, 9):
        counts = np.bincount(chosen[pool == size].ravel(), minlength=size)
        expected = 20000 * 4 / size
        assert len(counts) == size
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_every_round_of_every_block_has_a_stream_of_its_own(monkeypatch):
    paths = []

    def recorded(*path):
        paths.append(path)
        return numpy_stream(*path)

    monkeypatch.setattr(sampling, "BLOCK", 30)
    monkeypatch.setattr(sampling, "numpy_stream", recorded)
    embeddings, identities = clusters([40, 30, 30])
    sdd_fiqa_labels(embeddings, identities, rounds=3, seed=8)
    assert len(paths) == len(set(paths)) == 4 * 3
    assert all(path[0] == 8 for path in paths)


def test_labels_depend_on_the_seed_alone():
    embeddings, identities = clusters([30, 30, 30, 12])
    first = sdd_fiqa_labels(embeddings, identities, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        np.random.seed(5)  # noqa: NPY002 - global state must not matter
        again = sdd_fiqa_labels(torch.from_numpy(embeddings), torch.from_numpy(identities), seed=1)
    finally:
        torch.set_num_threads(threads)
    other = sdd_fiqa_labels(embeddings, identities, seed=2)
    np.testing.assert_array_equal(first.score, again.score)
    assert np.abs(first.score - other.score).max() > 1
    assert np.corrcoef(first.score, other.score)[0, 1] > 0.8


def test_more_rounds_start_with_the_same_rounds():
    embeddings, identities = clusters([30, 30, 30])
    three, four = (sdd_fiqa_labels(embeddings, identities, rounds=rounds) for rounds in (3, 4))
    last = sampler_of(embeddings, identities)
    fourth = np.empty(90)
    fourth[last.order] = sample_distances(last.sample(0, 3))
    np.testing.assert_allclose(4 * four.raw - 3 * three.raw, fourth, atol=1e-12)


def test_embeddings_are_normalised_inside_and_left_alone():
    embeddings, identities = clusters([12, 12, 12])
    scaled = embeddings * np.random.default_rng(1).uniform(0.1, 10, size=(36, 1))
    before = scaled.copy()
    np.testing.assert_allclose(
        sdd_fiqa_labels(scaled, identities).score, sdd_fiqa_labels(embeddings, identities).score, atol=1e-9
    )
    np.testing.assert_array_equal(scaled, before)


def test_half_precision_is_computed_in_single():
    embeddings, identities = clusters([12, 12, 12])
    half = torch.from_numpy(embeddings).half()
    np.testing.assert_array_equal(
        sdd_fiqa_labels(half, identities).score, sdd_fiqa_labels(half.float(), identities).score
    )


def test_an_image_far_from_its_identity_gets_the_lowest_label():
    embeddings, identities = clusters([20, 20, 20], noise=0.3)
    embeddings[7] = np.random.default_rng(9).normal(size=16)
    assert np.argmin(sdd_fiqa_labels(embeddings, identities).score) == 7


def test_signed_puts_a_wrongly_annotated_image_last():
    """Its positives are less similar than its negatives: the unsigned distance cannot tell (spec, no. 35)."""
    embeddings, identities = clusters([12, 30], noise=0.2)
    wrong = int(np.flatnonzero(identities == 0)[0])
    embeddings[wrong] = embeddings[identities == 1].mean(axis=0)
    unsigned, signed = (
        sdd_fiqa_labels(embeddings, identities, negatives=11, signed=signed) for signed in (False, True)
    )
    assert unsigned.score[wrong] > 50
    assert signed.score[wrong] == 0.0
    assert signed.raw[wrong] == -unsigned.raw[wrong] < 0


def test_images_without_a_positive_stay_unlabelled_and_serve_as_negatives():
    embeddings, identities = clusters([12, 1, 14, 1])
    alone = np.isin(identities, [1, 3])
    labels = sdd_fiqa_labels(embeddings, identities, negatives=14)  # 12 + 2 images for identity 2
    np.testing.assert_array_equal(np.isnan(labels.score), alone)
    assert labels.meta["unlabelled"] == 2
    assert labels.meta["images"] == 28
    _, valid = labels.lookup(labels.keys)
    np.testing.assert_array_equal(valid.numpy(), ~alone)


def test_identity_names_do_not_matter():
    embeddings, identities = clusters([12, 12, 12])
    named = [f"person {identity}" for identity in identities]
    np.testing.assert_array_equal(
        sdd_fiqa_labels(embeddings, named).score, sdd_fiqa_labels(embeddings, identities).score
    )


def test_equal_distances_make_equal_labels_not_nan():
    embeddings = np.repeat(np.eye(3), 2, axis=0)
    labels = sdd_fiqa_labels(embeddings, [0, 0, 1, 1, 2, 2], negatives=4)
    np.testing.assert_array_equal(labels.score, 50.0)
    np.testing.assert_allclose(labels.raw, 1.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda e: e.__setitem__((3, 0), np.nan),
            r"1 of 36 embeddings are not finite: got 'img3'; expected finite vectors",
        ),
        (
            lambda e: e.__setitem__((slice(0, 4), 1), np.inf),
            r"4 of 36 embeddings are not finite: got 'img0, img1, img2'",
        ),
        (lambda e: e.__setitem__(5, 0.0), r"1 of 36 embeddings are zero: got 'img5'"),
    ],
)
def test_spoilt_embeddings_are_named(spoil, message):
    embeddings, identities = clusters([12, 12, 12])
    spoil(embeddings)
    with pytest.raises(LabelError, match=message):
        sdd_fiqa_labels(embeddings, identities, keys=[f"img{row}" for row in range(36)])


@pytest.mark.parametrize(
    ("identities", "message"),
    [
        ([7] * 6, r"Identities to label: got 1; expected at least 2"),
        ([0, 1, 2, 3, 4, 5], r"None of 6 identities has two images; expected identities with 2 images or more"),
        ([0, 0, 0, 0, 4, 5], r"Images of identities other than 0: got 2; expected at least 24 .* pass negatives=2\."),
        ([0, 0, 0], r"Identities: got 'int64 \(3,\)'; expected one integer or string for each of 6 embeddings"),
        ([0.0, 0, 0, 1, 1, 1], r"Identities: got 'float64 \(6,\)'; expected one integer or string"),
    ],
)
def test_identities_that_cannot_be_labelled(identities, message):
    with pytest.raises(LabelError, match=message):
        sdd_fiqa_labels(np.eye(6), identities)


def test_wrong_shapes_and_counts():
    with pytest.raises(
        LabelError, match=r"Embeddings: got \(6, 6\); expected \[N, D\] with one row for each of 2 keys"
    ):
        sdd_fiqa_labels(np.eye(6), [0, 0, 0, 1, 1, 1], keys=["a", "b"])
    with pytest.raises(ConfigError, match="sdd_fiqa_labels: rounds: got 0; expected at least 1"):
        sdd_fiqa_labels(np.eye(6), [0, 0, 0, 1, 1, 1], rounds=0)
