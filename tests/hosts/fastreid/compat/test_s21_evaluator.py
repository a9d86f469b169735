"""S21: ROC the right way round, and an evaluator that never holds the distance matrix."""

from __future__ import annotations

import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import DataError
from qsd_plugin.evaluation import distances, rerank
from qsd_plugin.hosts.fastreid import compat

NUM_QUERY, NUM_GALLERY = 60, 300


def evaluator(folder: Path, *, seed: int = 0, noise: float = 1.0, **options: Any) -> Any:
    """The host's evaluator after it has processed random people in batches of 64."""
    from fastreid.evaluation import ReidEvaluator

    generator = torch.Generator().manual_seed(seed)
    pids = torch.randint(20, (NUM_QUERY + NUM_GALLERY,), generator=generator)
    camids = torch.randint(4, pids.shape, generator=generator)
    centres = torch.randn(20, 24, generator=generator)
    features = 3 * (centres[pids] + noise * torch.randn(len(pids), 24, generator=generator))
    result = ReidEvaluator(toy_cfg(folder, **options), num_query=NUM_QUERY)
    result.reset()
    for rows in torch.arange(len(pids)).split(64):
        result.process({"targets": pids[rows], "camids": camids[rows]}, features[rows])
    return result


def labels(subject: Any) -> tuple[np.ndarray, ...]:
    pids, camids = (torch.cat([part[key] for part in subject._predictions]).numpy() for key in ("pids", "camids"))
    return pids[:NUM_QUERY], pids[NUM_QUERY:], camids[:NUM_QUERY], camids[NUM_QUERY:]


def test_s21_roc_is_the_right_way_round(tmp_path: Path) -> None:
    perfect = evaluator(tmp_path, noise=0.0, **{"TEST.ROC.ENABLED": True}).evaluate()
    names = ["TPR@FPR=1e-04", "TPR@FPR=1e-03", "TPR@FPR=1e-02"]
    assert [perfect[name] for name in names] == [1.0, 1.0, 1.0]

    subject = evaluator(tmp_path, **{"TEST.ROC.ENABLED": True})
    results = subject.evaluate()
    assert list(results)[-3:] == names
    features = torch.nn.functional.normalize(torch.cat([part["feats"] for part in subject._predictions])).double()
    similarity = (features[:NUM_QUERY] @ features[NUM_QUERY:].T).numpy()
    query_ids, gallery_ids, query_cams, gallery_cams = labels(subject)
    same = query_ids[:, None] == gallery_ids
    genuine = similarity[same & (query_cams[:, None] != gallery_cams)]
    impostor = np.sort(similarity[~same])[::-1]
    for name, target in zip(names, (1e-4, 1e-3, 1e-2), strict=True):
        threshold = impostor[int(target * len(impostor))]  # the first impostor that must be refused
        assert results[name] == pytest.approx((genuine > threshold).mean(), abs=1e-12)
    assert 0 < results[names[0]] < results[names[2]] < 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"TEST.METRIC": "euclidean"},
        {"TEST.AQE.ENABLED": True},
        {"TEST.AQE.ENABLED": True, "TEST.AQE.QE_TIME": 2, "TEST.AQE.QE_K": 3, "TEST.METRIC": "euclidean"},
        {"TEST.RERANK.ENABLED": True},
        {"TEST.RERANK.ENABLED": True, "TEST.METRIC": "euclidean", "TEST.RERANK.K1": 9, "TEST.RERANK.LAMBDA": 0.5},
        {"TEST.RERANK.ENABLED": True, "TEST.AQE.ENABLED": True},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()) or "plain",
)
def test_s21_results_are_the_hosts(tmp_path: Path, options: dict[str, Any]) -> None:
    ours = evaluator(tmp_path, **options).evaluate()
    with compat.without("S21"):
        host = evaluator(tmp_path, **options).evaluate()
    assert isinstance(ours, OrderedDict)
    assert list(ours) == list(host) == ["Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "metric"]
    for name, value in host.items():
        assert ours[name] == pytest.approx(float(value), abs=1e-4), name
    assert 20 < ours["mAP"] < 99


@pytest.mark.parametrize(
    "options", [{}, {"TEST.METRIC": "euclidean"}, {"TEST.RERANK.ENABLED": True, "TEST.RERANK.K1": 5}]
)
def test_s21_never_holds_the_distance_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            leaves = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            Largest.size = max([Largest.size, *(leaf.numel() for leaf in leaves)])
            return result

    monkeypatch.setattr(rerank, "nearest", functools.partial(rerank.nearest, tile=32))
    for function in (distances.distance_blocks, rerank.rerank_blocks):
        monkeypatch.setitem(function.__kwdefaults__, "block_bytes", 8 * 4 * NUM_GALLERY)
    subject = evaluator(tmp_path, **options)
    with Largest():
        subject.evaluate()
    assert 0 < Largest.size < NUM_QUERY * NUM_GALLERY


def test_s21_small_galleries_have_all_ranks(tmp_path: Path) -> None:
    from fastreid.evaluation import ReidEvaluator

    subject = ReidEvaluator(toy_cfg(tmp_path), num_query=1)
    inputs = {"targets": torch.tensor([0, 1, 0]), "camids": torch.tensor([0, 1, 1])}
    subject.process(inputs, torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.5]]))
    results = subject.evaluate()
    assert (results["Rank-1"], results["Rank-5"], results["Rank-10"], results["mAP"]) == (0.0, 100.0, 100.0, 50.0)


def test_s21_unmatched_queries_are_explained(tmp_path: Path) -> None:
    from fastreid.evaluation import ReidEvaluator

    subject = ReidEvaluator(toy_cfg(tmp_path), num_query=1)
    subject.process({"targets": torch.tensor([0, 1]), "camids": torch.tensor([0, 1])}, torch.ones(2, 2))
    with pytest.raises(DataError, match=r"None of the 1 queries has a match among the 1 gallery images.*cameras"):
        subject.evaluate()


def test_s21_one_process_of_several_has_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 evaluates what all ranks gathered, in rank order; the others return nothing."""
    from fastreid.utils import comm

    whole = evaluator(tmp_path)
    expected = whole.evaluate()
    parts = [whole._predictions[:2], whole._predictions[2:]]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "synchronize", lambda: None)
    monkeypatch.setattr(comm, "gather", lambda data, dst: parts)
    assert whole.evaluate() == expected
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "gather", lambda data, dst: [])
    assert whole.evaluate() == {}


def test_s21_hosts_own_reranking_is_used_where_ours_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.evaluation import reid_evaluation

    def host_build_dist(query: torch.Tensor, gallery: torch.Tensor, metric: str = "euclidean", **kwargs: Any) -> Any:
        calls.append(metric)
        return (query @ gallery.T).numpy()

    calls: list[str] = []
    subject = evaluator(tmp_path, **{"TEST.RERANK.ENABLED": True})
    monkeypatch.setattr(reid_evaluation, "build_dist", host_build_dist)
    subject.evaluate()
    assert calls == ["cosine", "jaccard"]
