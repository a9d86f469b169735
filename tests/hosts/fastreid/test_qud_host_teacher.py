"""QUD's teacher inside fast-reid: from checkpoints, ONNX files and caches; itself, or an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qud_toy import batch, build, plain_of, qud, qud_cfg, sgd, step, student_embedding, train, write_teacher
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from qsd_plugin.core.errors import CheckpointError, ConfigError, DataError
from qsd_plugin.hosts import fastreid as host

host.activate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qud")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    """The network behind the files in ``folder``."""
    return write_teacher(folder)


def test_teacher_stays_as_it_is_and_is_in_no_checkpoint(folder: Path, teacher: Any) -> None:
    model = build(qud_cfg(folder))
    before = {name: value.clone() for name, value in model.qud_teacher.network.state_dict().items()}
    for name, value in teacher.state_dict().items():
        assert name == "heads.weight" or torch.equal(before[name], value)
    model.train()
    train(model, sgd(model), [batch(index) for index in range(3)])
    assert all(torch.equal(before[name], value) for name, value in model.qud_teacher.network.state_dict().items())
    assert not any(module.training for module in model.qud_teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.qud_teacher.parameters())
    state = model.state_dict()
    queue = ["qud_queue.features", "qud_queue.filled", "qud_queue.pointer"]
    assert list(state) == [*plain_of(model, qud_cfg(folder)).state_dict(), *queue]
    assert list(build(qud_cfg(folder), seed=1).load_state_dict(state).missing_keys) == []  # strict
    assert next(model.qud_teacher.parameters()).dtype == torch.float32
    assert next(model.half().qud_teacher.parameters()).dtype == torch.float16  # moved with the model all the same


def test_building_the_teacher_draws_nothing_from_the_global_stream(folder: Path, teacher: Any) -> None:
    cfg = qud_cfg(folder)
    build(cfg)
    after = torch.rand(1)
    build(qud_cfg(folder, **{"QUD.TEACHER.SOURCE": "cache"}))
    assert torch.equal(after, torch.rand(1))


def write_onnx(path: Path, size: Any) -> Tensor:
    """A model that averages a convolution over the image; its kernel [16, 3, 3, 3]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kernel = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(4))
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, *size])]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 16, 1, 1])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [numpy_helper.from_array(kernel.numpy(), "kernel")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return kernel


def test_onnx_teacher_gets_its_size_colours_and_normalisation(folder: Path, tmp_path: Path) -> None:
    kernel = write_onnx(tmp_path / "teacher.onnx", (20, 20))
    options = {
        "QUD.TEACHER.SOURCE": "onnx",
        "QUD.TEACHER.ONNX": str(tmp_path / "teacher.onnx"),
        "QUD.TEACHER.MEAN": [120.0, 110.0, 100.0],
        "QUD.TEACHER.STD": [60.0, 50.0, 40.0],
        "QUD.TEACHER.COLOUR": "BGR",
        "KD.MODEL_CONFIG": [],
        "KD.MODEL_WEIGHTS": [],
    }
    cfg = qud_cfg(folder, **options)
    model = build(cfg)
    plain = plain_of(model, cfg)
    start = model.qud_queue.features.clone()
    loss = step(model, batch())["loss_qud"]
    shown = resize(batch()["images"], [20, 20], InterpolationMode.BICUBIC, antialias=True).clamp(0, 255).flip(1)
    mean, std = torch.tensor(options["QUD.TEACHER.MEAN"]), torch.tensor(options["QUD.TEACHER.STD"])
    maps = F.conv2d((shown - mean.view(3, 1, 1)) / std.view(3, 1, 1), kernel)
    student = F.normalize(student_embedding(plain, batch()["images"]))
    torch.testing.assert_close(loss, qud(student, F.normalize(maps.mean(dim=(2, 3))), start), rtol=1e-4, atol=1e-5)

    with pytest.raises(ConfigError, match=r"teacher\.onnx: image size \(H, W\): got \(112, 112\).*model's \(20, 20\)"):
        build(qud_cfg(folder, **options, **{"QUD.TEACHER.SIZE": [112, 112]}))
    with pytest.raises(ConfigError, match=r"QUD.TEACHER.SIZE: got \[112\]"):
        build(qud_cfg(folder, **options, **{"QUD.TEACHER.SIZE": [112]}))
    with pytest.raises(CheckpointError, match=r"ONNX model: got '.*gone\.onnx'; expected an existing file"):
        build(qud_cfg(folder, **{**options, "QUD.TEACHER.ONNX": str(tmp_path / "gone.onnx")}))
    with pytest.raises(ConfigError, match=r"QUD.TEACHER.ONNX is empty"):
        build(qud_cfg(folder, **{**options, "QUD.TEACHER.ONNX": ""}))


def test_cached_embeddings_train_as_the_live_teacher_does(folder: Path, teacher: Any) -> None:
    live = build(qud_cfg(folder))
    expected = train(live, sgd(live), [batch(index) for index in range(3)])
    cached = {"QUD.TEACHER.SOURCE": "cache", "KD.MODEL_CONFIG": [], "KD.MODEL_WEIGHTS": []}
    curves = {}
    for dtype in (torch.float32, torch.float16):
        batches = [batch(index) for index in range(3)]
        for inputs in batches:
            inputs["teacher_features"] = live.qud_teacher(inputs["images"]).to(dtype)
        model = build(qud_cfg(folder, **cached))
        assert model.qud_teacher is None
        assert list(model.state_dict()) == list(live.state_dict())
        curves[dtype] = train(model, sgd(model), batches)
    assert curves[torch.float32] == expected
    assert curves[torch.float16][0] == pytest.approx(expected[0], abs=2e-3)

    with pytest.raises(DataError, match=r"without the teacher's embeddings.*expected the key teacher_features"):
        step(model, batch())
    with pytest.raises(DataError, match=r"teacher_features: got \(8, 5\); expected \(8, 16\).*QUD.TEACHER.DIM"):
        step(model, {**batch(), "teacher_features": torch.ones(8, 5)})
    longer = build(qud_cfg(folder, **cached, **{"QUD.TEACHER.DIM": 5}))
    assert longer.qud_projector.weight.shape == (5, 16)
    assert step(longer, {**batch(), "teacher_features": torch.rand(8, 5)})["loss_qud"] > 0


def test_checkpoints_of_trainings_serve_as_teachers(folder: Path, teacher: Any, tmp_path: Path) -> None:
    """With what else they hold, from data-parallel training, and without a classifier; and the config of a QSD."""
    expected = step(build(qud_cfg(folder)), batch())["loss_qud"]
    write_teacher(tmp_path, extra={"center_loss.centers": torch.ones(7, 16)}, **{"MODEL.META_ARCHITECTURE": "Baseline"})
    config = (tmp_path / "teacher.yaml").read_text()
    (tmp_path / "teacher.yaml").write_text(config.replace("META_ARCHITECTURE: Baseline", "META_ARCHITECTURE: QSD"))
    assert torch.equal(step(build(qud_cfg(tmp_path)), batch())["loss_qud"], expected)
    weights = {f"module.{name}": value for name, value in teacher.state_dict().items() if name != "heads.weight"}
    torch.save(weights, tmp_path / "teacher.pth")
    assert torch.equal(step(build(qud_cfg(tmp_path)), batch())["loss_qud"], expected)


def test_a_teacher_that_is_not_there_or_not_itself_is_refused(folder: Path, teacher: Any, tmp_path: Path) -> None:
    write_teacher(tmp_path)
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)["model"]

    def refusal(kind: type[Exception], **overrides: Any) -> str:
        with pytest.raises(kind) as caught:
            build(qud_cfg(tmp_path, **overrides))
        return str(caught.value)

    text = refusal(ConfigError, **{"KD.MODEL_WEIGHTS": []})
    assert re.search(r"KD.MODEL_WEIGHTS is empty; expected the checkpoint of the teacher .*teacher\.yaml", text)
    assert "--stage teacher" not in text
    assert "--stage teacher" in refusal(ConfigError, **{"KD.MODEL_WEIGHTS": [], "RECIPE.NAME": "qud"})
    assert re.search(r"KD.MODEL_CONFIG is empty.*QUD.TEACHER.SOURCE", refusal(ConfigError, **{"KD.MODEL_CONFIG": []}))
    assert "KD.MODEL_CONFIG: got 'gone.yaml'" in refusal(ConfigError, **{"KD.MODEL_CONFIG": ["gone.yaml"]})
    misspelt = {"KD.MODEL_WEIGHTS": [str(tmp_path / "teachr.pth")]}
    assert "Did you mean 'teacher.pth'" in refusal(CheckpointError, **misspelt)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "teacher.pth").read_bytes()[:5000])
    assert "cannot be read" in refusal(CheckpointError, **{"KD.MODEL_WEIGHTS": [str(tmp_path / "cut.pth")]})

    partial = {name: value for name, value in weights.items() if not name.startswith("backbone.layer4")}
    torch.save(partial, tmp_path / "teacher.pth")
    text = refusal(CheckpointError)
    assert re.search(r"teacher\.pth is not of the network in KD.MODEL_CONFIG .*teacher\.yaml: got '\d+ missing", text)
    write_teacher(tmp_path, **{"MODEL.BACKBONE.DEPTH": "34x"})
    config = (tmp_path / "teacher.yaml").read_text().replace("DEPTH: 34x", "DEPTH: 18x")
    (tmp_path / "teacher.yaml").write_text(config)
    assert re.search(r"is not of the network.*\d+ left over \(backbone\.layer1\.2", refusal(CheckpointError))
