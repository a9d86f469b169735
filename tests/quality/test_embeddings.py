"""Embeddings from a file and from an ONNX model, whose numbers are those of the same arithmetic in torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from qsd_plugin.core.errors import CheckpointError, ConfigError, LabelError
from qsd_plugin.quality.embeddings import read_embeddings
from qsd_plugin.quality.onnx_embedder import OnnxEmbedder

KERNEL = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)


def write_model(path: Path, shape: list[Any], *, kind: int = TensorProto.FLOAT, extra_input: bool = False) -> Path:
    """Convolution and global average pooling: embeddings of 5 numbers, as [B, 5, 1, 1]."""
    weight = numpy_helper.from_array(KERNEL, "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("images", kind, shape)]
    if extra_input:
        inputs.append(helper.make_tensor_value_info("labels", TensorProto.INT64, [shape[0]]))
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [shape[0], 5, 1, 1])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (20, 12, 3), np.uint8)) for _ in range(count)]


def expected(images: list[Image.Image], size: tuple[int, int], mean: Any, std: Any, *, bgr: bool) -> np.ndarray:
    rows = []
    for image in images:
        values = torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))).float()
        values = values.flip(-1) if bgr else values
        values = ((values - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]
        rows.append(torch.nn.functional.conv2d(values, torch.from_numpy(KERNEL)).mean(dim=(2, 3)))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize(("colour", "batch"), [("RGB", 2), ("BGR", 64)])
def test_images_are_prepared_as_asked(tmp_path: Path, colour: str, batch: int) -> None:
    mean, std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    model = write_model(tmp_path / "m.onnx", ["batch", 3, "h", "w"])
    embedder = OnnxEmbedder(model, size=(16, 8), mean=mean, std=std, colour=colour, batch=batch)
    images = pictures(5)
    wanted = expected(images, (16, 8), mean, std, bgr=colour == "BGR")
    np.testing.assert_allclose(embedder.embed(images), wanted, rtol=1e-4, atol=1e-5)
    assert embedder.embed([]).shape == (0, 0)


def test_a_fixed_batch_is_filled_up_and_the_filling_dropped(tmp_path: Path) -> None:
    fixed = OnnxEmbedder(write_model(tmp_path / "m.onnx", [4, 3, 16, 8]), batch=64)
    assert fixed.size == (16, 8)
    images = pictures(6)
    wanted = expected(images, (16, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), bgr=False)
    np.testing.assert_allclose(fixed.embed(images), wanted, rtol=1e-4, atol=1e-3)


def test_size_is_the_option_s_else_the_model_s_else_the_default(tmp_path: Path) -> None:
    free = write_model(tmp_path / "free.onnx", ["b", 3, "h", "w"])
    fixed = write_model(tmp_path / "fixed.onnx", ["b", 3, 16, 8])
    assert OnnxEmbedder(free, size=(9, 7), default_size=(5, 4)).size == (9, 7)
    assert OnnxEmbedder(free, default_size=(5, 4)).size == (5, 4)
    assert OnnxEmbedder(fixed, default_size=(5, 4)).size == (16, 8)
    with pytest.raises(ConfigError, match=r"free\.onnx takes images of any size\. Say which .*--size H W"):
        OnnxEmbedder(free)
    with pytest.raises(ConfigError, match=r"image size \(H, W\): got \(9, 7\); expected the model's \(16, 8\)"):
        OnnxEmbedder(fixed, size=(9, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "rgb"}, r"colour order: got 'rgb'; expected RGB or BGR"),
        ({"std": (1, 1, 0)}, r"mean and std: got .*expected three numbers each, std above 0"),
        ({"batch": 0}, r"batch: got 0; expected at least 1"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnnxEmbedder(tmp_path / "m.onnx", **options)


def test_models_that_take_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"images tensor\(float\) .*labels tensor\(int64\).*one image batch"):
        OnnxEmbedder(write_model(tmp_path / "two.onnx", ["b", 3, 8, 8], extra_input=True))
    (tmp_path / "cut.onnx").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"cut\.onnx'; expected a model that ONNX Runtime can load"):
        OnnxEmbedder(tmp_path / "cut.onnx")
    with pytest.raises(CheckpointError, match=r"ONNX model: got '.*none\.onnx'; expected an existing file"):
        OnnxEmbedder(tmp_path / "none.onnx")


def test_a_missing_runtime_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"^ONNX models need the package onnxruntime, .*not installed\. pip install"):
        OnnxEmbedder(tmp_path / "m.onnx")


def test_embedding_files_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "e.npz", keys=np.array(["a", "b"]), embeddings=np.eye(2), identities=np.array([3, 4]))
    table = read_embeddings(tmp_path / "e.npz")
    assert table.keys == ("a", "b")
    np.testing.assert_array_equal(table.embeddings, np.eye(2))
    assert table.identities is not None
    np.savez(tmp_path / "f.npz", keys=np.array(["a", "b"]), embeddings=np.eye(2))
    assert read_embeddings(tmp_path / "f.npz").identities is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"keys": ["a", "b"], "features": np.eye(2)}, r"cannot be read: got .*embeddings.*expected an \.npz file with"),
        ({"keys": ["a", "b", "c"], "embeddings": np.eye(2)}, r"got '3 keys, 3 of them different, embeddings \(2, 2\)'"),
        ({"keys": ["a", "a"], "embeddings": np.eye(2)}, r"got '2 keys, 1 of them different"),
        ({"keys": ["a", "b"], "embeddings": np.ones(2)}, r"embeddings \(2,\)"),
        ({"keys": ["a", "b"], "embeddings": np.eye(2), "identities": [1]}, r"identities \(1,\)'; expected arrays keys"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(LabelError, match=message):
        read_embeddings(tmp_path / "e.npz")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"none\.npz cannot be read"):
        read_embeddings(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("a,b,c")
    with pytest.raises(LabelError, match=r"text\.npz cannot be read"):
        read_embeddings(tmp_path / "text.npz")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04" + b"0" * 40)
    with pytest.raises(LabelError, match=r"cut\.npz cannot be read"):
        read_embeddings(tmp_path / "cut.npz")
