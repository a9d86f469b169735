"""What benchmarks of training steps share: a step of the host's own trainer over one batch that stays in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, NamedTuple

import torch

from qsd_plugin.report.benchmarks.paired import freed_memory_kept, pooled_ratio

Step = Callable[[], None]


class Item(NamedTuple):
    """Two steps to compare: builds both, told whether the second comes first; on a GPU they may be skipped."""

    name: str
    sides: Callable[[bool], tuple[Step, Step]]
    device: str
    limit: float | None = None


def timed(items: Iterable[Item], *, pairs: int, rounds: int, only: str) -> dict[str, Any]:
    """Time items whose name contains ``only``, over ``pairs`` interleaved pairs in so many rounds.

    Returns:
        ``threads``, ``load`` (one-minute average at the start), ``freed_memory_kept``, ``rounds`` and ``items``: what
        :func:`pooled_ratio` gives, first side over second, and ``limit`` where there is one.
    """
    load = os.getloadavg()[0]
    found: dict[str, dict[str, Any]] = {}
    with freed_memory_kept() as kept:
        for name, sides, device, limit in items:
            if only not in name:
                continue
            if device == "cuda" and not torch.cuda.is_available():
                found[name] = {"skipped": "not shown, no GPU"}
                continue
            found[name] = pooled_ratio(sides, pairs, rounds=rounds) | ({} if limit is None else {"limit": limit})
    return {
        "threads": torch.get_num_threads(),
        "load": load,
        "freed_memory_kept": kept,
        "rounds": rounds,
        "items": found,
    }


def build(cfg: Any, seed: int) -> Any:
    """The model that ``cfg`` names, on its device, with initial weights by ``seed``."""
    from fastreid.modeling.meta_arch import build_model

    torch.manual_seed(seed)
    return build_model(cfg)


def trainer_step(cfg: Any, model: Any, batch: dict[str, Any]) -> Step:
    """One step of the host's trainer on ``batch``, with the optimizer of ``cfg``, until the device has finished it."""
    from fastreid.engine.train_loop import SimpleTrainer
    from fastreid.solver import build_optimizer
    from fastreid.utils.events import EventStorage

    optimizer, parameters = build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, repeat(batch), optimizer, parameters)
    trainer.iter = 0

    def step() -> None:
        with EventStorage(0):
            trainer.run_step()
        if cfg.MODEL.DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def warmed_up(
    first: Callable[[], Step], second: Callable[[], Step], steps: int, *, second_first: bool
) -> tuple[Step, Step]:
    """Both steps, built one after the other and then warmed up in the same order."""
    built = {make: make() for make in ((second, first) if second_first else (first, second))}
    for _ in range(steps):
        for step in built.values():
            step()
    return built[first], built[second]
