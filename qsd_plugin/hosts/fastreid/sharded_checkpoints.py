"""Checkpoints of ``ShardedEmbeddingHead``: one file more for every process, read back by any number of processes.

In one process a checkpoint is the host's ordinary file. In several, every process writes its class rows and what the
optimizer knows of them to a file beside it::

    model_0003.pth                           network, optimizer, ..., and which files belong to it
    model_0003.classes-3f9c01d2-0-of-2.pt    first half of the classes
    model_0003.classes-3f9c01d2-1-of-2.pt    second half

The host's file comes last, when the others are complete, and names them: a kill leaves either the old checkpoint or
the new one. All processes must see the same ``OUTPUT_DIR``.
"""

from __future__ import annotations

import functools
import glob
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fastreid.engine.train_loop import HookBase
from torch import Tensor

from qsd_plugin.core.distributed import on_main, world_size
from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import load_safely
from qsd_plugin.hosts.fastreid.compat.checkpoints import checkpoint_content
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace, together
from qsd_plugin.hosts.fastreid.sharded_head import CLASS_ROWS, ShardedEmbeddingHead, sharded_head
from qsd_plugin.methods.margins import ClassShard, class_range

#: Name of the class rows among a model's tensors.
ROWS = "heads.weight"
#: Entry of a checkpoint: the number of classes, and the files that hold their rows.
SHARDS = "class_shards"


class _Deferred:
    """Stands for the checkpointer in the host's hook: remembers what is to be saved."""

    def __init__(self) -> None:
        self.pending: list[tuple[str, dict[str, Any]]] = []

    def save(self, name: str, **extra: Any) -> None:
        self.pending.append((name, extra))


class ShardHook(HookBase):  # type: ignore[misc]
    """Saves, with all processes, what the host's hook on rank 0 asked for at the end of an epoch.

    Args:
        head: The head of the trainer's model.
        saves: Takes the place of the checkpointer in the host's hook; empty on other ranks.
    """

    def __init__(self, head: ShardedEmbeddingHead, saves: _Deferred) -> None:
        self._head, self._saves = head, saves

    def after_epoch(self) -> None:
        """Every rank writes its rows; when all have, rank 0 writes the checkpoint that names the files."""
        from fastreid.utils import comm

        checkpointer = self.trainer.checkpointer
        folder, shard = Path(checkpointer.save_dir), self._head.shard
        names = on_main(lambda: [(name, uuid.uuid4().hex[:8]) for name, _ in self._saves.pending])
        for name, token in names:
            content = {
                "token": token,
                "rows": self._head.weight.detach(),
                "optimizer": dict(self.trainer.optimizer.state.get(self._head.weight, {})),
            }
            file = folder / shard_files(name, token, shard.world_size)[shard.rank]
            write_atomically(file, functools.partial(torch.save, content))
        comm.synchronize()
        for (name, extra), (_, token) in zip(self._saves.pending, names, strict=False):
            files = shard_files(name, token, shard.world_size)
            content = without_rows(checkpoint_content(checkpointer)) | extra
            content[SHARDS] = {"num_classes": shard.num_classes, "token": token, "files": files}
            write_atomically(folder / f"{name}.pth", functools.partial(torch.save, content))
            checkpointer.tag_last_checkpoint(f"{name}.pth")
            remove_shards(folder, name, keep=files)
        self._saves.pending.clear()


def shard_files(name: str, token: str, count: int) -> list[str]:
    """File names of the class rows of the checkpoint ``name``, by rank."""
    return [f"{name}.classes-{token}-{rank}-of-{count}.pt" for rank in range(count)]


def remove_shards(folder: Path, name: str, *, keep: list[str] | tuple[str, ...] = ()) -> None:
    """Remove the class rows of earlier checkpoints of the same name."""
    for file in folder.glob(f"{glob.escape(name)}.classes-*.pt"):
        if file.name not in keep:
            file.unlink()


