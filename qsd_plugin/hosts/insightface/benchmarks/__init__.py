"""Speed of the plugin in InsightFace: each module of :data:`PARTS` measures items of one kind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qsd_plugin.hosts.insightface.benchmarks import exports, steps

#: From the checkout (if one is given), ``pairs`` and ``only`` (text in an item's name) to items by name.
PARTS: tuple[Callable[..., dict[str, dict[str, Any]]], ...] = (steps.run, exports.run)


def run(host_root: Path | None, *, pairs: int = 30, only: str = "") -> dict[str, Any]:
    """Measure everything.

    Args:
        host_root: An arcface_torch checkout; without one its items are skipped.
        pairs: Interleaved pairs per item.
        only: Items whose name contains this.

    Returns:
        ``threads``, ``load`` (one-minute average at the start) and ``items``.

    Raises:
        HostError: The checkout is none, or its trainer stopped.
    """
    load = os.getloadavg()[0]
    items: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        items |= part(host_root, pairs=pairs, only=only)
    return {"threads": torch.get_num_threads(), "load": load, "items": items}
