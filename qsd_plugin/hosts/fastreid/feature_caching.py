"""``QUD.TEACHER.SOURCE: cache``: when it is allowed, and the recipe's stage that makes the cache.

An image's embedding can be kept only if the student never sees the image in more than two ways: as it is, and mirrored.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qsd_plugin.core.distributed import on_main, rank, world_size
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.progress import progress
from qsd_plugin.core.stages import Stage
from qsd_plugin.data.corrupt import CorruptImages
from qsd_plugin.data.feature_cache import FEATURES, HEADER, KEYS
from qsd_plugin.data.feature_cache_writer import FeatureCacheWriter
from qsd_plugin.data.images import decoder
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.datasets import Item
from qsd_plugin.methods.qud import Teacher
from qsd_plugin.quality.keys import label_key

logger = logging.getLogger("fastreid.qsd_plugin.qud")

STAGE = "cache"

#: Augmentations of ``INPUT`` that change an image in more ways than the cache holds: all but FLIP.
OFFENDING = ("AFFINE", "AUGMIX", "AUTOAUG", "CJ", "CROP", "DEGRADE", "PADDING", "REA", "RPT")
#: What may be left of the host's training transforms without FLIP.
_PLAIN_TRANSFORMS = ("Resize", "ToTensor")


def wants_cache(cfg: Any) -> bool:
    """Whether the configured method takes its teacher's embeddings from a cache."""
    return bool(in_chain(cfg, "QUD") and cfg.QUD.TEACHER.SOURCE == "cache")


def check_cacheable(cfg: Any) -> None:
    """Refuse settings under which a cached embedding would be that of another picture than the student sees.

    Raises:
        ConfigError: Names every offending key with its value, and the choices.
    """
    offending = [f"INPUT.{name}.ENABLED True" for name in OFFENDING if cfg.INPUT[name].ENABLED]
    if in_chain(cfg, "QSD") and cfg.QSD.PAIRING == "partner":
        offending.append("QSD.PAIRING partner")
    if cfg.QGFACE.VIEWS.MODE != "none":
        offending.append(f"QGFACE.VIEWS.MODE {cfg.QGFACE.VIEWS.MODE}")
    if offending:
        raise ConfigError(
            "QUD.TEACHER.SOURCE cache, which holds the teacher's view of each image and its mirror image and no other",
            value=", ".join(offending),
            expected="no augmentation but INPUT.FLIP, and one image per sample",
            remedy="Turn these off, or let the teacher look at every image anew: QUD.TEACHER.SOURCE network or onnx.",
        )


def plain_transforms(cfg: Any) -> Any:
    """The host's training transforms without the mirroring: what an image goes through before either network.

    Raises:
        ConfigError: As :func:`check_cacheable`, also for augmentations of a host that knows more than the released one.
    """
    from fastreid.data.build import build_transforms

    check_cacheable(cfg)
    rest = cfg.clone()
    rest.defrost()
    rest.INPUT.FLIP.ENABLED = False
    transforms = build_transforms(rest, is_train=True)
    unknown = varying_steps(transforms)
    if unknown:
        raise ConfigError(
            "QUD.TEACHER.SOURCE cache with transforms of the host that may differ from one time to the next",
            value=", ".join(unknown),
            expected=" and ".join(_PLAIN_TRANSFORMS),
            remedy="Turn them off, or let the teacher look at every image anew: QUD.TEACHER.SOURCE network or onnx.",
        )
    return transforms


def varying_steps(transforms: Any) -> list[str]:
    """Names of the steps of host transforms that may change an image in another way the next time."""
    names = [type(step).__name__ for step in getattr(transforms, "transforms", [transforms])]
    return [name for name in names if name not in _PLAIN_TRANSFORMS]


def image_identity(cfg: Any) -> dict[str, str]:
    """The part of a cache's identity that a student's run can tell without the teacher: how images become pixels."""
    size = cfg.INPUT.SIZE_TRAIN
    return {"image size": "x".join(map(str, size)) + ", bicubic", "decoder": decoder()}


