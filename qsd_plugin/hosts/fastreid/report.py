"""The last stage of a recipe: every arm evaluated on the same images, overall and by query quality, with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from qsd_plugin.data.synthetic import load_truth
from qsd_plugin.evaluation.retrieval import RetrievalResult, rank
from qsd_plugin.hosts.fastreid import extract
from qsd_plugin.hosts.fastreid.datasets import Item, dataset_folder, test_set
from qsd_plugin.hosts.fastreid.mlr_protocol import rates_of
from qsd_plugin.hosts.fastreid.report_frame import write_framed
from qsd_plugin.report.per_query import PerQuery, identity_names, quality_groups, relative
from qsd_plugin.report.pictures import RankList, draw_rank_lists
from qsd_plugin.report.sharpness import sharpness

_RANK_LIST_LENGTH = 10


@dataclass(frozen=True)
class TestSet:
    """Queries and gallery of one data set, and how good each query image is."""

    query: Sequence[Item]
    gallery: Sequence[Item]
    quality: NDArray[np.float64]
    quality_name: str


@dataclass(frozen=True)
class Outcome:
    """One arm on one test set."""

    result: RetrievalResult
    query: torch.Tensor
    gallery: torch.Tensor


def write_report(model_cfg: Any, cfg: Any, arms: dict[str, Path], label_files: Sequence[Path], folder: Path) -> None:
    """Evaluate all arms and write ``results.json``, ``results.md`` and the pictures to ``folder``.

    Args:
        model_cfg: Config of the network all arms share (the baseline's).
        cfg: Config of the recipe.
        arms: Checkpoint of each arm, by name, in the order of the table.
        label_files: Quality labels of the training sets.
        folder: Where to write.
    """

    def evaluate(name: str) -> dict[str, Any]:
        test = load_test(cfg, name)
        rows: dict[str, Any] = {}
        outcomes: dict[str, Outcome] = {}
        for arm, checkpoint in arms.items():
            model = extract.load_model(model_cfg, checkpoint)
            embeddings = extract.embed(model_cfg, model, [*test.query, *test.gallery], title=f"Evaluating {arm}")
            query, gallery = embeddings[: len(test.query)], embeddings[len(test.query) :]
            outcomes[arm] = Outcome(rank_test(test, query, gallery, cfg.TEST.METRIC), query, gallery)
            rows[arm] = by_quality(outcomes[arm].result, test.quality)
        draw_rank_lists(_rank_lists(test, outcomes), folder / f"rank_lists_{name}.png")
        return {"quality": test.quality_name, "queries": len(test.query), "arms": rows}

    write_framed(cfg, label_files, folder, evaluate=evaluate, as_table=as_table)


def by_quality(result: RetrievalResult, quality: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Rank-1, mAP and mINP in percent, over all valid queries and over the thirds of their quality.

    Args:
        result: Of one arm.
        quality: Of every query, [Q]; higher is better.
    """
    return {
        name: {
            "rank1": 100 * float(np.mean(result.first_hit[chosen] == 1)),
            "mAP": 100 * float(np.mean(result.ap[chosen])),
            "mINP": 100 * float(np.mean(result.inp[chosen])),
        }
        for name, chosen in quality_groups(quality[result.valid]).items()
    }


def evaluate_per_query(model_cfg: Any, checkpoint: Path, test: TestSet, folder: Path, *, title: str) -> PerQuery:
    """Evaluate a checkpoint and keep the result of every query.

    Args:
        model_cfg: Config of the plain network.
        checkpoint: Its weights.
        test: Queries and gallery.
        folder: The data-set folder.
        title: For the progress line.
    """
    items = [*test.query, *test.gallery]
    embeddings = extract.embed(model_cfg, extract.load_model(model_cfg, checkpoint), items, title=title)
    count = len(test.query)
    result = rank_test(test, embeddings[:count], embeddings[count:], model_cfg.TEST.METRIC)
    names = identity_names([relative(path, folder) for path, _, _ in items], [pid for _, pid, _ in items])
    queries = [item for item, valid in zip(test.query, result.valid, strict=True) if valid]
    return PerQuery(
        query=np.array([relative(path, folder) for path, _, _ in queries]),
        identity=np.array([names[pid] for _, pid, _ in queries]),
        quality=test.quality[result.valid],
        ap=result.ap,
        inp=result.inp,
        first_hit=result.first_hit,
    )


def as_table(results: dict[str, Any]) -> str:
    """Markdown text of ``results``: one table per test set, arms in rows."""
    parts = []
    for name, test in results["tests"].items():
        groups = list(next(iter(test["arms"].values())))
        header = ["arm", *(f"{group} R1 / mAP / mINP" for group in groups)]
        body = [
            [arm, *("{rank1:.1f} / {mAP:.1f} / {mINP:.1f}".format(**row[group]) for group in groups)]
            for arm, row in test["arms"].items()
        ]
        parts.append(
            f"{name}, {test['queries']} queries, {results['note']} (seed {results['seed']}); "
            f"thirds of the queries by {test['quality']}\n\n{tabulate(body, headers=header, tablefmt='github')}\n"
        )
    return "\n".join(parts)


def load_test(cfg: Any, name: str) -> TestSet:
    """A registered test set with the quality of its queries: true severity or rate where known, else sharpness."""
    _, query, gallery = test_set(cfg, name)
    return TestSet(query, gallery, *image_quality(cfg, name, [path for path, _, _ in query]))


def image_quality(cfg: Any, name: str, paths: Sequence[str]) -> tuple[NDArray[np.float64], str]:
    """How good images of a registered data set are, higher is better, and what that is measured by.

    Args:
        cfg: The host's config.
        name: Registered name.
        paths: Images of the set.
    """
    folder = dataset_folder(cfg, name)
    if name == "SyntheticPedestrians":
        truth = load_truth(folder)
        severity = dict(zip(truth.paths, truth.severity, strict=True))
        quality = np.array([-severity[Path(path).relative_to(folder).as_posix()] for path in paths])
        return quality, "true degradation severity"
    rates = rates_of(list(paths), folder)
    if rates.all():
        return -rates.astype(np.float64), "how little the query was shrunk (minus its rate)"
    return sharpness(paths), "sharpness of the query image (no model involved)"


def rank_test(test: TestSet, query: torch.Tensor, gallery: torch.Tensor, metric: str) -> RetrievalResult:
    """Retrieval metrics of embeddings [Q, D] and [G, D] of a test set."""

    def columns(items: Sequence[Item]) -> tuple[list[int], list[int]]:
        return [pid for _, pid, _ in items], [camera for _, _, camera in items]

    (query_ids, query_cams), (gallery_ids, gallery_cams) = columns(test.query), columns(test.gallery)
    return rank(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, metric=metric)


def _rank_lists(test: TestSet, outcomes: dict[str, Outcome]) -> list[RankList]:
    """The first and the last arm on three queries: the last arm's largest gain, its largest loss, the poorest image."""
    first, *_, last = outcomes
    gain = outcomes[last].result.ap - outcomes[first].result.ap
    valid = np.flatnonzero(outcomes[first].result.valid)
    chosen = {"largest gain": gain.argmax(), "largest loss": gain.argmin(), "poorest": test.quality[valid].argmin()}
    lists = []
    for reason, place in chosen.items():
        index = int(valid[place])
        path, identity, camera = test.query[index]
        # As in the metrics: the query's own identity in its own camera is left out.
        kept = [at for at, (_, pid, cam) in enumerate(test.gallery) if (pid, cam) != (identity, camera)]
        for arm in (first, last):
            outcome = outcomes[arm]
            similarity = torch.cosine_similarity(outcome.query[index : index + 1], outcome.gallery[kept])
            nearest = [kept[at] for at in similarity.argsort(descending=True)[:_RANK_LIST_LENGTH].tolist()]
            lists.append(
                RankList(
                    f"{arm}\n({reason})",
                    path,
                    [test.gallery[at][0] for at in nearest],
                    [test.gallery[at][1] == identity for at in nearest],
                )
            )
    return lists
