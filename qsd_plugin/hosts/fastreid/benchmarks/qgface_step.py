"""A whole training step of QGFace on N images in two views beside a baseline's step over the same 2 N images.

Both sides are the host's trainer over one synthetic batch that stays in memory, as for QSD (:mod:`.qsd_step`): making
the views is the loader's work and left out. The baselines are the host's ArcFace and AdaFace on the same network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsd_plugin.hosts.fastreid.benchmarks.host_steps import Item, Step, build, timed, trainer_step, warmed_up

#: Largest allowed ratio to the step of each baseline; AdaFace is the one whose head QGFace has, ArcFace the host's own.
LIMITS = {"AdaFace": 1.05, "ArcFace": 1.05}
#: Steps before the first timing; the second one fills what the first has allocated.
WARM_UP = 2
#: How often both sides are built; even, so that either comes first equally often.
ROUNDS = 2

_HEADS: dict[str, dict[str, Any]] = {
    "AdaFace": {"MODEL.HEADS.NAME": "AdaFaceHead"},
    "ArcFace": {"MODEL.HEADS.NAME": "EmbeddingHead"},
}


@dataclass(frozen=True)
class Size:
    """One training problem: depth and width of IR, N images, pixels per side, queue, classes, device."""

    depth: int
    width: float
    batch: int
    pixels: int
    queue: int = 8192
    classes: int = 9131
    device: str = "cpu"

    def __str__(self) -> str:
        network = f"IR-{self.depth} x{self.width:g} {self.pixels}x{self.pixels}"
        return f"{network}, {self.batch} images, queue {self.queue} x 512, {self.device}"


#: Batch and queue are those that the limit is stated for. A smaller network makes it harder to keep.
SIZES = (Size(18, 0.25, 256, 48), Size(34, 1.0, 256, 112, device="cuda"))


def run(chosen: Sequence[Size] = SIZES, *, pairs: int = 30, seed: int = 0, only: str = "") -> dict[str, Any]:
    """Time QGFace beside both baselines at every size.

    Args:
        chosen: Sizes; those on a GPU are skipped where there is none.
        pairs: Interleaved pairs of steps after the warm-up, over all rounds.
        seed: Seeds images, labels and initial weights.
        only: Items whose name contains this.

    Returns:
        As :func:`~.host_steps.timed`, QGFace over the baseline.
    """
    with tempfile.TemporaryDirectory() as folder:
        items = [
            Item(
                f"QGFace step over {baseline}, {size}",
                partial(step_functions, size, baseline, Path(folder), seed),
                size.device,
                limit,
            )
            for size in chosen
            for baseline, limit in LIMITS.items()
        ]
        return timed(items, pairs=pairs, rounds=ROUNDS, only=only)


def step_functions(
    size: Size, baseline: str, folder: Path, seed: int, baseline_first: bool = False
) -> tuple[Step, Step]:
    """One training step of QGFace and one of the baseline over the same images, both warmed up.

    Args:
        size: The training problem.
        baseline: A key of :data:`LIMITS`.
        folder: ``OUTPUT_DIR``; nothing is written.
        seed: Seeds images, labels and initial weights.
        baseline_first: Build and warm up the baseline before QGFace; the order of what is returned stays.
    """
    generator = torch.Generator().manual_seed(seed)
    clean, degraded = (
        (torch.rand(size.batch, 3, size.pixels, size.pixels, generator=generator) * 255).to(size.device)
        for _ in range(2)
    )
    targets = torch.randint(size.classes, (size.batch,), generator=generator).to(size.device)
    common = {"camids": torch.zeros(size.batch, dtype=torch.int64)}

    def qgface() -> Step:
        cfg = _config(size, folder, {})
        return trainer_step(
            cfg,
            build(cfg, seed),
            {**common, "images": clean, "degraded_images": degraded, "targets": targets},
        )

    def other() -> Step:
        options = {"MODEL.META_ARCHITECTURE": "Baseline", "QGFACE.VIEWS.MODE": "none", **_HEADS[baseline]}
        cfg = _config(size, folder, options)
        images = torch.cat([clean, degraded])
        return trainer_step(cfg, build(cfg, seed), {**common, "images": images, "targets": targets.repeat(2)})

    return warmed_up(qgface, other, WARM_UP, second_first=baseline_first)


def _config(size: Size, folder: Path, options: dict[str, Any]) -> Any:
    from fastreid.config import get_cfg

    from qsd_plugin.model_zoo import get_config_file

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file("QGFace/vggface2_r34.yml"))
    values = {
        "MODEL.DEVICE": size.device,
        "MODEL.BACKBONE.DEPTH": f"{size.depth}x",
        "MODEL.BACKBONE.WIDTH": size.width,
        "MODEL.HEADS.NUM_CLASSES": size.classes,
        "INPUT.SIZE_TRAIN": [size.pixels, size.pixels],
        "INPUT.SIZE_TEST": [size.pixels, size.pixels],
        "QGFACE.THRESHOLD": 0.4,  # so that the contrast has pairs from the first steps
        "QGFACE.CONTRAST.QUEUE_SIZE": size.queue,
        "SOLVER.IMS_PER_BATCH": size.batch,
        "OUTPUT_DIR": str(folder),
        **options,
    }
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    return cfg
