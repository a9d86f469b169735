"""Quality labels of training sets: by a checkpoint, by one per fold, by an ONNX model or from an embedding file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from qsd_plugin.core.distributed import rank
from qsd_plugin.core.errors import ConfigError, LabelError, did_you_mean
from qsd_plugin.core.progress import progress
from qsd_plugin.hosts.fastreid import extract
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.datasets import Item, dataset_folder
from qsd_plugin.hosts.fastreid.folds import fold_of_items
from qsd_plugin.hosts.fastreid.label_reports import write_report
from qsd_plugin.hosts.fastreid.taps import head_name
from qsd_plugin.quality import sdd_fiqa_labels
from qsd_plugin.quality.checks import LabelCheck, check_labels
from qsd_plugin.quality.embeddings import EmbeddingTable, read_embeddings
from qsd_plugin.quality.folds import merge_folds
from qsd_plugin.quality.keys import KeyIndex, label_key
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.quality.norms import norm_labels
from qsd_plugin.quality.onnx_embedder import OnnxEmbedder

logger = logging.getLogger("fastreid.qsd_plugin.labels")

#: Values of ``QUALITY.METHOD``.
METHODS = ("sdd_fiqa", "norm")

Features = NDArray[Any] | torch.Tensor


def make_labels(cfg: Any, checkpoint: Path, items: Mapping[str, list[Item]], folder: Path) -> None:
    """Label training sets with one network, as ``<folder>/<data set>.npz``, and report on the labels.

    Args:
        cfg: Config of the plain network that embeds the images; reads ``QUALITY.*`` and ``SEED``.
        checkpoint: Its weights.
        items: Training items by data-set name.
        folder: Where to write.
    """
    if rank() != 0:
        return
    model = extract.load_model(cfg, checkpoint)
    _write(cfg, items, folder, lambda name, entries: label_with(cfg, model, name, entries, extractor=str(checkpoint)))


def make_fold_labels(cfg: Any, checkpoints: Sequence[Path], items: Mapping[str, list[Item]], folder: Path) -> None:
    """Cross-fitted labels: fold k of every training set is labelled by the k-th checkpoint, and by itself.

    Args:
        cfg: As for :func:`make_labels`.
        checkpoints: One per fold, each trained without the identities of its fold.
        items: Training items by data-set name.
        folder: Where to write.
    """
    if rank() != 0:
        return
    parts: dict[str, list[QualityLabels]] = {name: [] for name in items}
    for number, checkpoint in enumerate(checkpoints, 1):
        model = extract.load_model(cfg, checkpoint)
        for name, entries in items.items():
            fold = fold_of_items(cfg, entries, len(checkpoints))
            own = [item for item, place in zip(entries, fold, strict=True) if place == number]
            parts[name].append(label_with(cfg, model, name, own, extractor=str(checkpoint)))
    _write(cfg, items, folder, lambda name, entries: merge_folds(parts[name], _keys(cfg, name, entries)))


def make_onnx_labels(
    cfg: Any, embedder: OnnxEmbedder, items: Mapping[str, list[Item]], folder: Path, *, extractor: str
) -> None:
    """Label training sets with an ONNX model, whose first output is the embedding (for ``norm`` as well)."""

    def label(name: str, entries: list[Item]) -> QualityLabels:
        images = (read_image(path) for path, _, _ in progress(entries, f"Embedding {name}"))
        return _label(cfg, name, entries, embedder.embed(images), extractor=extractor)

    _write(cfg, items, folder, label)


def make_table_labels(
    cfg: Any, table: EmbeddingTable, items: Mapping[str, list[Item]], folder: Path, *, extractor: str
) -> None:
    """Label training sets from embeddings made elsewhere; identities are those of the data sets.

    Images without an embedding stay unlabelled.

    Raises:
        LabelError: Less than ``QUALITY.MIN_COVERAGE`` of a set has an embedding.
    """

    def label(name: str, entries: list[Item]) -> QualityLabels:
        index = KeyIndex(table.keys, dataset=name)
        paths = [path for path, _, _ in entries]
        rows = index.rows(paths, root=dataset_folder(cfg, name), basenames=len(items) == 1)
        if (rows >= 0).mean() < cfg.QUALITY.MIN_COVERAGE:
            raise LabelError(
                f"Embedding file {extractor} has a vector for {int((rows >= 0).sum())} of {len(rows)} training images "
                f"of {name}",
                expected=f"at least {cfg.QUALITY.MIN_COVERAGE:.1%}. Images without one: "
                f"{', '.join([path for path, row in zip(paths, rows, strict=True) if row < 0][:2])}. "
                f"Keys in the file: {', '.join(table.keys[:2])}",
                remedy="Use paths below the data-set folder as keys; QUALITY.MIN_COVERAGE sets the limit.",
            )
        known = [item for item, row in zip(entries, rows, strict=True) if row >= 0]
        return _label(cfg, name, known, table.embeddings[rows[rows >= 0]], extractor=extractor)

    _write(cfg, items, folder, label)


def label_table_alone(cfg: Any, path: Path, folder: Path) -> tuple[Path, LabelCheck]:
    """Label the images of an embedding file that holds identities, without any data set.

    Returns:
        The label file, ``<folder>/<name of the embedding file>.npz`` with the same keys, and what its labels are like.

    Raises:
        LabelError: The file has no identities, or cannot be labelled.
    """
    table = read_embeddings(path)
    if table.identities is None:
        raise LabelError(
            f"Embedding file {path} has no identities",
            expected="an array identities [N], or a data set that knows them",
            remedy="Name the data set: DATASETS.NAMES \"('Market1501',)\".",
        )
    labels = label_set(cfg, table.keys, table.identities, table.embeddings, extractor=str(path))
    file = folder / f"{path.stem}.npz"
    labels.save(file)
    return file, check_labels(labels, table.keys, table.identities)


def label_with(cfg: Any, model: nn.Module, name: str, entries: list[Item], *, extractor: str) -> QualityLabels:
    """Labels of the images of one data set by a host model in eval mode; see :func:`label_set`."""
    tap = f"{head_name(model)}.pool_layer" if cfg.QUALITY.METHOD == "norm" else None
    features = extract.embed(cfg, model, entries, title=f"Embedding {name}", tap=tap)
    return _label(cfg, name, entries, features, extractor=extractor)


def label_set(cfg: Any, keys: Sequence[str], identities: Any, features: Features, *, extractor: str) -> QualityLabels:
    """Labels of images from their features, by ``QUALITY.METHOD``.

    Args:
        cfg: Reads ``QUALITY.*`` and ``SEED``.
        keys: Image keys, N of them.
        identities: [N].
        features: [N, D].
        extractor: What made the features, for the header.
    """
    check_method(cfg)
    if cfg.QUALITY.METHOD == "norm":
        return norm_labels(features, identities, keys=keys).with_meta(extractor=extractor)
    labels = sdd_fiqa_labels(
        features,
        identities,
        keys=keys,
        positives=cfg.QUALITY.POSITIVES,
        negatives=cfg.QUALITY.NEGATIVES,
        rounds=cfg.QUALITY.ROUNDS,
        seed=max(cfg.SEED, 0),
        signed=cfg.QUALITY.SIGNED,
    )
    return labels.with_meta(extractor=extractor)


def check_method(cfg: Any) -> None:
    """Refuse an unknown ``QUALITY.METHOD``."""
    if cfg.QUALITY.METHOD not in METHODS:
        raise ConfigError("QUALITY.METHOD", value=cfg.QUALITY.METHOD, remedy=did_you_mean(cfg.QUALITY.METHOD, METHODS))


def _label(cfg: Any, name: str, entries: Sequence[Item], features: Features, *, extractor: str) -> QualityLabels:
    identities = [pid for _, pid, _ in entries]
    labels = label_set(cfg, _keys(cfg, name, entries), identities, features, extractor=extractor)
    return labels.with_meta(dataset=name)


def _keys(cfg: Any, name: str, entries: Sequence[Item]) -> list[str]:
    root = dataset_folder(cfg, name)
    return [label_key(path, root=root, dataset=name) for path, _, _ in entries]


def _write(
    cfg: Any,
    items: Mapping[str, list[Item]],
    folder: Path,
    label: Callable[[str, list[Item]], QualityLabels],
) -> None:
    for name, entries in items.items():
        label(name, entries).save(folder / f"{name}.npz")
    write_report(cfg, {name: folder / f"{name}.npz" for name in items}, folder)
