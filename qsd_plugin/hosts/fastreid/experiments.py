"""Runs an experiment: per (split, seed) one baseline and its labels, then every arm from there, each stage resumable.

The stages of a block lie in ``<output>/<split>/seed<k>/``: ``baseline``, ``labels`` and one folder per arm. Training
stages end with :class:`PerQuery` results of the last epoch. An arm that fails leaves its traceback in ``error.txt`` and
the others go on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, get_start_method, set_start_method
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError, StageError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.progress import duration
from qsd_plugin.core.stages import MARKER, Stage, run_recipe
from qsd_plugin.hosts.fastreid import processes, recipes, report, samplers
from qsd_plugin.hosts.fastreid.datasets import dataset_folder, training_set
from qsd_plugin.hosts.fastreid.quality import label_files
from qsd_plugin.report import per_query
from qsd_plugin.report.experiment import BASELINE, LABELS, PICTURES, Experiment

#: Where a failed stage leaves its traceback, and a block in a process of its own what it prints.
ERROR, CONSOLE = "error.txt", "console.log"

_POLL_S = 0.5
_ARGUMENTS = argparse.Namespace(config_file="", eval_only=False)  # for the host's log


@dataclass(frozen=True)
class Plan:
    """What a call of :func:`run` does.

    Args:
        experiment: What it is about.
        arms: Names of the arms to run.
        options: ``KEY VALUE`` pairs from the command line; they lie between the common and the arms' own overrides.
        redo: A stage to run again although it has finished; ``baseline`` and ``labels`` take all arms with them.
        accept_stale: Keep finished stages although their settings have changed.
    """

    experiment: Experiment
    arms: list[str]
    options: list[str] = field(default_factory=list)
    redo: str | None = None
    accept_stale: bool = False

    @property
    def stages(self) -> list[str]:
        """Names of the stages of a block."""
        return [BASELINE, LABELS, *self.arms, *([PICTURES] if self.experiment.pictures else [])]


@dataclass(frozen=True)
class Event:
    """The end of a stage: which, how long it took (``None``: skipped), and what went wrong, if anything."""

    split: str
    seed: int
    stage: str
    seconds: float | None
    error: str = ""


def run(plan: Plan, *, jobs: int = 1, announce: Callable[[str], None] = print) -> list[Event]:
    """Run all blocks of ``plan`` and return the failures.

    Args:
        plan: What to run.
        jobs: Blocks at the same time, each in a process of its own with its share of the CPU's threads.
        announce: Receives a line at the end of every stage.

    Raises:
        QSDPluginError: A config of the experiment cannot work; nothing has been trained then.
    """
    if jobs < 1:
        raise ConfigError("--jobs", value=jobs, expected="an integer >= 1")
    check(plan)
    plan.experiment.save()
    blocks = plan.experiment.blocks
    progress = Progress(plan, min(jobs, len(blocks)), announce)
    if jobs == 1:
        for split, seed in blocks:
            run_block(plan, split, seed, progress.stage_ended)
    else:
        _run_in_processes(plan, blocks, jobs, progress)
    return progress.failures


def check(plan: Plan) -> None:
    """Build the model of every arm once, so that a mistake in the last one does not come to light after hours."""
    split, seed = plan.experiment.blocks[0]
    for arm in plan.arms:
        cfg = block_config(plan, split, seed, arm)
        if cfg.RECIPE.NAME != "qsd":
            raise ConfigError("RECIPE.NAME", value=cfg.RECIPE.NAME, expected="qsd in an experiment")
        if len(cfg.DATASETS.TESTS) != 1:
            raise ConfigError("DATASETS.TESTS", value=cfg.DATASETS.TESTS, expected="one test set in an experiment")
        recipes.check_final_stage(cfg)


def block_config(plan: Plan, split: str, seed: int, arm: str | None = None) -> Any:
    """The frozen config of a block, or of one arm of it; ``OUTPUT_DIR`` is the block's folder."""
    from fastreid.config import get_cfg

    experiment = plan.experiment
    cfg = get_cfg()
    cfg.merge_from_file(experiment.config)
    own = experiment.splits[split] | (experiment.arms[arm].overrides if arm else {})
    fixed = {"SEED": seed, "OUTPUT_DIR": str(experiment.folder(split, seed))}
    for values in (experiment.overrides, own, fixed):
        cfg.merge_from_list([part for pair in values.items() for part in pair])
        if values is experiment.overrides:
            cfg.merge_from_list(plan.options)
    cfg.freeze()
    return cfg


