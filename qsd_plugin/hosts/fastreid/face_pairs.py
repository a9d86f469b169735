"""Face test sets of pairs, all by ten-fold verification: ``.bin`` files, own lists, built-in faces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.face_lists import read_pairs
from qsd_plugin.data.items import check_listed, listed_root
from qsd_plugin.data.synthetic.face_protocols import verification
from qsd_plugin.data.verification_bin import check_folds, load_bin
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.quality_curves import error_discard_curve
from qsd_plugin.evaluation.verification import VerificationResult, correct_pairs, normalised, verify_distances
from qsd_plugin.hosts.fastreid.datasets import synthetic_faces
from qsd_plugin.hosts.fastreid.face_protocol import (
    SEVERITY,
    EncodedImages,
    FaceTest,
    ImageFiles,
    Score,
    Sides,
    severity_of,
    thirds,
)
from qsd_plugin.report.per_query import relative
from qsd_plugin.report.per_trial import PerTrial, join


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of a test set.

    Args:
        test: Name of the test set.
        names: Of the pairs, [P].
        rows: Of the embeddings, [P, 2].
        issame: Whether a pair shows one person, [P].
        identity: Whom the first image shows, [P]; a name of its own for each pair where nobody knows.
        quality: Of the worse image, [P], higher is better; ``None`` where it is not known.
    """

    test: str
    names: Sequence[str]
    rows: NDArray[np.int64]
    issame: NDArray[np.bool_]
    identity: Sequence[str]
    quality: Array | None = None

    def distances(self, first: torch.Tensor, second: torch.Tensor) -> Array:
        """Squared Euclidean distance [P] of the normalised embeddings of each pair, of ``first`` and of ``second``."""
        one = normalised(first.numpy())
        other = one if second is first else normalised(second.numpy())
        distances: Array = np.square(one[self.rows[:, 0]] - other[self.rows[:, 1]]).sum(axis=1)
        return distances

    def trials(self, correct: Array) -> PerTrial:
        """Metric ``accuracy``: 100 for a pair that the protocol decided rightly, bool [P], 0 for the others.

        Its mean over pairs is the protocol's accuracy, the mean over folds, where the number of pairs is a multiple of
        ten; else some folds are longer than others by one pair, whose weight is then the same as that of any other.
        """
        return PerTrial(
            query=np.array(self.names),
            test=np.full(len(self.names), self.test),
            identity=np.array(self.identity),
            quality=np.full(len(self.names), np.nan) if self.quality is None else self.quality,
            values=100.0 * correct[:, None],
            names=np.array(["accuracy"]),
        )


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
    return bin_files(paths)


def bin_files(paths: Sequence[Path]) -> FaceTest:
    """Ten-fold verification of each of these ``.bin`` files, which have different stems.

    Raises:
        DataError: A file cannot be read.
    """
    encoded: list[bytes] = []
    names: list[str] = []
    sets: list[Pairs] = []
    for path in paths:
        images, issame = load_bin(path)
        rows = len(encoded) + np.arange(len(images)).reshape(-1, 2)
        of_pairs = [f"{path.stem} {number}" for number in range(len(issame))]
        sets.append(Pairs(path.stem, of_pairs, rows, issame, of_pairs))
        encoded += images
        names += [f"{path}, image {number}" for number in range(len(images))]

    def compare(first: torch.Tensor, second: torch.Tensor) -> Score:
        results: dict[str, VerificationResult] = {}
        trials = []
        for pairs in sets:
            distances = pairs.distances(first, second)
            results[pairs.test] = result = verify_distances(distances, pairs.issame)
            trials.append(pairs.trials(correct_pairs(distances, pairs.issame, result)))
        accuracy = {name: 100 * result.accuracy for name, result in results.items()}
        mean = sum(accuracy.values()) / len(accuracy)
        curves = {name: (result.fpr, result.tpr) for name, result in results.items()}
        return Score({**accuracy, "metric": mean}, results, curves, join(trials))

    rows = np.arange(len(names)).reshape(-1, 2)
    return FaceTest.of_sides(names, EncodedImages(names, encoded), Sides(compare, rows[:, 0]), rows)


