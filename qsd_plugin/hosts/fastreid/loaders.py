"""fast-reid's loaders with the plugin's data sets behind them: sorted, RGB, safe from damaged files, with partners.

The host's builders are called with ``train_set=`` or ``test_set=``, so samplers, batches and devices stay the host's;
on sound RGB images a batch is the host's bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastreid.data import build
from fastreid.data.common import CommDataset
from PIL import ImageOps
from torch.utils.data import Sampler

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.corrupt import CorruptImages
from qsd_plugin.data.items import single_image_identities
from qsd_plugin.data.samplers import SeededIdentitySampler, SeededTrainingSampler, StepSampler
from qsd_plugin.hosts.fastreid.cached_features import CachedFeatures, cached_features, drawn_flips
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace, together
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.datasets import Item, test_set, training_set
from qsd_plugin.hosts.fastreid.dil_pairs import OWN, PairDraws, pair_sample, pair_transforms, refuse_own, wants_pairs
from qsd_plugin.hosts.fastreid.feature_caching import plain_transforms, varying_steps, wants_cache
from qsd_plugin.hosts.fastreid.folds import training_part
from qsd_plugin.hosts.fastreid.pair_views import PairViews, host_transforms_config, pair_views, refuse_own_transforms
from qsd_plugin.hosts.fastreid.samplers import build_sampler, names_explained
from qsd_plugin.hosts.fastreid.training_degradation import (
    TrainingDegradation,
    refuse_foreign,
    training_degradation,
)
from qsd_plugin.hosts.fastreid.training_views import TrainingViews, training_views, without_flip
from qsd_plugin.hosts.fastreid.watched_loader import CORRUPT, WatchedLoader

logger = logging.getLogger("fastreid.qsd_plugin.data")

_records: dict[str, CorruptImages] = {}


def install() -> Undo:
    """Put the plugin's loaders behind the host's names."""
    from fastreid import data
    from fastreid.engine import defaults

    train = _train_loader_builder(build.build_reid_train_loader)
    test = _test_loader_builder(build.build_reid_test_loader)
    return together(
        *(replace(module, "build_reid_train_loader", train) for module in (data, build, defaults)),
        *(replace(module, "build_reid_test_loader", test) for module in (data, build, defaults)),
    )


def corrupt_images(cfg: Any) -> CorruptImages:
    """The record of the run's damaged training images; its ``summary()`` is for the end of training."""
    key = os.path.abspath(cfg.OUTPUT_DIR) if cfg.OUTPUT_DIR else ""
    if key not in _records:
        folder = Path(key) if key else None
        _records[key] = CorruptImages(cfg.DATA.MAX_CORRUPT, folder=folder, rank=rank(), world_size=world_size())
    return _records[key]


def wants_partners(cfg: Any) -> bool:
    """Whether the configured method trains on pairs made by the loader."""
    return bool(in_chain(cfg, "QSD") and cfg.QSD.PAIRING == "partner")