def run_block(plan: Plan, split: str, seed: int, stage_ended: Callable[[Event], None]) -> None:
    """Run the stages of one (split, seed); a stage that fails is reported and the next one tried."""
    root = plan.experiment.folder(split, seed)
    for stage in block_stages(plan, split, seed):
        start = time.monotonic()
        skipped = is_finished(root / stage.name)
        redo = stage.name if _is_redone(plan, stage.name) else None
        try:
            run_recipe([stage], root, from_stage=redo, accept_stale=plan.accept_stale)
        except Exception as error:
            write_atomically(root / stage.name / ERROR, traceback.format_exc().encode())
            stage_ended(Event(split, seed, stage.name, None, f"{type(error).__name__}: {error}"))
            if stage.name == BASELINE:
                return  # nothing can start without it
            continue
        (root / stage.name / ERROR).unlink(missing_ok=True)
        seconds = None if skipped and redo is None else time.monotonic() - start
        stage_ended(Event(split, seed, stage.name, seconds))


def block_stages(plan: Plan, split: str, seed: int) -> list[Stage]:
    """The stages of one block: baseline, labels, the arms and, where the experiment wants them, the pictures."""
    cfg = block_config(plan, split, seed)
    root = Path(cfg.OUTPUT_DIR)
    items = {name: training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1] for name in cfg.DATASETS.NAMES}
    data = recipes._digest(items)
    plain = recipes.baseline_config(cfg, root / BASELINE)
    given = cfg.RECIPE.BASELINE.WEIGHTS
    checkpoint = Path(given) if given else root / BASELINE / "model_final.pth"
    own_keys = recipes._without(plain, recipes._NO_QUALITY)
    stages = [_training_stage(BASELINE, plain, plain, data, own_keys, [], checkpoint if given else None)]
    folds = recipes.fold_stages(cfg, root, _ARGUMENTS, items)
    stages += [*folds, recipes.labels_stage(cfg, plain, checkpoint, items, folds=folds)]
    for arm in plan.arms:
        own = block_config(plan, split, seed, arm)
        tuned = recipes.derive(
            own, root / arm, MODEL__WEIGHTS=str(checkpoint), QUALITY__FILES=tuple(map(str, label_files(own)))
        )
        with_quality = tuned.MODEL.META_ARCHITECTURE != tuned.QSD.BASE or samplers.needs_labels(tuned)
        keys = recipes._without(tuned, () if with_quality else recipes._NO_QUALITY)
        inputs = [checkpoint, *(label_files(own) if with_quality else [])]
        stages.append(_training_stage(arm, tuned, plain, data, keys, inputs))
    if plan.experiment.pictures:
        arms = {BASELINE: checkpoint, **{arm: root / arm / "model_final.pth" for arm in plan.arms}}
        stages.append(recipes.report_stage(cfg, plain, arms, name=PICTURES))
    return stages


def is_finished(folder: Path) -> bool:
    """Whether the stage in ``folder`` ran to its end, with whatever settings."""
    marker = folder / MARKER
    return marker.is_file() and bool(json.loads(marker.read_text(encoding="utf-8"))["finished"])


def listing(plan: Plan) -> list[tuple[str, ...]]:
    """A row per block: split, seed, and ``done``, ``failed``, ``started`` or nothing for each stage."""
    rows = []
    for split, seed in plan.experiment.blocks:
        root = plan.experiment.folder(split, seed)
        rows.append((split, str(seed), *(_state(root / stage) for stage in plan.stages)))
    return rows


class Progress:
    """Counts the stages of all blocks and foresees how long the rest will take.

    Args:
        plan: What is run.
        jobs: Blocks at the same time.
        announce: Receives the lines.
    """

    def __init__(self, plan: Plan, jobs: int, announce: Callable[[str], None]) -> None:
        names = plan.stages
        self.failures: list[Event] = []
        self._left = [(block, stage) for block in plan.experiment.blocks for stage in names]
        self._total, self._jobs, self._announce = len(self._left), jobs, announce
        self._seconds: dict[str, list[float]] = {}

    def stage_ended(self, event: Event) -> None:
        """Take down the end of a stage and announce it."""
        block = (event.split, event.seed)
        lost = event.error and event.stage == BASELINE
        self._left = [left for left in self._left if left != (block, event.stage) and not (lost and left[0] == block)]
        if event.error:
            self.failures.append(event)
        elif event.seconds is not None:
            self._seconds.setdefault(_kind(event.stage), []).append(event.seconds)
        what = "failed" if event.error else "skipped" if event.seconds is None else f"{duration(event.seconds)}"
        eta = self.remaining()
        text = f"[{self._total - len(self._left)}/{self._total}] {event.split} seed {event.seed} {event.stage}: {what}"
        text += f", ETA {duration(eta)}" if eta else ""
        self._announce(f"{text}\n  {event.error}" if event.error else text)

    def remaining(self) -> float | None:
        """Seconds until all stages are done, from the mean times so far; ``None`` before there are any."""
        known = {kind: sum(times) / len(times) for kind, times in self._seconds.items()}
        if not known:
            return None
        typical = sum(known.values()) / len(known)
        return sum(known.get(_kind(stage), typical) for _, stage in self._left) / self._jobs


