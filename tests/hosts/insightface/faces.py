"""Coloured squares that pass for faces: a record folder, quality labels and a verification set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.data.recordio import RecordWriter
from qsd_plugin.data.verification_bin import save_bin
from qsd_plugin.quality.labels import QualityLabels

CLASSES, PER_CLASS = 6, 4
IMAGES = CLASSES * PER_CLASS


def face(identity: int, noise: float, seed: int) -> bytes:
    """A JPEG of 112 x 112: the identity's pattern, and noise."""
    pattern = np.random.default_rng(identity).integers(0, 255, (7, 7, 3))
    pixels = np.kron(pattern, np.ones((16, 16, 1)))
    pixels = pixels + np.random.default_rng(1000 + seed).normal(0, noise, pixels.shape)
    encoded = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def write_faces(folder: Path, *, classes: int = CLASSES, damaged: bool = False) -> Path:
    """``train.rec`` with header, ``labels.csv`` with four qualities per class, ``lfw.bin`` of 20 pairs."""
    images = classes * PER_CLASS
    with RecordWriter(folder / "train.rec") as writer:
        writer.append(b"", [images + 1, images + 1 + classes])
        for index in range(images):
            content = face(index // PER_CLASS, 10 * (index % PER_CLASS), index)
            writer.append(b"no image" if damaged and index == 9 else content, float(index // PER_CLASS))
        for identity in range(classes):
            writer.append(b"", [1 + identity * PER_CLASS, 1 + (identity + 1) * PER_CLASS])
    score = np.array([100.0 * (3 - index % PER_CLASS) / 3 for index in range(images)])
    keys = tuple(f"train#{index + 1}" for index in range(images))
    QualityLabels(score, score, np.full(images, np.nan), keys, {"scale": "minmax"}).save(folder / "labels.csv")
    pairs = [(pair % classes, (pair + pair % 2) % classes) for pair in range(20)]
    contents: list[bytes] = []
    for number, (one, other) in enumerate(pairs):
        contents += [face(one, 5, 2 * number), face(other, 5, 2 * number + 1)]
    save_bin(folder / "lfw.bin", contents, [one == other for one, other in pairs])
    return folder


def write_embedder(path: Path, dim: int = 16) -> None:
    """An ONNX file of a linear map of the 4 x 4 mean colours of an image, [n, 3, 112, 112] to [n, ``dim``]."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    weights = np.random.default_rng(0).normal(size=(48, dim)).astype(np.float32)
    make = onnx.helper
    nodes = [
        make.make_node("AveragePool", ["images"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28]),
        make.make_node("Flatten", ["pooled"], ["flat"]),
        make.make_node("MatMul", ["flat", "weights"], ["embedding"]),
    ]
    given = make.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 112, 112])
    made = make.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["n", dim])
    graph = make.make_graph(nodes, "embedder", [given], [made], [onnx.numpy_helper.from_array(weights, "weights")])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8), path)