class TrainSet(CommDataset):  # type: ignore[misc]
    """The host's training set, in which a damaged image is replaced by another one of its identity.

    With partners every sample also holds another image of the identity, drawn uniformly over all of them: the keys
    ``partner_images``, ``partner_paths`` and ``partner_valid``, the last one false where the identity has no other
    image and the partner is the image itself, augmented anew. Draws depend on (seed, rank, number of the draw) only.

    Args:
        items: Host items (path, identity, camera).
        transform: From PIL image to tensor.
        seed: Of partners and replacements, >= 0.
        partners: Whether to add partners.
        views: Flips and erasing that pairs decide; then a sample may also hold ``erase_boxes`` [4] and, with partners,
            ``partner_erase_boxes``.
        features: The teacher's embeddings of ``items``; then a sample also holds ``teacher_features`` [D], those of the
            image as it is shown. ``views`` must draw the flips then, and not ``transform``.
        training_views: Makes two views of an image, or one: then ``images`` is the clean view and a sample also holds
            ``degraded_images``, or ``images`` is the only view.
        degradation: What images go through first.
        pairs: Makes the pairs of DIL's stage 1: then ``images`` and ``targets`` are the better image's, and a sample
            also holds ``worse_images``, ``worse_targets`` and ``dil_iteration``. Nothing else of the above then.
    """

    def __init__(
        self,
        items: Sequence[Item],
        transform: Callable[[Any], Any],
        *,
        seed: int,
        partners: bool = False,
        views: PairViews | None = None,
        features: CachedFeatures | None = None,
        training_views: TrainingViews | None = None,
        degradation: TrainingDegradation | None = None,
        pairs: PairDraws | None = None,
    ) -> None:
        super().__init__(items, transform, relabel=True)
        self._pairs = pairs
        self._seed, self._partners, self._rank = seed, partners, rank()
        self._views = views or PairViews(seed, self._rank)
        self._features, self._training_views, self._degradation = features, training_views, degradation
        self._members: defaultdict[Any, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            self._members[item[1]].append(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        damaged: list[str] = []
        draw = getattr(index, "draw", 0)
        if self._pairs is not None:
            made, shown = pair_sample(
                self._pairs, int(index), draw, lambda which: self._read(which, damaged), self.transform, self._label
            )
        else:
            image, shown = self._read(int(index), damaged)
            made = self._shown(image, shown, draw, "")
        path, identity, camera = self.img_items[shown]
        sample = {
            **made,
            "targets": self.pid_dict[identity],
            "camids": self.cam_dict[camera],
            "img_paths": path,
        }
        if self._partners:
            sample |= self._partner(shown, draw, damaged)
        sample[CORRUPT] = "\n".join(damaged)
        return sample

    def _label(self, index: int) -> int:
        return int(self.pid_dict[self.img_items[index][1]])

    def _partner(self, anchor: int, draw: int, damaged: list[str]) -> dict[str, Any]:
        others = [index for index in self._members[self.img_items[anchor][1]] if index != anchor]
        partner = anchor
        if others:
            stream = numpy_stream(self._seed, "partner", self._rank, draw)
            partner = others[int(stream.integers(len(others)))]
        image, shown = self._read(partner, damaged, instead=anchor)
        return {
            **self._shown(image, shown, draw, "partner_"),
            "partner_paths": self.img_items[shown][0],
            "partner_valid": shown != anchor,
        }

    def _shown(self, image: Any, shown: int, draw: int, prefix: str) -> dict[str, Any]:
        """All views of an image."""
        if self._degradation is not None:
            image = self._degradation(image, draw, prefix)
        if self._training_views is None:
            return self._view(image, shown, draw, prefix)
        sample: dict[str, Any] = {}
        for own, view in self._training_views.of(image, draw, prefix).items():
            sample |= self._view(view, shown, draw, own)
        return sample

    def _view(self, image: Any, shown: int, draw: int, prefix: str) -> dict[str, Any]:
        """The augmented image, where erasing is left to the training step its box, and the teacher's embedding."""
        mirrored = self._views.mirrors(draw, self.pid_dict[self.img_items[shown][1]])
        with self._views.transforming(draw, prefix):
            view = self.transform(ImageOps.mirror(image) if mirrored else image)
        sample = {f"{prefix}images": view, **self._views.boxes(view, draw, prefix)}
        return sample if self._features is None else sample | self._features.of(shown, mirrored=mirrored)

    def _read(self, index: int, damaged: list[str], *, instead: int | None = None) -> tuple[Any, int]:
        """The image ``index`` or, if it is damaged, another one of its identity, ``instead`` last."""
        for candidate in self._candidates(index, instead):
            path = self.img_items[candidate][0]
            try:
                return read_image(path), candidate
            except DataError:
                damaged.append(path)
        raise DataError(
            "Training identity without a readable image",
            value=self.img_items[index][1],
            expected="one image that can be decoded",
            remedy=f"Repair or remove {', '.join(sorted(set(damaged)))}.",
        )

    def _candidates(self, index: int, last: int | None) -> Iterator[int]:
        yield index
        others = [other for other in self._members[self.img_items[index][1]] if other not in (index, last)]
        for place in numpy_stream(self._seed, "replacement", index).permutation(len(others)):
            yield others[place]
        if last is not None and last != index:
            yield last


class TestSet(CommDataset):  # type: ignore[misc]
    """The host's test set; an image that cannot be decoded is named, since a result without it would be another one."""

    __test__ = False  # a pytest module that imports this holds no tests in it

    def __init__(self, items: Sequence[Item], transform: Callable[[Any], Any]) -> None:
        super().__init__(items, transform, relabel=False)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, identity, camera = self.img_items[index]
        return {"images": self.transform(read_image(path)), "targets": identity, "camids": camera, "img_paths": path}


class DrawnIndex(int):
    """An index into the training set that carries the number of its draw to the worker that loads it."""

    draw: int

    def __new__(cls, index: int, draw: int) -> DrawnIndex:
        self = super().__new__(cls, index)
        self.draw = draw
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return DrawnIndex, (int(self), self.draw)


class CountingSampler(Sampler[int]):
    """Another sampler's indices with the number of each draw, which a sampler that begins at a later step continues."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        first = self.sampler.step * self.sampler.batch_size if isinstance(self.sampler, StepSampler) else 0
        for draw, index in enumerate(self.sampler, first):
            yield DrawnIndex(index, draw)


def _train_loader_builder(host_build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(host_build)
    def build_reid_train_loader(*args: Any, **kwargs: Any) -> Any:
        cfg = _config_of(args, kwargs)
        if cfg is None:
            return host_build(*args, **kwargs)
        if wants_pairs(cfg):
            return _pair_loader(host_build, cfg, kwargs)
        if kwargs.get("train_set") is not None:
            return _foreign_loader(host_build, cfg, args, kwargs)
        kwargs.pop("cfg", None)
        sampler, transforms, partner = (kwargs.pop(name, None) for name in ("sampler", "transforms", "partner"))
        items, sets = _training_items(cfg, kwargs)
        partners = wants_partners(cfg) if partner is None else partner
        views, features, made = pair_views(cfg), None, training_views(cfg)
        if wants_cache(cfg):
            features = cached_features(cfg, items, sets, partners=partners, own_transforms=transforms is not None)
            views, transforms = drawn_flips(cfg, views), plain_transforms(cfg)
        elif views is not None and transforms is not None:
            refuse_own_transforms()
        if sampler is None:
            sampler = build_sampler(cfg, items, sets)
        degradation = training_degradation(cfg)
        seed, seeded = max(cfg.SEED, 0), isinstance(sampler, (SeededTrainingSampler, SeededIdentitySampler))
        if seeded and transforms is None and not partners and made is None:
            views = drawn_flips(cfg, views)  # those that a student with cached teacher embeddings sees
        rest = host_transforms_config(cfg, views) if made is None else without_flip(cfg)
        transforms = transforms or build.build_transforms(rest, is_train=True)
        if seeded and varying_steps(transforms):
            views = dataclasses.replace(views or PairViews(seed, rank()), seeded=True)
        train_set = TrainSet(
            items,
            transforms,
            seed=seed,
            partners=partners,
            views=views,
            features=features,
            training_views=made,
            degradation=degradation,
        )
        with names_explained(cfg):
            loader = host_build(cfg, train_set=train_set, sampler=sampler, transforms=transforms)
        if partners or any(own is not None for own in (views, made, degradation)):
            loader.batch_sampler.sampler = CountingSampler(loader.batch_sampler.sampler)
        return _watched(cfg, loader, items)

    return build_reid_train_loader


def _watched(cfg: Any, loader: Any, items: Sequence[Item]) -> WatchedLoader:
    record = corrupt_images(cfg)
    record.expect(len(items))
    return WatchedLoader(loader, record)


def _pair_loader(host_build: Callable[..., Any], cfg: Any, options: dict[str, Any]) -> WatchedLoader:
    """The loader of DIL's stage 1."""
    refuse_own(cfg, options)
    items, sets = _training_items(cfg, {key: value for key, value in options.items() if key not in OWN})
    transforms = pair_transforms(cfg)
    pairs = PairDraws([camera for _, _, camera in items], cfg, [identity for _, identity, _ in items])
    train_set = TrainSet(items, transforms, seed=max(cfg.SEED, 0), pairs=pairs)
    loader = host_build(cfg, train_set=train_set, sampler=build_sampler(cfg, items, sets), transforms=transforms)
    loader.batch_sampler.sampler = CountingSampler(loader.batch_sampler.sampler)
    return _watched(cfg, loader, items)


def _foreign_loader(host_build: Callable[..., Any], cfg: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The host's loader over a training set of the caller's; all of it counts as one data set."""
    refuse_foreign(cfg)
    items = getattr(kwargs["train_set"], "img_items", ())
    if kwargs.get("sampler") is None:
        kwargs["sampler"] = build_sampler(cfg, items, [0] * len(items))
    with names_explained(cfg):
        return host_build(*args, **kwargs)


def _test_loader_builder(host_build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(host_build)
    def build_reid_test_loader(*args: Any, **kwargs: Any) -> Any:
        cfg = _config_of(args, kwargs)
        if cfg is None or kwargs.get("dataset_name") is None or kwargs.get("test_set") is not None:
            return host_build(*args, **kwargs)
        kwargs.pop("cfg", None)
        name, transforms = kwargs.pop("dataset_name"), kwargs.pop("transforms", None)
        data_set, query, gallery = test_set(cfg, name, **kwargs)
        if rank() == 0:
            data_set.show_test()
        transforms = transforms or build.build_transforms(cfg, is_train=False)
        images = TestSet([*query, *gallery], transforms)
        return host_build(cfg, test_set=images, num_query=len(query), transforms=transforms)

    return build_reid_test_loader


def _config_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The config a host builder was called with, if it was."""
    from yacs.config import CfgNode

    first = args[0] if args else kwargs.get("cfg")
    return first if isinstance(first, CfgNode) else None


def _training_items(cfg: Any, options: dict[str, Any]) -> tuple[list[Item], list[int]]:
    """The items of all training sets, and the index of each item's set."""
    items: list[Item] = []
    sets: list[int] = []
    for which, name in enumerate(cfg.DATASETS.NAMES):
        data_set, own = training_set(cfg, name, **options)
        if rank() == 0:
            data_set.show_train()
            _tell_single_images(name, own)
        part = training_part(cfg, own)
        items += part
        sets += [which] * len(part)
    return items, sets


def _tell_single_images(name: str, items: Sequence[Item]) -> None:
    single = single_image_identities(str(item[1]) for item in items)
    if single:
        logger.warning(
            "%s: %d of %d training identities have one image only (%s%s). Samplers repeat it, and it has no partner.",
            name,
            len(single),
            len({item[1] for item in items}),
            ", ".join(single[:5]),
            ", ..." if len(single) > 5 else "",
        )
