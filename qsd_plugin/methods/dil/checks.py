"""A loss that is not finite stops training on every rank, with its name, before it reaches a weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qsd_plugin.core.distributed import all_reduce_max
from qsd_plugin.core.errors import TrainingError


@torch.no_grad()
def require_finite(what: str, terms: Mapping[str, Tensor]) -> None:
    """Refuse values that are not finite on any rank; waits for the device.

    Args:
        what: Whose terms they are, and when.
        terms: Name to value, any shape; the same names on every rank.

    Raises:
        TrainingError: On every rank, if a term is not finite on one.
    """
    bad = all_reduce_max(torch.stack([~torch.isfinite(term).all() for term in terms.values()]).to(torch.float32))
    names = [name for name, flag in zip(terms, bad.tolist(), strict=True) if flag]
    if names:
        values = ", ".join(f"{name} = {terms[name].float().mean().item():g} on this rank" for name in names)
        raise TrainingError(
            f"{what}: {', '.join(names)} not finite ({values})",
            expected="finite losses",
            remedy="Nothing was updated with it. Look at the images of this batch, lower the learning rate, or train "
            "in float32.",
        )