def without_rows(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's content without this process's class rows, of which an empty tensor remains."""
    model, optimizer = dict(content["model"]), dict(content["optimizer"])
    model[ROWS] = model[ROWS].new_empty((0, model[ROWS].shape[1]))
    own = _rows_key(optimizer)
    optimizer["state"] = {key: state for key, state in optimizer["state"].items() if key != own}
    return {**content, "model": model, "optimizer": optimizer}


def take_rows(checkpoint: dict[str, Any], shard: ClassShard, dim: int, path: Path, *, resuming: bool) -> None:
    """Put the class rows of this process, and what the optimizer knows of them, into a checkpoint that is being loaded.

    Args:
        checkpoint: Content of the file; changed.
        shard: The classes of this process.
        dim: Length of a row.
        path: Where it comes from; the files with the rows lie beside it.
        resuming: Whether training goes on, for which all of it must be there. Otherwise rows of other classes, or of a
            checkpoint that was copied without any of its files, are left to the host, which says that it skips them.

    Raises:
        CheckpointError: The classes differ, or a file with rows is missing, damaged or of another checkpoint.
    """
    model, stored = checkpoint["model"], checkpoint.get(SHARDS)
    whole = model.get(ROWS)
    found = None if whole is None else (stored["num_classes"] if stored else len(whole), whole.shape[1])
    if found != (shard.num_classes, dim):
        if resuming:
            raise CheckpointError(
                f"Classes and embedding size of checkpoint {path}",
                value=found,
                expected=str((shard.num_classes, dim)),
                remedy="Go on with the training set it was trained on, or start from its network: MODEL.WEIGHTS "
                "without --resume.",
            )
        return
    optimizer = checkpoint.get("optimizer") if resuming else None
    own = _rows_key(optimizer) if optimizer else None
    if optimizer and own is None:
        raise CheckpointError(
            f"Optimizer of checkpoint {path}",
            expected="one of a training with ShardedEmbeddingHead",
            remedy="Go on with the head it was trained with, or start from its network: MODEL.WEIGHTS without "
            "--resume.",
        )
    if stored and not resuming and not any(file.is_file() for file in _shard_paths(path, stored)):
        return
    if stored:
        rows, state = _read_shards(path, stored, shard, dim)
    elif shard.world_size > 1:
        part = slice(shard.start, shard.stop)
        rows = whole[part]
        state = _cut(optimizer["state"].get(own, {}), shard.num_classes, part) if optimizer else {}
    else:
        return
    model[ROWS] = rows
    if optimizer and state:
        optimizer["state"][own] = state


def install() -> Undo:
    """Save and load the rows of every ``DefaultTrainer`` whose model has a sharded head."""
    from fastreid.engine.defaults import DefaultTrainer
    from fastreid.engine.hooks import PeriodicCheckpointer
    from fastreid.utils.checkpoint import Checkpointer

    host_build, host_save = DefaultTrainer.build_hooks, Checkpointer.save
    host_load, host_load_model = Checkpointer.load, Checkpointer._load_model

    @functools.wraps(host_build)
    def build_hooks(self: Any) -> list[Any]:
        hooks: list[Any] = host_build(self)
        head = sharded_head(self.model)
        if head is None:
            return hooks
        _require_enough_classes(self.data_loader, head)
        if world_size() == 1 or not self.checkpointer.save_dir:
            return hooks
        saves = _Deferred()
        for hook in hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.checkpointer = saves
        return [*hooks, ShardHook(head, saves)]

    @functools.wraps(host_save)
    def save(self: Any, name: str, **extra: Any) -> None:
        sharded = sharded_head(self.model) is not None
        if sharded and world_size() > 1:
            raise CheckpointError(
                f"{name}.pth cannot be saved by one process",
                expected="all of them, because each holds class rows of its own",
                remedy="--resume continues from the checkpoint of the last whole epoch.",
            )
        host_save(self, name, **extra)
        if sharded and self.save_dir and self.save_to_disk:
            remove_shards(Path(self.save_dir), name)

    @functools.wraps(host_load)
    def load(self: Any, path: str, checkpointables: Any = None) -> Any:
        self._class_rows_of = Path(path), checkpointables is None and "optimizer" in self.checkpointables
        return host_load(self, path, checkpointables=checkpointables)

    @functools.wraps(host_load_model)
    def load_model(self: Any, checkpoint: dict[str, Any]) -> Any:
        head = sharded_head(self.model)
        if head is not None:
            path, resuming = self._class_rows_of
            take_rows(checkpoint, head.shard, head.weight.shape[1], path, resuming=resuming)
        return host_load_model(self, checkpoint)

    return together(
        replace(DefaultTrainer, "build_hooks", build_hooks),
        replace(Checkpointer, "save", save),
        replace(Checkpointer, "load", load),
        replace(Checkpointer, "_load_model", load_model),
    )


def _require_enough_classes(loader: Any, head: ShardedEmbeddingHead) -> None:
    identities = getattr(loader.dataset, "num_classes", 0)
    if identities > head.shard.num_classes:
        raise ConfigError(
            "MODEL.HEADS.NUM_CLASSES",
            value=head.shard.num_classes,
            expected=f"at least {identities}, the identities of the training set; 0 takes their number",
        )


def _rows_key(optimizer: Mapping[str, Any]) -> int | None:
    """Key of the class rows in an optimizer's state dict, ``None`` where it has none."""
    return next((group["params"][0] for group in optimizer["param_groups"] if group.get(CLASS_ROWS)), None)


def _read_shards(path: Path, stored: Mapping[str, Any], shard: ClassShard, dim: int) -> tuple[Tensor, dict[str, Any]]:
    """Rows of this process's classes from the files of all processes that wrote the checkpoint."""
    files = _shard_paths(path, stored)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"Class rows of checkpoint {path}",
            value=f"no {missing[0]}",
            expected=f"{len(files)} files beside it, one of each process that wrote it",
            remedy="Copy all of them, or none to start from the network alone (MODEL.WEIGHTS without --resume).",
        )
    rows, states = [], []
    for rank, file in enumerate(files):
        first, stop = class_range(shard.num_classes, rank, len(files))
        part = slice(max(shard.start, first) - first, min(shard.stop, stop) - first)
        if part.start >= part.stop:
            continue
        content = load_safely(file, title="Class rows")
        held = content.get("rows") if isinstance(content, dict) else None
        if not isinstance(held, Tensor) or tuple(held.shape) != (stop - first, dim):
            raise _foreign(file, path, "others" if not isinstance(held, Tensor) else f"rows {tuple(held.shape)}")
        if content.get("token") != stored["token"]:
            raise _foreign(file, path, f"those of the save {content.get('token')}")
        rows.append(held[part])
        states.append(_cut(content["optimizer"], stop - first, part))
    joined = {
        key: torch.cat([state[key] for state in states]) if _per_row(value, len(rows[0])) else value
        for key, value in states[0].items()
    }
    return torch.cat(rows), joined


def _shard_paths(path: Path, stored: Mapping[str, Any]) -> list[Path]:
    return [path.parent / Path(name).name for name in stored["files"]]


def _foreign(file: Path, path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"Class rows {file}",
        value=found,
        expected=f"those that {path.name} was saved with",
        remedy="Copy the checkpoint and its files together.",
    )


def _cut(state: Mapping[str, Any], count: int, part: slice) -> dict[str, Any]:
    """Some rows of what an optimizer knows of ``count`` rows; what it knows of all at once, such as a step, stays."""
    # Copies: the optimizer takes them as they are, and would keep the tensor of all rows in memory behind its part.
    return {key: value[part].clone() if _per_row(value, count) else value for key, value in state.items()}


def _per_row(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and len(value) == count
