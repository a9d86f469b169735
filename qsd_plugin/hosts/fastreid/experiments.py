"""Runs an experiment: per (split, seed) what all arms share, then every arm from there, each stage resumable.

The stages of a block lie in ``<output>/<split>/seed<k>/``: those that arms share (``baseline`` and ``labels``;
``teacher`` and ``cache`` for QUD; ``dil_stage1`` and others for DIL; none for QGFace), and one folder per arm. What
each does is in :mod:`~qsd_plugin.hosts.fastreid.experiment_stages`. A stage that fails leaves its traceback in
``error.txt``; what is made from it is left out, and the others go on.
"""

from __future__ import annotations

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
from qsd_plugin.core.stages import MARKER, run_recipe
from qsd_plugin.hosts.fastreid import processes
from qsd_plugin.hosts.fastreid.experiment_stages import Block, check_arm
from qsd_plugin.report.experiment import PICTURES, Experiment

#: Where a failed stage leaves its traceback, and a block in a process of its own what it prints.
ERROR, CONSOLE = "error.txt", "console.log"

_POLL_S = 0.5


@dataclass(frozen=True)
class Plan:
    """What a call of :func:`run` does.

    Args:
        experiment: What it is about.
        arms: Names of the arms to run.
        options: ``KEY VALUE`` pairs from the command line; they lie between the common and the arms' own overrides.
        redo: A stage to run again although it has finished; one that all arms share takes them with it.
        accept_stale: Keep finished stages although their settings have changed.
    """

    experiment: Experiment
    arms: list[str]
    options: list[str] = field(default_factory=list)
    redo: str | None = None
    accept_stale: bool = False

    @property
    def stages(self) -> list[str]:
        """Names of the stages of a block, in order."""
        return list(self.needs)

    @functools.cached_property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """Names of the stages of a block, each with those that it is made from."""
        return block(self, *self.experiment.blocks[0]).needs

    def made_from(self, stage: str) -> set[str]:
        """Names of the stages that cannot be without ``stage``."""
        found: set[str] = set()
        for name, needed in self.needs.items():
            if stage in needed or found & set(needed):
                found.add(name)
        return found


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
        check_arm(block_config(plan, split, seed, arm))
    assert plan.needs  # arms that cannot be in one experiment raise here


def block_config(plan: Plan, split: str, seed: int, arm: str | None = None) -> Any:
    """The frozen config of a block, or of one arm of it; ``OUTPUT_DIR`` is the block's folder."""
    from fastreid.config import get_cfg

    experiment = plan.experiment
    cfg = get_cfg()
    cfg.merge_from_file((experiment.arms[arm].config if arm else "") or experiment.config)
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
    root, lost = plan.experiment.folder(split, seed), set[str]()
    for stage in block(plan, split, seed).stages():
        if stage.name in lost:
            continue
        start = time.monotonic()
        skipped = is_finished(root / stage.name)
        redo = stage.name if _is_redone(plan, stage.name) else None
        try:
            run_recipe([stage], root, from_stage=redo, accept_stale=plan.accept_stale)
        except Exception as error:
            write_atomically(root / stage.name / ERROR, traceback.format_exc().encode())
            stage_ended(Event(split, seed, stage.name, None, f"{type(error).__name__}: {error}"))
            lost |= plan.made_from(stage.name)
            continue
        (root / stage.name / ERROR).unlink(missing_ok=True)
        seconds = None if skipped and redo is None else time.monotonic() - start
        stage_ended(Event(split, seed, stage.name, seconds))


def block(plan: Plan, split: str, seed: int) -> Block:
    """What is run of one (split, seed)."""
    every = {arm: block_config(plan, split, seed, arm) for arm in plan.experiment.arms}
    return Block(block_config(plan, split, seed), every, plan.arms, pictures=plan.experiment.pictures)


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
        names, self._plan = plan.stages, plan
        self.failures: list[Event] = []
        self._left = [(block, stage) for block in plan.experiment.blocks for stage in names]
        self._total, self._jobs, self._announce = len(self._left), jobs, announce
        self._seconds: dict[str, list[float]] = {}

    def stage_ended(self, event: Event) -> None:
        """Take down the end of a stage and announce it."""
        block = (event.split, event.seed)
        lost = self._plan.made_from(event.stage) if event.error else set()
        ended = {(block, stage) for stage in (event.stage, *lost)}
        self._left = [left for left in self._left if left not in ended]
        if event.error:
            self.failures.append(event)
        elif event.seconds is not None:
            self._seconds.setdefault(self._kind(event.stage), []).append(event.seconds)
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
        return sum(known.get(self._kind(stage), typical) for _, stage in self._left) / self._jobs

    def _kind(self, stage: str) -> str:
        """What takes about as long as other stages of the kind: arms that go on from the same network."""
        return f"arm {self._plan.needs[stage][:1]}" if stage in self._plan.arms else stage


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
    return stage in {plan.redo, PICTURES, *plan.made_from(plan.redo)}


def _state(folder: Path) -> str:
    if is_finished(folder):
        return "done"
    if (folder / ERROR).is_file():
        return "failed"
    return "started" if (folder / MARKER).is_file() else ""
