"""Face test sets of probes and a gallery, all by closed-set identification: TinyFace, SCface, built-in faces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.face_sets import read_tinyface
from qsd_plugin.data.packed_faces import is_packed, packed_scface, packed_tinyface
from qsd_plugin.data.scface import SCFACE_METRES, SCfaceSplit, read_scface, scface_split
from qsd_plugin.data.synthetic.face_protocols import identification
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.evaluation.identification import IdentificationResult, by_group, closed_set
from qsd_plugin.hosts.fastreid.datasets import synthetic_faces
from qsd_plugin.hosts.fastreid.face_protocol import (
    SEVERITY,
    FaceTest,
    ImageFiles,
    Score,
    Sides,
    severity_of,
    thirds,
)
from qsd_plugin.report.per_trial import PerTrial

#: What the quality of SCface's trials is.
_NEARNESS = "nearness of the camera"


def tinyface(cfg: Any) -> FaceTest:
    """``TinyFace``: closed-set identification among distractors, ranks 1, 5 and 20.

    Raises:
        ConfigError: ``DATA.TINYFACE`` is empty.
        DataError: There is no such set.
    """
    source = required(cfg, "TINYFACE")
    data = packed_tinyface(source) if is_packed(source) else read_tinyface(source)
    return _probes_first(
        "TinyFace",
        [str(path) for path in data.paths],
        data.identities,
        (data.num_probe, data.num_probe + data.num_mated),
        metric=cfg.TEST.METRIC,
        shown=["/".join(path.parts[-2:]) for path in data.paths],
    )


def scface(cfg: Any) -> FaceTest:
    """``SCface``: rank 1 at each of the three distances, mug shots as gallery.

    Of all subjects (130) and, under names of their own, of those after the first ``TEST.SCFACE.FINE_TUNING`` ones (80),
    who are then alone in the gallery, too.

    Raises:
        ConfigError: ``DATA.SCFACE`` is empty.
        DataError: There is no such set.
    """
    source = required(cfg, "SCFACE")
    data = packed_scface(source) if is_packed(source) else read_scface(source)
    everybody = scface_split(data.names)
    held_out = everybody.without_first(cfg.TEST.SCFACE.FINE_TUNING)
    metric = cfg.TEST.METRIC

    def compare(first: torch.Tensor, second: torch.Tensor) -> Score:
        whole = _scface_result(first, second, everybody, metric)
        results = by_group(whole, everybody.distance)
        numbers = {f"d{d} ({SCFACE_METRES[d]} m)": 100 * result.rates[1] for d, result in results.items()}
        mean = sum(numbers.values()) / len(numbers)
        details: dict[str, Any] = {"SCface": results}
        subjects = len(held_out.subjects())
        if 0 < subjects < len(everybody.subjects()):
            part = by_group(_scface_result(first, second, held_out, metric), held_out.distance)
            details[f"last {subjects} subjects"] = part
            numbers |= {f"d{d}, last {subjects} subjects": 100 * result.rates[1] for d, result in part.items()}
        trials = _trials(
            "SCface", [data.names[row] for row in everybody.probe], everybody.probe_ids, whole, everybody.distance
        )
        return Score({**numbers, "metric": mean}, details, trials=trials)

    paths = [str(path) for path in data.paths]
    mated = np.isin(everybody.probe_ids, everybody.gallery_ids)
    sides = Sides(compare, np.sort(everybody.probe))
    return FaceTest.of_sides(paths, ImageFiles(paths), sides, everybody.probe[mated, None], _NEARNESS)


def synthetic_identification(cfg: Any) -> FaceTest:
    """``SyntheticFacesIdentification``: the built-in faces among distractors, rank 1 also by thirds of the probes."""
    spec, folder = synthetic_faces(cfg)
    data = identification(spec)
    return _probes_first(
        "SyntheticFacesIdentification",
        [str(folder / name) for name in data.paths],
        data.identities,
        (data.num_probe, data.num_probe + data.num_mated),
        metric=cfg.TEST.METRIC,
        shown=data.paths,
        details="SyntheticFaces",
        quality=-severity_of(folder, data.paths[: data.num_probe]),
    )


def required(cfg: Any, key: str) -> str:
    """``DATA.<key>``.

    Raises:
        ConfigError: It is empty.
    """
    if not cfg.DATA[key]:
        raise ConfigError(
            f"DATA.{key}",
            value="",
            expected="the test set's folder or .rec file",
            remedy=f"Add DATA.{key} PATH.",
        )
    return str(cfg.DATA[key])


def _probes_first(
    test: str,
    paths: Sequence[str],
    identities: Array,
    ends: tuple[int, int],
    *,
    metric: str,
    shown: Sequence[str],
    details: str = "",
    quality: Array | None = None,
) -> FaceTest:
    """Probes, mated gallery and distractors one after another.

    Args:
        test: Its name.
        paths: Of the images, N of them.
        identities: [N].
        ends: Where the probes end, and where the mated gallery does.
        metric: Of the embeddings.
        shown: Names of the images in trials, the same on every machine.
        details: Name of the result in the JSON file; default: ``test``.
        quality: Of the probes, higher is better; ``None``: not known.
    """
    first, last = ends
    who = identities[:first]
    mated = np.flatnonzero(np.isin(who, identities[first:last]))

    def compare(probes: torch.Tensor, gallery: torch.Tensor) -> Score:
        result = closed_set(
            probes[:first],
            gallery[first:last],
            who,
            identities[first:last],
            distractors=gallery[last:] if last < len(gallery) else None,
            metric=metric,
        )
        rates: Mapping[str, float] = {f"Rank-{r}": 100 * rate for r, rate in result.rates.items()}
        by_third = {} if quality is None else thirds(result.rank == 1, quality)
        trials = _trials(test, shown[:first], who, result, quality)
        return Score({**rates, **by_third, "metric": rates["Rank-1"]}, {details or test: result}, trials=trials)

    return FaceTest.of_sides(
        paths, ImageFiles(paths), Sides(compare, np.arange(first)), mated[:, None], "" if quality is None else SEVERITY
    )


def _scface_result(first: torch.Tensor, second: torch.Tensor, split: SCfaceSplit, metric: str) -> IdentificationResult:
    return closed_set(
        first[split.probe], second[split.gallery], split.probe_ids, split.gallery_ids, ranks=(1,), metric=metric
    )


def _trials(
    test: str, names: Sequence[str], identities: Array, result: IdentificationResult, quality: Array | None
) -> PerTrial:
    """Metric ``rank-1``: 100 for a probe whose nearest gallery image is of the right person, of probes with a mate."""
    rows = np.flatnonzero(result.valid)
    return PerTrial(
        query=np.array([names[row] for row in rows.tolist()]),
        test=np.full(len(rows), test),
        identity=np.array([f"{who:05d}" for who in identities[rows].tolist()]),
        quality=np.full(len(rows), np.nan) if quality is None else quality[rows].astype(np.float64),
        values=100.0 * (result.rank == 1)[:, None],
        names=np.array(["rank-1"]),
    )


IDENTIFICATION: dict[str, Callable[[Any], FaceTest]] = {
    "TinyFace": tinyface,
    "SCface": scface,
    "SyntheticFacesIdentification": synthetic_identification,
}
