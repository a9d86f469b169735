"""Face test sets of templates: IJB-B and IJB-C, 1:1 verification."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.face_sets import Ijb, read_ijb
from qsd_plugin.data.packed_faces import is_packed, packed_ijb
from qsd_plugin.evaluation.templates import verify_templates
from qsd_plugin.hosts.fastreid.face_identification import required
from qsd_plugin.hosts.fastreid.face_protocol import AlignedFiles, FaceTest, ImageFiles, Score

#: How an image's embedding enters its template, by whether it keeps its length. AdaFace, InsightFace and most tables
#: keep it; QGFace's integrated program does not.
WEIGHTINGS = {True: "norm-weighted (as AdaFace)", False: "unit"}


def ijb(cfg: Any, key: str = "IJB") -> FaceTest:
    """``IJB``, ``IJBB``, ``IJBC``: 1:1 verification of pairs of templates, by embeddings with and without their length.

    ``metric`` is TAR at a FAR of 1e-4 of the weighting that ``TEST.IJB.NORM`` chooses. Loose crops are aligned to
    112x112 by their landmarks; a packed record holds them aligned.

    Args:
        cfg: The host's config.
        key: Of ``DATA``.

    Raises:
        ConfigError: ``DATA.<key>`` is empty.
        DataError: There is no such set.
    """
    data = _read(required(cfg, key), key)
    options = cfg.TEST.IJB
    if options.DETECTOR_SCORE and np.isnan(data.detector_score).any():
        raise ConfigError("TEST.IJB.DETECTOR_SCORE", value=True, expected=f"False, {key} lists no scores")

    def score(features: torch.Tensor) -> Score:
        # With a flip test both embeddings have been fused, which pooling to length 1 cannot tell from their sum.
        numbers: dict[str, float] = {}
        details: dict[str, Any] = {}
        curves = {}
        for use_norm, name in WEIGHTINGS.items():
            result = verify_templates(
                features,
                data.templates,
                data.medias,
                data.pairs,
                data.genuine,
                detector_score=data.detector_score if options.DETECTOR_SCORE else None,
                use_norm=use_norm,
                use_detector_score=options.DETECTOR_SCORE,
                use_flip=False,
                rule=options.RULE,
            )
            switches = f"{result.switches[:-1]}{cfg.TEST.FLIP.ENABLED:d}"
            tar = dict(zip(result.far_targets.tolist(), (100 * result.tar).tolist(), strict=True))
            numbers |= {f"TAR@FAR={target:.0e} {name}": rate for target, rate in tar.items()}
            details[name] = {"result": result, "switches": switches}
            curves[switches] = (result.roc.far, result.roc.tar)
        chosen = f"TAR@FAR=1e-04 {WEIGHTINGS[bool(options.NORM)]}"
        return Score({**numbers, "metric": numbers[chosen]}, details, curves)

    paths = [str(path) for path in data.paths]
    if data.points is None:
        return FaceTest(paths, ImageFiles(paths), score)
    return FaceTest(paths, AlignedFiles(paths, data.points), score)


def _read(source: str, key: str) -> Ijb:
    if not is_packed(source):
        return read_ijb(source, *([] if key == "IJB" else [key.lower()]))
    return packed_ijb(source, *([] if key == "IJB" else [key.lower()]))


TEMPLATES: dict[str, Callable[[Any], FaceTest]] = {
    key: functools.partial(ijb, key=key) for key in ("IJB", "IJBB", "IJBC")
}
