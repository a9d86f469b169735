"""What arcface_torch needs to run where there is no CUDA device."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

from qsd_plugin.hosts.insightface.checkout import host_module
from qsd_plugin.hosts.insightface.shims import Shim, Undo, replace, together


def no_cuda() -> bool:
    """Whether there is no CUDA device."""
    return not torch.cuda.is_available()


class _NoCuda:
    """``torch.cuda`` for the host's loader: no devices, no streams."""

    Stream = staticmethod(lambda *_: None)
    stream = staticmethod(lambda *_: contextlib.nullcontext())
    set_device = staticmethod(lambda *_: None)
    current_stream = staticmethod(lambda *_: types.SimpleNamespace(wait_stream=lambda *_: None))


class _TorchWithoutCuda(types.ModuleType):
    """torch, but for ``cuda``; for the namespace of one module."""

    cuda = _NoCuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _load_onto_the_cpu() -> Undo:
    dataset = host_module("dataset")
    # The loader's device is its local rank, a number; a data descriptor on its class keeps what is set out.
    cpu = property(lambda self: torch.device("cpu"), lambda self, value: None)
    return together([replace(dataset, torch=_TorchWithoutCuda("torch")), replace(dataset.DataLoaderX, local_rank=cpu)])


def _seed_over_the_cpu() -> Undo:
    function = host_module("utils.utils_distributed_sampler").sync_random_seed
    before = function.__defaults__
    function.__defaults__ = tuple("cpu" if value == "cuda" else value for value in before)

    def undo() -> None:
        function.__defaults__ = before

    return undo


def _gloo_for_nccl() -> Undo:
    original = torch.distributed.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        original("gloo" if backend == "nccl" else backend, *args, **kwargs)

    return replace(torch.distributed, init_process_group=init_process_group)


def _stay_on_the_cpu() -> Undo:
    def same(self: Any, *_: object, **__: object) -> Any:
        return self

    return together(
        [
            replace(torch.cuda, set_device=lambda *_: None),
            replace(torch.Tensor, cuda=same),
            replace(torch.nn.Module, cuda=same),
        ]
    )


def _parallel_on_the_cpu() -> Undo:
    original: Any = torch.nn.parallel.DistributedDataParallel

    class OnCpu(original):  # type: ignore[misc]
        """Without ``device_ids``, which are for GPUs."""

        def __init__(self, module: torch.nn.Module, device_ids: object = None, **kwargs: Any) -> None:
            super().__init__(module, **kwargs)

    return replace(torch.nn.parallel, DistributedDataParallel=OnCpu)


CPU_SHIMS: tuple[Shim, ...] = (
    Shim(
        "loader on CPU",
        "dataset.py, torch.cuda streams and devices",
        "there is no CUDA device",
        no_cuda,
        _load_onto_the_cpu,
    ),
    Shim(
        "seed on CPU",
        "utils/utils_distributed_sampler.py, device",
        "there is no CUDA device",
        no_cuda,
        _seed_over_the_cpu,
    ),
    Shim("gloo", "train_v2.py, nccl", "there is no CUDA device", no_cuda, _gloo_for_nccl),
    Shim(
        "cuda()",
        "train_v2.py and partial_fc_v2.py, .cuda()",
        "there is no CUDA device",
        no_cuda,
        _stay_on_the_cpu,
    ),
    Shim("DDP", "train_v2.py, device_ids", "there is no CUDA device", no_cuda, _parallel_on_the_cpu),
)
