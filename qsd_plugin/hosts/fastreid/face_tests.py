"""Every test set that is scored here and not by the host, by its name in ``DATASETS.TESTS``, and its mirror images.

Those of faces, and those of persons whose queries are degraded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps

from qsd_plugin.evaluation.fusion import FUSIONS, check_fusion, fuse
from qsd_plugin.hosts.fastreid.face_identification import IDENTIFICATION
from qsd_plugin.hosts.fastreid.face_mixed import MIXED
from qsd_plugin.hosts.fastreid.face_pairs import PAIRS
from qsd_plugin.hosts.fastreid.face_protocol import FaceTest, Score
from qsd_plugin.hosts.fastreid.face_templates import TEMPLATES
from qsd_plugin.hosts.fastreid.person_mixed import MIXED_PERSONS

TESTS: dict[str, Callable[[Any], FaceTest]] = {**PAIRS, **IDENTIFICATION, **TEMPLATES, **MIXED, **MIXED_PERSONS}
#: Those that ``EVALUATION.MIXED`` is about.
WITH_LEVELS = frozenset({*MIXED, *MIXED_PERSONS})


@dataclass(frozen=True)
class WithMirrorImages:
    """The images of a test set, and behind them the mirror image of each."""

    read: Callable[[int], Image.Image]
    count: int

    def __call__(self, index: int) -> Image.Image:
        return ImageOps.mirror(self.read(index - self.count)) if index >= self.count else self.read(index)


def build_test(cfg: Any, name: str) -> FaceTest:
    """A test set, with its mirror images as images of its own where ``TEST.FUSION`` needs both embeddings.

    Args:
        cfg: The host's config.
        name: One of :data:`TESTS`.

    Raises:
        QSDPluginError: The set or the fusion cannot be used.
    """
    rule = cfg.TEST.FUSION
    check_fusion(rule)
    test = TESTS[name](cfg)
    if not cfg.TEST.FLIP.ENABLED or host_flips(cfg):
        return test
    count = len(test.names)

    def score(features: torch.Tensor) -> Score:
        return test.score(torch.from_numpy(fuse(features[:count], features[count:], rule)))

    names = [*test.names, *(f"{each}, mirrored" for each in test.names)]
    return FaceTest(names, WithMirrorImages(test.read, count), score, test.trial_images, test.quality_name)


def host_flips(cfg: Any) -> bool:
    """Whether the host adds the embedding of the mirror image: it averages, half of ``pre_norm_vector_add``."""
    return bool(cfg.TEST.FLIP.ENABLED) and FUSIONS[0] == cfg.TEST.FUSION
