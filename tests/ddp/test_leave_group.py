"""Leaving a process group: nothing that is freed afterwards is the last to hold it, and so waits for gloo's threads."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qsd_plugin.core import distributed


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> weakref.ref[Any]:
    """A group of one that has exchanged nothing, which its end could wait for."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    return weakref.ref(dist.group.WORLD)


def test_the_group_outlives_leaving_it_until_the_process_exits(
    group: weakref.ref[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)
    distributed.leave_group()
    assert not dist.is_initialized()
    distributed.leave_group()  # there is none any more: does nothing
    gc.collect()
    assert group() is not None
    (let_go,) = at_exit
    let_go()
    gc.collect()
    assert group() is None


def test_by_torch_alone_the_group_ends_with_the_last_reference(group: weakref.ref[Any]) -> None:
    """The control: that reference can be a data-parallel wrapper's."""
    dist.destroy_process_group()
    gc.collect()
    assert group() is None
