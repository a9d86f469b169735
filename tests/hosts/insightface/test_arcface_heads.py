"""Heads on the tree's own PartialFC: equal to the methods' pure forms, in value and gradient, on one rank and on two.

Controls: without the gathered norms, or with the other kind of gradient, the same comparisons fail.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from conftest import imported_host
from heads_toy import CLASSES, DIM, IMAGES, TEACHER, gradients, labels, make_head, output, rows, values
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "ddp"))

from gloo import run_ranks

from qsd_plugin.hosts.insightface import compat, terms
from qsd_plugin.hosts.insightface.wrappers import TrainingOutput
from qsd_plugin.methods.qgface import AdaFaceHead, ProxyQueue, QGContrast, QGFaceHead, contrast_options, unit_and_norm
from qsd_plugin.methods.qsd import QSDLoss
from qsd_plugin.methods.qud import FeatureQueue, qud_loss

ALL = {
    "methods": ["QGFace", "QSD", "QUD"],
    "qgface": {"queue_size": 40, "threshold": 0.5, "momentum": 0.5},
    "qsd": {"partner": "degraded", "quality": "norm"},
    "qud": TEACHER,
}


def test_adaface_head_is_the_pure_head(group: None) -> None:
    head = make_head({"methods": ["AdaFace"]})
    pure = AdaFaceHead(DIM, CLASSES)
    with torch.no_grad():
        pure.weight.copy_(rows())
    head.margin_softmax.statistics.load_state_dict(pure.statistics.state_dict())
    for _ in range(2):  # the second with statistics that have moved
        batch = output(1).embedding
        # A plain tensor, as the host's network gives it.
        found = head(batch, labels())
        expected = pure(*unit_and_norm(batch), labels()).loss
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            gradients(found, batch, head.weight), gradients(expected, batch, pure.weight), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    straight = make_head({"methods": ["AdaFace"], "adaface": {"gradient": "straight_through"}})
    assert not torch.allclose(
        gradients(straight(batch, labels()), batch)[0], gradients(found_of(head, batch), batch)[0]
    )


def found_of(head: Any, batch: Tensor) -> Tensor:
    loss: Tensor = head(batch, labels())
    return loss


def test_straight_through_and_exact_margins_have_the_gradients_they_are_named_after(group: None) -> None:
    batch = output(1).embedding
    cosine = F.normalize(batch) @ F.normalize(rows()).T
    own = labels()[:, None]
    angle = cosine.gather(1, own).acos()
    with_margin = cosine.scatter(1, own, torch.cos(angle + 0.5)) * 64
    expected = F.cross_entropy(with_margin, labels())
    (exact,) = gradients(expected, batch)
    p = with_margin.softmax(dim=1).detach()
    cosine = F.normalize(batch) @ F.normalize(rows()).T
    (straight,) = torch.autograd.grad(cosine, batch, 64 * (p - F.one_hot(labels(), CLASSES)) / IMAGES)
    assert not torch.allclose(exact, straight, rtol=1e-2)
    for style, wanted in (("exact", exact), ("straight_through", straight)):
        head = make_head({"methods": ["AdaFace"], "adaface": {"gradient": style}})
        if style == "exact":
            head = make_head({"margin_gradient": "exact"})
            found = head(batch, labels())
            torch.testing.assert_close(found, expected)
        else:
            head = make_head({"methods": ["QUD"], "qud": {**TEACHER, "classify": True, "weight": 0.0}})
            found = head(TrainingOutput(batch, {}, values(IMAGES, DIM)), labels())
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, batch)[0], wanted, rtol=1e-4, atol=1e-5)


def test_adaface_straight_through_is_p_minus_onehot(group: None) -> None:
    batch = output(1).embedding
    head = make_head({"methods": ["AdaFace"], "adaface": {"gradient": "straight_through"}})
    found = head(batch, labels())
    pure = AdaFaceHead(DIM, CLASSES)
    with torch.no_grad():
        pure.weight.copy_(rows())
    pure.statistics.load_state_dict(head.margin_softmax.statistics.state_dict())
    pure.eval()
    p = pure(*unit_and_norm(batch), labels()).logits.softmax(dim=1).detach()
    cosine = F.normalize(batch) @ F.normalize(rows()).T
    (expected,) = torch.autograd.grad(cosine, batch, 64 * (p - F.one_hot(labels(), CLASSES)) / IMAGES)
    torch.testing.assert_close(gradients(found, batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_all_terms_are_the_pure_methods_side_by_side(group: None) -> None:
    head = make_head(ALL)
    pure = QGFaceHead(DIM, CLASSES, threshold=0.5, momentum=0.5)
    with torch.no_grad():
        pure.weight.copy_(rows())
    contrast = QGContrast(threshold=0.5, **contrast_options("figure"))
    ring, queue = ProxyQueue(40, DIM), FeatureQueue(40, DIM, seed=1)
    for _ in range(2):
        batch = output(2)
        found = head(batch, labels())
        unit, norm = unit_and_norm(batch.embedding)
        classified = pure(unit, norm, labels().repeat(2))
        own = ring.enqueue(unit.view(2, IMAGES, DIM).detach(), labels(), pure.weight)
        scalers = classified.scaler.chunk(2)
        poor = contrast(
            unit[IMAGES:], unit[:IMAGES], ring.negatives(pure.weight), labels(), scalers[1], scalers[0], own
        ).loss
        assert batch.teacher is not None
        distilled = qud_loss(batch.embedding, batch.teacher, queue.features, 0.1)
        queue.enqueue(batch.teacher)
        quality = 50 * (head.terms.qsd.statistics.scaler(norm.detach())[:, 0] + 1)
        halves = [{name: tap.chunk(2)[view] for name, tap in batch.taps.items()} for view in (0, 1)]
        taught = QSDLoss({"layer4": 1.0, "embedding": 0.5}, missing="tie")(*halves, *quality.chunk(2)).total
        expected = classified.loss + poor + distilled + taught
        torch.testing.assert_close(found, expected)
        inputs = (batch.embedding, batch.taps["layer4"])
        for one, other in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_labels_of_a_file_decide_who_teaches_and_the_anchor_alone_is_classified(group: None) -> None:
    head = make_head({"methods": ["QSD"], "qsd": {"labels": "x.csv"}})
    batch = output(2)
    quality = torch.linspace(0, 100, 2 * IMAGES).roll(3)
    valid = torch.ones(2 * IMAGES)
    valid[2] = 0
    columns = [labels().double(), quality[:IMAGES], valid[:IMAGES], quality[IMAGES:], valid[IMAGES:]]
    found = head(batch, torch.stack([column.double() for column in columns], dim=1))
    halves = [{name: tap.chunk(2)[view] for name, tap in batch.taps.items()} for view in (0, 1)]
    taught = QSDLoss({"layer4": 1.0, "embedding": 0.5}, missing="tie")(
        *halves, *quality.chunk(2), valid[:IMAGES] > 0, valid[IMAGES:] > 0
    )
    assert taught.stats["unlabelled"] == 1
    anchor = make_head({"methods": ["QUD"], "qud": {**TEACHER, "classify": True, "weight": 0.0}})
    first = TrainingOutput(batch.embedding[:IMAGES], {}, values(IMAGES, DIM))
    torch.testing.assert_close(found, anchor(first, labels()) + taught.total)


def step(rank: int, ranks: int) -> dict[str, Any]:
    """Two steps on this rank's part of the batch: losses, gradients as data-parallel training averages them, state."""
    with imported_host(Path(ROOT)):
        undo = next(shim for shim in compat.SHIMS if shim.name == "cuda()").apply()
        size = IMAGES // ranks
        part = slice(rank * size, (rank + 1) * size)
        head = make_head(ALL, batch=size)
        for _ in range(2):
            batch = output(2, part)
            loss = head(batch, labels()[part])
            found = gradients(loss, batch.embedding, batch.taps["layer4"], head.weight)
        undo()
    views = [gradient.view(2, size, *gradient.shape[1:]) / ranks for gradient in found[:2]]
    return {"loss": loss.detach(), "embedding": views[0], "map": views[1], "rows": found[2], "state": state(head)}


