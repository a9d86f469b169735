"""Run a function on several CPU ranks of one gloo process group and collect what each returns."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], *args: object, world_size: int = 2) -> list[Any]:
    """What ``function(rank, *args)`` returns on each rank.

    Args:
        function: Defined at the top level of a test module, so that a spawned process can import it. Its result may
            hold tensors, numbers, strings and containers of them.
        args: Passed on; picklable.
        world_size: Number of processes.
    """
    # A file as rendezvous: no port that a parallel test run could have taken.
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, args=(function, args, world_size, folder), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(rank: int, function: Callable[..., Any], args: tuple[object, ...], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host name of a container may not resolve
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
