"""Projections of a deployed network's embedding: fitted to images or trained on them, and what they cost in ranking."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsd_plugin.core.errors import ExportError
from qsd_plugin.core.progress import progress
from qsd_plugin.data.items import existing_folder, image_files
from qsd_plugin.export.packages import PERSON_DIMENSION
from qsd_plugin.export.projection import Projection, fit_pca, pad_with_zeros, read_linear
from qsd_plugin.export.projection_training import train_linear
from qsd_plugin.hosts.fastreid import extract
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.datasets import Item, training_set
from qsd_plugin.hosts.fastreid.deployed import Deployed
from qsd_plugin.hosts.fastreid.report import TestSet, load_test, rank_test

PCA, TRAINED = "pca", "trained"


def projection_for(run: Deployed, wanted: str, cfg: Any, images: Path | None) -> Projection | None:
    """The projection to 256 numbers, or ``None`` for a network that has them.

    Args:
        run: The network.
        wanted: ``pca``, ``trained``, a file for :func:`qsd_plugin.export.projection.read_linear`, or empty.
        cfg: Its config with the user's options: the training images are those of ``DATASETS.NAMES``.
        images: Folder of images to fit ``pca`` to instead; those of all folders below it.

    Raises:
        ExportError: Too few images, or a folder of images without identities for ``trained``.
        CheckpointError: The file is no fitting linear layer.
    """
    given = int(run.contract["embedding"]["dimension"])
    if wanted == PCA and given > PERSON_DIMENSION:
        items = _items(images) if images is not None else list(itertools.chain(*_training_sets(cfg).values()))
        with _on_accelerator(run.model) as model:
            return fit_pca(
                extract.embedding_stream(cfg, model, items, title="Fitting the projection"), PERSON_DIMENSION
            )
    if wanted == TRAINED and given > PERSON_DIMENSION:
        if images is not None:
            raise ExportError(
                "--images", value=str(images), expected="none with --projection trained, which needs identities"
            )
        sets = _training_sets(cfg)
        items = list(itertools.chain(*sets.values()))
        with _on_accelerator(run.model) as model:
            embeddings = extract.embed(cfg, model, items, title="Embeddings to train the projection on")
        identities = [(name, identity) for name, part in sets.items() for _, identity, _ in part]
        return train_linear(embeddings, identities, PERSON_DIMENSION, seed=max(cfg.SEED, 0))
    if wanted not in ("", PCA, TRAINED):
        return read_linear(Path(wanted), given=given, dimension=PERSON_DIMENSION)
    return pad_with_zeros(given, PERSON_DIMENSION) if given < PERSON_DIMENSION else None


def ranking_table(cfg: Any, run: Deployed, projection: Projection | None) -> list[dict[str, Any]]:
    """Rank-1, mAP and mINP in percent on ``DATASETS.TESTS``, with the run's embedding and with the projected one.

    Both are compared by cosine, as the runtime does, and the run's also by its own metric where that is another one.

    Raises:
        ExportError: No test set.
    """
    rows = []
    for name in _tests(cfg):
        test = load_test(cfg, name)
        items = [*test.query, *test.gallery]
        with _on_accelerator(run.model) as model:
            embeddings = extract.embed(cfg, model, items, title=f"Evaluating {name}")
        arms = {(embeddings.shape[1], metric): embeddings for metric in dict.fromkeys((cfg.TEST.METRIC, "cosine"))}
        if projection is not None:
            arms[(projection.matrix.shape[0], "cosine")] = projection(embeddings)
        rows += [_row(test, name, "torch", features, metric) for (_, metric), features in arms.items()]
    return rows


def ranking_in_runtime(cfg: Any, way: str, embed: Callable[[NDArray[np.uint8]], Any]) -> list[dict[str, Any]]:
    """Rows as of :func:`ranking_table`, of what a runtime makes of the images in their files.

    The runtime resizes them in its own way, so that its numbers may differ a little from torch's behind the transforms
    of the host.

    Args:
        cfg: Names ``DATASETS.TESTS``.
        way: Name of the runtime.
        embed: BGR picture, uint8 [H, W, 3], to its embedding [D].

    Raises:
        ExportError: No test set.
    """
    rows = []
    for name in _tests(cfg):
        test = load_test(cfg, name)
        features = []
        for path, _, _ in progress([*test.query, *test.gallery], f"{name} by {way}"):
            features.append(np.asarray(embed(np.ascontiguousarray(np.asarray(read_image(path))[..., ::-1]))))
        rows.append(_row(test, name, way, torch.from_numpy(np.stack(features)).float(), "cosine"))
    return rows


def _row(test: TestSet, name: str, way: str, features: Tensor, metric: str) -> dict[str, Any]:
    count = len(test.query)
    result = rank_test(test, features[:count], features[count:], metric)
    return {
        "test": name,
        "numbers": features.shape[1],
        "metric": metric,
        "computed by": way,
        "Rank-1": 100 * float(result.cmc[0]),
        "mAP": 100 * result.mAP,
        "mINP": 100 * result.mINP,
    }


def _tests(cfg: Any) -> tuple[str, ...]:
    if not cfg.DATASETS.TESTS:
        raise ExportError(
            "DATASETS.TESTS", value="()", expected="a test set", remedy="""Add DATASETS.TESTS "('Market1501',)"."""
        )
    return tuple(cfg.DATASETS.TESTS)


def with_options(run: Deployed, options: list[str]) -> Any:
    """The run's config with ``KEY VALUE`` options, on the data sets that the run itself named."""
    cfg = run.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.NAMES = tuple(run.results["trained_on"])
    cfg.DATASETS.TESTS = tuple(run.results["tested_on"])
    cfg.merge_from_list(options)
    return cfg


@contextmanager
def _on_accelerator(model: nn.Module) -> Iterator[nn.Module]:
    """The model on the GPU, where there is one, for as long as images are embedded."""
    try:
        yield model.to("cuda" if torch.cuda.is_available() else "cpu")
    finally:
        model.to("cpu")


def _training_sets(cfg: Any) -> dict[str, list[Item]]:
    return {name: training_set(cfg, name)[1] for name in cfg.DATASETS.NAMES}


def _items(folder: Path) -> list[Item]:
    return [(str(path), 0, 0) for path in image_files(existing_folder(str(folder), "--images"))]
