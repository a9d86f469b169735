"""IJB-B and IJB-C, 1:1 mixed verification: sets of images (templates) are pooled and compared in pairs.

Whitelam et al., CVPRW 2017, "IARPA Janus Benchmark-B"; Maze et al., ICB 2018, "IARPA Janus Benchmark-C".

Shapes: N images, D embedding dimension, S templates, P pairs of templates, F wanted false acceptance rates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix, to_numpy
from qsd_plugin.evaluation.curves import Roc, check_rule, exact_tar, nearest_tar, roc
from qsd_plugin.evaluation.verification import normalised

#: False acceptance rates that are reported for IJB-B and IJB-C.
FAR_TARGETS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

#: Size of one block of embeddings while pooling and scoring.
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class TemplateResult:
    """Outcome of 1:1 template verification; all rates are fractions.

    Attributes:
        far_targets: Wanted false acceptance rates [F].
        tar: True acceptance rates [F].
        far: False acceptance rates [F] at the points that ``tar`` was read from.
        rule: ``nearest`` or ``exact``.
        switches: The protocol in InsightFace's spelling, such as ``N1 D1 F1``.
        roc: The whole curve, for ROC and DET plots.
    """

    far_targets: Array
    tar: Array
    far: Array
    rule: str
    switches: str
    roc: Roc


def verify_templates(
    features: Matrix,
    templates: Labels,
    medias: Labels,
    pairs: Matrix,
    genuine: Labels,
    *,
    flipped: Matrix | None = None,
    detector_score: Matrix | None = None,
    use_norm: bool = True,
    use_detector_score: bool = True,
    use_flip: bool = True,
    far_targets: Sequence[float] = FAR_TARGETS,
    rule: str = "nearest",
) -> TemplateResult:
    """Pool images to templates, score pairs of templates, read the ROC.

    Args:
        features: Raw embeddings [N, D] of the images.
        templates: Template [N] of each image.
        medias: Medium [N] of each image: the frames of one video share a number. Counted within a template.
        pairs: Templates [P, 2] to compare.
        genuine: Whether a pair shows one person [P]; bool, or 0 and 1.
        flipped, detector_score, use_norm, use_detector_score, use_flip: See :func:`pool_templates`.
        far_targets: Wanted false acceptance rates, each in [0, 1].
        rule: ``nearest``: at the ROC's point nearest to the rate, as published numbers are read
            (:func:`~qsd_plugin.evaluation.curves.nearest_tar`). ``exact``: the best at a rate that is not exceeded.

    Raises:
        DataError: Shapes that do not fit, NaN, an unknown template, or one kind of pairs only.
        ConfigError: Unknown rule, or a switch without the data it needs.
    """
    check_rule(rule, far_targets)
    names, embeddings = pool_templates(
        features,
        templates,
        medias,
        flipped=flipped,
        detector_score=detector_score,
        use_norm=use_norm,
        use_detector_score=use_detector_score,
        use_flip=use_flip,
    )
    scores = score_pairs(names, embeddings, pairs)
    curve = roc(scores, genuine)
    tar, far = nearest_tar(curve, far_targets) if rule == "nearest" else exact_tar(scores, genuine, far_targets)
    switches = f"N{use_norm:d} D{use_detector_score:d} F{use_flip:d}"
    return TemplateResult(np.array(far_targets), tar, far, rule, switches, curve)


def pool_templates(
    features: Matrix,
    templates: Labels,
    medias: Labels,
    *,
    flipped: Matrix | None = None,
    detector_score: Matrix | None = None,
    use_norm: bool = True,
    use_detector_score: bool = True,
    use_flip: bool = True,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Array, Array]:
    """One embedding per template: the mean over the images of each medium, then the sum over media, of length 1.

    Args:
        features: Raw embeddings [N, D] of the images.
        templates: Template [N] of each image.
        medias: Medium [N] of each image.
        flipped: Raw embeddings [N, D] of the mirror images; needed by ``use_flip``.
        detector_score: Of each image [N], >= 0; needed by ``use_detector_score``.
        use_norm: N. True: an image weighs as much as its embedding is long. False: embeddings are normalised first.
            (InsightFace's ``ijb_evals.py`` has the same option with the opposite meaning; this is ``eval_ijbc.py``'s.)
        use_detector_score: D. An image also weighs its detector score.
        use_flip: F. The embedding of an image is the sum of its own and its mirror image's.
        block_bytes: Size of the float64 copy held at a time.

    Returns:
        The templates [S], ascending, and their embeddings [S, D] float64.

    Raises:
        DataError: Shapes that do not fit, or NaN.
        ConfigError: A switch without the data it needs.
    """
    plain = to_numpy(features)
    if plain.ndim != 2 or not len(plain):
        raise DataError("Shape of image embeddings", value=plain.shape, expected="[N, D] with at least one image")
    template, media = _column(templates, "templates", len(plain)), _column(medias, "medias", len(plain))
    weights = _wanted(detector_score, use_detector_score, "use_detector_score", "detector_score", (len(plain),))
    mirrored = _wanted(flipped, use_flip, "use_flip", "flipped", plain.shape)

    order = np.lexsort((media, template))
    template, media = template[order], media[order]
    first = np.flatnonzero(np.concatenate(([True], template[1:] != template[:-1])))
    pooled = np.empty((len(first), plain.shape[1]))
    starts = np.append(first, len(plain))
    for begin, end in _whole_templates(starts, max(1, block_bytes // (8 * plain.shape[1]))):
        rows = order[starts[begin] : starts[end]]
        block = plain[rows].astype(np.float64)
        if mirrored is not None:
            block += mirrored[rows]
        if not use_norm:
            block = normalised(block)
        if weights is not None:
            block *= weights[rows, None]
        bad = rows[np.isnan(block).any(1)]
        if len(bad):
            raise DataError(
                f"Embeddings or detector scores of {len(bad)} images are NaN, first of image {bad.min()}",
                expected="numbers",
            )
        here, frames = template[starts[begin] : starts[end]], media[starts[begin] : starts[end]]
        change = np.concatenate(([True], (here[1:] != here[:-1]) | (frames[1:] != frames[:-1])))
        medium = np.flatnonzero(change)
        means = np.add.reduceat(block, medium) / np.diff(np.append(medium, len(block)))[:, None]
        pooled[begin:end] = np.add.reduceat(means, np.searchsorted(medium, starts[begin:end] - starts[begin]))
    return template[first], normalised(pooled)


def score_pairs(names: Labels, embeddings: Matrix, pairs: Matrix, *, block_bytes: int = BLOCK_BYTES) -> Array:
    """Inner products [P] of pairs of templates, a block of pairs at a time.

    Args:
        names: Templates [S], ascending and without repetition.
        embeddings: Their embeddings [S, D].
        pairs: Templates [P, 2] by name.
        block_bytes: Size of the embeddings gathered at a time.

    Raises:
        DataError: A pair names an unknown template.
    """
    known, vectors, wanted = to_numpy(names), to_numpy(embeddings), to_numpy(pairs)
    if wanted.ndim != 2 or wanted.shape[1] != 2:
        raise DataError("Shape of template pairs", value=wanted.shape, expected="[P, 2]")
    scores = np.empty(len(wanted), dtype=vectors.dtype)
    rows = max(1, block_bytes // (2 * vectors.shape[1] * vectors.itemsize))
    for start in range(0, len(wanted), rows):
        part = wanted[start : start + rows]
        place = np.searchsorted(known, part).clip(max=len(known) - 1)
        missing = part[known[place] != part]
        if len(missing):
            raise DataError(
                "Template pairs name templates without images",
                value=np.unique(missing)[:5].tolist(),
                expected=f"some of the {len(known)} templates",
                remedy="Check that the pair list and the image list belong to one data set.",
            )
        np.einsum("ij,ij->i", vectors[place[:, 0]], vectors[place[:, 1]], out=scores[start : start + rows])
    return scores


def _whole_templates(starts: Array, rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive templates that hold at most ``rows`` images, or one template."""
    begin = 0
    while begin < len(starts) - 1:
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + rows, side="right")) - 1)
        yield begin, end
        begin = end


def _column(values: Labels, name: str, count: int) -> Array:
    column = to_numpy(values)
    if column.shape != (count,):
        raise DataError(f"Shape of {name}", value=column.shape, expected=f"({count},), one per image")
    return column


def _wanted(values: Matrix | None, wanted: bool, switch: str, name: str, shape: tuple[int, ...]) -> Array | None:
    if not wanted:
        return None
    if values is None:
        raise ConfigError(f"{switch}=True without {name}", remedy=f"Pass {name}, or {switch}=False.")
    array = to_numpy(values)
    if array.shape != shape:
        raise DataError(f"Shape of {name}", value=array.shape, expected=str(shape))
    return array