def _training_stage(
    name: str,
    cfg: Any,
    plain: Any,
    data: str,
    keys: dict[str, Any],
    inputs: Sequence[Path],
    given: Path | None = None,
) -> Stage:
    """Train ``cfg``, or take the ``given`` checkpoint, and evaluate it with the network of ``plain``."""

    def work(folder: Path, resume: bool) -> None:
        if given is None:
            recipes.train(cfg, _ARGUMENTS, resume=resume, evaluate=False)
            # Later stages read the last epoch only, and a study would fill the disk with the others.
            for file in folder.glob("model_*.pth"):
                if file.name != "model_final.pth":
                    file.unlink()
        test_name = plain.DATASETS.TESTS[0]
        test = report.load_test(plain, test_name)
        result = report.evaluate_per_query(
            plain,
            given or folder / "model_final.pth",
            test,
            dataset_folder(plain, test_name),
            title=f"Evaluating {name}",
        )
        result.save(folder / per_query.FILE)
        means = dict(zip(per_query.METRICS, result.metrics().mean(axis=0).tolist(), strict=True))
        summary = {
            "test": test_name,
            "quality": test.quality_name,
            "training_images": sum(len(training_set(cfg, each)[1]) for each in cfg.DATASETS.NAMES),
            **means,
            "environment": report.environment(),
            "settings": recipes.flatten(cfg),
        }
        write_atomically(folder / "results.json", json.dumps(summary, indent=1, default=str).encode())

    outputs = [per_query.FILE, "results.json", *(["model_final.pth"] if given is None else [])]
    keys = {**keys, "TEST.METRIC": plain.TEST.METRIC}
    return Stage(name, work, keys=keys, inputs=[*inputs, *([given] if given else [])], data=data, outputs=outputs)


def _run_in_processes(plan: Plan, blocks: Sequence[tuple[str, int]], jobs: int, progress: Progress) -> None:
    context = get_context("spawn")  # torch's threads do not survive a fork
    events = context.SimpleQueue()  # whose put() returns when the event is on its way
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_process, initargs=(events, get_start_method())
    ) as pool:
        waiting = [pool.submit(_block_in_process, plan, split, seed) for split, seed in blocks]
        while waiting:
            ended, _ = wait(waiting, timeout=_POLL_S)
            while not events.empty():
                progress.stage_ended(events.get())
            for future in ended:
                waiting.remove(future)
                try:
                    future.result()  # raises what a block could not report itself
                except BrokenProcessPool as error:
                    raise StageError(
                        "A process of the experiment was ended from outside (out of memory?)",
                        remedy="Start the same command again, with fewer --jobs; what has finished is kept.",
                    ) from error


_events: Any = None  # the queue to the parent, in a process that runs blocks


def _start_process(events: Any, start_method: str) -> None:
    import torch

    global _events
    _events = events
    set_start_method(start_method, force=True)  # a spawned process would spawn the workers of its data loaders too
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    processes.exit_with_parent()


def _block_in_process(plan: Plan, split: str, seed: int) -> None:
    console = plan.experiment.folder(split, seed) / CONSOLE
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run_block(plan, split, seed, functools.partial(_events.put))


def _is_redone(plan: Plan, stage: str) -> bool:
    """Whether ``plan.redo`` takes a stage along: what it names, what is made from that, and pictures always."""
    if plan.redo is None:
        return False
    made_from_labels = plan.redo == LABELS and stage in plan.arms
    return plan.redo in (stage, BASELINE) or made_from_labels or stage == PICTURES


def _kind(stage: str) -> str:
    return stage if stage in (BASELINE, LABELS, PICTURES) else "arm"


def _state(folder: Path) -> str:
    if is_finished(folder):
        return "done"
    if (folder / ERROR).is_file():
        return "failed"
    return "started" if (folder / MARKER).is_file() else ""
