"""The host's ``Checkpointer`` on current torch: foreign files, refusals in words, saves that survive a kill (S20)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import load_safely, read_checkpoint
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("fastreid.qsd_plugin")


def _repair_checkpointer() -> Undo:
    import torch
    from fastreid.utils.checkpoint import Checkpointer

    host_load, host_load_model = Checkpointer.load, Checkpointer._load_model

    @functools.wraps(host_load)
    def load(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if path and "://" not in path and not Path(path).is_file():
            load_safely(Path(path))  # says what is missing and what lies there instead
        return host_load(self, path, *args, **kwargs)

    def load_file(self: Any, f: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(Path(f))
        self._loaded_from = f
        return checkpoint

    @functools.wraps(host_load_model)
    def load_model(self: Any, checkpoint: dict[str, Any]) -> Any:
        require_same_architecture(getattr(self, "_loaded_from", "given"), checkpoint["model"], self.model.state_dict())
        return host_load_model(self, checkpoint)

    def save(self: Any, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        content = checkpoint_content(self) | kwargs
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        write_atomically(path, functools.partial(torch.save, content))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self: Any, last_filename_basename: str) -> None:
        write_atomically(Path(self.save_dir) / "last_checkpoint", last_filename_basename.encode())

    replacements = {
        "load": load,
        "_load_file": load_file,
        "_load_model": load_model,
        "save": save,
        "tag_last_checkpoint": tag_last_checkpoint,
    }
    return together(*(replace(Checkpointer, name, function) for name, function in replacements.items()))


def checkpoint_content(checkpointer: Any) -> dict[str, Any]:
    """What the host's ``Checkpointer`` saves beside what the caller adds."""
    states = {key: item.state_dict() for key, item in checkpointer.checkpointables.items()}
    return {"model": checkpointer.model.state_dict(), **states}


def require_same_architecture(source: str, weights: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of another architecture; warn when part of a backbone stays as it was initialised.

    What counts are the backbone's kernels (two and more dimensions): their names and shapes tell architectures apart,
    whereas vectors of the same length are everywhere. Heads may differ: their size follows the training set. In a model
    without ``backbone`` all kernels but those of classifiers count.

    Args:
        source: File name for the message.
        weights: State dict to be loaded, with or without DataParallel's ``module.`` prefix.
        model: State dict of the model.

    Raises:
        CheckpointError: Fewer than half of the model's backbone kernels are in ``weights`` with the same shape.
    """
    found = {name.removeprefix("module."): tuple(getattr(value, "shape", ())) for name, value in weights.items()}
    kernels = {name: tuple(tensor.shape) for name, tensor in model.items() if tensor.dim() > 1}
    sized = {name: shape for name, shape in kernels.items() if "classifier" not in name.split(".")}
    kernels = {name: shape for name, shape in kernels.items() if name.startswith("backbone.")} or sized or kernels
    missed = [name for name, shape in kernels.items() if found.get(name) != shape]
    if not missed:
        return
    first = missed[0]
    counted = f"{len(kernels) - len(missed)} of the model's {len(kernels)} backbone kernels"
    example = f"{first} is {found.get(first, 'absent')} there and {kernels[first]} in the model"
    if 2 * len(missed) <= len(kernels):
        _logger.warning(f"Checkpoint {source} holds only {counted}; the others keep their initial values ({example}).")
        return
    raise CheckpointError(
        f"Checkpoint {source} belongs to another architecture: it holds {counted} ({example}; its first entry is "
        f"{next(iter(weights), 'absent')})",
        remedy="Set MODEL.BACKBONE.* and MODEL.META_ARCHITECTURE as in the config.yaml it was trained with. Weights "
        "of a bare backbone belong into MODEL.BACKBONE.PRETRAIN_PATH.",
    )


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S20",
        where="utils/checkpoint.py:73-98,118,206-225",
        symptom="Files with numpy scalars: UnpicklingError; bare state dicts: KeyError 'model'; other architectures: "
        "random weights with a log line; a kill during a save loses the last checkpoint.",
        action="numpy scalars are allowed, bare state dicts are wrapped; unsafe, damaged, missing and foreign files "
        "are refused with the reason; files are written aside and moved into place.",
        needed=always,
        apply=_repair_checkpointer,
        proof="test_s20_foreign_checkpoints_load",
    ),
)
