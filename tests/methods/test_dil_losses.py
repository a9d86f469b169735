"""DIL's losses: recorded values and gradients, closed forms, precision, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dil_recorded import Golden, close, digest, fill, image, recorded, same_digest, same_digests
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil import MultiScaleDiscriminator
from qsd_plugin.methods.dil.losses import (
    consistency_loss,
    hardest_distances,
    identity_loss,
    ls_d,
    ls_g,
    means,
    pixel_loss,
    r1,
    r1_terms,
    rank_labels,
    rank_loss,
    triplet_loss,
)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return recorded("losses")


@pytest.fixture(scope="module")
def inputs(golden: Golden) -> dict[str, Tensor]:
    return {name: torch.from_numpy(golden[f"id.in/{name}"]) for name in ("feat", "label", "logit", "logit2")}


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, tensors, allow_unused=True))


def test_triplet(golden: Golden, inputs: dict[str, Tensor]) -> None:
    features = inputs["feat"].clone().requires_grad_()
    loss = triplet_loss(features, inputs["label"])
    assert loss.item() == pytest.approx(2.7350514612)
    close(loss, golden["triplet/0"])
    close(gradients(loss, features)[0], golden["triplet/1"])
    for found, index in zip(hardest_distances(features, inputs["label"]), (0, 1), strict=True):
        close(found, golden[f"triplet.dist_ap_an/{index}"])


def test_identity(golden: Golden, inputs: dict[str, Tensor]) -> None:
    features, logits = inputs["feat"].clone().requires_grad_(), inputs["logit"].clone().requires_grad_()
    loss = identity_loss(logits, features, inputs["label"])
    assert loss.item() == pytest.approx(6.0414589446)
    close(loss, golden["ce_tri/0"])
    for found, index in zip(gradients(loss, logits, features), (0, 1), strict=True):
        close(found, golden[f"ce_tri/1/{index}"])
    close(identity_loss(logits, features, inputs["label"], "ce"), golden["ce"])
    close(identity_loss(logits, features, inputs["label"], "tri"), golden["triplet/0"])
    assert identity_loss(logits, features, inputs["label"], "none").item() == 0


@pytest.mark.parametrize("kind", ["kl", "kl_detach", "js", "js_detach"])
def test_consistency(golden: Golden, inputs: dict[str, Tensor], kind: str) -> None:
    first, second = (inputs[name].clone().requires_grad_() for name in ("logit", "logit2"))
    loss = consistency_loss(first, second, kind)
    close(loss, golden[f"smooth.{kind}/0"])
    to_first, to_second = gradients(loss, first, second)
    close(to_second, golden[f"smooth.{kind}/1/1"])
    if kind.endswith("detach"):
        assert to_first is None
        assert f"smooth.{kind}/1/0" not in golden
    else:
        close(to_first, golden[f"smooth.{kind}/1/0"])


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1"])
def test_pixels(golden: Golden, kind: str) -> None:
    first, second = (torch.from_numpy(golden[f"pixel.in/{index}"]) for index in (0, 1))
    close(pixel_loss(first, second, kind), golden[f"pixel.{kind}"])


@pytest.fixture(scope="module", params=["D_deg", "D_real"])
def adversary(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    name = request.param
    return name, fill(MultiScaleDiscriminator(1 if name == "D_deg" else 3), name)


@pytest.fixture(scope="module")
def pictures() -> dict[str, Tensor]:
    return {"lo": image("adv.lo", 3), "hi": image("adv.hi", 3).requires_grad_()}


def weight_gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def test_discriminator_losses(golden: Golden, adversary: tuple[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    """Values and gradients of the weights, the penalty's included."""
    name, network = adversary
    low, high = network(pictures["lo"]), network(pictures["hi"])
    order = rank_labels(low, high)
    close(order, golden[f"adv.{name}.predict(lo,hi)"])
    for index, scores in enumerate(means(low)):
        close(scores[:, 0], golden[f"adv.{name}.scores(lo)/{index}"])
    for index, penalty in enumerate(r1_terms(high, pictures["hi"])):
        close(0.01 * penalty, golden[f"adv.{name}.r1_terms(hi)/{index}"])
    pooled = 0.01 * r1(high, pictures["hi"], pooled=True)
    losses = {
        "dis_lsgan(fake=lo,real=hi)": ls_d(low, high) + 0.01 * r1(high, pictures["hi"]),
        "dis_rank(lower=lo,higher=hi,label=-1)": rank_loss(low, high) + pooled,
        "dis_rank(label=predict)": rank_loss(low, high, order) + pooled,
    }
    for kind, loss in losses.items():
        close(loss, golden[f"adv.{name}.{kind}/0"])
        same_digests(weight_gradients(network, loss), golden, f"adv.{name}.{kind}/1")


