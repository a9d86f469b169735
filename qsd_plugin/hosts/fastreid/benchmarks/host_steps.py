"""What benchmarks of training steps share: a step of the host's own trainer over one batch that stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch

Step = Callable[[], None]


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
