"""DIL's losses as functions of maps, logits and features, so that they need no network.

All are a **local mean**: each rank averages over its own images; with equal batches the averaged gradients of
data-parallel training are those of one process on the whole batch. So they are of the triplet, which is mined over the
images of all ranks. All are fp32 islands: autocast off, inputs cast to float32, float64 stays.

Shapes: B images, S scales of a discriminator, h x w the grid of a scale's map D_s, C classes, D feature size. Source:
Huang et al., CVPR 2020 and IJCV 2022; forms and constants as in their program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qsd_plugin.core.distributed import gather_equal_rows, rank, world_size
from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.dil.layers import in_float32, no_autocast

PIXEL_LOSSES = ("l1", "l2", "smooth_l1")
CONSISTENCIES = ("kl_detach", "kl", "js_detach", "js")
IDENTITY_LOSSES = ("ce_tri", "ce", "tri", "none")
#: Margin of the triplet loss.
MARGIN = 0.3

_SQUARED_MIN = 1e-12
_PROBABILITY_MIN = 1e-7


def ls_d(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Least squares for a discriminator: ``1/S sum_s mean D_s(fake)^2 + mean (D_s(real) - 1)^2``.

    Args:
        fake: Maps of a rendered, or of a degraded image, [B, 1, h, w] per scale.
        real: Maps of a real, or of a clean image.

    Returns:
        0-d; without the gradient penalty, which is :func:`r1`.
    """
    return _over_scales(fake, lambda scores: scores.square().mean()) + _over_scales(
        real, lambda scores: (scores - 1).square().mean()
    )


def ls_g(fake: Sequence[Tensor], target: float) -> Tensor:
    """Least squares for the generator: ``2/S sum_s mean (D_s(fake) - t)^2``.

    Args:
        fake: Maps of a rendered image, [B, 1, h, w] per scale.
        target: t: 1 for real or clean, 0 for degraded.

    Returns:
        0-d.
    """
    return 2 * _over_scales(fake, lambda scores: (scores - target).square().mean())


def rank_loss(lower: Sequence[Tensor], higher: Sequence[Tensor], order: Tensor | float = -1.0) -> Tensor:
    """Hinge on the mean scores m_s: ``1/S sum_s mean max(0, 1 - y (m_s(lower) - m_s(higher)))``.

    Args:
        lower: Maps of the image of lower quality, [B, 1, h, w] per scale.
        higher: Maps of its partner.
        order: y, [B, 1] or one number: -1 where ``higher`` is the better one, 1 where the names are wrong.

    Returns:
        0-d; for a discriminator without the gradient penalty.
    """
    with no_autocast(lower[0]):
        terms = [F.relu(1 - order * (low - high)).mean() for low, high in zip(means(lower), means(higher), strict=True)]
        return torch.stack(terms).mean()


@torch.no_grad()
def rank_labels(lower: Sequence[Tensor], higher: Sequence[Tensor]) -> Tensor:
    """The order that a discriminator itself believes in: ``sign(sum_s m_s(lower) - m_s(higher))``, 1 for a tie.

    Args:
        lower: Maps of one image of unknown quality, [B, 1, h, w] per scale.
        higher: Maps of the other.

    Returns:
        [B, 1], -1 or 1; carries no gradient.
    """
    with no_autocast(lower[0]):
        pairs = zip(means(lower), means(higher), strict=True)
        difference = torch.stack([low - high for low, high in pairs]).sum(dim=0)
    return torch.where(difference >= 0, 1.0, -1.0).to(difference.dtype)


def r1(maps: Sequence[Tensor], images: Tensor, *, pooled: bool = False) -> Tensor:
    """Gradient penalty on real images: ``1/S sum_s mean_i |d sum D_s / d x_i|^2``; its gradient can be taken.

    Args:
        maps: Of ``images``, [B, 1, h, w] per scale, computed outside autocast: the squares underflow in half precision.
        images: [B, 3, H, W]; requires gradient.
        pooled: Take the gradient of the mean over positions instead of the sum, as the authors do beside the ranking
            loss, where the penalty is smaller by (h w)^2 and hence does nothing.

    Returns:
        0-d, to be weighted with 0.01.
    """
    return torch.stack(r1_terms(maps, images, pooled=pooled)).mean()


def r1_terms(maps: Sequence[Tensor], images: Tensor, *, pooled: bool = False) -> list[Tensor]:
    """The summands of :func:`r1`, one per scale; arguments as there."""
    terms = []
    for scores in maps:
        total = in_float32(scores).mean(dim=(2, 3)).sum() if pooled else in_float32(scores).sum()
        (gradient,) = torch.autograd.grad(total, images, create_graph=True)
        terms.append(in_float32(gradient).square().sum(dim=(1, 2, 3)).mean())
    return terms


def means(maps: Sequence[Tensor]) -> list[Tensor]:
    """Mean score of each image, [B, 1] per scale."""
    return [in_float32(scores).mean(dim=(2, 3)) for scores in maps]


