"""The export benchmark: what is timed is written and computes the same; sessions are those of the named files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qsd_plugin.core.errors import ExportError
from qsd_plugin.export.face_networks import FaceModel, face_model
from qsd_plugin.hosts.insightface.benchmarks import exports
from qsd_plugin.networks import iresnet18

pytest.importorskip("insightface", reason="insightface is not installed: requirements/hosts.txt")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return exports._settled(iresnet18(16, width=0.0625))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The checkout's network is one of ours here, and so is what its script writes."""
    theirs = network(0)
    monkeypatch.setattr(exports, "_host_network", lambda checkout, name, seed: theirs)
    monkeypatch.setattr(exports, "find_checkout", lambda root: root)
    monkeypatch.setattr(
        exports, "export_by_script", lambda checkout, network, file: exports.export_by_torch(network, file)
    )
    return theirs


def test_every_item_has_its_limit_and_is_measured(tiny: nn.Module) -> None:
    found = exports.run(Path("checkout"), pairs=2, batches=(1, 2))
    written, first, second = found.items()
    assert (written[0], written[1]["pairs"], written[1]["seconds_limit"]) == ("export of r50, loaded back", 2, 60)
    assert 0 < written[1]["a_seconds"] <= written[1]["a_high_seconds"]
    assert first[0] == "onnxruntime, r50 B=1 beside the host's by torch2onnx.py"
    assert second[0] == "onnxruntime, r50 B=2 beside the host's by torch"
    for item in (first[1], second[1]):
        assert (item["limit"], item["pairs"]) == (1.03, 2)
        assert item["low"] <= item["median"] <= item["high"]


def test_without_a_checkout_only_the_comparison_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(theirs: Any, seed: int) -> FaceModel:
        assert theirs is None
        return face_model(network(seed).state_dict(), title="tiny")

    monkeypatch.setattr(exports, "_our_network", ours)
    items = exports.run(None, pairs=1)
    assert items["onnxruntime, r50 B=1 beside the host's by torch2onnx.py"] == {
        "skipped": "--host-root names no arcface_torch checkout"
    }
    assert "a_seconds" in items["export of r50, loaded back"]


@pytest.mark.parametrize("theirs_first", [False, True])
def test_each_side_runs_its_own_file(tmp_path: Path, theirs_first: bool) -> None:
    models = {name: network(seed) for seed, name in enumerate(("ours", "theirs"))}
    for name, model in models.items():
        exports.export_by_torch(model, tmp_path / f"{name}.onnx")
    images = exports._images(2, 0)
    files = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    for work, model in zip(exports.sessions(*files, images, theirs_first), models.values(), strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(work(), model(torch.from_numpy(images)), rtol=1e-3, atol=1e-4)
    with pytest.raises(ExportError, match=r"The host's ONNX file: got 'smallest cosine .* with ours'; expected more"):
        exports.require_same(*files, images)


def test_script_of_the_checkout_makes_the_same_of_one_image(checkout: Path, tmp_path: Path) -> None:
    theirs = exports._host_network(checkout, "mbf", seed=0)
    exports.export_by_script(checkout, theirs, tmp_path / "host.onnx")
    assert not hasattr(np, "float")
    exports.export_by_torch(theirs, tmp_path / "ours.onnx")
    exports.require_same(tmp_path / "ours.onnx", tmp_path / "host.onnx", exports._images(1, 0))