def state(head: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in head.state_dict().items() if key != "weight"}


def worker(rank: int, root: str) -> dict[str, Any]:
    """What two ranks do, and what they would without the norms of the other one."""
    global ROOT
    ROOT = root
    alone = mock.patch.object(terms, "gather_equal_rows", lambda tensor: torch.cat([tensor.detach()] * 2))
    found = step(rank, 2)
    with alone:
        return {**found, "control": step(rank, 2)}


ROOT = ""


def differences(found: list[dict[str, Any]], whole: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference of two ranks from one process, by quantity."""
    joined = {
        "embedding": torch.cat([rank["embedding"] for rank in found], dim=1),
        "map": torch.cat([rank["map"] for rank in found], dim=1),
        "rows": torch.cat([rank["rows"] for rank in found]),
        **found[0]["state"],
    }
    wanted = {**{name: whole[name] for name in ("embedding", "map", "rows")}, **whole["state"]}
    return {
        name: float((joined[name].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-12))
        for name, value in wanted.items()
    }


def test_two_ranks_are_one_process_on_the_whole_batch(host_root: Path, group: None) -> None:
    global ROOT
    ROOT = str(host_root)
    from partial_fc_v2 import PartialFC_V2  # noqa: F401 - the tree is importable here

    whole = step(0, 1)
    found = run_ranks(worker, str(host_root))
    assert found[0]["rows"].shape[0] == 3
    for key, value in found[0]["state"].items():
        assert torch.equal(value, found[1]["state"][key]), key
    wrong = {name: size for name, size in differences(found, whole).items() if size > 1e-4}
    assert not wrong
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, whole["loss"], rtol=0.5, atol=0)
    assert differences([rank["control"] for rank in found], whole)["embedding"] > 1e-3
