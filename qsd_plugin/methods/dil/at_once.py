"""Losses whose gradient is taken as soon as they are known, so that what they were computed from can go.

A step of stage 1 sums losses that share little: each reconstruction, each judgement and each cycle has maps of its own.
Kept until one backward pass they all lie in memory together; here one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_once(
    loss: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], parameters: Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """``loss(*inputs)``, of which the first is a loss, with its gradient computed here and now.

    The gradient arrives where it would have arrived, in a later backward pass and times what is multiplied there; it
    cannot be differentiated again. Under float16 autocast everything stays as it is: small gradients would be lost
    before the loss scale reaches them.

    Args:
        loss: Takes tensors in place of ``inputs``; returns a 0-d loss and whatever else, which is detached.
        inputs: What the loss depends on beside parameters.
        parameters: Of the networks in ``loss``; those that do not require gradient, or are not reached, get none.

    Returns:
        What ``loss`` returns.
    """
    sources = [*inputs, *parameters]
    if not torch.is_grad_enabled() or _half(sources):
        return loss(*inputs)
    with torch.enable_grad():
        stand_ins = [source.detach().requires_grad_(source.requires_grad) for source in inputs]
        value, *others = loss(*stand_ins)
        wanted = [place for place, source in enumerate(sources) if source.requires_grad]
        leaves = [stand_ins[place] if place < len(inputs) else sources[place] for place in wanted]
        found = torch.autograd.grad(value, leaves, allow_unused=True) if leaves and value.requires_grad else ()
    reached = [(sources[place], part) for place, part in zip(wanted, found, strict=False) if part is not None]
    value = value.detach()
    if reached:
        value = _Known.apply(value, [part for _, part in reached], *(source for source, _ in reached))  # type: ignore[no-untyped-call]
    return value, *(other.detach() for other in others)


def _half(sources: Sequence[Tensor]) -> bool:
    kind = sources[0].device.type if sources else "cpu"
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


class _Known(torch.autograd.Function):
    """A value and its gradient by each of the sources."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *_sources: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(part * factor for part in ctx.gradients)
