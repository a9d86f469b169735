"""Closed-set identification against QGFace's golden numbers, an argsort of every row, and the retrieval metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.identification import by_group, closed_set, scface, scface_split
from qsd_plugin.evaluation.retrieval import rank


@pytest.fixture(scope="module")
def golden() -> dict[str, Array]:
    with np.load(Path(__file__).parents[1] / "data" / "verification.npz", allow_pickle=False) as file:
        return dict(file)


def test_equals_tinyface_s_protocol(golden: dict[str, Array]) -> None:
    probe, gallery = golden["ident_probe"], golden["ident_gallery"]
    result = closed_set(probe, gallery, golden["ident_probe_label"], golden["ident_gallery_label"])
    assert list(result.rates) == [1, 5, 20]
    assert list(result.rates.values()) == pytest.approx(golden["ident_rates"].tolist(), abs=1e-6)
    assert result.valid.sum() == np.isin(golden["ident_probe_label"], golden["ident_gallery_label"]).sum() < len(probe)

    others = golden["ident_gallery_label"] == -100
    apart = closed_set(
        torch.from_numpy(probe),
        gallery[~others],
        golden["ident_probe_label"],
        golden["ident_gallery_label"][~others],
        distractors=torch.from_numpy(gallery[others]),
        block_bytes=1,
    )
    assert apart.rank.tolist() == result.rank.tolist()
    assert apart.num_gallery == result.num_gallery == len(gallery)


def test_equals_scface_s_protocol(golden: dict[str, Array]) -> None:
    names = golden["scface_names"].tolist()
    split = scface_split([f"folder/{name}.jpg" for name in names])
    used = np.sort(np.concatenate((split.gallery, split.probe)))
    assert [names[index] for index in used] == golden["scface_kept"].tolist()
    results = scface(golden["scface_feat"], golden["scface_kept"].tolist())
    assert [results[distance].rates[1] for distance in (1, 2, 3)] == pytest.approx(
        golden["scface_rank1_d123"], abs=1e-6
    )
    assert [results[distance].valid.sum() for distance in (1, 2, 3)] == golden["scface_n_probe"].tolist()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_every_rank_by_sorting(metric: str) -> None:
    random = np.random.default_rng(4)
    probe, gallery, others = (random.standard_normal((count, 6)) for count in (50, 40, 30))
    probe_ids, gallery_ids = random.integers(0, 15, 50), random.integers(0, 12, 40)
    result = closed_set(probe, gallery, probe_ids, gallery_ids, distractors=others, ranks=(3, 60), metric=metric)
    everyone = np.concatenate((gallery, others))
    if metric == "cosine":
        unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (probe, everyone)]
        distances = -unit[0] @ unit[1].T
    else:
        distances = ((probe[:, None] - everyone) ** 2).sum(2)
    labels = np.concatenate((gallery_ids, np.full(30, -1)))
    ranks = [
        np.flatnonzero(labels[np.argsort(row)] == wanted) for row, wanted in zip(distances, probe_ids, strict=True)
    ]
    assert result.valid.tolist() == [len(found) > 0 for found in ranks]
    assert result.rank.tolist() == [found[0] + 1 for found in ranks if len(found)]
    assert result.cmc.tolist() == [(result.rank <= r).mean() for r in range(1, 61)]
    assert result.rates == {3: result.cmc[2], 60: result.cmc[59]}
    plain = rank(probe, gallery, probe_ids, gallery_ids, metric=metric)
    alone = closed_set(probe, gallery, probe_ids, gallery_ids, metric=metric)
    assert alone.rank.tolist() == plain.first_hit.tolist()


def test_ties_count_against_the_probe() -> None:
    constant = closed_set(np.ones((2, 3)), np.ones((4, 3)), [0, 1], [0, 0, 1, 2], distractors=np.ones((5, 3)))
    assert constant.rank.tolist() == [8, 9]  # 2 and 3 others in the gallery, 5 distractors, then a mate
    exact = closed_set(np.eye(2), np.array([[1.0, 0], [1, 0], [0, 1]]), [0, 1], [0, 0, 1])
    assert exact.rank.tolist() == [1, 1]  # two mates at one distance are no tie


def test_groups() -> None:
    result = closed_set(np.eye(3), np.eye(3)[:2], [0, 1, 2], [1, 0], ranks=(1, 2))
    parts = by_group(closed_set(np.eye(3)[[0, 0, 1]], np.eye(3)[:2], [0, 1, 1], [0, 1], ranks=(1, 2)), [7, 7, 9])
    assert {number: part.rates for number, part in parts.items()} == {7: {1: 0.5, 2: 1.0}, 9: {1: 1.0, 2: 1.0}}
    with pytest.raises(DataError, match=r"Shape of groups: got \(2,\)"):
        by_group(result, [1, 2])
    with pytest.raises(DataError, match="No probe of group 2 has a mate"):
        by_group(result, [1, 1, 2])


def test_bad_input_is_named() -> None:
    rows = np.eye(3)
    with pytest.raises(DataError, match=r"Shape of probe_ids: got \(2,\); expected \(3,\), one per embedding"):
        closed_set(rows, rows, [0, 1], [0, 1, 2])
    with pytest.raises(DataError, match="None of the 3 probes has a mate among the 3 gallery images"):
        closed_set(rows, rows, [0, 1, 2], [3, 4, 5])
    with pytest.raises(ConfigError, match=r"Identification ranks: got \(0, 5\)"):
        closed_set(rows, rows, [0, 1, 2], [0, 1, 2], ranks=(0, 5))
    with pytest.raises(ConfigError, match=r"Retrieval metric: got 'cosin'.*Did you mean 'cosine'"):
        closed_set(rows, rows, [0, 1, 2], [0, 1, 2], metric="cosin")
    with pytest.raises(DataError, match=r"Embeddings of 1 distractors images contain NaN \(first row: 1\)"):
        closed_set(rows, rows, [0, 1, 2], [0, 1, 2], distractors=np.diag([1, np.nan, 1]))
    with pytest.raises(DataError, match="Name of an SCface image: got '001_cam9_1'"):
        scface_split(["001_frontal", "001_cam9_1"])
    with pytest.raises(DataError, match="SCface images: got '1 mug shots, 0 probes'"):
        scface_split(["001_frontal", "001_cam8"])
    with pytest.raises(DataError, match="Number of SCface names: got 1; expected 3"):
        scface(rows, ["001_frontal"])
