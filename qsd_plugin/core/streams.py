"""Random numbers from explicit generators: one independent stream per (seed, purpose, epoch, rank, index)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def numpy_stream(seed: int, *path: int | str) -> np.random.Generator:
    """A NumPy generator that depends on ``seed`` and ``path`` only, never on global state or call order.

    Args:
        seed: The run's seed, >= 0.
        path: What the stream is for, e.g. ``("augment", epoch, rank, index)``; strings are hashed stably.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=_spawn_key(path)))


def torch_stream(seed: int, *path: int | str) -> torch.Generator:
    """A CPU ``torch.Generator`` seeded from ``seed`` and ``path`` like :func:`numpy_stream`."""
    import torch

    state = np.random.SeedSequence(seed, spawn_key=_spawn_key(path)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _spawn_key(path: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in path)
