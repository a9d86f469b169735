"""Leaving a process group: nothing that is freed afterwards is the last to hold it, and so waits for gloo's threads."""

from __future__ import annotations

import gc
import os
import sys

import pytest
import torch.distributed as dist
from gloo import run_ranks

from qsd_plugin.core.distributed import leave_group


def threads_around(rank: int, kept: bool) -> list[int]:
    """Threads of this process in a group that exchanged nothing for the control to wait for, and after leaving it."""
    before = len(os.listdir("/proc/self/task"))
    if kept:
        leave_group()
    else:
        dist.destroy_process_group()
    assert not dist.is_initialized()
    leave_group()  # there is none any more: does nothing
    gc.collect()
    return [before, len(os.listdir("/proc/self/task"))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_the_group_outlives_whatever_is_freed_after_leaving_it() -> None:
    for before, after in run_ranks(threads_around, True):
        assert after == before
    # The control: by torch alone the group ends where the last reference to it is dropped, and joins its threads there.
    for before, after in run_ranks(threads_around, False):
        assert after < before
