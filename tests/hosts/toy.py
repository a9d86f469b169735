"""A person data set and a config small enough to train through the host inside a test."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_CAMERAS = 3


def write_market(
    root: Path,
    num_ids: int = 8,
    per_id: int = 8,
    *,
    test_ids: int = 4,
    test_per_id: int = 4,
    size: tuple[int, int] = (64, 32),
    seed: int = 0,
) -> Path:
    """Write JPEGs in Market-1501's layout below ``root`` and return ``root`` (the host's ``FASTREID_DATASETS``).

    An identity is a pair of clothes colours, so a small network can learn it. Training identities are ``1 .. num_ids``,
    test identities follow; each of those has one query image (camera 1) and ``test_per_id - 1`` gallery images from the
    other cameras.
    """
    generator = np.random.default_rng(seed)
    base = root / "Market-1501-v15.09.15"
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for pid in range(1, num_ids + test_ids + 1):
        clothes = generator.integers(0, 256, size=(2, 3))
        train = pid <= num_ids
        for index in range(per_id if train else test_per_id):
            if train:
                folder, camera = "bounding_box_train", 1 + index % _CAMERAS
            elif index == 0:
                folder, camera = "query", 1
            else:
                folder, camera = "bounding_box_test", 2 + index % (_CAMERAS - 1)
            path = base / folder / f"{pid:04d}_c{camera}s1_{index:06d}_00.jpg"
            _person(clothes, camera, size, generator).save(path, quality=95)
    return root


def toy_config(output_dir: Path, **overrides: Any) -> list[Any]:
    """``KEY VALUE`` options for ``cfg.merge_from_list``: ResNet-18 at 64x32 on the CPU, one epoch, batches of 16.

    Overrides are spelled as in a config: ``toy_config(out, **{"SOLVER.MAX_EPOCH": 2})``.
    """
    options: dict[str, Any] = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.BACKBONE.DEPTH": "18x",
        "MODEL.BACKBONE.FEAT_DIM": 512,
        "MODEL.HEADS.WITH_BNNECK": True,
        "INPUT.SIZE_TRAIN": [64, 32],
        "INPUT.SIZE_TEST": [64, 32],
        "DATASETS.NAMES": ("Market1501",),
        "DATASETS.TESTS": ("Market1501",),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.MAX_EPOCH": 1,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "TEST.EVAL_PERIOD": 1,
        "TEST.IMS_PER_BATCH": 16,
        "OUTPUT_DIR": str(output_dir),
    }
    options.update(overrides)
    return [item for option in options.items() for item in option]


def toy_cfg(output_dir: Path, **overrides: Any) -> Any:
    """The host's config node with :func:`toy_config` merged; the host must be activated."""
    from fastreid.config import get_cfg

    output_dir.mkdir(parents=True, exist_ok=True)
    cfg = get_cfg()
    cfg.merge_from_list(toy_config(output_dir, **overrides))
    return cfg


def use_market(monkeypatch: Any, root: Path) -> None:
    """Make ``root`` the host's data folder in this process; the host reads the variable once, when it is imported."""
    import fastreid.data.build as build

    monkeypatch.setenv("FASTREID_DATASETS", str(root))
    monkeypatch.setattr(build, "_root", str(root))


def _person(clothes: np.ndarray, camera: int, size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    height, width = size
    image = np.full((height, width, 3), 40 * camera, dtype=np.float64)
    left, right = width // 4, width - width // 4
    image[height // 8 : height // 2, left:right] = clothes[0]
    image[height // 2 :, left:right] = clothes[1]
    image += generator.normal(0.0, 12.0, size=image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


#: What stages take from the command line, without one.
ARGUMENTS = argparse.Namespace(config_file="", eval_only=False, opts=[])


def run_recipe_of(cfg: Any) -> list[str]:
    """Run the recipe that ``cfg`` names below its ``OUTPUT_DIR``; what it announced."""
    from qsd_plugin.core.stages import run_recipe
    from qsd_plugin.hosts.fastreid import recipes

    said: list[str] = []
    run_recipe(recipes.build_recipe(cfg, ARGUMENTS), Path(cfg.OUTPUT_DIR), announce=said.append)
    return said
