"""Checkpoints of arcface_torch for another number of processes: class rows are joined and divided again.

Shapes: C classes, C_r of them on rank r, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.files import new_folder
from qsd_plugin.hosts.insightface.checkpoints import FILE, PROCESSES, read_checkpoint
from qsd_plugin.methods.margins import class_range

_HEAD, _OPTIMIZER = "state_dict_softmax_fc", "state_optimizer"
_ROWS = "weight"


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """The checkpoints of all ranks of a run with ``save_all_states``.

    Raises:
        CheckpointError: There are none, one is missing or damaged, or they are of different steps.
    """
    count = len(list(folder.glob(FILE.format("*"))))
    if not count:
        raise CheckpointError(
            "Checkpoints of a run",
            value=str(folder),
            expected=f"{FILE.format(0)} and so on",
            remedy="arcface_torch writes them with config.save_all_states = True.",
        )
    shards = [_read(folder / FILE.format(rank)) for rank in range(count)]
    processes = shards[0].get(PROCESSES, count)  # not there in those of the trainer by itself
    if processes != count:
        raise CheckpointError(f"Checkpoints in {folder}", value=count, expected=f"{processes}, one per process")
    steps = [shard["global_step"] for shard in shards]
    if len(set(steps)) > 1:
        raise CheckpointError(f"Checkpoints in {folder}", value=steps, expected="the same global step on every rank")
    return shards


def reshard(shards: Sequence[dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """The checkpoints that a run of another number of processes resumes from.

    Class rows and what the optimizer keeps of them are joined in the order of the ranks and divided as PartialFC does.
    Everything else of the head (queues, statistics) is the same on every rank; the network is rank 0's, whose running
    statistics are those of ``model.pt``.

    Args:
        shards: Of :func:`read_shards`.
        processes: Number of processes to resume with.

    Raises:
        ConfigError: Not 1 to C processes.
    """
    first = shards[0]
    if processes < 1 or (_ROWS in first[_HEAD] and processes > sum(len(shard[_HEAD][_ROWS]) for shard in shards)):
        raise ConfigError("Number of processes", value=processes, expected="1 to the number of classes")
    if _ROWS not in first[_HEAD]:
        return [first] * processes
    rows = torch.cat([shard[_HEAD][_ROWS] for shard in shards])
    # The class rows are the first parameter of the head, whose group is the last.
    number = first[_OPTIMIZER]["param_groups"][-1]["params"][0]
    states = [shard[_OPTIMIZER]["state"].get(number, {}) for shard in shards]
    joined = {name: _joined([state[name] for state in states], shards) for name in states[0]}
    made = []
    for rank in range(processes):
        own = slice(*class_range(len(rows), rank, processes))
        state = {
            name: value[own].clone() if isinstance(value, Tensor) and value.shape == rows.shape else value
            for name, value in joined.items()
        }
        optimizer = {**first[_OPTIMIZER], "state": {**first[_OPTIMIZER]["state"], number: state}}
        head = {**first[_HEAD], _ROWS: rows[own].clone()}
        made.append({**first, _HEAD: head, _OPTIMIZER: optimizer})
    return made


def write_shards(shards: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write checkpoints where a run with that many processes and this output folder resumes from: all or none.

    Raises:
        DataError: The folder is there and not empty, or cannot be made.
    """
    with new_folder(folder) as partial:
        for rank, shard in enumerate(shards):
            torch.save({**shard, PROCESSES: len(shards)}, partial / FILE.format(rank))


def _read(file: Path) -> dict[str, Any]:
    content = read_checkpoint(file)
    if content is None:
        raise CheckpointError("Checkpoint", value=str(file), expected="a complete file of this rank")
    return content


def _joined(values: list[Any], shards: Sequence[dict[str, Any]]) -> Any:
    first = values[0]
    return torch.cat(values) if isinstance(first, Tensor) and first.shape == shards[0][_HEAD][_ROWS].shape else first
