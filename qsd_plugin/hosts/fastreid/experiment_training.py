"""One network of an experiment as a stage: trained or given, then evaluated, with what its training took.

Stages end with the results of the last epoch: on every query (:class:`~qsd_plugin.report.per_query.PerQuery`) or, on
test sets that are scored by the plugin, on every trial (:class:`~qsd_plugin.report.per_trial.PerTrial`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import face_tests, face_trials, recipes, report, report_frame, training_stages
from qsd_plugin.hosts.fastreid.datasets import dataset_folder, training_set
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import STAGE1
from qsd_plugin.report import per_query, per_trial
from qsd_plugin.report.per_query import PerQuery
from qsd_plugin.report.per_trial import PerTrial
from qsd_plugin.report.run_doctor import StageFolder

#: Figures of a training that its ``results.json`` repeats.
SHARES = tuple(f"qgface/{name}" for name in ("low_quality", "low_quality_clean", "low_quality_degraded", "contrasted"))

ARGUMENTS = argparse.Namespace(config_file="", eval_only=False)  # for the host's log


@dataclass(frozen=True)
class Trained:
    """A network to train, or one that is given, and how it is evaluated.

    Args:
        cfg: Of its training.
        plain: Of its evaluation, without what training adds.
        given: Its checkpoint where it is not trained.
        teacher: The stage folder of the network whose embeddings it is compared with, on face test sets.
        before: Stage folders of the trainings that it goes on from.
    """

    cfg: Any
    plain: Any
    given: Path | None = None
    teacher: Path | None = None
    before: Sequence[Path] = ()


def trained_stage(name: str, run: Trained, data: str, keys: dict[str, Any], inputs: Sequence[Path] = ()) -> Stage:
    """Train a network, or take the one that is given, and evaluate it."""
    plain, given = run.plain, run.given
    scored_here = plain.DATASETS.TESTS[0] in face_tests.TESTS

    def work(folder: Path, resume: bool) -> None:
        if given is None:
            _train(run.cfg, folder, resume)
        checkpoint = given or folder / "model_final.pth"
        title = f"Evaluating {name}"
        if scored_here:
            trials, about = face_trials.evaluate(plain, checkpoint, folder, teacher=run.teacher, title=title)
            trials.save(folder / per_trial.FILE)
            _summarise(folder, run, trials, about)
        else:
            test_name = plain.DATASETS.TESTS[0]
            test = report.load_test(plain, test_name)
            root = dataset_folder(plain, test_name)
            queries = report.evaluate_per_query(plain, checkpoint, test, root, title=title)
            queries.save(folder / per_query.FILE)
            _summarise(folder, run, queries, test.quality_name)

    file = per_trial.FILE if scored_here else per_query.FILE
    outputs = [file, "results.json", *(["model_final.pth"] if given is None else [])]
    keys = {
        **keys,
        "TEST.METRIC": plain.TEST.METRIC,
        **({"DATASETS.TESTS": list(plain.DATASETS.TESTS), **recipes.evaluation_keys(plain)} if scored_here else {}),
    }
    return Stage(name, work, keys=keys, inputs=[*inputs, *([given] if given else [])], data=data, outputs=outputs)


def training_alone(name: str, cfg: Any, data: str, keys: dict[str, Any], inputs: Sequence[Path] = ()) -> Stage:
    """Train a network that others go on from, without evaluating it."""
    return Stage(
        name,
        lambda folder, resume: _train(cfg, folder, resume),
        keys=keys,
        inputs=inputs,
        data=data,
        outputs=["model_final.pth"],
    )


def training_cost(folder: Path) -> dict[str, float]:
    """What the training in ``folder`` took, by the host's own timing; empty where there was none.

    Returns:
        ``steps``, ``images`` (that the loader gave in all of them; a pair is two) and ``seconds_per_step``, the median,
        which the host does not know of less than three steps.
    """
    stage = StageFolder(folder)
    if not stage.events:
        return {}
    times = stage.series("time")
    per_step = int(stage.setting("SOLVER.IMS_PER_BATCH", 0)) * _views(stage)
    return {
        "steps": stage.iterations,
        "images": stage.iterations * per_step,
        **({"seconds_per_step": float(np.median(times))} if times else {}),
    }


def _views(stage: StageFolder) -> int:
    """Images that the loader gives for each that the sampler draws."""
    architecture = str(stage.setting("MODEL.META_ARCHITECTURE", ""))
    partners = architecture == "QSD" and stage.setting("QSD.PAIRING") == "partner"
    return 2 if architecture == STAGE1 or partners or stage.setting("QGFACE.VIEWS.MODE") == "pair" else 1


def _train(cfg: Any, folder: Path, resume: bool) -> None:
    training_stages.train(cfg, ARGUMENTS, resume=resume, evaluate=False)
    # Later stages read the last epoch only, and a study would fill the disk with the others.
    for file in folder.glob("model_*.pth"):
        if file.name != "model_final.pth":
            file.unlink()


def _summarise(folder: Path, run: Trained, outcome: PerQuery | PerTrial, quality: str) -> None:
    means = np.nanmean(outcome.metrics(), axis=0)
    trainings = [*run.before, *([folder] if run.given is None else [])]
    summary = {
        "test": ", ".join(run.plain.DATASETS.TESTS),
        "quality": quality,
        "training_images": sum(len(training_set(run.cfg, each)[1]) for each in run.cfg.DATASETS.NAMES),
        **dict(zip(outcome.metric_names, means.tolist(), strict=True)),
        **_last_shares(folder),
        "training": {path.name: training_cost(path) for path in trainings},
        "environment": report_frame.environment(),
        "settings": training_stages.flatten(run.cfg),
    }
    write_atomically(folder / "results.json", json.dumps(summary, indent=1, default=str).encode())


def _last_shares(folder: Path) -> dict[str, float]:
    """QGFace's shares of low quality in the last epoch that wrote them, by their names in ``metrics.json``."""
    found: dict[str, float] = {}
    for event in StageFolder(folder).events:
        found |= {name: float(value) for name, value in event.items() if name in SHARES}
    return found
