"""Weights alone, as torch's own file or as safetensors, which holds no code and is read by other languages."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from qsd_plugin.core.errors import ExportError
from qsd_plugin.core.files import write_atomically


def save_state_dict(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the tensors of ``state`` with ``torch.save``; ``torch.load(path, weights_only=True)`` reads them.

    Raises:
        DataError: The folder cannot be written.
    """
    write_atomically(path, functools.partial(torch.save, dict(state)))


def save_safetensors(state: Mapping[str, torch.Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write the tensors of ``state`` as a safetensors file with ``metadata`` in its header.

    Raises:
        ExportError: The package safetensors is not installed.
        DataError: The folder cannot be written.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ExportError(
            "safetensors export needs the package safetensors, which is not installed: pip install safetensors"
        ) from error
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    write_atomically(path, save(tensors, metadata=dict(metadata)))
