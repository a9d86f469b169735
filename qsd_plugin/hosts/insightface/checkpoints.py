"""Checkpoints of arcface_torch that a killed run can go on from: one file per process, all of them of the same step.

The trainer writes ``checkpoint_gpu_<rank>.pt`` of every process, and rank 0's ``model.pt``, straight to their places. A
kill leaves half a file, or processes of different epochs, which then resume without a word. Here every process writes
``checkpoint_gpu_<rank>.pt.next`` first; when all are complete, each moves its own to its place. A run that was killed
before goes on from the old checkpoints, one that was killed between two moves from the new ones.

All processes save and load at the same place of the script, so both wait for each other.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.core.files import write_atomically

#: Of a rank, in the run's output folder.
FILE = "checkpoint_gpu_{}.pt"
#: Entry of a checkpoint that the trainer does not know: how many processes, and so files, there are.
PROCESSES = "processes"

_PATTERN = re.compile(r"checkpoint_gpu_\d+\.pt")

Save = Callable[..., None]
Load = Callable[..., Any]


def saver(save: Save) -> Save:
    """``torch.save`` for the time of a training: files are complete or absent, those of all processes of one step.

    Args:
        save: torch's own; gets everything that is no path.
    """

    def save_completely(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(file, str | Path):
            save(content, file, *args, **kwargs)
            return
        place = Path(file)
        if not _is_checkpoint(place, content):
            write_atomically(place, lambda opened: save(content, opened, *args, **kwargs))
            return
        content = {**content, PROCESSES: world_size()}
        following = _following(place)
        write_atomically(following, lambda opened: save(content, opened, *args, **kwargs))
        _barrier()
        os.replace(following, place)

    return functools.wraps(save)(save_completely)


def loader(load: Load) -> Load:
    """``torch.load`` for the time of a training: checkpoints of all processes are of one step and of as many processes.

    Args:
        load: torch's own; gets everything that is no checkpoint.
    """

    def load_together(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, str | Path) or not _PATTERN.fullmatch(Path(file).name):
            return load(file, *args, **kwargs)
        place = Path(file)
        following = _following(place)
        steps = _gathered((step_of(following, load), step_of(place, load)))
        step = common_step(place, steps)
        if step != steps[rank()][1]:
            os.replace(following, place)
        _barrier()
        following.unlink(missing_ok=True)
        content = load(file, *args, **kwargs)
        _check_processes(place, content)
        return content

    return functools.wraps(load)(load_together)


def common_step(place: Path, steps: Sequence[tuple[int | None, int | None]]) -> int:
    """The step that a run goes on from.

    Args:
        place: A checkpoint, for the message.
        steps: Per process that of the file that was being written, and that of its checkpoint; ``None`` without one.

    Raises:
        CheckpointError: No step is there for all processes.
    """
    moved = {current for _, current in steps}
    if len(moved) == 1 and None not in moved:
        (step,) = moved
        assert step is not None
        return step
    # Some have moved their new file and some have not: all new files were complete by then.
    newest = max((step for pair in steps for step in pair if step is not None), default=None)
    if newest is not None and all(newest in pair for pair in steps):
        return newest
    found = {FILE.format(number): current for number, (_, current) in enumerate(steps)}
    raise CheckpointError(
        f"Checkpoints in {place.parent}, their steps",
        value=found,
        expected="a complete file of every process, all of the same step",
        remedy="Restore the missing ones. For another number of processes convert the run: tools/arcface_shards.py.",
    )


def read_checkpoint(file: Path, load: Load = torch.load, **options: Any) -> dict[str, Any] | None:
    """A checkpoint on the CPU; ``None`` if the file is missing, cut off, or something else.

    Args:
        file: Of one process.
        load: torch's own.
        options: For it.
    """
    if not zipfile.is_zipfile(file):  # of other files torch's reader makes errors of any kind
        return None
    try:
        content = load(file, map_location="cpu", weights_only=True, **options)
    except (OSError, RuntimeError, pickle.UnpicklingError):
        return None
    return content if isinstance(content, dict) and "global_step" in content else None


def step_of(file: Path, load: Load = torch.load) -> int | None:
    """The global step of a checkpoint, without reading its tensors; ``None`` without a complete one."""
    content = read_checkpoint(file, load, mmap=True)
    return None if content is None else int(content["global_step"])


def _check_processes(place: Path, content: Any) -> None:
    stored = content.get(PROCESSES, world_size())
    if stored != world_size():
        raise CheckpointError(
            f"Number of processes of {place}",
            value=stored,
            expected=f"{world_size()}, as in this run",
            remedy=f"Convert the run: tools/arcface_shards.py {place.parent} --processes {world_size()} --output DIR.",
        )


def _is_checkpoint(place: Path, content: Any) -> bool:
    return bool(_PATTERN.fullmatch(place.name)) and isinstance(content, dict) and "global_step" in content


def _following(place: Path) -> Path:
    return place.with_name(f"{place.name}.next")


def _barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def _gathered(own: tuple[int | None, int | None]) -> list[tuple[int | None, int | None]]:
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found
