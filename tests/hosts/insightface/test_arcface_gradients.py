"""Gradients of the heads against the methods' formulas over all images and all classes, written out here in float64.

On one rank and on two, for a margin that is differentiated (``exact``) and for one that is not (``straight_through``).
Controls: each style differs from the other one's formula, and so do two ranks that judge norms without each other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import imported_host
from heads_toy import CLASSES, DIM, IMAGES, TEACHER, gradients, labels, make_head, output, rows, values
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "ddp"))

from gloo import run_ranks

from qsd_plugin.hosts.insightface import compat, terms
from qsd_plugin.hosts.insightface.wrappers import TrainingOutput
from qsd_plugin.methods.qsd import QSDLoss
from qsd_plugin.methods.qud import FeatureQueue

STYLES = ("exact", "straight_through")
MARGIN, H, SCALE, THRESHOLD = 0.4, 0.333, 64.0, 0.5
#: A momentum of 1: the statistics are those of the batch.
NORM = {"momentum": 1.0, "margin": MARGIN, "h": H}
LEVELS = {"layer4": 1.0, "embedding": 0.5}

CASES: dict[str, dict[str, Any]] = {
    "ArcFace": {"methods": []},
    "AdaFace": {"methods": ["AdaFace"], "adaface": NORM},
    "AdaFace, QSD, QUD": {
        "methods": ["AdaFace", "QSD", "QUD"],
        "adaface": NORM,
        "qsd": {"labels": "labels.csv", "classify": "both"},
        "qud": {**TEACHER, "weight": 2.0},
    },
    "QGFace": {
        "methods": ["QGFace"],
        "qgface": {**NORM, "threshold": THRESHOLD, "queue_size": 40, "contrast_weight": 0.0},
    },
    "QGFace, QSD": {
        "methods": ["QGFace", "QSD"],
        "qgface": {**NORM, "threshold": THRESHOLD, "queue_size": 40, "contrast_weight": 0.0},
        "qsd": {"partner": "degraded", "quality": "norm", "weight": 0.5},
    },
}


def options_of(case: str, style: str) -> dict[str, Any]:
    """The case with the margin's gradient in this style."""
    given = CASES[case]
    if not given["methods"]:
        return {**given, "margin_gradient": style}
    section = "qgface" if "QGFace" in given["methods"] else "adaface"
    return {**given, section: {**given[section], "gradient": style}}


def views_of(case: str) -> int:
    return 2 if {"QSD", "QGFace"} & set(CASES[case]["methods"]) else 1


def label_quality() -> Tensor:
    """Quality of first and second views, [2 B], and no tie among them."""
    return torch.linspace(0, 100, 2 * IMAGES).roll(3)


def targets_of(case: str) -> Tensor:
    if "labels" not in CASES[case].get("qsd", {}):
        return labels()
    valid = torch.ones(IMAGES)
    first, second = label_quality().chunk(2)
    return torch.stack([labels().double(), first.double(), valid.double(), second.double(), valid.double()], dim=1)


# --- the formulas ---------------------------------------------------------------------------------------------------


def margin_loss(embedding: Tensor, centres: Tensor, own: Tensor, case: str, style: str) -> Tensor:
    """Cross entropy over all rows; ``straight_through``: a surrogate with the gradient ``s gate (p - onehot) / N``."""
    cosine = F.normalize(embedding, dim=1) @ F.normalize(centres, dim=1).T
    onehot = F.one_hot(own, CLASSES).bool()
    gate = torch.ones(len(own), 1, dtype=torch.float64)
    if case == "ArcFace":
        target = torch.cos(cosine.acos() + 0.5)
    else:
        k = scaler(embedding)
        target = torch.cos((cosine.acos() - MARGIN * k).clamp(1e-3, torch.pi - 1e-3)) - MARGIN * (1 + k)
        if case.startswith("QGFace"):
            gate = torch.sigmoid(2 * SCALE * ((k + 1) / 2 - THRESHOLD))
    logits = SCALE * gate * torch.where(onehot, target, cosine)
    if style == "exact":
        return F.cross_entropy(logits, own)
    p = logits.softmax(dim=1)
    return (cosine * (SCALE * gate * (p - onehot.double()) / len(own)).detach()).sum()


def scaler(embedding: Tensor) -> Tensor:
    """``clip(h (norm - mean) / (std + 1e-3), -1, 1)`` with the mean and deviation of all rows."""
    norm = embedding.detach().norm(dim=1, keepdim=True).clamp(1e-3, 100)
    return (H * (norm - norm.mean()) / (norm.std() + 1e-3)).clamp(-1, 1)


