"""Evaluation on sets of two resolutions: single-shot or against the whole gallery, overall and by rate of the query.

``TEST.GALLERY auto`` takes the protocol of papers on the set. Both measures that papers call mAP have a name of their
own: ``MRR`` is the mean reciprocal rank over single-shot draws, ``mAP`` the mean of average precisions over all gallery
images. ``<name>.json`` holds both protocols, ``<name>.md`` the table by rate, ``per_trial.npz`` every query.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastreid.evaluation import ReidEvaluator

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.data.mlr import META_FILE
from qsd_plugin.data.mlr_folders import read_rates
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.ground_truth import GroundTruth
from qsd_plugin.evaluation.results import to_json
from qsd_plugin.evaluation.retrieval import Ranker, RetrievalResult
from qsd_plugin.evaluation.single_shot import SingleShotRanker, SingleShotResult
from qsd_plugin.hosts.fastreid.datasets import dataset_folder
from qsd_plugin.hosts.fastreid.evaluators import compared, gathered
from qsd_plugin.hosts.fastreid.mlr_datasets import ALL, SINGLE, degraded_cameras_of, gallery_protocol
from qsd_plugin.report.conditions import condition_table, has_conditions
from qsd_plugin.report.per_query import identity_names, relative
from qsd_plugin.report.per_trial import PerTrial

logger = logging.getLogger("fastreid.qsd_plugin.mlr")

PROTOCOLS = ("auto", ALL, SINGLE)
RANKS = (1, 5, 10, 20)
DEFINITIONS = {
    "Rank-k": "percent of queries whose match is among the first k; of people with the single gallery, of images else",
    "MRR": "mean reciprocal rank over single-shot draws, percent; what papers with this protocol call mAP",
    "mAP": "mean of average precisions over all gallery images, percent",
    "mINP": "mean inverse negative penalty over all gallery images, percent",
}


@dataclass(frozen=True)
class Measured:
    """Both protocols on the same queries; ``single`` is ``None`` where the whole gallery is what counts."""

    whole: RetrievalResult
    single: SingleShotResult | None

    def numbers(self, chosen: Array | None = None) -> dict[str, float]:
        """Percentages over all valid queries, or over the rows ``chosen`` of them."""
        rows = np.arange(self.whole.num_valid) if chosen is None else chosen
        if self.single is None:
            hits = [float((self.whole.first_hit[rows] <= k).mean()) for k in RANKS]
            found = {"mAP": float(self.whole.ap[rows].mean()), "mINP": float(self.whole.inp[rows].mean())}
        else:
            hits = [float(self.single.hits[rows, :k][:, -1].mean()) for k in RANKS]
            found = {
                "MRR": float(self.single.reciprocal[rows].mean()),
                "mAP": float(self.whole.ap[rows].mean()),
                "mINP": float(self.whole.inp[rows].mean()),
            }
        named = {f"Rank-{k}": share for k, share in zip(RANKS, hits, strict=True)}
        return {name: 100 * share for name, share in (named | found).items()}


def protocol_of(cfg: Any, name: str) -> str:
    """What a query of the test set ``name`` is compared with.

    Raises:
        ConfigError: Unknown ``TEST.GALLERY``.
    """
    chosen = str(cfg.TEST.GALLERY)
    if chosen not in PROTOCOLS:
        raise ConfigError("TEST.GALLERY", value=chosen, expected=" or ".join(PROTOCOLS))
    return gallery_protocol(name) if chosen == "auto" else chosen


def check_config(cfg: Any) -> None:
    """Refuse settings that an evaluation, after hours of training, would stumble over.

    Raises:
        ConfigError: Unknown ``TEST.GALLERY``, or impossible draws.
    """
    for name in cfg.DATASETS.TESTS:
        protocol_of(cfg, name)
    for key in ("DRAWS", "SEED"):
        value = cfg.TEST.SINGLE_SHOT[key]
        if value < 0:
            raise ConfigError(f"TEST.SINGLE_SHOT.{key}", value=value, expected="a whole number >= 0")


def applies(cfg: Any, name: str) -> bool:
    """Whether this evaluation takes the place of the host's on the test set ``name``."""
    return bool(degraded_cameras_of(name)) or protocol_of(cfg, name) == SINGLE


def measure(cfg: Any, blocks: Any, truth: GroundTruth, protocol: str) -> Measured:
    """Both protocols, or only that of the whole gallery, from blocks of distances."""
    whole = Ranker(truth)
    options = cfg.TEST.SINGLE_SHOT
    single = SingleShotRanker(truth, draws=options.DRAWS, seed=options.SEED) if protocol == SINGLE else None
    for start, distances in blocks:
        whole.add(start, distances)
        if single is not None:
            single.add(start, distances)
    return Measured(whole.result(), None if single is None else single.result())


def rates_of(paths: list[str], folder: Path) -> Array:
    """The factor each image was shrunk by, [N]; 0 where nothing says so."""
    known = read_rates(folder)
    return np.array([known.get(relative(path, folder), 0) for path in paths], dtype=np.int64)


