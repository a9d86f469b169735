"""Face test sets trial by trial, for comparisons: what one network does, and how near it is to its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.files import write_atomically
from qsd_plugin.hosts.fastreid import extract, face_tests
from qsd_plugin.hosts.fastreid.face_tests import FaceTest
from qsd_plugin.hosts.fastreid.protocols import FaceImages
from qsd_plugin.report.per_trial import PerTrial, join

#: File of a teacher's stage with its embeddings [N, D] of the images of each test set, by the set's name.
EMBEDDINGS = "test_embeddings.npz"
#: Name of the metric: 100 times the cosine of a network's embedding of a test image and its teacher's.
AGREEMENT = "agreement"


def check(name: str) -> None:
    """Refuse a face test set that cannot be compared trial by trial.

    Raises:
        ConfigError: It is one of those.
    """
    if name not in face_tests.WITH_TRIALS:
        raise ConfigError(
            "DATASETS.TESTS of an experiment",
            value=name,
            expected=f"one of {', '.join(face_tests.WITH_TRIALS)}, or a person re-identification set",
            remedy=did_you_mean(name, face_tests.WITH_TRIALS),
        )


def evaluate(cfg: Any, checkpoint: Path, folder: Path, *, teacher: Path | None, title: str) -> tuple[PerTrial, str]:
    """All trials of the face test sets of ``cfg``, and what their quality is.

    Args:
        cfg: Of the network, without what training adds.
        checkpoint: Its weights.
        folder: Its embeddings are kept there.
        teacher: Folder that an earlier call kept a teacher's embeddings in; ``None``: this is the teacher, or there is
            none.
        title: For the progress line.
    """
    from fastreid.data.transforms import build_transforms

    model = extract.load_model(cfg, checkpoint)
    parts: list[PerTrial] = []
    embeddings: dict[str, Any] = {}
    quality = ""
    for name in cfg.DATASETS.TESTS:
        test = face_tests.TESTS[name](cfg)
        images = FaceImages(test, build_transforms(cfg, is_train=False))
        features = extract.embed_images(cfg, model, images, title=title, mirrored=cfg.TEST.FLIP.ENABLED)
        assert test.trials is not None  # as check() has seen
        parts.append(test.trials(features))
        embeddings[name], quality = features.numpy(), test.quality_name
        theirs = None if teacher is None else _kept(teacher, name)
        if theirs is not None and theirs.shape == features.shape:
            parts.append(_agreement(name, test, features, theirs))
    write_atomically(folder / EMBEDDINGS, lambda stream: np.savez(stream, **embeddings))
    return join(parts), quality


def _kept(folder: Path, name: str) -> torch.Tensor | None:
    with np.load(folder / EMBEDDINGS, allow_pickle=False) as archive:
        return torch.from_numpy(archive[name]) if name in archive else None


def _agreement(name: str, test: FaceTest, features: torch.Tensor, theirs: torch.Tensor) -> PerTrial:
    cosine = torch.cosine_similarity(features.double(), theirs.double(), dim=1)
    return PerTrial(
        query=np.array([f"{name} {image}" for image in test.labels]),
        test=np.full(len(test.labels), f"{name} {AGREEMENT}"),
        identity=np.array(test.people),
        quality=np.asarray(test.quality, np.float64),
        values=100 * cosine[:, None].numpy(),
        names=np.array([AGREEMENT]),
    )
