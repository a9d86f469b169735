"""Cross-fitting: how identities are divided, and how the labels of the folds become one table."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qsd_plugin.core.errors import ConfigError, LabelError
from qsd_plugin.quality import QualityLabels, sdd_fiqa_labels
from qsd_plugin.quality.folds import identity_folds, merge_folds


def uneven_identities():
    """60 identities with 1 to 40 images each, shuffled."""
    generator = np.random.default_rng(0)
    return generator.permutation(np.repeat(np.arange(60), generator.integers(1, 41, size=60)))


@pytest.mark.parametrize("folds", [2, 5, 30])
def test_folds_are_balanced_and_keep_identities_together(folds):
    identities = uneven_identities()
    fold = identity_folds(identities, folds, seed=3)
    images = np.bincount(fold, minlength=folds)
    assert fold.shape == identities.shape
    assert images.max() - images.min() <= max(Counter(identities.tolist()).values())
    for identity in np.unique(identities):
        assert len(set(fold[identities == identity])) == 1


def test_equal_identities_make_equal_folds():
    fold = identity_folds(np.repeat(np.arange(12), 5), 4)
    assert np.bincount(fold).tolist() == [15, 15, 15, 15]


def test_folds_depend_on_the_seed_and_on_nothing_else():
    identities = np.repeat(np.arange(40), 6)
    first = identity_folds(identities, 4, seed=1)
    np.random.seed(7)  # noqa: NPY002 - global state must not matter
    np.testing.assert_array_equal(identity_folds(identities, 4, seed=1), first)
    assert (identity_folds(identities, 4, seed=2) != first).any()
    order = np.random.default_rng(1).permutation(len(identities))
    np.testing.assert_array_equal(identity_folds(identities[order], 4, seed=1), first[order])


@pytest.mark.parametrize("folds", [1, 3, 0])
def test_impossible_numbers_of_folds_are_refused(folds):
    with pytest.raises(ConfigError, match=rf"Folds of 5 identities: got {folds}; expected 2 to 2 .*QUALITY\.FOLDS"):
        identity_folds(["a", "b", "c", "d", "e"], folds)


def embedded(seed):
    """What two different networks might make of 6 identities with 8 images: other vectors, other distances."""
    generator = np.random.default_rng(seed)
    identities = np.repeat(np.arange(6), 8)
    return generator.normal(size=(6, 8))[identities] * (1 + seed) + generator.normal(size=(48, 8)), identities


def test_merged_labels_are_those_of_each_fold_scaled_by_itself():
    (first, identities), (second, _) = embedded(0), embedded(1)
    keys = [f"img{row:02d}" for row in range(48)]
    fold = identity_folds(identities, 2, seed=0)
    parts = []
    for k, vectors in enumerate((first, second)):
        rows = np.flatnonzero(fold == k)
        part = sdd_fiqa_labels(vectors[rows], identities[rows], keys=[keys[row] for row in rows], negatives=8, rounds=1)
        parts.append(part.with_meta(extractor=f"net{k}"))
    merged = merge_folds(parts, keys)
    assert merged.keys == tuple(keys)
    for k, part in enumerate(parts):
        np.testing.assert_array_equal(merged.score[fold == k], part.score)
        np.testing.assert_array_equal(merged.raw[fold == k], part.raw)
        np.testing.assert_array_equal(merged.spread[fold == k], part.spread)
        # One round of one fold spans the whole scale, whatever its network's distances are.
        assert (merged.score[fold == k].min(), merged.score[fold == k].max()) == (0.0, 100.0)
    assert merged.meta["scale"] == "minmax"
    assert merged.meta["scale_fitted_per"] == "fold"
    assert (merged.meta["folds"], merged.meta["images"], merged.meta["identities"]) == (2, 48, 6)
    assert merged.meta["fold_extractor"] == ["net0", "net1"]
    assert merged.meta["fold_raw_range"] == [part.meta["raw_range"] for part in parts]
    assert "raw_range" not in merged.meta
    assert merged.rescaled("minmax") is merged  # a second fit over both networks' labels would mix them


def test_merging_refuses_images_that_are_missing_or_labelled_twice():
    def part(*keys):
        numbers = np.zeros(len(keys))
        meta = {"images": len(keys), "identities": 1, "unlabelled": 0}
        return QualityLabels(numbers, numbers, numbers, keys, meta)

    for parts, keys in (
        ([part("a"), part("b")], ["a", "b", "c"]),
        ([part("a"), part("a", "b")], ["a", "b"]),
        ([part("a"), part("b", "c")], ["a", "b"]),
    ):
        with pytest.raises(
            LabelError, match=r"Labels of folds: got '\d labels'; expected each of \d images in exactly"
        ):
            merge_folds(parts, keys)