def pixel_loss(images: Tensor, target: Tensor, kind: str = "l1") -> Tensor:
    """Mean difference of two tensors of equal shape.

    Args:
        kind: ``"l1"``, ``"l2"`` (squared) or ``"smooth_l1"``.

    Raises:
        ConfigError: Unknown kind, or other shapes.
    """
    _check(kind, PIXEL_LOSSES, "pixel loss")
    if images.shape != target.shape:
        raise ConfigError(
            "DIL pixel loss: shapes", value=(tuple(images.shape), tuple(target.shape)), expected="equal ones"
        )
    losses = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
    with no_autocast(images):
        return losses[kind](in_float32(images), in_float32(target))


def consistency_loss(target: Tensor, logits: Tensor, kind: str = "kl_detach") -> Tensor:
    """How far the prediction on a re-rendered image is from that on the image itself.

    Args:
        target: Logits on the image, [B, C].
        logits: Logits on the re-rendered image, [B, C].
        kind: ``"kl"``: KL(softmax target || softmax logits), summed over classes, mean over images; ``"js"``: mean of
            the KLs of both to their mean distribution. With ``"_detach"`` the target gets no gradient.

    Returns:
        0-d.

    Raises:
        ConfigError: Unknown kind.
    """
    _check(kind, CONSISTENCIES, "consistency loss")
    with no_autocast(logits):
        target, logits = in_float32(target), in_float32(logits)
        if kind.endswith("_detach"):
            target = target.detach()
        if kind.startswith("kl"):
            return F.kl_div(logits.log_softmax(dim=1), target.softmax(dim=1), reduction="batchmean")
        first, second = target.softmax(dim=1), logits.softmax(dim=1)
        middle = ((first + second) / 2).clamp(_PROBABILITY_MIN, 1).log()
        both = [F.kl_div(middle, part, reduction="batchmean") for part in (first, second)]
        return (both[0] + both[1]) / 2


def hardest_distances(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, the distance to the furthest of its identity and to the nearest of another, [B] each.

    Args:
        features: [B, D], not normalised.
        labels: [B].

    Returns:
        Euclidean distances; infinite to the nearest other where there is none.
    """
    with no_autocast(features):
        features = in_float32(features)
        norms = features.square().sum(dim=1)
        squared = torch.addmm(norms[:, None] + norms[None, :], features, features.t(), alpha=-2)
        distance = squared.clamp(min=_SQUARED_MIN).sqrt()
        same = labels[:, None] == labels[None, :]
        furthest = distance.masked_fill(~same, -torch.inf).amax(dim=1)
        nearest = distance.masked_fill(same, torch.inf).amin(dim=1)
        return furthest, nearest


def triplet_loss(features: Tensor, labels: Tensor, margin: float = MARGIN) -> Tensor:
    """Batch-hard triplet loss ``mean_i max(0, d_ap - d_an + margin)``; arguments as :func:`hardest_distances`.

    Across ranks: over the images of all, of which every rank must have the same number; equal on every rank.
    """
    whole, count = gather_equal_rows(features), len(features)
    start = rank() * count
    whole = torch.cat([whole[:start], features, whole[start + count :]])
    furthest, nearest = hardest_distances(whole, gather_equal_rows(labels))
    loss = F.relu(furthest - nearest + margin).mean()
    # The gradient reaches this rank's rows only, and data-parallel training divides it by the number of ranks.
    return loss.detach() + world_size() * (loss - loss.detach())


def identity_loss(logits: Tensor, features: Tensor, labels: Tensor, kind: str = "ce_tri") -> Tensor:
    """Cross entropy of the logits plus the triplet loss of the features, or one of them.

    Args:
        logits: [B, C].
        features: [B, D], before the bottleneck, not normalised.
        labels: [B] int64, in [0, C).
        kind: ``"ce_tri"``, ``"ce"``, ``"tri"``, or ``"none"`` for 0.

    Returns:
        0-d.

    Raises:
        ConfigError: Unknown kind.
    """
    _check(kind, IDENTITY_LOSSES, "identity loss")
    loss = logits.new_zeros((), dtype=in_float32(logits).dtype)
    if "ce" in kind:
        with no_autocast(logits):
            loss = loss + F.cross_entropy(in_float32(logits), labels)
    if "tri" in kind:
        loss = loss + triplet_loss(features, labels)
    return loss


def _over_scales(maps: Sequence[Tensor], term: Callable[[Tensor], Tensor]) -> Tensor:
    with no_autocast(maps[0]):
        return torch.stack([term(in_float32(scores)) for scores in maps]).mean()


def _check(kind: str, known: tuple[str, ...], what: str) -> None:
    if kind not in known:
        raise ConfigError(
            f"DIL {what}", value=kind, expected=" or ".join(map(repr, known)), remedy=did_you_mean(str(kind), known)
        )
