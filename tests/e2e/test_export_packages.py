"""``tools/export_model.py`` for InsightFace: face weights and person networks, to packages and weight files."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from commands import ROOT
from face_toy import tiny_faces_keys
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from toy import toy_cfg, use_market, write_market

from qsd_plugin.export.face_networks import read_face_model
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.networks import iresnet18

host.activate()

from fastreid.modeling.meta_arch import build_model  # noqa: E402

from qsd_plugin.hosts.fastreid import deploy  # noqa: E402


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the tool in this process."""
    monkeypatch.setattr("sys.argv", ["export_model.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "export_model.py"), run_name="__main__")


def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the tool says when it stops."""
    with pytest.raises(SystemExit) as stopped:
        export(monkeypatch, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone as arcface_torch saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(iresnet18(16, width=0.0625).state_dict(), path)
    return path


@pytest.fixture
def terms(tmp_path: Path) -> Path:
    (tmp_path / "terms.txt").write_text("for research")
    return tmp_path / "terms.txt"


@pytest.fixture(scope="module")
def deployed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deploy folder of a person network of 512 numbers, without a training; its market has 260 training images."""
    folder = tmp_path_factory.mktemp("run")
    write_market(folder / "data", num_ids=26, per_id=10, size=(64, 32))
    cfg = toy_cfg(folder / "run")
    cfg.MODEL.HEADS.NUM_CLASSES = 26
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    facts: dict[str, Any] = {"metrics": {}, "config_hash": "0", "command": ["x"]}
    deploy.write_deploy(folder / "run" / "deploy", cfg, folder / "model.pth", **facts)
    return folder


def test_face_weights_become_a_package_that_the_runtime_reads(
    weights: Path, terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    insightface = pytest.importorskip("insightface", reason="insightface is not installed: requirements/hosts.txt")
    package = tmp_path / "models" / "tiny"
    export(monkeypatch, weights, "--face-package", package, "--license", terms, "--check-batches", 1, 3)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line.split("|")][1:3] for line in table[1:]] == [
        ["get_model(PACKAGE, model_task='recognition')", "1"],
        ["get_model(PACKAGE, model_task='recognition')", "3"],
        ["get_model(recognition.onnx)", "1"],
        ["get_model(recognition.onnx)", "3"],
        ["FaceAnalysis.get", "1"],
    ]
    model = insightface.model_zoo.get_model("tiny", root=str(tmp_path), model_task="recognition")
    picture = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    image = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = read_face_model(weights).network((image - 127.5) / 127.5)
    np.testing.assert_allclose(model.get_feat(picture), expected, rtol=1e-3, atol=1e-5)
    assert (package / "MODEL.LICENSE").read_text() == "for research"


def test_nothing_is_kept_and_the_command_fails_when_the_runtime_computes_something_else(
    weights: Path, terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("insightface", reason="insightface is not installed: requirements/hosts.txt")
    from qsd_plugin.hosts.insightface import runtime

    reference = runtime.Reference.__call__
    swapped = lambda self, pictures: reference(self, [one[..., ::-1] for one in pictures])  # noqa: E731
    monkeypatch.setattr(runtime.Reference, "__call__", swapped)
    package = tmp_path / "models" / "tiny"
    package.parent.mkdir()
    message = refuse(monkeypatch, capsys, weights, "--face-package", package, "--license", terms)
    assert "get_model(PACKAGE, model_task='recognition') differs from torch at batch size 1" in message
    assert list(package.parent.iterdir()) == []


def test_face_weights_become_files_under_arcface_names(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"model.{name}" for name in ("onnx", "safetensors", "state-dict")}
    export(monkeypatch, weights, *(part for name, file in files.items() for part in (f"--{name}", file)))
    given = torch.load(weights, weights_only=True)
    for state in (torch.load(files["state-dict"], weights_only=True), load_file(files["safetensors"])):
        assert state.keys() == given.keys()
        assert all(torch.equal(state[name], given[name]) for name in given)
    session = onnxruntime.InferenceSession(files["onnx"], providers=["CPUExecutionProvider"])
    assert [one.name for one in (*session.get_inputs(), *session.get_outputs())] == ["data", "embedding"]


def test_person_network_gets_its_projection_and_is_ranked(
    deployed_run: Path, terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("insightface", reason="insightface is not installed: requirements/hosts.txt")
    use_market(monkeypatch, deployed_run / "data")
    source, package = deployed_run / "run", tmp_path / "net"
    options = ("--license", terms, "--projection", "pca", "--evaluate", "TEST.IMS_PER_BATCH", 64)
    export(monkeypatch, source, "--person-package", package, *options)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line and line[0] == "Market1501"]
    assert [row[1:4] for row in rows] == [
        ["512", "cosine", "torch"],
        ["256", "cosine", "torch"],
        ["256", "cosine", "PersonReID"],
    ]
    assert float(rows[0][5]) == pytest.approx(float(rows[1][5]), abs=10)
    # The images have the size of the network, so that it does not matter who resizes.
    assert float(rows[1][5]) == pytest.approx(float(rows[2][5]), abs=1)
    assert [line[0] for line in lines if line and line[0].startswith("Person")] == [
        "PersonReID.embed",
        "PersonReID.session",
        "PersonReID.session",
        "PersonAnalysis.get",
    ]
    notes = json.loads((package / "manifest.json").read_text())["qsd_plugin"]
    assert (notes["projection"], notes["projection_sizes"]) == ("pca", "512 to 256, behind L2 normalisation")
    assert re.fullmatch(r"[01]\.\d+ of the squared length of 260 unit embeddings", notes["projection_kept"])


def test_mistakes_are_one_paragraph(
    deployed_run: Path,
    weights: Path,
    terms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*arguments: object) -> str:
        return refuse(monkeypatch, capsys, *arguments)

    run, face = deployed_run / "run", ("--face-package", tmp_path / "net")
    person = ("--person-package", tmp_path / "net")
    assert "--license FILE" in said(weights, *face)
    assert "--license FILE" in said(run, *person, "--license", tmp_path / "none")
    assert "got 512; expected 256 numbers" in said(run, *person, "--license", terms)
    few = tmp_path / "few"
    few.mkdir()
    Image.new("RGB", (32, 64)).save(few / "one.png")
    message = said(run, *person, "--license", terms, "--projection", "pca", "--images", few)
    assert "Images to fit the projection to: got 1; expected at least 256" in message
    assert "got 'a face network'; expected a person network" in said(weights, *person, "--license", terms)
    assert "got 'a person network'; expected a face network" in said(run, *face, "--license", terms)
    assert "--input-size PIXELS" in said(weights, *face, "--license", terms, "--input-size", 80)
    assert "--quality-network needs --face-package" in said(run, *person, "--quality-network", "import:a:b")
    assert "--license needs --face-package or --person-package" in said(weights, "--onnx", "m.onnx", "--license", terms)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "terms.txt"]


def test_face_run_is_scored_in_torch_and_in_the_runtime(
    terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `make demo-face` ends with, on a network that was not trained."""
    pytest.importorskip("insightface", reason="insightface is not installed: requirements/hosts.txt")
    run, package = tmp_path / "run", tmp_path / "net"
    options = {
        "MODEL.BACKBONE.NAME": "build_iresnet_backbone",
        "MODEL.BACKBONE.FEAT_DIM": 16,
        "MODEL.BACKBONE.WIDTH": 0.0625,
        "MODEL.HEADS.WITH_BNNECK": False,
        "MODEL.HEADS.POOL_LAYER": "Identity",
        "MODEL.HEADS.NUM_CLASSES": 4,
        "MODEL.PIXEL_MEAN": [127.5, 127.5, 127.5],
        "MODEL.PIXEL_STD": [127.5, 127.5, 127.5],
        "INPUT.SIZE_TRAIN": [112, 112],
        "INPUT.SIZE_TEST": [112, 112],
        "DATASETS.TESTS": ("SyntheticFacesVerification",),
        "TEST.FLIP.ENABLED": True,
        **tiny_faces_keys(tmp_path / "cache"),
    }
    cfg = toy_cfg(run, **options)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict(), "epoch": 0}, run / "model_final.pth")
    (run / "config.yaml").write_text(cfg.dump())
    export(monkeypatch, run, "--face-package", package, "--license", terms, "--evaluate", "--check-batches", 1)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    header, _, torch_row, runtime_row = [line for line in lines if line][-4:]
    assert header[:3] == ["test", "computed by", "accuracy"]
    assert header[-2:] == ["smallest cosine", "largest difference"]
    assert (torch_row[1], runtime_row[1]) == ("torch", "insightface")
    assert torch_row[2:-2] == runtime_row[2:-2]
    assert 40 < float(torch_row[2]) < 100
    assert (float(torch_row[-2]), torch_row[-1]) == (1.0, "0.0e+00")
    assert 0.99999 < float(runtime_row[-2]) <= 1.000001
    assert 0 < float(runtime_row[-1]) < 1e-3
    with Image.open(tmp_path / "net.png") as picture:
        assert picture.width > picture.height > 100
    message = refuse(
        monkeypatch, capsys, run, "--face-package", package, "--license", terms, "--evaluate", "DATASETS.TESTS", "()"
    )
    assert "net" in message


def test_scores_need_a_run(
    weights: Path, terms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refuse(monkeypatch, capsys, weights, "--face-package", tmp_path / "net", "--license", terms, "--evaluate")
    assert "expected a run, whose config names test sets" in message
    assert "--evaluate needs --face-package" in refuse(
        monkeypatch, capsys, weights, "--onnx", tmp_path / "m.onnx", "--evaluate"
    )


def test_network_of_another_size_is_refused(
    tmp_path: Path, terms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Module.state_dict(iresnet18(8, width=0.0625, input_size=80)), tmp_path / "small.pt")
    arguments = ("--face-package", tmp_path / "net", "--license", terms, "--input-size", 80)
    message = refuse(monkeypatch, capsys, tmp_path / "small.pt", *arguments)
    assert "Input size of the face network: got (80, 80); expected a square" in message
    assert not (tmp_path / "net").exists()
