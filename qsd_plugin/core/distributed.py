"""Collectives that are no-ops in a single process, so that losses read the same with one rank and with many."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from qsd_plugin.core.errors import QSDPluginError

T = TypeVar("T")

#: Groups that were left, see :func:`leave_group`.
_left: list[Any] = []


def initialised() -> bool:
    """Whether a process group with more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if initialised() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if initialised() else 0


def leave_group() -> None:
    """Leave the process group, if there is one, where data-parallel wrappers may be freed afterwards.

    The group's object is kept until the process exits. Otherwise the last one to hold it is such a wrapper, and when
    Python frees that, gloo waits for a thread which waits for Python to release what was exchanged last: after an error
    on all ranks a training then hangs, now and then, instead of ending (pytorch/pytorch#190489).
    """
    if dist.is_available() and dist.is_initialized():
        if not _left:
            atexit.register(_let_go)
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


def _let_go() -> None:
    # While Python still runs: a thread that needs it afterwards would abort the process. The pause is for that thread.
    time.sleep(0.05)
    _left.clear()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of ``tensor`` over ranks, detached, equal on every rank; in a single process the tensor itself."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of ``tensor`` over ranks, detached. In a single process the tensor itself."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def _all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if not initialised():
        return tensor.detach()
    reduced = tensor.detach().clone()
    dist.all_reduce(reduced, op=operation)
    return reduced


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks one below the other, in the order of the ranks, detached; every rank gets the same.

    Args:
        tensor: [B_r, ...]; the number of rows may differ between ranks and be 0, the rest of the shape, the dtype and
            the kind of device may not. The numbers of rows are exchanged first, for which the host waits for the
            device.

    Returns:
        [sum of B_r, ...]; in a single process ``tensor`` itself, detached.
    """
    own = tensor.detach()
    if not initialised():
        return own
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], len(own)))
    sizes = [int(count) for count in counts]
    # Collectives want equal shapes: every rank fills up to the longest part.
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def gather_equal_rows(tensor: torch.Tensor) -> torch.Tensor:
    """:func:`gather_rows` where every rank has the same number of rows; nothing waits for the device."""
    own = tensor.detach()
    if not initialised():
        return own
    whole = own.new_empty(world_size() * len(own), *own.shape[1:])
    dist.all_gather(list(whole.chunk(world_size())), own.contiguous())
    return whole


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """:func:`gather_equal_rows` through which gradient flows back to the rank that a row came from.

    The gradient of ``tensor`` is the sum over the ranks of what each of them has for these rows, times the number of
    ranks. A loss whose gradient is spread over the ranks, as that of
    :func:`~qsd_plugin.core.sharded_cross_entropy.sharded_cross_entropy`, so reaches the parameters below with the
    gradient of one process on the whole batch, once data-parallel training has averaged it. Every rank must go back
    through it or none.
    """
    if not initialised():
        return tensor
    whole: torch.Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        ctx.rows = len(own)
        return gather_equal_rows(own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        start = rank() * ctx.rows
        return all_reduce_sum(gradient)[start : start + ctx.rows] * world_size()


def on_main(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 only and return its result (any picklable object) on every rank; also a barrier.

    A plugin error raised there is raised on every rank, so that no rank waits for one that has stopped.
    """
    if not initialised():
        return function()
    box: list[Any] = [None]
    if rank() == 0:
        try:
            box = [function()]
        except QSDPluginError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], QSDPluginError):
        raise box[0]
    result: T = box[0]
    return result
