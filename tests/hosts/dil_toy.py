"""Tiny DIL models inside fast-reid: a sixteenth of the width at 32x32, ResNets of one block per stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from qud_toy import build, step
from toy import toy_cfg

__all__ = ["build", "dil_cfg", "pair_batch", "step", "stored"]

ROWS, CLASSES = 4, 5


def dil_cfg(folder: Path, architecture: str = "DIL", **overrides: Any) -> Any:
    """Batches of 4 pairs, or of 2 x 4 images in stage 2; the host would have found 5 identities."""
    first = architecture == "DIL"
    options: dict[str, Any] = {
        "MODEL.META_ARCHITECTURE": architecture,
        "MODEL.HEADS.NUM_CLASSES": CLASSES,
        "DIL.WIDTH": 0.0625,
        "DIL.BLOCKS": [1, 1, 1, 1],
        "DIL.BLOCK": "basic",
        "DIL.DROPOUT": 0.5,
        "INPUT.SIZE_TRAIN": [32, 32],
        "INPUT.SIZE_TEST": [32, 32],
        "DATALOADER.SAMPLER_TRAIN": "SeededTrainingSampler" if first else "SeededIdentitySampler",
        "DATALOADER.NUM_INSTANCE": 4,
        "SOLVER.IMS_PER_BATCH": ROWS if first else 8,
        "SOLVER.OPT": "Adam",
        "SOLVER.BASE_LR": 1e-3,
        "SEED": 3,
        **overrides,
    }
    return toy_cfg(folder / "out", **options)


def pair_batch(iteration: int, rows: int = ROWS) -> dict[str, Any]:
    """A batch as the loader makes it: random pictures, and others or darker ones."""
    generator = torch.Generator().manual_seed(40 + iteration)
    better, worse = (torch.rand(rows, 3, 32, 32, generator=generator) * 255 for _ in range(2))
    return {
        "images": better,
        "worse_images": worse * 0.3,
        "targets": torch.arange(rows) % CLASSES,
        "worse_targets": (torch.arange(rows) + 2) % CLASSES,
        "dil_iteration": torch.full((rows,), iteration),
        "camids": torch.zeros(rows, dtype=torch.int64),
        "img_paths": [f"{iteration}_{row}.jpg" for row in range(rows)],
    }


def stored(model: Any, path: Path) -> str:
    """A checkpoint of ``model`` as the host writes it."""
    torch.save({"model": model.state_dict()}, path)
    return str(path)
