"""Pairs of one identity inside a batch, for QSD without a second forward pass.

Shapes: B images on this rank, K images of an identity in a row, P pairs. Index tensors are int64 on the inputs' device.
With ``num_instances`` the result has a fixed shape and nothing waits for the device; without it the shape depends on
the identities, for which a GPU has to be waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean

MODES = ("all", "best_vs_rest")


def inbatch_pairs(
    identities: Tensor, quality: Tensor, *, mode: str = "all", num_instances: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pairs of same-identity images, sorted by first then second index.

    Args:
        identities: Identity of each image, [B].
        quality: Label of each image, [B], higher is better; ``"best_vs_rest"`` selects by it, ``"all"`` does not.
        mode: ``"all"``: every unordered pair once, as (i, j) with i < j; for a batch of B/K identities with K images
            these are B (K - 1) / 2 pairs. ``"best_vs_rest"``: see :func:`best_vs_rest_pairs`.
        num_instances: K, if the batch is known to hold its identities in blocks of K, as identity samplers yield them.

    Returns:
        ``(index_1, index_2)``, [P] each; empty if no identity repeats.

    Raises:
        ConfigError: Unknown mode, lengths differ, or B is not a multiple of K.
        DataError: Identities on the CPU are not in blocks of K (on a GPU use :func:`check_blocks` now and then).
    """
    if mode not in MODES:
        raise ConfigError("QSD pairing mode", value=mode, remedy=did_you_mean(mode, MODES))
    if mode == "best_vs_rest":
        return best_vs_rest_pairs(identities, quality, num_instances=num_instances)
    _check_lengths(identities, quality)
    if num_instances is None:
        first, second = torch.nonzero(_same(identities).triu(diagonal=1), as_tuple=True)
        return first, second
    starts = _block_starts(identities, num_instances)
    offsets = torch.triu_indices(num_instances, num_instances, offset=1, device=identities.device)
    first, second = (starts + offsets[:, None]).flatten(1).unbind()
    return first, second


def best_vs_rest_pairs(
    identities: Tensor, quality: Tensor, *, num_instances: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best image of each identity with each of its other images: B - (number of identities) pairs.

    Args:
        identities: Identity of each image, [B].
        quality: Label of each image, [B], higher is better; labels that are not finite are never best, and the first
            of equal labels is.
        num_instances: K, as in :func:`inbatch_pairs`.

    Returns:
        ``(best, rest)``, [P] each, in ascending order of ``rest``; ``best`` repeats.

    Raises:
        ConfigError: Lengths differ, or B is not a multiple of K.
        DataError: Identities on the CPU are not in blocks of K.
    """
    _check_lengths(identities, quality)
    # The lowest finite score for missing labels: below it, -inf marks other identities.
    score = torch.where(torch.isfinite(quality), quality.detach().double(), torch.finfo(torch.float64).min)
    if num_instances is None:
        own = torch.where(_same(identities), score, -torch.inf)
        best = own.argmax(dim=1) if len(own) else own.new_empty(0, dtype=torch.int64)  # argmax refuses empty rows
        rest = torch.nonzero(best != torch.arange(len(best), device=best.device)).flatten()
        return best[rest], rest
    starts = _block_starts(identities, num_instances)
    best = score.view(-1, num_instances).argmax(dim=1, keepdim=True)
    others = torch.arange(num_instances - 1, device=score.device)
    rest = others + (others >= best)  # 0..K-1 without the best one
    return (starts + best).expand_as(rest).flatten(), (starts + rest).flatten()


def check_blocks(identities: Tensor, num_instances: int) -> None:
    """Refuse a batch whose identities do not come in blocks of K. Reads values, so it waits for the device.

    Args:
        identities: Identity of each image, [B].
        num_instances: K, the length of a block.

    Raises:
        DataError: A block holds more than one identity.
    """
    blocks = identities.view(-1, num_instances)
    mixed = (blocks != blocks[:, :1]).any(dim=1)
    if mixed.any():
        at = int(mixed.nonzero()[0])
        raise DataError(
            f"Block {at} of the batch",
            value=blocks[at].tolist(),
            expected=f"{num_instances} images of one identity",
            remedy="Use an identity sampler with that number of instances, or leave num_instances out.",
        )


def _block_starts(identities: Tensor, num_instances: int) -> Tensor:
    batch = identities.shape[0]
    if num_instances < 1 or batch % num_instances:
        raise ConfigError(
            "Images per identity (num_instances)", value=num_instances, expected=f"a divisor of the batch size {batch}"
        )
    if identities.device.type == "cpu":
        check_blocks(identities, num_instances)
    return torch.arange(0, batch, num_instances, device=identities.device)[:, None]


def _same(identities: Tensor) -> Tensor:
    return identities[:, None] == identities[None, :]


def _check_lengths(identities: Tensor, quality: Tensor) -> None:
    if identities.dim() != 1 or identities.shape != quality.shape:
        shapes = tuple(identities.shape), tuple(quality.shape)
        raise ConfigError("Identities and quality labels", value=shapes, expected="two vectors of the same length")
