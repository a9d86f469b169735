"""A whole training step with QSD beside the host's own step over the same images.

Both sides are the host's trainer (forward of the meta-architecture, backward, update of the host's optimizer, reading
the losses) over one synthetic batch that stays in memory; loading images is left out, since it is the same for both.
Freed memory stays with the process meanwhile, on both sides (:func:`~.paired.freed_memory_kept`).

Which side is built first decides where its buffers lie, and moved the ratio of the smallest size by 0.015. So both are
built anew and warmed up for each of :data:`ROUNDS` rounds, either side first in turn, and the pairs of all rounds are
pooled (:func:`~.paired.pooled_ratio`): 60 pairs are 4 rounds of 15.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qsd_plugin.hosts.fastreid.benchmarks.host_steps import Item, Step, build, timed, trainer_step, warmed_up
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.quality.sources import FileSource

#: Images per identity in a batch.
INSTANCES = 4
#: Largest allowed ratio to the baseline's step: pairs within the batch, and a partner per anchor.
LIMITS = {"in batch": 1.03, "partner, separate forward": 1.05, "partner, joint forward": 1.05}
#: Steps before the first timing: buffers, thread pools, and the trainer's check that parameters move.
WARM_UP = 3
#: How often both sides are built; even, so that either comes first equally often.
ROUNDS = 4

_OPTIONS: dict[str, dict[str, Any]] = {
    "in batch": {},
    "partner, separate forward": {"QSD.PAIRING": "partner", "QSD.PARTNER_FORWARD": "separate"},
    "partner, joint forward": {"QSD.PAIRING": "partner", "QSD.PARTNER_FORWARD": "joint"},
}


@dataclass(frozen=True)
class Size:
    """One training problem: ResNet depth, batch B, image height and width, device."""

    depth: int
    batch: int
    height: int
    width: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"R{self.depth} {self.height}x{self.width} B={self.batch} {self.device}"


#: The sizes that the limits are stated for.
SIZES = (Size(18, 64, 64, 32), Size(50, 16, 256, 128), Size(50, 64, 256, 128, "cuda"))


def run(chosen: Sequence[Size] = SIZES, *, pairs: int = 30, seed: int = 0, only: str = "") -> dict[str, Any]:
    """Time every kind of pairing at every size.

    Args:
        chosen: Sizes; those on a GPU are skipped where there is none.
        pairs: Interleaved pairs of steps after the warm-up, over all rounds.
        seed: Seeds images, labels and initial weights.
        only: Items whose name contains this.

    Returns:
        As :func:`~.host_steps.timed`: per size and pairing QSD over the baseline. With partners the baseline's batch is
        the 2B images of anchors and partners. One more item per size, without a limit, is the baseline itself with two
        forwards of B over one of 2B: what the separate forward costs before QSD adds anything.
    """
    items: list[Item] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in chosen:
            for pairing, limit in LIMITS.items():
                sides = partial(step_functions, size, pairing, folder, seed)
                items.append(Item(f"QSD step, {size}, {pairing}", sides, size.device, limit))
            twice = partial(two_forwards, size, folder, seed)
            items.append(Item(f"baseline step, {size}, two forwards", twice, size.device))
        return timed(items, pairs=pairs, rounds=ROUNDS, only=only)


def step_functions(
    size: Size, pairing: str, folder: Path, seed: int, baseline_first: bool = False
) -> tuple[Step, Step]:
    """One training step with QSD and one of the baseline over the same images, both warmed up.

    Args:
        size: The training problem.
        pairing: A key of :data:`LIMITS`.
        folder: For the label file.
        seed: Seeds images, labels and initial weights.
        baseline_first: Build and warm up the baseline before QSD; the order of what is returned stays.
    """
    batch, labels = _batch(size, folder, seed)

    def qsd() -> Step:
        cfg = _config(size, folder, {"MODEL.META_ARCHITECTURE": "QSD", **_OPTIONS[pairing]})
        model = build(cfg, seed)
        # As the plugin reads it from QUALITY.FILES, without the data set that it would be checked against.
        model._qsd_quality.source = FileSource([labels])
        return trainer_step(cfg, model, batch)

    def baseline() -> Step:
        cfg = _config(size, folder, {"MODEL.META_ARCHITECTURE": "Baseline"})
        images = _anchors(batch) if pairing == "in batch" else _everyone(batch)
        return trainer_step(cfg, build(cfg, seed), images)

    return warmed_up(qsd, baseline, WARM_UP, second_first=baseline_first)


def two_forwards(size: Size, folder: Path, seed: int, once_first: bool = False) -> tuple[Step, Step]:
    """One step of the baseline with a forward for anchors and one for partners, and one with all images at once."""
    batch, _ = _batch(size, folder, seed)
    cfg = _config(size, folder, {"MODEL.META_ARCHITECTURE": "Baseline"})

    def twice() -> Step:
        return trainer_step(cfg, _TwoForwards(build(cfg, seed)), batch)

    def once() -> Step:
        return trainer_step(cfg, build(cfg, seed), _everyone(batch))

    return warmed_up(twice, once, WARM_UP, second_first=once_first)


class _TwoForwards(nn.Module):
    """Sums the losses of a model on the anchors and on the partners."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        anchors = self.model(_anchors(batch))
        partners = self.model({**_anchors(batch), "images": batch["partner_images"]})
        return {name: loss + partners[name] for name, loss in anchors.items()}


