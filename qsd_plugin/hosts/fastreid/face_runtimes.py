"""A face network as several runtimes compute it, scored on the face test sets of its run.

Shapes: N images of a test set, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsd_plugin.core.errors import ExportError
from qsd_plugin.core.progress import progress
from qsd_plugin.hosts.fastreid.face_protocol import FaceTest
from qsd_plugin.hosts.fastreid.face_tests import TESTS, build_test
from qsd_plugin.report.pictures import ShownPair, draw_pairs

#: BGR pictures, uint8 [H, W, 3], to raw embeddings.
Embed = Callable[[Sequence[NDArray[np.uint8]]], Any]

#: Pairs in the picture.
_SHOWN = 12


def score_runtimes(cfg: Any, runtimes: Mapping[str, Embed], *, picture: Path) -> list[dict[str, Any]]:
    """Score every runtime on ``DATASETS.TESTS``, without mirror images, and draw pairs of the first set of pairs.

    Args:
        cfg: Config of the run: ``DATASETS.TESTS`` and what its test sets read, ``TEST.IMS_PER_BATCH``.
        runtimes: By name; the first one is what the others are compared with.
        picture: PNG to write; not written where no test set consists of pairs.

    Returns:
        One row per test set and runtime: its numbers in percent, the smallest cosine of an image's embedding with the
        first runtime's and the largest difference of a number relative to the largest number.

    Raises:
        ExportError: No face test set.
    """
    names = [name for name in cfg.DATASETS.TESTS if name in TESTS]
    if not names:
        raise ExportError(
            "DATASETS.TESTS", value=tuple(cfg.DATASETS.TESTS), expected="a face test set, to score the package on"
        )
    rows = []
    for name in names:
        test = build_test(cfg, name)
        embeddings = {runtime: _embed(test, embed, cfg, f"{name} by {runtime}") for runtime, embed in runtimes.items()}
        first = next(iter(embeddings.values()))
        for runtime, found in embeddings.items():
            numbers = test.score(found).numbers
            rows.append(
                {"test": name, "computed by": runtime}
                | {key: f"{numbers[key]:.2f}" for key in numbers if key != "metric"}
                | {"smallest cosine": f"{_smallest_cosine(found, first):.8f}", "largest difference": _off(found, first)}
            )
        if not picture.exists() and test.trial_images is not None and test.trial_images.shape[1] == 2:
            _draw(test, embeddings, picture)
    return rows


def _embed(test: FaceTest, embed: Embed, cfg: Any, title: str) -> Tensor:
    step = int(cfg.TEST.IMS_PER_BATCH)
    parts = []
    for start in progress(range(0, len(test.names), step), title):
        images = [np.asarray(test.read(index)) for index in range(start, min(start + step, len(test.names)))]
        found = embed([np.ascontiguousarray(image[..., ::-1]) for image in images])
        parts.append(torch.as_tensor(found).float())
    return torch.cat(parts)


def _smallest_cosine(found: Tensor, first: Tensor) -> float:
    return float(torch.cosine_similarity(found.double(), first.double()).min())


def _off(found: Tensor, first: Tensor) -> str:
    return f"{float((found - first).abs().max() / first.abs().max()):.1e}"


def _draw(test: FaceTest, embeddings: Mapping[str, Tensor], picture: Path) -> None:
    """Pairs from the least to the most alike, with every runtime's cosine."""
    assert test.trial_images is not None
    left, right = test.trial_images.T
    cosines = {
        runtime: torch.cosine_similarity(found[left], found[right]).numpy() for runtime, found in embeddings.items()
    }
    order = np.argsort(next(iter(cosines.values())), kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int)]
    decided = test.trials(next(iter(embeddings.values()))).metrics()[:, 0]
    pairs = [
        ShownPair(
            test.read(int(left[row])),
            test.read(int(right[row])),
            "\n".join(f"{values[row]:.4f}" for values in cosines.values()),
            bool(decided[row] == 100),
        )
        for row in chosen
    ]
    draw_pairs(pairs, f"Cosine of two faces by {' and by '.join(cosines)} (green: decided rightly)", picture)