def qud(student: Tensor, teacher: Tensor) -> Tensor:
    """``-log softmax`` of the own teacher's cosine among it and the queue's."""
    queue = FeatureQueue(TEACHER["queue_size"], DIM, seed=1).features.double()
    q, k, entries = (F.normalize(tensor, dim=1) for tensor in (student, teacher, queue))
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ entries.T], dim=1) / 0.1
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def qsd(taps: dict[str, Tensor], quality: Tensor) -> Tensor:
    """The pure loss of the whole batch, which has tests of its own."""
    halves = [{name: tap.chunk(2)[view] for name, tap in taps.items()} for view in (0, 1)]
    return QSDLoss(LEVELS, missing="tie")(*halves, *quality.chunk(2)).total


def dense(case: str, style: str) -> dict[str, Tensor]:
    """Gradients of the whole batch by embeddings, maps and class rows."""
    views = views_of(case)
    given = output(views)
    embedding = given.embedding.detach().double().requires_grad_()
    maps = given.taps["layer4"].detach().double().requires_grad_()
    centres = rows().double().requires_grad_()
    loss = margin_loss(embedding, centres, labels().repeat(views), case, style)
    if "QUD" in case:
        assert given.teacher is not None
        loss = loss + 2 * qud(embedding, given.teacher.double())
    if "QSD" in case:
        by_norm = case.startswith("QGFace")
        quality = 50 * (scaler(embedding)[:, 0] + 1) if by_norm else label_quality().double()
        loss = loss + (0.5 if by_norm else 1.0) * qsd({"layer4": maps, "embedding": embedding}, quality)
    found = torch.autograd.grad(loss, (embedding, maps, centres), allow_unused=True)
    return {name: value for name, value in zip(("embedding", "map", "rows"), found, strict=True) if value is not None}


# --- the heads ------------------------------------------------------------------------------------------------------


def found(case: str, style: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """Gradients of this rank's images, as data-parallel training averages them, and of its class rows."""
    size, views = IMAGES // ranks, views_of(case)
    part = slice(rank * size, (rank + 1) * size)
    head = make_head(options_of(case, style), batch=size)
    given = output(views, part)
    plain = views == 1 and "QUD" not in case
    loss = head(given.embedding if plain else given, targets_of(case)[part].clone())
    wanted = {"embedding": given.embedding, "map": given.taps["layer4"], "rows": head.weight}
    if "QSD" not in case:
        del wanted["map"]
    result = dict(zip(wanted, gradients(loss, *wanted.values()), strict=True))
    return {
        name: value if name == "rows" else value.view(views, size, *value.shape[1:]) / ranks
        for name, value in result.items()
    }


def difference(parts: list[dict[str, Tensor]], wanted: dict[str, Tensor]) -> float:
    """Largest difference of the ranks' gradients from the formula's, relative to the largest of that quantity."""
    assert parts[0].keys() == wanted.keys()
    largest = 0.0
    for name, value in wanted.items():
        joined = torch.cat([part[name] for part in parts], dim=0 if name == "rows" else 1)
        joined = joined.reshape(value.shape).double()
        largest = max(largest, float((joined - value).abs().max() / value.abs().max()))
    return largest


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", CASES)
def test_one_rank_has_the_gradient_of_the_formula(case: str, style: str, group: None) -> None:
    other = STYLES[1 - STYLES.index(style)]
    own = [found(case, style, 0, 1)]
    assert difference(own, dense(case, style)) < 1e-4
    assert difference(own, dense(case, other)) > 1e-2  # the control


def worker(rank: int, root: str) -> dict[str, Any]:
    """What a rank of two has in every case, and what it would have if it judged norms by its own rows."""
    with imported_host(Path(root)):
        undo = next(shim for shim in compat.SHIMS if shim.name == "cuda()").apply()
        result: dict[str, Any] = {}
        for case in CASES:
            for style in STYLES:
                result[f"{case} {style}"] = found(case, style, rank, 2)
        with mock.patch.object(terms, "gather_equal_rows", lambda tensor: torch.cat([tensor.detach()] * 2)):
            for case in ("AdaFace", "QGFace"):
                for style in STYLES:
                    result[f"control {case} {style}"] = found(case, style, rank, 2)
        undo()
    return result


def test_two_ranks_have_the_gradients_of_the_formulas(host_root: Path) -> None:
    parts = run_ranks(worker, str(host_root))
    for case in CASES:
        for style in STYLES:
            key = f"{case} {style}"
            wanted = dense(case, style)
            assert difference([part[key] for part in parts], wanted) < 1e-4, key
            if f"control {key}" in parts[0]:
                assert difference([part[f"control {key}"] for part in parts], wanted) > 5e-4, key


def test_the_formulas_notice_what_they_are_for() -> None:
    """Rows of every kind are there: margins that differ, and with QGFace closed, open and half-open gates."""
    embedding = output(2).embedding.double()
    k = scaler(embedding)
    gate = torch.sigmoid(2 * SCALE * ((k + 1) / 2 - THRESHOLD))
    assert (gate < 0.01).any()
    assert (gate > 0.99).any()
    assert float(k.std()) > 0.1
    assert isinstance(output(1), TrainingOutput)
    assert values(2).shape == (2,)
