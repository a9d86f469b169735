"""Training batches with the teacher's embeddings from a cache: which folder, which row, and the flip that chooses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd_plugin.core.distributed import rank
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.feature_cache import HEADER, FeatureCache
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.datasets import Item
from qsd_plugin.hosts.fastreid.feature_caching import STAGE, check_cacheable, image_identity
from qsd_plugin.hosts.fastreid.pair_views import PairViews
from qsd_plugin.quality.keys import label_key

logger = logging.getLogger("fastreid.qsd_plugin.qud")


class CachedFeatures:
    """The teacher's embeddings of the training items, for any loader worker.

    Args:
        cache: The open cache.
        rows: The row of each training item, [N].
    """

    def __init__(self, cache: FeatureCache, rows: NDArray[np.int64]) -> None:
        self.cache = cache
        self.rows = rows

    def of(self, item: int, *, mirrored: bool) -> dict[str, torch.Tensor]:
        """The sample's entry ``teacher_features`` [D], float16 or float32 as stored, not normalised.

        Raises:
            DataError: The image has none; see :meth:`FeatureCache.read`.
        """
        return {"teacher_features": torch.from_numpy(self.cache.read(int(self.rows[item]), mirrored=mirrored))}


def features_folder(cfg: Any) -> Path:
    """Where the cache of a run lies: ``QUD.CACHE.FOLDER``, or where the recipe makes it."""
    return Path(cfg.QUD.CACHE.FOLDER or Path(cfg.OUTPUT_DIR, STAGE)).expanduser()


def open_cache(cfg: Any, *, dim: int | None = None) -> FeatureCache:
    """The cache that ``cfg`` names, checked against what ``cfg`` makes of images.

    Args:
        cfg: The student's config.
        dim: Embedding size that is needed; ``None`` takes any.

    Raises:
        DataError: It is missing, unfinished, damaged, of another embedding size, image size or decoder.
    """
    folder = features_folder(cfg)
    if not (folder / HEADER).is_file():
        raise DataError(
            "Teacher features",
            value=str(folder),
            expected=f"a folder with a finished cache ({HEADER}), because QUD.TEACHER.SOURCE is cache",
            remedy="Make it, or finish it, with: python tools/train_net.py --config-file CONFIG --stage "
            f"{STAGE}, or name yours in QUD.CACHE.FOLDER.",
        )
    cache = FeatureCache(folder, dim=dim)
    cache.require(image_identity(cfg))
    return cache


def cached_features(
    cfg: Any, items: Sequence[Item], sets: Sequence[int], *, partners: bool = False, own_transforms: bool = False
) -> CachedFeatures:
    """The cached embeddings of the training items.

    Args:
        cfg: The student's config.
        items: Training items in the order of the training set.
        sets: Index of each item's data set in ``DATASETS.NAMES``.
        partners: Whether samples hold a second image.
        own_transforms: Whether a script passes transforms of its own to the loader.

    Raises:
        ConfigError: The student would see more than an image and its mirror image.
        DataError: See :func:`open_cache`; or a training image is not in the cache.
    """
    check_cacheable(cfg)
    if partners or own_transforms:
        raise ConfigError(
            "QUD.TEACHER.SOURCE cache",
            value=f"build_reid_train_loader with {'partner images' if partners else 'transforms'} of the caller's",
            expected="the transforms of INPUT.* without any but FLIP, and one image per sample",
            remedy="Leave the argument out, or use QUD.TEACHER.SOURCE network or onnx.",
        )
    cache = open_cache(cfg, dim=cfg.QUD.TEACHER.get("DIM", 0) or None)
    names = cfg.DATASETS.NAMES
    roots = [datasets.dataset_folder(cfg, name) for name in names]
    keys = [
        label_key(path, root=roots[which], dataset=names[which])
        for (path, _, _), which in zip(items, sets, strict=True)
    ]
    rows = cache.rows(keys)
    if rank() == 0:
        teacher = cache.identity.get("teacher weights", "unknown")
        logger.info("Teacher features: %d images from %s, teacher %.12s", len(items), cache.folder, teacher)
    return CachedFeatures(cache, rows)


def drawn_flips(cfg: Any, views: PairViews | None) -> PairViews:
    """``views`` with flips drawn by the plugin, which must know of each, in place of the host's transforms.

    Images that QSD pairs are mirrored together as ``views`` says; else each draw of an image has a flip of its own.
    """
    views = views or PairViews(seed=max(cfg.SEED, 0), rank=rank())
    if views.flip is not None or not cfg.INPUT.FLIP.ENABLED:
        return views
    return dataclasses.replace(views, flip=cfg.INPUT.FLIP.PROB, batch=0)