def per_trial(name: str, measured: Measured, queries: list[tuple[str, str]], rates: Array) -> PerTrial:
    """What happened to every valid query; its quality is minus its rate, and not a number where none is known.

    Args:
        name: Of the test set.
        measured: Of all queries.
        queries: Name and identity of each query.
        rates: Of each query; 0 where not known.
    """
    valid = np.flatnonzero(measured.whole.valid)
    whole, single = measured.whole, measured.single
    values = [whole.first_hit == 1, whole.ap] if single is None else [single.hits[:, 0], single.reciprocal, whole.ap]
    names = ["rank1", "mAP"] if single is None else ["rank1", "MRR", "mAP"]
    order = [1, 0] if single is None else [1, 0, 2]  # the first one is what verdicts are about
    return PerTrial(
        query=np.array([queries[row][0] for row in valid]),
        test=np.array([name] * len(valid)),
        identity=np.array([queries[row][1] for row in valid]),
        quality=np.where((rates == 0).any(), np.nan, -rates[valid].astype(np.float64)),
        values=100 * np.stack([np.asarray(values[column], dtype=np.float64) for column in order], axis=1),
        names=np.array([names[column] for column in order]),
    )


class MLREvaluator(ReidEvaluator):  # type: ignore[misc]
    """The host's evaluator with the protocol of a set of two resolutions.

    Args:
        cfg: The host's config.
        num_query: Number of queries, which come first.
        name: Of the test set.
        folder: For the files; default: ``evaluation`` in ``OUTPUT_DIR``.
    """

    def __init__(self, cfg: Any, num_query: int, name: str, folder: Path) -> None:
        super().__init__(cfg, num_query)
        self._name, self._folder = name, folder
        self._paths: list[str] = []

    def reset(self) -> None:
        """Forget the embeddings of an earlier round."""
        super().reset()
        self._paths = []

    def process(self, inputs: Mapping[str, Any], outputs: torch.Tensor) -> None:
        """Keep embeddings [B, D], labels and paths of a batch."""
        super().process(inputs, outputs)
        self._paths += inputs["img_paths"]

    def evaluate(self) -> OrderedDict[str, float]:
        """The protocol's numbers in per cent, overall and by rate; nothing on ranks other than the first.

        Raises:
            DataError: No query has a match, or embeddings are NaN.
        """
        from fastreid.utils import comm

        found = gathered(self)
        paths = self._paths
        if comm.get_world_size() > 1:
            paths = list(itertools.chain(*comm.gather(paths, dst=0)))
        if found is None:
            return OrderedDict()
        features, pids, camids = found
        count = self._num_query
        truth = GroundTruth(pids[:count], pids[count:], camids[:count], camids[count:])
        protocol = protocol_of(self.cfg, self._name)
        blocks = compared(self.cfg, features[:count], features[count:])
        measured = measure(self.cfg, blocks, truth, protocol)
        root = dataset_folder(self.cfg, self._name)
        rates = rates_of(paths[:count], root)
        people = identity_names([relative(path, root) for path in paths], pids.tolist())
        queries = [(relative(path, root), people[pid]) for path, pid in zip(paths[:count], pids.tolist(), strict=False)]
        return self._write(protocol, measured, rates, per_trial(self._name, measured, queries, rates))

    def _write(self, protocol: str, measured: Measured, rates: Array, trials: PerTrial) -> OrderedDict[str, float]:
        overall = measured.numbers()
        primary = overall["mAP" if measured.single is None else "MRR"]
        numbers = OrderedDict({**overall, "metric": (overall["Rank-1"] + primary) / 2})
        valid = rates[measured.whole.valid]
        known = sorted(set(valid.tolist()) - {0})
        for rate in known:
            rows = np.flatnonzero(valid == rate)
            numbers.update((f"rate {rate}/{key}", value) for key, value in measured.numbers(rows).items())
        details = {
            "test": self._name,
            "gallery": protocol,
            "draws": self.cfg.TEST.SINGLE_SHOT.DRAWS or "exact expectation" if protocol == SINGLE else None,
            "definitions": DEFINITIONS,
            "queries": {"all": len(valid), **{f"rate {rate}": int((valid == rate).sum()) for rate in known}},
            "numbers": numbers,
            "whole_gallery": Measured(measured.whole, None).numbers(),
            "set": _meta(dataset_folder(self.cfg, self._name)),
        }
        write_atomically(self._folder / f"{self._name}.json", json.dumps(to_json(details), indent=1).encode())
        trials.save(self._folder / f"{self._name}_per_trial.npz")
        kind = "single-shot" if protocol == SINGLE else "the whole gallery"
        logger.info("%s: %s; MRR and mAP are two measures: %s.json", self._name, kind, self._folder / self._name)
        if has_conditions(numbers):
            shown = {f"all/{key}": value for key, value in overall.items()} | numbers
            table = condition_table(shown)
            write_atomically(self._folder / f"{self._name}.md", f"{table}\n".encode())
            logger.info("%s by rate of the query, percent:\n%s", self._name, table)
        return numbers


def build(trainer: Any, cfg: Any, name: str, output_dir: str | None = None) -> tuple[Any, MLREvaluator]:
    """The trainer's test loader over the test set ``name``, and its evaluator."""
    loader, num_query = trainer.build_test_loader(cfg, name)
    folder = Path(output_dir or Path(cfg.OUTPUT_DIR, "evaluation"))
    return loader, MLREvaluator(cfg, num_query, name, folder)


def _meta(folder: Path) -> dict[str, Any]:
    file = folder / META_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