def _anchors(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if not key.startswith("partner")}


def _everyone(batch: dict[str, Any]) -> dict[str, Any]:
    images = torch.cat([batch["images"], batch["partner_images"]])
    return {**_anchors(batch), "images": images, "targets": batch["targets"].repeat(2)}


def _config(size: Size, folder: Path, options: dict[str, Any]) -> Any:
    from fastreid.config import get_cfg

    values = {
        "MODEL.DEVICE": size.device,
        "MODEL.BACKBONE.DEPTH": f"{size.depth}x",
        "MODEL.BACKBONE.FEAT_DIM": 512 if size.depth < 50 else 2048,
        "MODEL.BACKBONE.LAST_STRIDE": 1,
        "MODEL.HEADS.WITH_BNNECK": True,
        "MODEL.HEADS.NUM_CLASSES": 751,
        "MODEL.LOSSES.NAME": ("CrossEntropyLoss", "TripletLoss"),
        "INPUT.SIZE_TRAIN": [size.height, size.width],
        "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
        "DATALOADER.NUM_INSTANCE": INSTANCES,
        "SOLVER.IMS_PER_BATCH": size.batch,
        "OUTPUT_DIR": str(folder),
        **options,
    }
    cfg = get_cfg()
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    return cfg


def _batch(size: Size, folder: Path, seed: int) -> tuple[dict[str, Any], Path]:
    """Anchors with partners as the loader yields them, and the label file of all their images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2 * size.batch, 3, size.height, size.width, generator=generator) * 255
    names = [f"set/{index:04d}.jpg" for index in range(2 * size.batch)]
    scores = (torch.rand(len(names), generator=generator) * 100).double().numpy()
    path = folder / "labels.npz"
    QualityLabels(scores, scores, np.zeros(len(names)), tuple(names), {"dataset": "set", "scale": "minmax"}).save(path)
    batch = {
        "images": images[: size.batch].to(size.device),
        "targets": torch.arange(size.batch // INSTANCES).repeat_interleave(INSTANCES).to(size.device),
        "camids": torch.zeros(size.batch, dtype=torch.int64),
        "img_paths": names[: size.batch],
        "partner_images": images[size.batch :].to(size.device),
        "partner_paths": names[size.batch :],
        "partner_valid": torch.ones(size.batch, dtype=torch.bool),
    }
    return batch, path
