"""What the report of a recipe on persons and that of one on faces share: the frame of the results, labels, files."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import qsd_plugin
from qsd_plugin.core.distributed import rank
from qsd_plugin.core.files import write_atomically
from qsd_plugin.hosts.fastreid.datasets import dataset_folder, training_set
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.report.pictures import draw_label_histogram, draw_worst_and_best

Results = dict[str, Any]


def write_framed(
    cfg: Any,
    label_files: Sequence[Path],
    folder: Path,
    *,
    evaluate: Callable[[str], Results],
    as_table: Callable[[Results], str],
) -> None:
    """Evaluate all test sets and write ``results.json``, ``results.md`` and pictures of the labels; on one process.

    Args:
        cfg: Config of the recipe: ``DATASETS.TESTS``, and the training sets that the labels are of.
        label_files: Quality labels of the training sets, the first of the first one.
        folder: Where to write.
        evaluate: From the name of a test set to its part of the results; may draw pictures of its own.
        as_table: Markdown of all results.
    """
    if rank() != 0:
        return
    results: Results = {"note": "one seed, no claim", "seed": cfg.SEED, "environment": environment()}
    results["tests"] = {name: evaluate(name) for name in cfg.DATASETS.TESTS}
    _draw_labels(cfg, label_files, folder)
    text = as_table(results)
    write_atomically(folder / "results.json", json.dumps(results, indent=1).encode())
    write_atomically(folder / "results.md", text.encode())
    print(f"\n{text}\nPictures and results.json: {folder}", flush=True)


def environment() -> dict[str, Any]:
    """Versions and hardware, for every table that leaves this machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "qsd_plugin": qsd_plugin.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def _draw_labels(cfg: Any, label_files: Sequence[Path], folder: Path) -> None:
    labels = [QualityLabels.load(path) for path in label_files]
    names = [str(table.meta.get("dataset", path.stem)) for table, path in zip(labels, label_files, strict=True)]
    histograms = {name: table.score for name, table in zip(names, labels, strict=True)}
    draw_label_histogram(histograms, folder / "label_histogram.png")
    name = cfg.DATASETS.NAMES[0]
    paths = [path for path, _, _ in training_set(cfg, name)[1]]
    scores, known = labels[0].lookup(paths, root=dataset_folder(cfg, name))
    labelled = [path for path, has_label in zip(paths, known.tolist(), strict=True) if has_label]
    draw_worst_and_best(labelled, scores[known].double().numpy(), folder / "worst_and_best.png")
