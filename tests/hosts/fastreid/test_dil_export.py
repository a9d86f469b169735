"""DIL's stage 2 as an ONNX file and as a person package: every feature, against the pure network in torch."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from dil_toy import build, dil_cfg

from qsd_plugin.core.errors import CheckpointError, ConfigError, HostError
from qsd_plugin.export.onnx import export_onnx
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.insightface.packaging import PERSON_FORM

host.activate()

from qsd_plugin.hosts.fastreid import deployed, dil_runs  # noqa: E402

TOOL = Path(__file__).parents[3] / "tools" / "export_model.py"


def finished(folder: Path, architecture: str = "DILReID", **overrides: Any) -> Any:
    """A stage 2 after its training, and in ``folder`` what that leaves, with files it started from long gone."""
    cfg = dil_cfg(folder, architecture, **overrides)
    model = build(cfg, seed=4)
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    cfg.MODEL.HEADS.NUM_CLASSES = 0  # the host counts identities, it writes no number
    cfg.DIL.STAGE1, cfg.DIL.TEACHER, cfg.DIL.BANK = "gone.pth", "gone.pth", "gone.npz"
    stage = folder / "stage2"
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict(), "epoch": 0}, stage / "model_final.pth")
    return model.eval()


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["export_model.py", *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="__main__")


def run_file(file: Path, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    found: np.ndarray = session.run(None, {given.name: images.numpy()})[0]
    return found


def test_file_computes_the_feature_of_the_pure_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = finished(tmp_path / "run", **{"DIL.STAGE2_OPTIONS.ATTENTION": True})
    file = tmp_path / "model.onnx"
    export(monkeypatch, tmp_path / "run", "--onnx", file, "DIL.STAGE2_OPTIONS.FEATURE", "fuse")
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.reid.embed(images, "fuse")
    assert expected.shape == (5, 64)
    np.testing.assert_allclose(run_file(file, images), expected, rtol=1e-3, atol=1e-4)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert said["feature"] == "feature 'fuse' of DILReID in eval mode"
    assert (said["feature_dimension"], said["normalisation"][:17]) == ("64", "outside this file")


@pytest.mark.parametrize("feature", ["fuse", "inv", "sen"])
def test_every_feature_is_written_for_runtimes_of_several_years(feature: str, tmp_path: Path) -> None:
    model = finished(tmp_path)
    run = dil_runs.load(tmp_path, ["DIL.STAGE2_OPTIONS.FEATURE", feature])
    network = deployed.without_normalisation(run.model, (32, 32))
    export_onnx(network, tmp_path / "x.onnx", input_size=(32, 32), metadata={}, form=PERSON_FORM)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.reid.embed(images, feature)
    assert run.contract["embedding"]["dimension"] == expected.shape[1] == (64 if feature == "fuse" else 32)
    np.testing.assert_allclose(run_file(tmp_path / "x.onnx", images), expected, rtol=1e-3, atol=1e-4)


def test_method_on_top_leaves_no_trace(tmp_path: Path) -> None:
    model = finished(
        tmp_path,
        "QSD",
        **{"QSD.BASE": "DILReID", "QSD.TAPS": ["reid.sensitive.model.layer4=1"], "DIL.REPLAY.MODE": "none"},
    )
    assert dil_runs.is_dil_run(tmp_path)
    assert dil_runs.is_dil_run(tmp_path / "stage2")
    run = dil_runs.load(tmp_path, [])
    assert type(run.model).__name__ == "DILReID"
    images = deployed.noise(3, (32, 32))
    with torch.no_grad():
        torch.testing.assert_close(run.model(images.clone()), model({"images": images.clone()}))
        network = deployed.without_normalisation(run.model, (32, 32))
        torch.testing.assert_close(
            network((images - model.pixel_mean) / model.pixel_std), model({"images": images.clone()})
        )
    assert run.contract["classes"] == 5


def test_person_package_is_what_the_runtime_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("insightface", reason="insightface is not installed: requirements/hosts.txt")
    from insightface.model_zoo.person_reid import PersonReID

    from qsd_plugin.export.packages import person_descriptor

    model = finished(tmp_path / "run")
    (tmp_path / "terms.txt").write_text("for research")
    package = tmp_path / "net"
    export(monkeypatch, tmp_path / "run", "--person-package", package, "--license", tmp_path / "terms.txt")
    assert "PersonReID.session" in capsys.readouterr().out
    loaded = PersonReID(person_descriptor(package), ["CPUExecutionProvider"])
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model({"images": images}))[0]
    found = loaded.embed(picture)
    np.testing.assert_allclose(found[:64], expected, atol=1e-5)
    assert not found[64:].any()  # 64 numbers and zeros: every cosine stays
    notes = json.loads((package / "manifest.json").read_text())["qsd_plugin"]
    assert notes["feature"] == "feature 'fuse' of DILReID in eval mode"


def test_other_folders_and_features_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path)
    with pytest.raises(ConfigError, match=r"DIL\.STAGE2_OPTIONS\.FEATURE: got 'both'; expected 'fuse' or 'inv' or"):
        dil_runs.load(tmp_path, ["DIL.STAGE2_OPTIONS.FEATURE", "both"])
    torch.save({"model": {"teacher.x": torch.zeros(1)}}, tmp_path / "stage2" / "model_final.pth")
    with pytest.raises(CheckpointError, match=r"got \['teacher\.x'\]; expected those of DILReID"):
        dil_runs.load(tmp_path, [])
    (tmp_path / "stage2" / "model_final.pth").unlink()
    assert not dil_runs.is_dil_run(tmp_path)
    with pytest.raises(HostError, match="no finished run"):
        deployed.load(tmp_path)