def image_keys(cfg: Any, items: Mapping[str, Sequence[Item]]) -> list[str]:
    """The keys of all training images, data set by data set."""
    roots = {name: datasets.dataset_folder(cfg, name) for name in items}
    return [label_key(path, root=roots[name], dataset=name) for name, part in items.items() for path, _, _ in part]


def images_digest(cfg: Any, items: Mapping[str, Sequence[Item]]) -> str:
    """SHA-256 of the keys and file sizes of all training images; identities do not matter to a teacher."""
    digest = hashlib.sha256()
    sizes = datasets.stored_sizes(path for part in items.values() for path, _, _ in part)
    for key, size in zip(image_keys(cfg, items), sizes, strict=True):
        digest.update(f"{key}\t{size}\n".encode())
    return digest.hexdigest()


def build_cache(cfg: Any, teacher: Teacher, items: Mapping[str, Sequence[Item]], folder: Path) -> None:
    """Embed all training images and their mirror images, or those that an earlier attempt has not got to.

    Each rank does its share; with several machines, those of the first one do. Images that cannot be decoded are left
    out, up to ``DATA.MAX_CORRUPT``, as training replaces them.

    Args:
        cfg: The student's config; reads ``INPUT.*``, ``QUD.CACHE.DTYPE``, ``TEST.IMS_PER_BATCH`` (images at a time),
            ``DATALOADER.NUM_WORKERS``, ``DATA.MAX_CORRUPT`` and ``MODEL.DEVICE``.
        teacher: Any teacher.
        items: Training items by data-set name.
        folder: Where to write.

    Raises:
        ConfigError: The training images are augmented by more than mirroring.
        DataError: Too many damaged images, embeddings that cannot be stored, or the folder cannot be written.
    """
    from fastreid.utils import comm

    transforms = plain_transforms(cfg)
    teacher = teacher.to(cfg.MODEL.DEVICE)
    keys = image_keys(cfg, items)
    paths = [path for part in items.values() for path, _, _ in part]
    identity = {
        "teacher weights": teacher.weights_digest(),
        "teacher preprocessing": teacher.extra_repr(),
        **image_identity(cfg),
        "images": images_digest(cfg, items),
    }
    dim = _embedding_size(cfg, teacher, transforms, paths)
    options = {"identity": identity, "dtype": cfg.QUD.CACHE.DTYPE}
    on_main(lambda: FeatureCacheWriter(folder, keys, dim, **options).finished)  # others find it made
    writer = FeatureCacheWriter(folder, keys, dim, **options)
    local_size = comm.get_local_size()
    damaged = CorruptImages(cfg.DATA.MAX_CORRUPT, folder=folder, rank=rank(), world_size=world_size())
    damaged.expect(len(paths))
    if rank() == 0:
        damaged.report(paths[row] for row in writer.left_out)
    if rank() < local_size:
        batches = _share(writer.pending, len(paths), cfg.TEST.IMS_PER_BATCH, rank(), local_size)
        for batch in _embedded(cfg, teacher, transforms, paths, batches):
            for path in damaged.report(paths[row] for row in batch.damaged):
                logger.warning("Image cannot be decoded and gets no teacher features: %s", path)
            if len(batch.rows):
                writer.write(batch.rows, batch.features)
            if len(batch.damaged):
                writer.leave_out(batch.damaged)
    comm.synchronize()

    def finish() -> None:
        damaged.report(())  # what other ranks found since
        writer.finish()

    on_main(finish)


