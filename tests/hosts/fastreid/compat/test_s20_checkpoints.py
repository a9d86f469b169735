"""S20: checkpoints of any origin load, or are refused in words; a save is whole or absent."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.hosts.fastreid.compat.checkpoints import require_same_architecture


class Model(nn.Module):
    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, width), nn.Linear(width, width))
        self.heads = nn.Linear(width, classes)


def load(path: Path, model: nn.Module | None = None) -> tuple[nn.Module, Any]:
    from fastreid.utils.checkpoint import Checkpointer

    model = model or Model()
    return model, Checkpointer(model).load(str(path))


def assert_same(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(state[name].equal(weights[name]) for name in weights)


def foreign(kind: str, weights: dict[str, torch.Tensor]) -> Any:
    arrays = {name: value.numpy() for name, value in weights.items()}
    return {
        "numpy scalars": {"model": weights, "metric": np.float64(0.5), "epoch": np.int64(3), "best": np.bool_(True)},
        "numpy arrays": {"model": arrays},
        "bare": weights,
        "bare arrays": arrays,
        "state_dict": {"state_dict": weights, "epoch": 3},
        "DataParallel": {"model": {f"module.{name}": value for name, value in weights.items()}},
    }[kind]


@pytest.mark.parametrize("kind", ["numpy scalars", "numpy arrays", "bare", "bare arrays", "state_dict", "DataParallel"])
def test_s20_foreign_checkpoints_load(kind: str, tmp_path: Path) -> None:
    weights = Model().state_dict()
    torch.save(foreign(kind, dict(weights)), tmp_path / "foreign.pth")
    model, _ = load(tmp_path / "foreign.pth")
    assert_same(model, weights)


def test_s20_scalars_saved_under_numpy_1_load(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": Model().state_dict(), "metric": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    _, rest = load(path)
    assert rest["metric"] == 0.5


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("zipped", [True, False])
def test_s20_files_that_would_run_code_are_refused(zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "hostile.pth"
    content = {"model": Model().state_dict(), "x": Hostile(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"would run code.*(getattr|pathlib).*If you trust its author, convert"):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", b"hello world"])
def test_s20_damaged_files_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"damaged\.pth: got '{len(content)} bytes.*written by torch\.save"):
        load(path)


def test_s20_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"model": Model().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match="cut off"):
        load(path)


def test_s20_a_file_without_weights_lists_its_keys(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "arguments": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"\['arguments', 'epoch'\].*'model' or 'state_dict'"):
        load(tmp_path / "other.pth")


def test_s20_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"existing file.*Did you mean 'model_final\.pth'"):
        load(tmp_path / "model_finl.pth")
    with pytest.raises(CheckpointError, match="There is no folder"):
        load(tmp_path / "nowhere" / "model_final.pth")


@pytest.mark.parametrize(("depth", "other"), [("18x", "50x"), ("50x", "18x"), ("34x", "50x")])
def test_s20_another_architecture_is_refused(depth: str, other: str) -> None:
    from fastreid.config import get_cfg
    from fastreid.modeling.backbones import build_backbone

    def weights(name: str) -> dict[str, torch.Tensor]:
        cfg = get_cfg()
        cfg.MODEL.BACKBONE.DEPTH = name
        with torch.device("meta"):
            backbone = build_backbone(cfg)
        return {f"backbone.{key}": value for key, value in backbone.state_dict().items()}

    require_same_architecture("x.pth", weights(depth), weights(depth))
    with pytest.raises(
        CheckpointError,
        match=r"x\.pth belongs to another architecture: it holds \d+ of .*backbone\.layer1.*config\.yaml",
    ):
        require_same_architecture("x.pth", weights(other), weights(depth))


def test_s20_a_bare_backbone_is_refused_with_the_right_key(tmp_path: Path) -> None:
    torch.save({"model": Model().backbone.state_dict()}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=r"0 of the model's 2 backbone kernels.*absent.*PRETRAIN_PATH"):
        load(tmp_path / "backbone.pth")


def test_s20_partial_weights_load_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)
    donor = Model(classes=7).state_dict()
    del donor["backbone.1.weight"]
    torch.save({"model": donor}, tmp_path / "partial.pth")
    model, _ = load(tmp_path / "partial.pth")
    assert model.state_dict()["backbone.0.weight"].equal(donor["backbone.0.weight"])
    assert "holds only 1 of the model's 2 backbone kernels" in caplog.text


def test_s20_classifiers_of_another_size_are_no_news(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)

    def weights(classes: int, width: int) -> dict[str, torch.Tensor]:
        return {"net.layer.weight": torch.ones(2, width), "net.classifier.0.weight": torch.ones(classes, 2)}

    require_same_architecture("x.pth", weights(7, 3), weights(1, 3))
    assert caplog.text == ""
    with pytest.raises(CheckpointError, match="it holds 0 of the model's 1 backbone kernels"):
        require_same_architecture("x.pth", weights(7, 3), weights(7, 4))


def test_s20_heads_of_another_size_are_no_obstacle(tmp_path: Path) -> None:
    donor = Model(classes=7)
    torch.save({"model": donor.state_dict()}, tmp_path / "donor.pth")
    model, _ = load(tmp_path / "donor.pth")
    assert model.state_dict()["backbone.1.weight"].equal(donor.backbone[1].weight)


def checkpointer(folder: Path, seed: int = 0) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    from fastreid.utils.checkpoint import Checkpointer

    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.heads(model.backbone(torch.randn(2, 5))).sum().backward()
    optimizer.step()
    return Checkpointer(model, str(folder), optimizer=optimizer), model, optimizer


def test_s20_save_and_resume_are_exact(tmp_path: Path) -> None:
    saver, model, optimizer = checkpointer(tmp_path)
    saver.save("model_0004", epoch=4, metric=0.5)
    loader, other, other_optimizer = checkpointer(tmp_path, seed=1)
    rest = loader.resume_or_load("", resume=True)
    assert rest == {"epoch": 4, "metric": 0.5}
    assert_same(other, model.state_dict())
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(
        ours["exp_avg"].equal(moment) for ours, moment in zip(other_optimizer.state.values(), moments, strict=True)
    )


def test_s20_a_kill_during_a_save_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, _, _ = checkpointer(tmp_path)
    saver.save("model_best", epoch=1)
    before = (tmp_path / "model_best.pth").read_bytes()

    def killed(content: Any, file: Any) -> None:
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    for name in ("model_best", "model_0002"):
        with pytest.raises(KeyboardInterrupt):
            saver.save(name, epoch=2)
    assert (tmp_path / "model_best.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model_best.pth"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last_checkpoint", "model_best.pth"]


def test_s20_only_the_main_process_writes(tmp_path: Path) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    Checkpointer(Model(), str(tmp_path), save_to_disk=False).save("model_final")
    assert list(tmp_path.iterdir()) == []
