"""Data loaders: on the CPU (S04), without hanging on an error (S05), with as many test workers as configured (S24)."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together

_HOST_TEST_WORKERS = 4  # what the host uses whatever the config says; more workers than that were never asked for


def no_cuda() -> bool:
    """Whether this machine has no usable CUDA device."""
    import torch

    return not torch.cuda.is_available()


def _load_on_cpu() -> Undo:
    import fastreid.data.build
    import fastreid.data.data_utils
    from torch.utils.data import DataLoader

    class DataLoaderX(DataLoader[Any]):
        """The host's loader without prefetch thread, CUDA stream and pinned memory; same name and signature."""

        def __init__(self, local_rank: int, **kwargs: Any) -> None:
            super().__init__(**{**kwargs, "pin_memory": False})

    owners = (fastreid.data.data_utils, fastreid.data.build)
    return together(*(replace(owner, "DataLoaderX", DataLoaderX) for owner in owners))


class _Failure:
    """An exception of the prefetch thread on its way to the thread that consumes the batches."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _forward_prefetch_errors() -> Undo:
    import torch
    from fastreid.data.data_utils import BackgroundGenerator

    def run(self: Any) -> None:
        try:
            torch.cuda.set_device(self.local_rank)
            for item in self.generator:
                if self.exit_event.is_set():
                    break
                self.queue.put(item)
        except BaseException as error:
            self.queue.put(_Failure(error))
        else:
            self.queue.put(None)

    def next_item(self: Any) -> Any:
        item = self.queue.get()
        if item is None or isinstance(item, _Failure):
            self.queue.put(item)  # the thread has ended: whoever asks again must get the same answer, not wait
            if item is None:
                raise StopIteration
            raise item.error
        return item

    return together(replace(BackgroundGenerator, "run", run), replace(BackgroundGenerator, "next", next_item))


def _configure_test_workers() -> Undo:
    import fastreid.data
    import fastreid.data.build
    import fastreid.engine.defaults
    from yacs.config import CfgNode

    host_build: Callable[..., Any] = fastreid.data.build.build_reid_test_loader

    @functools.wraps(host_build)
    def build_reid_test_loader(*args: Any, **kwargs: Any) -> Any:
        cfg = args[0] if args else kwargs.get("cfg")
        if not isinstance(cfg, CfgNode):
            return host_build(*args, **kwargs)
        # The host reads the config into arguments, but has no key for this one.
        arguments = fastreid.data.build._test_loader_from_config(*args, **kwargs)
        return host_build(**{"num_workers": test_workers(cfg.DATALOADER.NUM_WORKERS), **arguments})

    owners = (fastreid.data.build, fastreid.data, fastreid.engine.defaults)
    return together(*(replace(owner, "build_reid_test_loader", build_reid_test_loader) for owner in owners))


def test_workers(configured: int) -> int:
    """Worker processes of a test loader.

    Args:
        configured: ``DATALOADER.NUM_WORKERS``; 0 loads in the main process.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(configured, _HOST_TEST_WORKERS, available)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S04",
        where="data/data_utils.py:127,151,182,190",
        symptom="'Found no NVIDIA driver on your system' when a data loader is built on a machine without CUDA.",
        action="Without CUDA a plain DataLoader stands behind DataLoaderX: no CUDA stream, no pinned memory.",
        needed=no_cuda,
        apply=_load_on_cpu,
        proof="test_s04_loaders_work_on_the_cpu_and_can_be_iterated_twice",
    ),
    Patch(
        row="S05",
        where="data/data_utils.py:126-142",
        symptom="With CUDA any error in a data loader ends the prefetch thread: training hangs for ever, silently.",
        action="The prefetch thread hands its exception to the consumer, which raises it.",
        needed=always,
        apply=_forward_prefetch_errors,
        proof="test_s05_an_error_in_the_prefetch_thread_reaches_the_consumer",
    ),
    Patch(
        row="S24",
        where="data/build.py:124",
        symptom="Test loaders always start 4 workers; no config key changes that.",
        action="Test loaders follow DATALOADER.NUM_WORKERS, up to the host's 4 and the number of CPU cores.",
        needed=always,
        apply=_configure_test_workers,
        proof="test_s24_test_workers_follow_the_config",
    ),
)
