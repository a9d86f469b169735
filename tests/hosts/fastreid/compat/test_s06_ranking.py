"""S6: the first evaluation builds nothing, and our ranking is the host's to the last digit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import DataError


def problem(seed: int, queries: int = 60, gallery: int = 400, ids: int = 15) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return (
        rng.random((queries, gallery), dtype=np.float32),
        rng.integers(0, ids, queries),
        rng.integers(0, ids, gallery),
        rng.integers(0, 4, queries),
        rng.integers(0, 4, gallery),
    )


def test_s06_first_evaluation_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.evaluation import ReidEvaluator

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("make")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setitem(sys.modules, "fastreid.evaluation.rank_cylib.rank_cy", None)  # not compiled
    ReidEvaluator(toy_cfg(tmp_path), num_query=4)


@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "float64", "few positives", "small gallery"])
def test_s06_ranking_is_the_hosts(kind: str) -> None:
    from fastreid.evaluation import rank

    distances, query_ids, gallery_ids, *cams = problem(1, gallery=30 if kind == "small gallery" else 400)
    if kind == "ties":
        distances = distances.round(1)
    elif kind == "all equal":
        distances[:] = 0.5
    elif kind == "float64":
        distances = 1 + distances.astype(np.float64) * 1e-9
    elif kind == "few positives":
        query_ids[10:] = 99
    elif kind == "small gallery":
        cams = [cams[0], cams[1] + 10]  # the host's loop stumbles over galleries made smaller than max_rank by junk
    ours = rank.evaluate_rank(distances, query_ids, gallery_ids, *cams)
    host = rank.evaluate_py(distances, query_ids, gallery_ids, *cams, 50, False)
    assert ours[0].dtype == host[0].dtype
    np.testing.assert_array_equal(ours[0], host[0])
    np.testing.assert_allclose(ours[1], host[1], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours[2], host[2])


def test_s06_unmatched_queries_are_explained() -> None:
    from fastreid.evaluation import rank

    distances, query_ids, *rest = problem(2)
    with pytest.raises(DataError, match=r"None of the 60 queries has a match among the 400 gallery images"):
        rank.evaluate_rank(distances, query_ids + 100, *rest)
