"""``deploy/`` of a finished QSD training: the plain host evaluates it, ``tools/export_model.py`` exports it."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from commands import ROOT, environment, run, train_net_command
from toy import write_market
from yacs.config import CfgNode

from qsd_plugin.hosts import fastreid as host

host.activate()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=8, per_id=8)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training without a recipe; what a recipe leaves is the same, see test_recipe.py."""
    output = tmp_path_factory.mktemp("runs") / "market"
    single = {"RECIPE.NAME": "''", "QUALITY.SOURCE": "embedding_norm"}
    code, text = run(train_net_command("QSD/market.yml", output, **single), environment(data))
    assert code == 0, text
    return output


@pytest.fixture(scope="module")
def plain(finished: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the plain host reports about the deploy folder, with a batch of images and their embeddings."""
    output = tmp_path_factory.mktemp("plain") / "batch.npz"
    command = [sys.executable, str(Path(__file__).with_name("plain_host.py")), str(finished / "deploy"), str(output)]
    code, text = run(command, environment(data), cwd=output.parent)
    assert code == 0, text
    return {**json.loads(text.splitlines()[-1]), **np.load(output)}


def test_plain_host_gets_the_run_s_metrics_without_the_plugin(finished: Path, plain: dict[str, Any]) -> None:
    assert plain["plugin"] == []
    results = json.loads((finished / "deploy" / "results.json").read_text())
    for name in ("Rank-1", "Rank-5", "mAP", "mINP"):
        assert plain["metrics"][name] == pytest.approx(results["metrics"][name], abs=1e-3)
    assert results["seed"] == 1
    assert results["versions"]["torch"] == torch.__version__
    assert results["command"].count("--config-file") == 1


def test_plain_host_gets_the_run_s_embeddings_and_parameters(finished: Path, plain: dict[str, Any]) -> None:
    from fastreid.config import get_cfg
    from fastreid.modeling.meta_arch import build_model

    cfg = get_cfg()
    cfg.merge_from_file(str(finished / "config.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "QSD"
    model = build_model(cfg).eval()
    trained = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    model.load_state_dict(trained)
    with torch.no_grad():
        embedding = model({"images": torch.from_numpy(plain["images"])})
    torch.testing.assert_close(torch.from_numpy(plain["embedding"]), embedding, rtol=1e-4, atol=1e-4)
    # The centre loss and the running norms of the quality source are trained and saved, and stay behind.
    assert {name.split(".")[0] for name in {*trained} - {*plain["keys"]}} == {"center_loss", "_qsd_quality"}
    assert {*plain["keys"]} <= {*trained}
    assert plain["parameters"] == sum(p.numel() for name, p in model.named_parameters() if "center_loss" not in name)


def test_config_names_nothing_of_the_plugin(finished: Path) -> None:
    with (finished / "deploy" / "config.yaml").open() as file:
        cfg = CfgNode.load_cfg(file)
    assert set(cfg).isdisjoint({"QSD", "QUALITY", "RECIPE", "DATA", "SEED"})
    assert set(cfg.MODEL.LOSSES).isdisjoint({"WTRI", "CENTER"})
    assert cfg.MODEL.META_ARCHITECTURE == "Baseline"
    assert cfg.MODEL.LOSSES.NAME == ["CrossEntropyLoss"]
    assert cfg.MODEL.HEADS.NUM_CLASSES == 8
    assert cfg.MODEL.WEIGHTS == ""
    assert str(finished) not in (finished / "deploy" / "config.yaml").read_text()


def test_tool_exports_what_the_plain_host_computes(
    finished: Path, plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    files = {name: tmp_path / f"model.{name}" for name in ("onnx", "safetensors", "state-dict")}
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    export(monkeypatch, str(finished), *options, "--check-batches", "1", "7")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:8].strip().isdigit()] == [
        "1",
        "7",
    ]
    contract = json.loads((finished / "deploy" / "contract.json").read_text())
    mean, std = (np.array(contract["input"][key], np.float32).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
    images = (plain["images"] - mean) / std
    found = session.run(["embedding"], {"images": images})[0]
    np.testing.assert_allclose(found, plain["embedding"], rtol=1e-4, atol=1e-4)
    assert found.shape[1] == contract["embedding"]["dimension"] == 512
    said = {entry.key: entry.value for entry in onnx.load(files["onnx"]).metadata_props}
    assert json.loads(said["mean"]) == contract["input"]["mean"]
    assert (said["height"], said["width"], said["colour_order"], said["metric"]) == ("64", "32", "RGB", "cosine")
    state = torch.load(files["state-dict"], weights_only=True)
    assert list(state) == plain["keys"]


@pytest.mark.parametrize(
    ("folder", "arguments", "message"),
    [
        ("", ["--onnx", "m.onnx"], r"There is no finished run in this folder.*expected deploy/.*--resume it finishes"),
        ("missing", ["--state-dict", "m.pth"], "missing is not a folder"),
        ("", ["--onnx", "/proc/nowhere/m.onnx"], r"Cannot write.*expected a writable folder"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_two(
    folder: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        export(monkeypatch, str(tmp_path / folder), *arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


def test_no_file_asked_for_names_the_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        export(monkeypatch, str(tmp_path))
    assert "--onnx, --safetensors or --state-dict" in capsys.readouterr().err


def export(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run ``tools/export_model.py`` in this process."""
    monkeypatch.setattr("sys.argv", ["export_model.py", *arguments])
    runpy.run_path(str(ROOT / "tools" / "export_model.py"), run_name="__main__")
