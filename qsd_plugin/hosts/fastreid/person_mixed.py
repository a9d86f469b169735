"""Person test sets whose queries are degraded, the gallery as it is: ``Market1501Mixed``, ``ReIDListMixed``, ...

A result is named ``<level>/<number>``: ``blur-0.5/mAP``. ``clean/...`` is the test set as it is, and ``mixed/...`` of a
query the mean over all levels. Gallery and clean queries are embedded once, every query once more per level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.degradations.levels import parse_levels
from qsd_plugin.evaluation.retrieval import RetrievalResult
from qsd_plugin.hosts.fastreid import report
from qsd_plugin.hosts.fastreid.datasets import dataset_folder
from qsd_plugin.hosts.fastreid.face_mixed import MixedImages
from qsd_plugin.hosts.fastreid.face_protocol import FaceTest, ImageFiles, Score
from qsd_plugin.report.conditions import CLEAN, MEAN
from qsd_plugin.report.per_query import identity_names, relative
from qsd_plugin.report.per_trial import PerTrial

#: Data sets that exist with degraded queries, under their name and ``Mixed`` behind it.
PERSONS = (
    "Market1501",
    "DukeMTMC",
    "MSMT17",
    "CUHK03Detected",
    "CUHK03Labeled",
    "ReIDFolder",
    "ReIDList",
    "SyntheticPedestrians",
)


def mixed_queries(cfg: Any, name: str) -> FaceTest:
    """The test set ``name`` with its queries clean and at every level of ``EVALUATION.MIXED.LEVELS``.

    Args:
        cfg: The host's config; reads ``EVALUATION.MIXED.LEVELS`` and ``SEED``, ``TEST.METRIC`` and where data lies.
        name: Of a person data set.

    Raises:
        ConfigError: An unknown level, or re-ranking or query expansion, which are not done here.
        DataError: The set is not there.
    """
    options = cfg.EVALUATION.MIXED
    levels = parse_levels(options.LEVELS)
    if options.SEED < 0:
        raise ConfigError("EVALUATION.MIXED.SEED", value=options.SEED, expected="0 or more")
    for key in ("RERANK", "AQE"):
        if cfg.TEST[key].ENABLED:
            raise ConfigError(f"TEST.{key}.ENABLED", value=True, expected=f"False with the test set {name}Mixed")
    test = report.load_test(cfg, name)
    folder = dataset_folder(cfg, name)
    items = [*test.query, *test.gallery]
    paths = [path for path, _, _ in items]
    shown = [relative(path, folder) for path in paths]
    queries = np.arange(len(test.query))
    sources = np.stack([np.zeros(len(items), np.int64), np.arange(len(items))], axis=1)
    read = MixedImages([ImageFiles(paths)], sources, levels, queries, options.SEED)
    names = shown + [f"{query} at {level.text}" for level in levels for query in shown[: len(queries)]]
    identities = identity_names(shown, [pid for _, pid, _ in items])
    metric = str(cfg.TEST.METRIC)

    def score(features: torch.Tensor) -> Score:
        gallery = features[len(queries) : len(items)]
        sides = {CLEAN: features[: len(queries)]}
        for place, level in enumerate(levels):
            start = len(items) + place * len(queries)
            sides[level.text] = features[start : start + len(queries)]
        found = {condition: report.rank_test(test, side, gallery, metric) for condition, side in sides.items()}
        valid = found[CLEAN].valid
        of_queries = {
            "query": np.array(shown)[: len(queries)][valid],
            "identity": np.array([identities[pid] for _, pid, _ in test.query])[valid],
            "quality": test.quality[valid],
        }
        details = {"levels": [level.text for level in levels], "sides": ["queries"], "seed": int(options.SEED)}
        return _score(found, of_queries, f"{name}, degraded queries", details)

    return FaceTest(names, read, score, quality_name=test.quality_name)


def _score(
    found: dict[str, RetrievalResult], of_queries: dict[str, NDArray[Any]], test: str, details: dict[str, Any]
) -> Score:
    """Numbers under the host's names, and both metrics of every query: the mean over the levels first."""
    numbers: dict[str, float] = {}
    values: dict[str, dict[str, NDArray[Any]]] = {}
    for condition, result in found.items():
        own = {"Rank-1": result.cmc[0], "mAP": result.mAP, "mINP": result.mINP}
        numbers |= {f"{condition}/{key}": 100 * float(value) for key, value in own.items()}
        values[condition] = {"mAP": 100 * result.ap, "rank1": 100.0 * (result.first_hit == 1)}
    numbers["metric"] = float(np.mean([100 * result.mAP for result in found.values()]))
    degraded = [own for condition, own in values.items() if condition != CLEAN]
    columns = {f"{MEAN}/{key}": np.mean([own[key] for own in degraded], axis=0) for key in values[CLEAN]}
    columns |= {f"{condition}/{key}": value for condition, own in values.items() for key, value in own.items()}
    trials = PerTrial(
        **of_queries,
        test=np.full(len(of_queries["query"]), test),
        values=np.stack(list(columns.values()), axis=1),
        names=np.array([*columns]),
    )
    return Score(numbers, details | numbers, trials=trials)


def _builders(names: Sequence[str]) -> dict[str, Callable[[Any], FaceTest]]:
    return {f"{name}Mixed": partial(mixed_queries, name=name) for name in names}


MIXED_PERSONS: dict[str, Callable[[Any], FaceTest]] = _builders(PERSONS)
