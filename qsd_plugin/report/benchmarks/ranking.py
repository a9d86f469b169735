"""Ranking, re-ranking, query expansion and ROC at Market-1501's size, beside the host's code and the bare products."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.distances import distance_blocks
from qsd_plugin.evaluation.expansion import expand_queries
from qsd_plugin.evaluation.ground_truth import GroundTruth
from qsd_plugin.evaluation.rerank import rerank_blocks
from qsd_plugin.evaluation.retrieval import RetrievalResult, rank, rank_blocks, rank_distances
from qsd_plugin.evaluation.roc import tpr_at_fpr
from qsd_plugin.report.benchmarks.paired import extra_memory_mib, paired_ratio, seconds

#: Rows per product of the bare chunked matrix products.
CHUNK = 512
#: Standard deviation of an image around its identity: mAP near 0.9, and no better than chance.
NOISE = {"trained": 0.4, "untrained": 100.0}
_SETUP = """
import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
names = ("rank_cy", "roc_cy")
setup(name="host_ranking", ext_modules=cythonize(
    [Extension(name, [f"{name}.pyx"], include_dirs=[numpy.get_include()]) for name in names]))
"""


@dataclass(frozen=True)
class Size:
    """Numbers of a retrieval problem; the defaults are Market-1501's with ResNet-50 features."""

    queries: int = 3368
    gallery: int = 15913
    distractors: int = 2798
    identities: int = 750
    cameras: int = 6
    dim: int = 2048


def run(size: Size = Size(), *, pairs: int = 30, slow_pairs: int = 6, seed: int = 0, only: str = "") -> dict[str, Any]:
    """Measure every item in a process of its own; callers need the ``if __name__ == "__main__"`` guard.

    Args:
        size: The retrieval problem.
        pairs: Interleaved pairs of timings of what a limit is stated for.
        slow_pairs: The same where a pair takes tens of seconds and there is no limit.
        seed: Seeds the embeddings.
        only: Items whose name contains this.

    Returns:
        ``size``, ``threads``, ``load`` (one-minute average at the start) and ``items``: per item what
        :func:`paired_ratio` gives (``median`` is ours over the baseline), ``limit`` for it, ``extra_memory_mib`` beyond
        the inputs, figures of agreement, or ``skipped`` with the reason.
    """
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    items: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        built = _build_host(Path(folder))
        jobs: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {}
        for kind in NOISE:
            jobs[f"given distances, {kind}"] = _given, (size, kind, seed, pairs, folder)
            jobs[f"streamed, {kind}"] = _streamed, (size, kind, seed, pairs)
        jobs["given distances, all equal"] = _all_equal, (size, seed)
        jobs["ROC"] = _roc, (size, seed, folder)
        jobs["re-ranking"] = _rerank, (size, seed, pairs)
        jobs["query expansion"] = _expansion, (size, seed, slow_pairs)
        for name, (job, arguments) in jobs.items():
            if only not in name:
                continue
            if folder in arguments and built is not None:
                items[name] = {"skipped": built}
                continue
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as pool:
                items[name] = pool.submit(job, *arguments).result()
    return {"size": vars(size), "threads": threads, "load": load, "items": items}


def people(size: Size, kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, tuple[Array, ...]]:
    """Embeddings of queries and gallery around identity centres with camera shifts, and ids and cameras of both."""
    rng = np.random.default_rng(seed)
    latent = 32
    centres = rng.standard_normal((size.identities + size.distractors, latent), dtype=np.float32)
    shifts = 0.3 * rng.standard_normal((size.cameras, latent), dtype=np.float32)
    mixing = rng.standard_normal((latent, size.dim), dtype=np.float32)
    known = rng.integers(0, size.identities, size.gallery - size.distractors)
    ids = (
        rng.integers(0, size.identities, size.queries),
        np.append(known, size.identities + np.arange(size.distractors)),
    )
    cams = tuple(rng.integers(0, size.cameras, len(side)) for side in ids)
    sides = []
    for identity, camera in zip(ids, cams, strict=True):
        quality = NOISE[kind] * rng.exponential(size=(len(identity), 1)).astype(np.float32)
        noise = quality * rng.standard_normal((len(identity), latent), dtype=np.float32)
        sides.append(torch.from_numpy((centres[identity] + shifts[camera] + noise) @ mixing))
    return sides[0], sides[1], (*ids, *cams)


def _given(size: Size, kind: str, seed: int, pairs: int, folder: str) -> dict[str, Any]:
    compiled = _load(Path(folder), "rank_cy")
    distances, labels = _distances(size, kind, seed)
    results: dict[str, Any] = {}

    def ours() -> None:
        results["ours"] = rank_distances(distances, *labels)

    def host() -> None:
        results["host"] = compiled.evaluate_cy(distances, *labels, 50)

    memory = extra_memory_mib(ours)
    figures = paired_ratio(ours, host, pairs) | {"limit": 0.2, "extra_memory_mib": memory}
    figures |= _quality(results["ours"]) | _agreement(results["ours"], results["host"], "compiled")
    if kind == "trained":
        python = _python_host()
        figures["python_seconds"] = seconds(
            lambda: results.update(python=python.evaluate_py(distances, *labels, 50, False))
        )
        figures["python_ratio"] = figures["a_seconds"] / figures["python_seconds"]
        figures |= _agreement(results["ours"], results["python"], "python")
    return figures


