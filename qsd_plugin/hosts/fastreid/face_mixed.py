"""Mixed-quality evaluation: any face test set with two sides, with images of one side or of both degraded.

A result is named ``<level>/<side>/<number>``: ``lowres-0.15/one/accuracy``. ``clean/...`` is the test set as it is, and
``mixed/...`` of a trial the mean over all degraded conditions. Every image is embedded once as it is and once per
level; all conditions are scored from these embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.degradations.levels import CROSS_RESOLUTION_LEVELS, Level, parse_levels
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.hosts.fastreid.face_identification import IDENTIFICATION
from qsd_plugin.hosts.fastreid.face_pairs import PAIRS, bin_files
from qsd_plugin.hosts.fastreid.face_protocol import FaceTest, Score, Sides
from qsd_plugin.report.conditions import CLEAN, MEAN
from qsd_plugin.report.per_trial import PerTrial, join

#: Which images are degraded: the first ones of pairs or the probes; all.
SIDES = ("one", "both")
#: Numbers of a protocol that are not repeated per condition; the JSON file has them all.
_LEFT_OUT = ("metric", "TAR@FAR=1e-01", "Rank-5", "Rank-20", "worst third", "middle third", "best third")


@dataclass(frozen=True)
class _Part:
    """One protocol: its test set, and the rows of its images in the joint list."""

    test: FaceTest
    sides: Sides
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class MixedImages:
    """Image ``index``: the clean one of that number, or a degraded one of those behind them.

    Args:
        read: Per protocol, gives an image by its own index.
        sources: (protocol, index) of each clean image, [N, 2].
        levels: Of degradation.
        rows: Clean images that are degraded at every level, R of them.
        seed: Of the degradations.
    """

    read: Sequence[Callable[[int], Image.Image]]
    sources: NDArray[np.int64]
    levels: Sequence[Level]
    rows: NDArray[np.int64]
    seed: int

    def __call__(self, index: int) -> Image.Image:
        clean = len(self.sources)
        if index < clean:
            return self._clean(index)
        level, place = divmod(index - clean, len(self.rows))
        row = int(self.rows[place])
        degraded, _ = self.levels[level].apply(np.asarray(self._clean(row)), seed=self.seed, index=row)
        return Image.fromarray(degraded)

    def _clean(self, row: int) -> Image.Image:
        part, index = self.sources[row].tolist()
        image: Image.Image = self.read[part](index)
        return image


def mixed_test(
    tests: Sequence[FaceTest], *, levels: Sequence[str], sides: Sequence[str] = SIDES, seed: int = 0
) -> FaceTest:
    """One test set of several, each scored clean and at every level with one side or both degraded.

    Args:
        tests: With sides. Images of one name are one image.
        levels: See :mod:`qsd_plugin.degradations.levels`.
        sides: Of :data:`SIDES`.
        seed: Of the degradations, >= 0.

    Raises:
        ConfigError: A level or side that does not exist, or a test set without sides.
    """
    parsed = parse_levels(levels)
    if not sides or not set(sides) <= set(SIDES) or len(set(sides)) < len(sides):
        raise ConfigError("EVALUATION.MIXED.SIDES", value=list(sides), expected="one, both, or each of them once")
    if seed < 0:
        raise ConfigError("EVALUATION.MIXED.SEED", value=seed, expected="0 or more")
    place: dict[str, int] = {}
    sources: list[tuple[int, int]] = []
    parts: list[_Part] = []
    for number, test in enumerate(tests):
        if test.sides is None:
            raise ConfigError("Face test set to degrade on one side", expected="one of pairs, or of probes and gallery")
        for index, name in enumerate(test.names):
            if place.setdefault(name, len(sources)) == len(sources):
                sources.append((number, index))
        rows = np.array([place[name] for name in test.names])
        parts.append(_Part(test, test.sides, rows))
    clean = len(sources)
    if "both" in sides:
        degraded = np.arange(clean)
    else:
        degraded = np.unique(np.concatenate([part.rows[part.sides.first] for part in parts]))
    names = list(place) + [f"{name} at {level.text}" for level in parsed for name in np.array([*place])[degraded]]
    read = MixedImages([test.read for test in tests], np.array(sources), parsed, degraded, seed)

    def score(features: torch.Tensor) -> Score:
        whole, scores = features[:clean], {}
        scores[CLEAN] = [_scored(part, whole, whole) for part in parts]
        for number, level in enumerate(parsed):
            worse = whole.clone()
            start = clean + number * len(degraded)
            worse[degraded] = features[start : start + len(degraded)]
            for side in sides:
                other = worse if side == "both" else whole
                scores[f"{level.text}/{side}"] = [_scored(part, worse, other) for part in parts]
        return _joined(scores, {"levels": [level.text for level in parsed], "sides": list(sides), "seed": seed})

    qualities = dict.fromkeys(test.quality_name for test in tests)
    quality = "" if "" in qualities else ", ".join(qualities)
    return FaceTest(names, read, score, quality_name=quality)


def _scored(part: _Part, first: torch.Tensor, second: torch.Tensor) -> Score:
    one = first[part.rows]
    return part.sides.compare(one, one if second is first else second[part.rows])


def _joined(scores: dict[str, list[Score]], about: dict[str, Any]) -> Score:
    """Numbers, details, curves and trials of all conditions."""
    numbers: dict[str, float] = {}
    details: dict[str, Any] = dict(about)
    curves: dict[str, tuple[Array, Array]] = {}
    for condition, found in scores.items():
        for score in found:
            numbers |= {f"{condition}/{key}": value for key, value in score.numbers.items() if key not in _LEFT_OUT}
            curves |= {f"{condition} {key}": curve for key, curve in score.curves.items()}
        details[condition] = {key: value for score in found for key, value in _named(score).items()}
    metric = np.mean([[score.numbers["metric"] for score in found] for found in scores.values()])
    numbers["metric"] = float(metric)
    return Score(numbers, details, curves, _trials(scores))


def _named(score: Score) -> dict[str, Any]:
    """Details under names that tell verification from identification."""
    return {("verification" if key == "result" else key): value for key, value in score.details.items()}


def _trials(scores: dict[str, list[Score]]) -> PerTrial:
    """A metric per condition, and in front of them the mean over the degraded ones, which verdicts are about."""
    joined = []
    for number in range(len(scores[CLEAN])):
        trials = {condition: found[number].trials for condition, found in scores.items()}
        known = {condition: each for condition, each in trials.items() if each is not None}
        clean = known[CLEAN]
        names = [f"{condition}/{name}" for condition, each in known.items() for name in each.metric_names]
        values = np.concatenate([each.values for each in known.values()], axis=1)
        degraded = np.stack([each.values for condition, each in known.items() if condition != CLEAN])
        means = [f"{MEAN}/{name}" for name in clean.metric_names]
        joined.append(
            replace(
                clean,
                test=np.array([f"{name} mixed" for name in clean.test.tolist()]),
                values=np.concatenate([degraded.mean(axis=0), values], axis=1),
                names=np.array([*means, *names]),
            )
        )
    return join(joined)


def cross_resolution(cfg: Any) -> FaceTest:
    """``CRLFW``: pairs of ``DATA.CRLFW`` whose first images are reduced to 8, 12, 16 and 20 pixels.

    Raises:
        ConfigError: No file is named.
        DataError: It cannot be read.
    """
    if not cfg.DATA.CRLFW:
        raise ConfigError("DATA.CRLFW", value="", expected="lfw.bin", remedy="Add DATA.CRLFW PATH.")
    test = bin_files([Path(cfg.DATA.CRLFW).expanduser()])
    return mixed_test([test], levels=CROSS_RESOLUTION_LEVELS, sides=("one",))


def _mixed(*builders: Callable[[Any], FaceTest]) -> Callable[[Any], FaceTest]:
    """The test set of ``EVALUATION.MIXED`` over these."""

    def build(cfg: Any) -> FaceTest:
        options = cfg.EVALUATION.MIXED
        tests = [each(cfg) for each in builders]
        return mixed_test(tests, levels=options.LEVELS, sides=options.SIDES, seed=options.SEED)

    return build


MIXED: dict[str, Callable[[Any], FaceTest]] = {
    "SyntheticFacesMixed": _mixed(PAIRS["SyntheticFacesVerification"], IDENTIFICATION["SyntheticFacesIdentification"]),
    "VerificationBinMixed": _mixed(PAIRS["VerificationBin"]),
    "FacePairsMixed": _mixed(PAIRS["FacePairs"]),
    "TinyFaceMixed": _mixed(IDENTIFICATION["TinyFace"]),
    "SCfaceMixed": _mixed(IDENTIFICATION["SCface"]),
    "CRLFW": cross_resolution,
}
