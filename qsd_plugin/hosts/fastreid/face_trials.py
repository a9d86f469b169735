"""Face test sets trial by trial, for comparisons: what one network does, and how near it is to its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.files import write_atomically
from qsd_plugin.hosts.fastreid import extract, face_tests
from qsd_plugin.hosts.fastreid.face_protocol import WITHOUT_TRIALS
from qsd_plugin.hosts.fastreid.protocols import FaceImages
from qsd_plugin.report.per_trial import PerTrial, join

#: File of a teacher's stage with its embeddings [N, D] of the images of each test set, by the set's name.
EMBEDDINGS = "test_embeddings.npz"
#: Name of the metric: 100 times the cosine of a network's embedding and its teacher's, mean over a trial's images.
AGREEMENT = "agreement"


def check(name: str) -> None:
    """Refuse a face test set that cannot be compared trial by trial.

    Raises:
        ConfigError: It is one of those.
    """
    known = sorted(set(face_tests.TESTS) - WITHOUT_TRIALS)
    if name not in known:
        raise ConfigError(
            "DATASETS.TESTS of an experiment",
            value=name,
            expected=f"one of {', '.join(known)}, or a person re-identification set",
            remedy=did_you_mean(name, known),
        )


def evaluate(cfg: Any, checkpoint: Path, folder: Path, *, teacher: Path | None, title: str) -> tuple[PerTrial, str]:
    """All trials of the face test sets of ``cfg``, and what their quality is.

    Args:
        cfg: Of the network, without what training adds.
        checkpoint: Its weights.
        folder: Its embeddings are kept there.
        teacher: Folder that an earlier call kept a teacher's embeddings in, or ``folder`` itself for the teacher's own;
            ``None``: there is none. Where they have the length of this network's, the trials get the metric
            :data:`AGREEMENT`.
        title: For the progress line.
    """
    from fastreid.data.transforms import build_transforms

    model = extract.load_model(cfg, checkpoint)
    parts: list[PerTrial] = []
    embeddings: dict[str, Any] = {}
    qualities: dict[str, None] = {}
    for name in cfg.DATASETS.TESTS:
        test = face_tests.build_test(cfg, name)
        images = FaceImages(test, build_transforms(cfg, is_train=False))
        features = extract.embed_images(cfg, model, images, title=title, mirrored=face_tests.host_flips(cfg))
        theirs = features if teacher == folder else None if teacher is None else _kept(teacher, name)
        trials = test.trials(features)
        if theirs is not None and theirs.shape == features.shape and test.trial_images is not None:
            trials = _with_agreement(trials, features, theirs, test.trial_images)
        parts.append(trials)
        embeddings[name] = features.numpy()
        qualities[test.quality_name or "not known"] = None
    write_atomically(folder / EMBEDDINGS, lambda stream: np.savez(stream, **embeddings))
    return join(parts), ", ".join(qualities)


def _kept(folder: Path, name: str) -> torch.Tensor | None:
    with np.load(folder / EMBEDDINGS, allow_pickle=False) as archive:
        return torch.from_numpy(archive[name]) if name in archive else None


def _with_agreement(
    trials: PerTrial, features: torch.Tensor, theirs: torch.Tensor, images: NDArray[np.int64]
) -> PerTrial:
    cosine = torch.cosine_similarity(features.double(), theirs.double(), dim=1).numpy()
    values = np.column_stack([trials.values, 100 * cosine[images].mean(axis=1)])
    return replace(trials, values=values, names=np.array([*trials.metric_names, AGREEMENT]))
