"""Random numbers from explicit generators: one independent stream per (seed, purpose, epoch, rank, index)."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def seeded_globals(seed: int, *path: int | str) -> Iterator[None]:
    """For code of others that draws from the global generators of Python, NumPy and torch (CPU).

    Inside, they start from ``seed`` and ``path`` like :func:`numpy_stream`; afterwards they go on as if nothing had
    been drawn.
    """
    import torch

    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    sequence = np.random.SeedSequence(seed, spawn_key=_spawn_key(path))
    for_python, for_numpy, for_torch = sequence.generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002
    torch.default_generator.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


def _spawn_key(path: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in path)