def face_pairs(cfg: Any) -> FaceTest:
    """``FacePairs``: ten-fold verification of the pairs listed in ``DATA.PAIRS``, by thirds where it has qualities.

    Raises:
        ConfigError: No list is named.
        DataError: The list is misformed, names files that do not exist, or a fold would have one kind of pairs only.
    """
    if not cfg.DATA.PAIRS:
        raise ConfigError(
            "DATA.PAIRS",
            value="",
            expected="a CSV file with the columns first,second,same",
            remedy="Add DATA.PAIRS PATH. tools/build_data.py face-split writes one from a folder.",
        )
    file = Path(cfg.DATA.PAIRS).expanduser().absolute()
    listed = read_pairs(file)
    check_folds(listed.same, name=f"Pair list {file}")
    first, second = ([str(path) for path in side] for side in (listed.first, listed.second))
    paths = list(dict.fromkeys([*first, *second]))
    check_listed(file, paths, what="Pair list")
    place = {path: row for row, path in enumerate(paths)}
    root = listed_root(file.parent, paths)
    names = [f"{relative(a, root)} {relative(b, root)}" for a, b in zip(first, second, strict=True)]
    rows = np.array([[place[a], place[b]] for a, b in zip(first, second, strict=True)])
    identity = names if listed.identity is None else listed.identity
    pairs = Pairs("FacePairs", names, rows, listed.same, identity, listed.quality)
    return _ten_fold(pairs, paths, quality_name="" if listed.quality is None else "the quality that DATA.PAIRS lists")


def synthetic_verification(cfg: Any) -> FaceTest:
    """``SyntheticFacesVerification``: ten-fold verification of the built-in faces, also by thirds of the pairs.

    The quality of a pair is that of its worse image, the quality of an image its true severity of degradation.
    """
    spec, folder = synthetic_faces(cfg)
    data = verification(spec)
    names = [f"{data.paths[a]} {data.paths[b]}" for a, b in data.pairs.tolist()]
    identity = [f"{who:05d}" for who in data.identities[data.pairs[:, 0]].tolist()]
    quality = -severity_of(folder, data.paths)[data.pairs].max(axis=1)
    pairs = Pairs("SyntheticFacesVerification", names, data.pairs, data.issame, identity, quality)
    paths = [str(folder / name) for name in data.paths]
    return _ten_fold(pairs, paths, curve="SyntheticFaces", quality_name=SEVERITY)


def _ten_fold(pairs: Pairs, paths: Sequence[str], *, quality_name: str, curve: str = "") -> FaceTest:
    """A test set of pairs in files, with the error-versus-discard curve where qualities are known."""

    def compare(first: torch.Tensor, second: torch.Tensor) -> Score:
        distances = pairs.distances(first, second)
        result = verify_distances(distances, pairs.issame, far_targets=(1e-1, 1e-2))
        correct = correct_pairs(distances, pairs.issame, result)
        numbers = {"accuracy": 100 * result.accuracy}
        numbers |= {f"TAR@FAR={point.far_target:.0e}": 100 * point.val for point in result.at_far}
        details: dict[str, Any] = {"result": result}
        if pairs.quality is not None:
            numbers |= thirds(correct, pairs.quality)
            details["error_discard"] = error_discard_curve(
                -distances, pairs.issame, pairs.quality, pairs.quality, start_error=0.1
            )
        numbers["metric"] = numbers["accuracy"]
        curves = {curve or pairs.test: (result.fpr, result.tpr)}
        return Score(numbers, details, curves, pairs.trials(correct))

    sides = Sides(compare, np.unique(pairs.rows[:, 0]))
    return FaceTest.of_sides(paths, ImageFiles(paths), sides, pairs.rows, quality_name)


PAIRS: dict[str, Callable[[Any], FaceTest]] = {
    "VerificationBin": verification_bin,
    "FacePairs": face_pairs,
    "SyntheticFacesVerification": synthetic_verification,
}