def _all_equal(size: Size, seed: int) -> dict[str, Any]:
    distances, labels = _distances(size, "trained", seed)
    distances[:] = 0.5
    memory = extra_memory_mib(lambda: rank_distances(distances, *labels))
    return {"a_seconds": seconds(lambda: rank_distances(distances, *labels)), "extra_memory_mib": memory}


def _streamed(size: Size, kind: str, seed: int, pairs: int) -> dict[str, Any]:
    query, gallery, labels = people(size, kind, seed)
    results: dict[str, RetrievalResult] = {}

    def ours() -> None:
        results["ours"] = rank(query, gallery, *labels)

    memory = extra_memory_mib(ours)
    figures = paired_ratio(ours, lambda: _product(query, gallery), pairs)
    return figures | {"limit": 1.2, "extra_memory_mib": memory} | _quality(results["ours"])


def _rerank(size: Size, seed: int, pairs: int) -> dict[str, Any]:
    query, gallery, labels = people(size, "trained", seed)
    everyone = torch.cat((query, gallery))
    results: dict[str, RetrievalResult] = {}

    def ours() -> None:
        results["ours"] = rank_blocks(rerank_blocks(query, gallery), GroundTruth(*labels))

    memory = extra_memory_mib(ours)
    figures = paired_ratio(ours, lambda: _product(everyone, everyone), pairs)
    return figures | {"limit": 1.25, "extra_memory_mib": memory} | _quality(results["ours"])


def _expansion(size: Size, seed: int, pairs: int) -> dict[str, Any]:
    query, gallery, _ = people(size, "trained", seed)
    everyone = torch.cat((query, gallery))
    memory = extra_memory_mib(lambda: expand_queries(query, gallery))
    figures = paired_ratio(lambda: expand_queries(query, gallery), lambda: _product(everyone, everyone), pairs)
    return figures | {"extra_memory_mib": memory}


def _roc(size: Size, seed: int, folder: str) -> dict[str, Any]:
    """Ours beside the host's way, once: its compiled collection of all pairs, then scikit-learn's full curve."""
    from sklearn.metrics import roc_curve

    compiled = _load(Path(folder), "roc_cy")
    distances, labels = _distances(size, "trained", seed)
    rates: dict[float, float] = {}
    curve: dict[str, Array] = {}

    def ours() -> None:
        rates.update(tpr_at_fpr(distances, *labels))

    def host() -> None:
        scores, impostor = compiled.evaluate_roc_cy(distances, *labels)
        curve["fpr"], curve["tpr"], _ = roc_curve(1 - impostor, -scores, drop_intermediate=False)

    memory = extra_memory_mib(ours)
    host_memory = extra_memory_mib(host)
    best = {target: float(curve["tpr"][curve["fpr"] <= target].max()) for target in rates}
    return paired_ratio(ours, host, 1) | {
        "extra_memory_mib": memory,
        "host_extra_memory_mib": host_memory,
        "tpr": {f"{target:.0e}": rate for target, rate in rates.items()},
        "tpr_difference": max(abs(rates[target] - best[target]) for target in rates),
    }


def _distances(size: Size, kind: str, seed: int) -> tuple[Array, tuple[Array, ...]]:
    query, gallery, labels = people(size, kind, seed)
    distances = np.empty((size.queries, size.gallery), dtype=np.float32)
    for start, block in distance_blocks(query, gallery):
        distances[start : start + len(block)] = block
    return distances, labels


def _product(left: torch.Tensor, right: torch.Tensor) -> None:
    """All inner products, a chunk of rows at a time into the same memory."""
    buffer = left.new_empty(CHUNK, len(right))
    for rows in left.split(CHUNK):  # type: ignore[no-untyped-call]
        torch.mm(rows, right.T, out=buffer[: len(rows)])


def _quality(result: RetrievalResult) -> dict[str, float]:
    return {"rank1": float(result.cmc[0]), "mAP": result.mAP, "mINP": result.mINP}


def _agreement(ours: RetrievalResult, host: Any, name: str) -> dict[str, Any]:
    cmc, ap, inp = (np.asarray(part) for part in host)
    return {
        f"{name}_cmc_identical": bool(np.array_equal(ours.cmc.astype(cmc.dtype), cmc)),
        f"{name}_inp_identical": bool(np.array_equal(ours.inp.astype(inp.dtype), inp)),
        f"{name}_ap_max_difference": float(np.abs(ours.ap - ap).max()),
    }


def _host_folder() -> Path | None:
    spec = importlib.util.find_spec("fastreid")
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) / "evaluation" if locations else None


def _build_host(folder: Path) -> str | None:
    """Compile the installed host's ranking code outside of its own folder; why it is impossible, or ``None``."""
    host = _host_folder()
    if host is None:
        return "fast-reid is not installed"
    if importlib.util.find_spec("Cython") is None:
        return "Cython is not installed"
    for source in (host / "rank_cylib").glob("*.pyx"):
        shutil.copy(source, folder)
    (folder / "setup.py").write_text(_SETUP)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    build = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return None if build.returncode == 0 else f"the host's code does not compile: {build.stderr[-300:]}"


def _load(folder: Path, name: str) -> ModuleType:
    return _module(name, next(folder.glob(f"{name}.*.*")))


def _python_host() -> ModuleType:
    """The host's Python ranking alone, without the rest of the host."""
    folder = _host_folder()
    assert folder is not None
    return _module("host_python_ranking", folder / "rank.py")


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
