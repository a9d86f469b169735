"""Face test sets: which images, and how their embeddings are scored by the protocols of ``qsd_plugin.evaluation``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.face_sets import read_ijb, read_tinyface
from qsd_plugin.data.items import existing_folder, image_files
from qsd_plugin.data.synthetic.face_protocols import identification
from qsd_plugin.evaluation.identification import SCFACE_METRES, closed_set, scface, scface_split
from qsd_plugin.evaluation.templates import verify_templates
from qsd_plugin.hosts.fastreid.datasets import synthetic_faces
from qsd_plugin.hosts.fastreid.face_pairs import face_pairs, synthetic_verification, verification_bin
from qsd_plugin.hosts.fastreid.face_protocol import (
    SEVERITY,
    AlignedFiles,
    FaceTest,
    ImageFiles,
    Score,
    severity_of,
    thirds,
)
from qsd_plugin.report.per_trial import PerTrial


def tinyface(cfg: Any) -> FaceTest:
    """``TinyFace``: closed-set identification among distractors, ranks 1, 5 and 20."""
    data = read_tinyface(_folder(cfg, "TINYFACE"))
    first, last = data.num_probe, data.num_probe + data.num_mated

    def score(features: torch.Tensor) -> Score:
        result = closed_set(
            features[:first],
            features[first:last],
            data.identities[:first],
            data.identities[first:last],
            distractors=features[last:],
            metric=cfg.TEST.METRIC,
        )
        rates = {f"Rank-{r}": 100 * rate for r, rate in result.rates.items()}
        return Score({**rates, "metric": 100 * result.rates[1]}, {"TinyFace": result})

    paths = [str(path) for path in data.paths]
    return FaceTest(paths, ImageFiles(paths), score)


def scface_test(cfg: Any) -> FaceTest:
    """``SCface``: rank 1 at each of the three distances, mug shots as gallery."""
    files = image_files(existing_folder(_folder(cfg, "SCFACE"), "DATA.SCFACE"))
    names = [path.name for path in files]
    split = scface_split(names)
    used = sorted([*split.gallery.tolist(), *split.probe.tolist()])
    kept = [names[index] for index in used]

    def score(features: torch.Tensor) -> Score:
        results = scface(features, kept)
        rank_1 = {f"d{d} ({SCFACE_METRES[d]} m)": 100 * result.rates[1] for d, result in results.items()}
        return Score({**rank_1, "metric": sum(rank_1.values()) / len(rank_1)}, {"SCface": results})

    paths = [str(files[index]) for index in used]
    return FaceTest(paths, ImageFiles(paths), score)


def ijb(cfg: Any) -> FaceTest:
    """``IJB``: 1:1 verification of IJB-B or IJB-C; crops are aligned to 112x112 by their landmarks."""
    data = read_ijb(_folder(cfg, "IJB"))
    options = cfg.TEST.IJB

    def score(features: torch.Tensor) -> Score:
        # The host's flip test has averaged both embeddings, which pooling to length 1 cannot tell from their sum.
        result = verify_templates(
            features,
            data.templates,
            data.medias,
            data.pairs,
            data.genuine,
            detector_score=data.detector_score,
            use_norm=options.NORM,
            use_detector_score=options.DETECTOR_SCORE,
            use_flip=False,
            rule=options.RULE,
        )
        switches = f"{result.switches[:-1]}{cfg.TEST.FLIP.ENABLED:d}"
        tar = {
            f"TAR@FAR={target:.0e}": 100 * rate
            for target, rate in zip(result.far_targets.tolist(), result.tar.tolist(), strict=True)
        }
        details = {"result": result, "switches": switches}
        return Score({**tar, "metric": tar["TAR@FAR=1e-04"]}, details, {switches: (result.roc.far, result.roc.tar)})

    paths = [str(path) for path in data.paths]
    return FaceTest(paths, AlignedFiles(paths, data.points), score)


def synthetic_identification(cfg: Any) -> FaceTest:
    """``SyntheticFacesIdentification``: the built-in faces among distractors, rank 1 also by thirds of the probes."""
    spec, folder = synthetic_faces(cfg)
    data = identification(spec)
    first, last = data.num_probe, data.num_probe + data.num_mated
    quality = -severity_of(folder, data.paths[:first])

    def score(features: torch.Tensor) -> Score:
        result = closed_set(
            features[:first],
            features[first:last],
            data.identities[:first],
            data.identities[first:last],
            distractors=features[last:] if last < len(features) else None,
            metric=cfg.TEST.METRIC,
        )
        rates = {f"Rank-{r}": 100 * rate for r, rate in result.rates.items()}
        found = result.rank == 1
        numbers = {**rates, **thirds(found, quality), "metric": rates["Rank-1"]}
        trials = PerTrial(
            query=np.array(data.paths[:first]),
            test=np.full(first, "SyntheticFacesIdentification"),
            identity=np.array([f"{who:05d}" for who in data.identities[:first].tolist()]),
            quality=quality,
            values=100.0 * found[:, None],
            names=np.array(["rank-1"]),
        )
        return Score(numbers, {"SyntheticFaces": result}, trials=trials)

    paths = [str(folder / name) for name in data.paths]
    return FaceTest(paths, ImageFiles(paths), score, np.arange(first)[:, None], SEVERITY)


TESTS: dict[str, Callable[[Any], FaceTest]] = {
    "VerificationBin": verification_bin,
    "FacePairs": face_pairs,
    "TinyFace": tinyface,
    "SCface": scface_test,
    "IJB": ijb,
    "SyntheticFacesVerification": synthetic_verification,
    "SyntheticFacesIdentification": synthetic_identification,
}


def _folder(cfg: Any, key: str) -> str:
    if not cfg.DATA[key]:
        raise ConfigError(f"DATA.{key}", value="", expected="the test set's folder", remedy=f"Add DATA.{key} PATH.")
    return str(cfg.DATA[key])