def cache_stages(
    cfg: Any,
    make_teacher: Callable[[], Teacher],
    items: Mapping[str, Sequence[Item]],
    *,
    inputs: Sequence[Path],
) -> list[Stage]:
    """The stage ``cache`` between teacher and student; none if the teacher is asked directly, or a cache was given.

    Args:
        cfg: The student's config; ``OUTPUT_DIR`` is the recipe's root.
        make_teacher: Called when the stage runs.
        items: Training items by data-set name.
        inputs: The files with the teacher's weights, so that another teacher makes the stage stale.

    Raises:
        ConfigError: The training images are augmented by more than mirroring.
    """
    if not wants_cache(cfg):
        return []
    check_cacheable(cfg)
    if cfg.QUD.CACHE.FOLDER:
        return []
    keys = {f"QUD.TEACHER.{name}": value for name, value in cfg.QUD.TEACHER.items()}
    keys |= {"QUD.CACHE.DTYPE": cfg.QUD.CACHE.DTYPE, "KD.MODEL_CONFIG": cfg.KD.MODEL_CONFIG, **image_identity(cfg)}
    return [
        Stage(
            STAGE,
            lambda folder, resume: build_cache(cfg, make_teacher(), items, folder),
            keys=keys,
            inputs=inputs,
            data=images_digest(cfg, items),
            outputs=[HEADER, FEATURES, KEYS],
        )
    ]


class _Batch(NamedTuple):
    rows: NDArray[np.int64]
    features: NDArray[np.float32]
    damaged: NDArray[np.int64]


class _Images(torch.utils.data.Dataset[tuple[int, Tensor | None]]):
    """Images as the student sees them without mirroring, ``None`` for one that cannot be decoded."""

    def __init__(self, paths: Sequence[str], transforms: Callable[[Any], Tensor]) -> None:
        self._paths, self._transforms = paths, transforms

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor | None]:
        try:
            image = read_image(self._paths[row])
        except DataError:
            return row, None
        return row, self._transforms(image)


def _share(pending: NDArray[np.int64], total: int, size: int, number: int, count: int) -> list[list[int]]:
    """The rows that rank ``number`` of ``count`` has to embed, in batches.

    Batches are cut at the same rows in every attempt and for every number of ranks, and one that was cut off is done
    again as a whole: what a network computes for an image may depend in its last bits on how many it gets at once, and
    so the file is the same however it was made.
    """
    batches = sorted({int(batch) for batch in pending // size if batch % count == number})
    return [list(range(batch * size, min((batch + 1) * size, total))) for batch in batches]


def _embedded(
    cfg: Any, teacher: Teacher, transforms: Any, paths: Sequence[str], batches: list[list[int]]
) -> Iterator[_Batch]:
    loader: Any = torch.utils.data.DataLoader(
        _Images(paths, transforms),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS if batches else 0,
        collate_fn=_collate,
        generator=torch.Generator(),  # else starting the loader draws the workers' seed from the global stream
    )
    for rows, images, damaged in progress(loader, "Teacher features", total=len(batches)):
        features = np.empty((0, 2, 0), np.float32)
        if len(rows):
            images = images.to(cfg.MODEL.DEVICE)
            features = torch.stack([teacher(images), teacher(images.flip(3))], dim=1).cpu().numpy()
        yield _Batch(rows, features, damaged)


def _collate(samples: list[tuple[int, Tensor | None]]) -> tuple[NDArray[np.int64], Tensor, NDArray[np.int64]]:
    good = [(row, image) for row, image in samples if image is not None]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    damaged = [row for row, image in samples if image is None]
    return np.array([row for row, _ in good], np.int64), images, np.array(damaged, np.int64)


def _embedding_size(cfg: Any, teacher: Teacher, transforms: Any, paths: Sequence[str]) -> int:
    """D, from what the teacher makes of the first image that can be decoded."""
    images = (image for _, image in map(_Images(paths, transforms).__getitem__, range(len(paths))) if image is not None)
    first = next(images, None)
    if first is None:
        raise DataError("Teacher features: none of the training images can be decoded", value=paths[0])
    return int(teacher(first[None].to(cfg.MODEL.DEVICE)).shape[1])
