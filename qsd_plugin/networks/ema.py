"""A network that follows another one as an exponential moving average."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qsd_plugin.core.distributed import all_reduce_sum, initialised, world_size


@torch.no_grad()
def ema_update(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """One step of ``average <- momentum * average + (1 - momentum) * network``.

    Every parameter and buffer of ``average`` is updated from the one of the same name in ``network``, which may have
    more; buffers that are not floating point (counters) are copied. Nothing waits for the device.

    Across ranks: reduces statistics. Parameters are equal on all ranks in data-parallel training, buffers such as the
    running statistics of batch normalisation are not; their mean over the ranks is taken, so the average stays equal.

    Args:
        average: The network that follows; changed in place.
        network: The network that is trained.
        momentum: In [0, 1]; 0 copies.
    """
    sources = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    buffers = dict(average.named_buffers())
    moving = {name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()}
    targets = {**dict(average.named_parameters()), **moving}
    follow = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    values = {name: sources[name].detach() for name in targets} | _over_ranks({name: sources[name] for name in moving})
    if targets:
        follow(list(targets.values()), [values[name] for name in targets], 0)
    for name in buffers.keys() - moving.keys():
        buffers[name].copy_(sources[name])


def _over_ranks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each tensor over the ranks, by one reduction."""
    if not tensors or not initialised():
        return {name: tensor.detach() for name, tensor in tensors.items()}
    joined = torch.cat([tensor.detach().flatten().float() for tensor in tensors.values()])
    mean = all_reduce_sum(joined) / world_size()
    parts = torch.split(mean, [tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