def test_generator_losses(golden: Golden, adversary: tuple[str, nn.Module], pictures: dict[str, Tensor]) -> None:
    name, network = adversary
    images = [pictures[key].detach().clone().requires_grad_() for key in ("lo", "hi")]
    for target in (0, 1):
        loss = ls_g(network(images[0]), target)
        close(loss, golden[f"adv.{name}.gen_lsgan(lo,{target})/0"])
        same_digest(gradients(loss, images[0])[0], golden[f"adv.{name}.gen_lsgan(lo,{target})/1"])
    loss = rank_loss(network(images[0]), network(images[1]), -1)
    close(loss, golden[f"adv.{name}.gen_rank(lo,hi,-1)/0"])
    for index, found in enumerate(gradients(loss, *images)):
        same_digest(found, golden[f"adv.{name}.gen_rank(lo,hi,-1)/{index + 1}"])


def flat_maps(*values: float) -> list[Tensor]:
    """A map of 2 x 3 equal scores per scale, of one image."""
    return [torch.full((1, 1, 2, 3), value) for value in values]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda: ls_d(flat_maps(0.0, 0.0), flat_maps(1.0, 1.0)), 0.0),
        (lambda: ls_d(flat_maps(0.5, 1.0), flat_maps(1.0, 0.0)), (0.25 + 1 + 1) / 2),
        (lambda: ls_g(flat_maps(1.0, 0.0), 1.0), 1.0),
        (lambda: rank_loss(flat_maps(-1.0, -0.5), flat_maps(0.0, 0.0)), 0.25),
        (lambda: rank_loss(flat_maps(-1.0), flat_maps(0.0), 1.0), 2.0),
    ],
)
def test_closed_forms(loss: Callable[[], Tensor], expected: float) -> None:
    assert loss().item() == pytest.approx(expected)


def test_the_optima_of_least_squares_and_ranking_agree() -> None:
    """A clean image at 1 and a degraded one at 0 cost nothing in either, so both may share a discriminator."""
    degraded, clean = flat_maps(0.0), flat_maps(1.0)
    assert ls_d(degraded, clean).item() == 0
    assert rank_loss(degraded, clean).item() == 0


def test_a_tie_counts_as_one() -> None:
    assert rank_labels(flat_maps(0.5, -0.5), flat_maps(-0.5, 0.5)).tolist() == [[1.0]]


def test_r1_of_a_linear_discriminator() -> None:
    """D(x) = a x has the gradient a in every pixel: sum form n a^2, mean form a^2 / n of n pixels."""
    images = torch.randn(4, 3, 5, 2, generator=torch_stream(0)).requires_grad_()
    maps = [(0.5 * images).sum(dim=1, keepdim=True)]
    assert r1(maps, images).item() == pytest.approx(30 * 0.25)
    assert r1(maps, images, pooled=True).item() == pytest.approx(30 * 0.25 / 100)


def test_no_other_identity_in_the_batch_costs_nothing() -> None:
    features = torch.randn(4, 3, generator=torch_stream(1)).requires_grad_()
    loss = triplet_loss(features, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().max().item() == 0


def test_equal_images_have_a_finite_gradient() -> None:
    features = torch.ones(4, 3).requires_grad_()
    triplet_loss(features, torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: ls_d([x], [y]),
        lambda x, y: ls_g([x], 1),
        lambda x, y: rank_loss([x], [y]),
        lambda x, y: pixel_loss(x, y),
        lambda x, y: consistency_loss(x.flatten(1), y.flatten(1), "js"),
        lambda x, y: identity_loss(x.flatten(1), y.flatten(1), torch.arange(8)),
    ],
)
def test_islands_of_single_precision(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    first, second = (40 * torch.randn(8, 1, 4, 3, generator=torch_stream(seed)).bfloat16() for seed in (2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(first, second)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(first.float(), second.float()))
    assert loss(first.double(), second.double()).dtype == torch.float64


def test_js_is_bounded_and_symmetric() -> None:
    first, second = (30 * torch.randn(6, 9, generator=torch_stream(seed)) for seed in (4, 5))
    value = consistency_loss(first, second, "js").item()
    assert value == pytest.approx(consistency_loss(second, first, "js").item())
    assert 0 < value <= math.log(2) + 1e-6


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: pixel_loss(x, x, "L1"), "DIL pixel loss: got 'L1'.*Did you mean 'l1'"),
        (lambda x: pixel_loss(x, x[:1]), "DIL pixel loss: shapes: got .*expected equal ones"),
        (lambda x: consistency_loss(x, x, "kl_detached"), "DIL consistency loss: .*Did you mean 'kl_detach'"),
        (lambda x: identity_loss(x, x, x[:, 0], "ce+tri"), "DIL identity loss: .*Did you mean 'ce_tri'"),
    ],
)
def test_refusals(call: Callable[[Tensor], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        call(torch.zeros(2, 3))


def test_the_recorded_digests_are_told_apart() -> None:
    """The comparison itself: a millionth more fails."""
    found = torch.randn(50, dtype=torch.float64, generator=torch_stream(6))
    same_digest(found, digest(found))
    with pytest.raises(AssertionError):
        same_digest(found * (1 + 1e-6), digest(found))
    with pytest.raises(AssertionError):
        same_digest(found, digest(found) + np.array([0, 0, 0, 0, 0, 0, 1e-6]))
