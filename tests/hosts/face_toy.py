"""Small face test sets in the released layouts, a network without weights, and the host's evaluation of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from toy import toy_cfg

from qsd_plugin.data.align import template
from qsd_plugin.data.synthetic import SyntheticFaces
from qsd_plugin.evaluation.arrays import Array

#: ``DATA.FACES`` of a set of built-in faces that is made in seconds, and its specification.
TINY_FACES = {
    "NUM_TRAIN_IDENTITIES": 8,
    "NUM_TEST_IDENTITIES": 16,
    "NUM_DISTRACTORS": 4,
    "IMAGES_PER_IDENTITY": 4,
    "NUM_PAIRS": 100,
    "SIZE": 48,
}
SPEC = SyntheticFaces(**{key.lower(): value for key, value in TINY_FACES.items()})

SIZE = 16
IJB_SIZE = 112


#: Size of the small networks of :func:`small_options`, as their functions take it.
SMALL: dict[str, Any] = {"embedding_dim": 24, "width": 1 / 16, "input_size": 48}
BASE_FACE = Path(__file__).parents[2] / "configs" / "Base-Face.yml"


def small_options(backbone: str, depth: str) -> dict[str, Any]:
    """Config values of a face network of :data:`SMALL`'s size on the CPU."""
    pixels = [SMALL["input_size"]] * 2
    return {
        "MODEL.BACKBONE.NAME": backbone,
        "MODEL.BACKBONE.DEPTH": depth,
        "MODEL.BACKBONE.WIDTH": SMALL["width"],
        "MODEL.BACKBONE.FEAT_DIM": SMALL["embedding_dim"],
        "MODEL.DEVICE": "cpu",
        "INPUT.SIZE_TRAIN": pixels,
        "INPUT.SIZE_TEST": pixels,
    }


def base_face_cfg(options: dict[str, Any]) -> Any:
    """configs/Base-Face.yml for five people, with ``options``."""
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(BASE_FACE))
    values = {"MODEL.HEADS.NUM_CLASSES": 5, **options}
    cfg.merge_from_list([item for pair in values.items() for item in pair])
    return cfg


class Pooled(torch.nn.Module):
    """Embeds an image as 4 x 4 mean colours, around the middle grey; a mirror image has another embedding."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(batch["images"] - 127.5, 4).flatten(1)


def face(identity: int, seed: int, size: int = SIZE) -> Image.Image:
    shape = (size // 4, size // 4, 3)
    look = np.random.default_rng(identity).integers(0, 256, shape)
    noisy = look + np.random.default_rng(seed + 1000).normal(0, 90, shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)


def embed(images: list[Image.Image], *, flip: bool) -> Array:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float().permute(0, 3, 1, 2)
    model = Pooled()
    return (model({"images": pixels}) + (model({"images": pixels.flip(3)}) if flip else 0)).numpy()


def write(folder: Path, names: list[str], identities: list[int], size: int = SIZE) -> list[Image.Image]:
    folder.mkdir(parents=True)
    images = [face(identity, seed, size) for seed, identity in enumerate(identities)]
    for name, image in zip(names, images, strict=True):
        image.save(folder / name)
    return images


def evaluate(folder: Path, name: str, **options: Any) -> dict[str, float]:
    from fastreid.engine import DefaultTrainer

    size = options.pop("size", SIZE)
    cfg = toy_cfg(folder / "out", **{"DATASETS.TESTS": (name,), "INPUT.SIZE_TEST": [size, size], **options})
    results = DefaultTrainer.test(cfg, Pooled())
    return dict(results)


class ToyIjb(NamedTuple):
    """What :func:`write_ijb` wrote."""

    images: list[Image.Image]
    points: Array
    detected: Array
    templates: Array
    medias: Array
    pairs: Array
    genuine: Array


def write_ijb(root: Path, kind: str = "ijbb") -> ToyIjb:
    """Forty loose crops of six people in two templates each."""
    random = np.random.default_rng(5)
    names = [f"{number}.png" for number in range(40)]
    identities = random.integers(0, 6, 40)
    templates = identities * 2 + random.integers(0, 2, 40)
    medias, detected = random.integers(0, 3, 40), random.random(40)
    images = write(root / "loose_crop", names, identities.tolist(), IJB_SIZE)
    points = template(IJB_SIZE) + random.normal(0, 4, (40, 5, 2)).round(3)
    known = np.unique(templates)
    pairs = np.array([(a, b) for a in known for b in known if a < b])
    genuine = pairs[:, 0] // 2 == pairs[:, 1] // 2
    meta = root / "meta"
    meta.mkdir()
    landmarks = [" ".join(map(str, (n, *p.ravel(), d))) for n, p, d in zip(names, points, detected, strict=True)]
    (meta / f"{kind}_name_5pts_score.txt").write_text("\n".join(landmarks))
    owners = zip(names, templates, medias, strict=True)
    (meta / f"{kind}_face_tid_mid.txt").write_text("\n".join(" ".join(map(str, row)) for row in owners))
    np.savetxt(meta / f"{kind}_template_pair_label.txt", np.column_stack((pairs, genuine)), fmt="%d")
    return ToyIjb(images, points, detected, templates, medias, pairs, genuine)


def tiny_faces_keys(cache: Path) -> dict[str, Any]:
    """Config keys of :data:`TINY_FACES`, kept in ``cache``."""
    return {"DATA.CACHE": str(cache), **{f"DATA.FACES.{key}": value for key, value in TINY_FACES.items()}}
