"""Weights as safetensors and as torch's file: the same tensors come back, and nothing but tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qsd_plugin.core.errors import ExportError
from qsd_plugin.export.state_dicts import save_safetensors, save_state_dict

STATE = {"a.weight": torch.arange(6.0).view(2, 3).T, "a.num_batches_tracked": torch.tensor(7)}


def test_safetensors_hold_the_tensors_and_the_metadata(tmp_path: Path) -> None:
    save_safetensors(STATE, tmp_path / "model.safetensors", metadata={"metric": "cosine"})
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert file.metadata() == {"metric": "cosine"}
        assert set(file.keys()) == set(STATE)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in STATE.items())


def test_state_dict_is_read_without_running_code(tmp_path: Path) -> None:
    save_state_dict(STATE, tmp_path / "model.pth")
    found = torch.load(tmp_path / "model.pth", weights_only=True)
    assert list(found) == list(STATE)
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())


def test_missing_safetensors_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ExportError, match="needs the package safetensors, which is not installed: pip install"):
        save_safetensors(STATE, tmp_path / "model.safetensors", metadata={})
    assert list(tmp_path.iterdir()) == []
