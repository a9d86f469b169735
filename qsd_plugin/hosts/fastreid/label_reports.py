"""Reports on label files of the config's training sets: fitness, agreement, and agreement with the synthetic truth."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.data.synthetic import load_face_truth, load_truth
from qsd_plugin.hosts.fastreid.datasets import dataset_folder, training_set
from qsd_plugin.quality.checks import LabelCheck, check_labels
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.report.label_agreement import agreement_with_truth, direction_agreement, rank_correlation
from qsd_plugin.report.label_tables import agreement_table, check_table, truth_table
from qsd_plugin.report.pictures import draw_label_histogram

logger = logging.getLogger("fastreid.qsd_plugin.labels")

REPORT = "check.json"
PICTURE = "label_histogram.png"
#: The data sets whose images' true severities are known.
SYNTHETIC = {"SyntheticPedestrians": load_truth, "SyntheticFaces": load_face_truth}


def check_files(cfg: Any, files: Mapping[str, Path]) -> dict[str, LabelCheck]:
    """Compare label files with the training images they are for.

    Args:
        cfg: The host's config.
        files: Label file by data-set name.
    """
    checks = {}
    for name, file in files.items():
        items = training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1]
        checks[name] = check_labels(
            QualityLabels.load(file),
            [path for path, _, _ in items],
            [pid for _, pid, _ in items],
            root=dataset_folder(cfg, name),
            basenames=len(files) == 1,
        )
    return checks


def write_report(cfg: Any, files: Mapping[str, Path], folder: Path) -> None:
    """Check label files, log the table and its warnings, and write ``check.json`` and a histogram to ``folder``."""
    checks = check_files(cfg, files)
    write_json(folder / REPORT, {name: asdict(check) for name, check in checks.items()})
    draw_histogram(files, folder / PICTURE)
    logger.info("Quality labels in %s\n%s", folder, check_table(checks))
    for name, check in checks.items():
        for text in check.warnings:
            logger.warning("Quality labels of %s: %s", name, text)


def draw_histogram(files: Mapping[str, Path], path: Path) -> None:
    """Histogram of every label file; unscaled labels are drawn stretched to 0 to 100."""
    labels = {name: QualityLabels.load(file) for name, file in files.items()}
    stretched = {
        name: table.rescaled("minmax") if table.meta.get("scale") == "none" else table for name, table in labels.items()
    }
    draw_label_histogram({name: table.score for name, table in stretched.items()}, path)


def compare_files(cfg: Any, files: Sequence[Path], *, severity: bool) -> tuple[str, dict[str, Any]]:
    """How far label files of the config's training set agree, as text and as JSON values.

    Args:
        cfg: The host's config, with one training set.
        files: Label files.
        severity: Compare them with the true severities of one of :data:`SYNTHETIC` too.

    Raises:
        ConfigError: More than one training set, or no truth is known about it.
    """
    if len(cfg.DATASETS.NAMES) != 1:
        raise ConfigError(
            "DATASETS.NAMES", value=tuple(cfg.DATASETS.NAMES), expected="one training set, because labels are compared"
        )
    name = cfg.DATASETS.NAMES[0]
    if severity and name not in SYNTHETIC:
        raise ConfigError(
            "--severity",
            value=name,
            expected=f"DATASETS.NAMES {' or '.join(SYNTHETIC)}",
            remedy="Real images have no known truth.",
        )
    items = training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1]
    root = dataset_folder(cfg, name)
    paths, identities = [path for path, _, _ in items], [pid for _, pid, _ in items]
    scores = {title: _scores(file, paths, root) for title, file in zip(_titles(files), files, strict=True)}
    pairs = {
        (row, column): (
            rank_correlation(scores[row], scores[column]),
            direction_agreement(scores[row], scores[column], identities),
        )
        for row, column in permutations(scores, 2)
    }
    parts = [agreement_table(list(scores), pairs)]
    result: dict[str, Any] = {
        "dataset": name,
        "files": {title: str(file) for title, file in zip(scores, files, strict=True)},
        "agreement": [
            {"labels": row, "reference": column, "rank_correlation": value, "direction": asdict(direction)}
            for (row, column), (value, direction) in pairs.items()
        ],
    }
    if severity:
        truth: Any = SYNTHETIC[name](root)
        place = {path: row for row, path in enumerate(truth.paths)}
        rows = np.array([place[Path(path).relative_to(root).as_posix()] for path in paths])
        kinds = {kind: values[rows] for kind, values in truth.by_degradation.items()}
        against = {
            title: agreement_with_truth(values, truth.severity[rows], kinds, identities)
            for title, values in scores.items()
        }
        parts.append(truth_table(against))
        result["truth"] = {title: asdict(found) for title, found in against.items()}
    return "\n\n".join(parts), result


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; numbers that are not finite become ``null``."""
    write_atomically(path, json.dumps(_finite(content), indent=1).encode())


def _scores(file: Path, paths: Sequence[str], root: Path) -> NDArray[np.float64]:
    found, valid = QualityLabels.load(file).lookup(paths, root=root)
    return np.where(valid.numpy(), found.double().numpy(), np.nan)


def _titles(files: Sequence[Path]) -> list[str]:
    """Short names that differ: as few folders in front of the file's name as that takes."""
    depth = 1
    while depth < max(len(file.parts) for file in files):
        titles = ["/".join(file.with_suffix("").parts[-depth:]) for file in files]
        if len(set(titles)) == len(files):
            return titles
        depth += 1
    return [str(file) for file in files]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
