"""S6, S7, S21, S22: evaluation without a build step, without a GPU, in bounded memory and with a ROC that is right."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together


def _no_build() -> Undo:
    from fastreid.evaluation import ReidEvaluator, rank

    from qsd_plugin.hosts.fastreid.evaluators import evaluate_rank

    return together(
        replace(ReidEvaluator, "_compile_dependencies", _nothing_to_compile),
        replace(rank, "evaluate_rank", evaluate_rank),
    )


def _nothing_to_compile(evaluator: Any) -> None:
    """Takes the place of the host's compilation of its ranking code."""


def _no_gpu_search() -> bool:
    """Whether the host's Jaccard distance cannot run: it moves to CUDA and searches with faiss's GPU classes."""
    import faiss
    import torch

    return not (torch.cuda.is_available() and hasattr(faiss, "StandardGpuResources"))


def _cpu_rerank() -> Undo:
    from fastreid.evaluation import reid_evaluation
    from fastreid.utils import compute_dist

    from qsd_plugin.hosts.fastreid.evaluators import with_cpu_jaccard

    build_dist = with_cpu_jaccard(compute_dist.build_dist)
    return together(
        replace(compute_dist, "build_dist", build_dist),
        replace(reid_evaluation, "build_dist", build_dist),
    )


def _evaluate() -> Undo:
    from fastreid.evaluation import ReidEvaluator

    return replace(ReidEvaluator, "evaluate", _streamed(ReidEvaluator.evaluate))


def _streamed(host_evaluate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Our evaluation, or the host's where the configuration asks for the host's own re-ranking."""
    from fastreid.evaluation import reid_evaluation

    from qsd_plugin.hosts.fastreid import evaluators

    def evaluate(evaluator: Any) -> Any:
        if evaluator.cfg.TEST.RERANK.ENABLED and reid_evaluation.build_dist.__module__ != evaluators.__name__:
            return host_evaluate(evaluator)
        return evaluators.evaluate(evaluator)

    return evaluate


def _numpy_lacks_bool() -> bool:
    return not hasattr(np, "bool")


def _numpy_with_bool() -> Undo:
    from fastreid.evaluation import rank

    return replace(rank, "np", _NumPyWithBool("numpy"))


class _NumPyWithBool(types.ModuleType):
    """NumPy as the host's module sees it: ``np.bool`` is the built-in type, as before NumPy 1.24."""

    bool = bool

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S06",
        where="evaluation/rank_cylib/__init__.py:15, evaluation/rank.py:154",
        symptom="The first evaluation runs make; without a compiler or Cython it ends the process after an epoch.",
        action="Nothing is compiled; ranking is our exact one, faster than the compiled code.",
        needed=always,
        apply=_no_build,
        proof="test_s06_first_evaluation_builds_nothing",
    ),
    Patch(
        row="S07",
        where="utils/compute_dist.py:53,68",
        symptom="TEST.RERANK needs CUDA and faiss for GPUs, also where faiss-cpu is installed.",
        action="The Jaccard distance is computed sparsely on the features' own device.",
        needed=_no_gpu_search,
        apply=_cpu_rerank,
        proof="test_s07_reranking_runs_without_a_gpu",
    ),
    Patch(
        row="S21",
        where="evaluation/reid_evaluation.py:50-126",
        symptom="ROC takes impostors for the genuine class and reports 0.00 for a perfect model; the evaluator holds "
        "the distance matrix and its orderings in memory.",
        action="Evaluation goes block by block; TPR@FPR is the genuine acceptance at that false acceptance.",
        needed=always,
        apply=_evaluate,
        proof="test_s21_roc_is_the_right_way_round",
    ),
    Patch(
        row="S22",
        where="evaluation/rank.py:69",
        symptom="np.bool is missing in NumPy 1.24 to 1.26: CUHK03's old protocol raises AttributeError.",
        action="That module's np gets its bool back.",
        needed=_numpy_lacks_bool,
        apply=_numpy_with_bool,
        proof="test_s22_cuhk03_protocol_without_numpy_bool",
    ),
)
