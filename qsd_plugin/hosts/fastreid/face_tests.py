"""Face test sets: which images, and how their embeddings are scored by the protocols of ``qsd_plugin.evaluation``."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.face_sets import read_ijb, read_tinyface
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.items import existing_folder, image_files
from qsd_plugin.data.synthetic import load_face_truth
from qsd_plugin.data.synthetic.face_protocols import identification, verification
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.identification import SCFACE_METRES, IdentificationResult, closed_set, scface, scface_split
from qsd_plugin.evaluation.quality_curves import error_discard_curve
from qsd_plugin.evaluation.templates import verify_templates
from qsd_plugin.evaluation.verification import correct_pairs, normalised, verify_distances, verify_pairs
from qsd_plugin.hosts.fastreid.datasets import synthetic_faces
from qsd_plugin.report.per_query import quality_groups
from qsd_plugin.report.per_trial import PerTrial


@dataclass(frozen=True)
class Score:
    """What a protocol makes of the embeddings.

    Args:
        numbers: Percentages for the host's table; ``metric`` is the one that picks the best checkpoint.
        details: Results by name, kept as JSON.
        curves: (FAR, TAR) by name, drawn as DET.
    """

    numbers: Mapping[str, float]
    details: Mapping[str, Any]
    curves: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)


@dataclass(frozen=True)
class FaceTest:
    """One test set.

    Args:
        names: Of the images, N of them; for messages.
        read: Gives the image of an index, RGB; an object that loader processes can be sent.
        score: From the raw embeddings [N, D] of the images, in their order.
        trials: The same trial by trial, for comparisons of networks; ``None`` where there is no such thing.
        labels: Names of the images that do not depend on where the set lies, [N]; this and the rest only with trials.
        people: Whom each image shows, [N].
        quality: Of each image, [N], higher is better; made without any tested network.
        quality_name: What that is, in words.
    """

    names: Sequence[str]
    read: Callable[[int], Image.Image]
    score: Callable[[torch.Tensor], Score]
    trials: Callable[[torch.Tensor], PerTrial] | None = None
    labels: Sequence[str] = ()
    people: Sequence[str] = ()
    quality: Sequence[float] = ()
    quality_name: str = ""


@dataclass(frozen=True)
class EncodedImages:
    """Images as they lie in a ``.bin`` file."""

    names: Sequence[str]
    encoded: Sequence[bytes]

    def __call__(self, index: int) -> Image.Image:
        return read_rgb(self.names[index], io.BytesIO(self.encoded[index]))


@dataclass(frozen=True)
class ImageFiles:
    """Aligned crops in files."""

    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return read_rgb(self.paths[index])


@dataclass(frozen=True)
class AlignedFiles:
    """Files that are aligned to 112x112 by their landmarks [N, 5, 2]."""

    paths: Sequence[str]
    points: Array

    def __call__(self, index: int) -> Image.Image:
        from qsd_plugin.data.align import norm_crop

        return Image.fromarray(norm_crop(np.asarray(read_rgb(self.paths[index])), self.points[index]))


def verification_bin(cfg: Any) -> FaceTest:
    """``VerificationBin``: every file of ``DATA.VERIFICATION`` by ten-fold verification.

    Raises:
        ConfigError: No file is named, or two have one name.
        DataError: A file cannot be read.
    """
    paths = [Path(path).expanduser() for path in cfg.DATA.VERIFICATION]
    if not paths or len({path.stem for path in paths}) < len(paths):
        raise ConfigError(
            "DATA.VERIFICATION",
            value=list(cfg.DATA.VERIFICATION),
            expected=".bin files of different names",
            remedy="""Such as: DATA.VERIFICATION "['lfw.bin', 'cfp_fp.bin']".""",
        )
    from qsd_plugin.data.verification_bin import load_bin

    encoded: list[bytes] = []
    names: list[str] = []
    labels: dict[str, Any] = {}
    for path in paths:
        images, labels[path.stem] = load_bin(path)
        encoded += images
        names += [f"{path}, image {number}" for number in range(len(images))]

    def score(features: torch.Tensor) -> Score:
        results, start = {}, 0
        for name, issame in labels.items():
            results[name] = verify_pairs(features[start : start + 2 * len(issame)], issame)
            start += 2 * len(issame)
        accuracy = {name: 100 * result.accuracy for name, result in results.items()}
        mean = sum(accuracy.values()) / len(accuracy)
        curves = {name: (result.fpr, result.tpr) for name, result in results.items()}
        return Score({**accuracy, "metric": mean}, results, curves)

    return FaceTest(names, EncodedImages(names, encoded), score)


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


def synthetic_verification(cfg: Any) -> FaceTest:
    """``SyntheticFacesVerification``: ten-fold verification of the built-in faces, also by thirds of the pairs.

    The quality of a pair is that of its worse image, the quality of an image its true severity of degradation.
    """
    spec, folder = synthetic_faces(cfg)
    data = verification(spec)
    severity, people = _truth(folder, data.paths)
    quality = -severity[data.pairs].max(axis=1)

    def distances(features: torch.Tensor) -> Array:
        unit = normalised(features.numpy())
        squared: Array = np.square(unit[data.pairs[:, 0]] - unit[data.pairs[:, 1]]).sum(axis=1)
        return squared

    def score(features: torch.Tensor) -> Score:
        apart = distances(features)
        result = verify_distances(apart, data.issame, far_targets=(1e-1, 1e-2))
        correct = correct_pairs(apart, data.issame, result)
        thirds = {name: 100 * float(correct[rows].mean()) for name, rows in _thirds(quality).items()}
        tar = {f"TAR@FAR={point.far_target:.0e}": 100 * point.val for point in result.at_far}
        numbers = {"accuracy": 100 * result.accuracy, **tar, **thirds, "metric": 100 * result.accuracy}
        edc = error_discard_curve(
            -apart, data.issame, -severity[data.pairs[:, 0]], -severity[data.pairs[:, 1]], start_error=0.1
        )
        details = {"result": result, "error_discard": edc}
        return Score(numbers, details, {"SyntheticFaces": (result.fpr, result.tpr)})

    def trials(features: torch.Tensor) -> PerTrial:
        apart = distances(features)
        correct = correct_pairs(apart, data.issame, verify_distances(apart, data.issame))
        return PerTrial(
            query=np.array([f"{data.paths[first]} {data.paths[second]}" for first, second in data.pairs]),
            test=np.full(len(data.pairs), "SyntheticFacesVerification"),
            identity=np.array(people)[data.pairs[:, 0]],
            quality=quality,
            values=100.0 * correct[:, None],
            names=np.array(["accuracy"]),
        )

    return _synthetic(folder, data.paths, severity, people, score, trials)


def synthetic_identification(cfg: Any) -> FaceTest:
    """``SyntheticFacesIdentification``: the built-in faces among distractors, rank 1 also by thirds of the probes."""
    spec, folder = synthetic_faces(cfg)
    data = identification(spec)
    first, last = data.num_probe, data.num_probe + data.num_mated
    severity, people = _truth(folder, data.paths)
    quality = -severity[:first]

    def found(features: torch.Tensor) -> IdentificationResult:
        return closed_set(
            features[:first],
            features[first:last],
            data.identities[:first],
            data.identities[first:last],
            distractors=features[last:] if last < len(features) else None,
            metric=cfg.TEST.METRIC,
        )

    def score(features: torch.Tensor) -> Score:
        result = found(features)
        rates = {f"Rank-{r}": 100 * rate for r, rate in result.rates.items()}
        thirds = {name: 100 * float(np.mean(result.rank[rows] == 1)) for name, rows in _thirds(quality).items()}
        return Score({**rates, **thirds, "metric": rates["Rank-1"]}, {"SyntheticFaces": result})

    def trials(features: torch.Tensor) -> PerTrial:
        return PerTrial(
            query=np.array(data.paths[:first]),
            test=np.full(first, "SyntheticFacesIdentification"),
            identity=np.array(people[:first]),
            quality=quality,
            values=100.0 * (found(features).rank == 1)[:, None],  # every probe has a mate
            names=np.array(["rank-1"]),
        )

    return _synthetic(folder, data.paths, severity, people, score, trials)


TESTS: dict[str, Callable[[Any], FaceTest]] = {
    "VerificationBin": verification_bin,
    "TinyFace": tinyface,
    "SCface": scface_test,
    "IJB": ijb,
    "SyntheticFacesVerification": synthetic_verification,
    "SyntheticFacesIdentification": synthetic_identification,
}

#: Those that can be compared trial by trial.
WITH_TRIALS = ("SyntheticFacesVerification", "SyntheticFacesIdentification")


def _synthetic(
    folder: Path,
    names: Sequence[str],
    severity: Array,
    people: Sequence[str],
    score: Callable[[torch.Tensor], Score],
    trials: Callable[[torch.Tensor], PerTrial],
) -> FaceTest:
    paths = [str(folder / name) for name in names]
    return FaceTest(
        paths, ImageFiles(paths), score, trials, names, people, (-severity).tolist(), "true severity of degradation"
    )


def _truth(folder: Path, names: Sequence[str]) -> tuple[Array, list[str]]:
    """True severity of degradation [N] and the person on each image."""
    truth = load_face_truth(folder)
    known = dict(zip(truth.paths, truth.severity.tolist(), strict=True))
    return np.array([known[name] for name in names]), [Path(name).parent.name for name in names]


def _thirds(quality: Array) -> dict[str, Array]:
    return {name: rows for name, rows in quality_groups(quality).items() if name != "all"}


def _folder(cfg: Any, key: str) -> str:
    if not cfg.DATA[key]:
        raise ConfigError(f"DATA.{key}", value="", expected="the test set's folder", remedy=f"Add DATA.{key} PATH.")
    return str(cfg.DATA[key])
