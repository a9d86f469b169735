"""Stand-ins for the models that InsightFace demands beside the one that is tested: constants instead of a network.

Made by hand from the shapes that the runtime checks; nothing is detected.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.data.align import template

#: Side in pixels of what the face detector takes, its strides, and the anchors per position.
FACE_SIDE = 128
_STRIDES, _ANCHORS = (8, 16, 32), 2

#: Height and width of what the person detector takes.
PERSON_SIZE = (64, 64)


def face_detector(path: Path, *, side: int = FACE_SIDE, finds: bool = True) -> None:
    """SCRFD's nine outputs: one face that fills the picture, its landmarks where an aligned crop has them.

    Args:
        path: File to write.
        side: Of the square input in pixels, a multiple of 32.
        finds: ``False``: no face at all.
    """
    outputs: dict[str, NDArray[np.float32]] = {}
    for width, name in ((1, "score"), (4, "box"), (10, "points")):
        for stride in _STRIDES:
            outputs[f"{name}_{stride}"] = np.zeros(((side // stride) ** 2 * _ANCHORS, width), np.float32)
    if finds:
        # The first anchor of stride 32 lies at (0, 0); distances to the box and the landmarks are in strides.
        outputs["score_32"][0] = 0.9
        outputs["box_32"][0] = np.array([0, 0, side, side]) / 32
        outputs["points_32"][0] = (template(112) * (side / 112)).ravel() / 32
    _write(path, {"input.1": [1, 3, side, side]}, outputs)


def person_detector(path: Path, picture: tuple[int, int]) -> None:
    """A person detector that always finds one person, who fills a picture.

    Args:
        path: File to write.
        picture: Height and width in pixels of the pictures it is given.
    """
    height, width = picture
    outputs = {
        "nms_pre_boxes": np.array([[[0, 0, width, height]]], np.float32),
        "nms_pre_scores": np.array([[[0.9]]], np.float32),
    }
    _write(path, {"image": [1, 3, *PERSON_SIZE], "scale_factor": [1, 2]}, outputs)


def face_recogniser(path: Path, *, side: int = 112) -> None:
    """A recogniser whose embedding is the mean colour, [1, 3]."""
    helper = importlib.import_module("onnx").helper
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    _save(path, nodes, {"data": [1, 3, side, side]}, {"embedding": [1, 3]}, [])


def _write(path: Path, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, NDArray[np.float32]]) -> None:
    onnx = importlib.import_module("onnx")
    constants = [onnx.numpy_helper.from_array(values, f"{name}_value") for name, values in outputs.items()]
    nodes = [onnx.helper.make_node("Identity", [f"{name}_value"], [name]) for name in outputs]
    _save(path, nodes, inputs, {name: values.shape for name, values in outputs.items()}, constants)


def _save(
    path: Path,
    nodes: list[Any],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
    constants: list[Any],
) -> None:
    onnx = importlib.import_module("onnx")

    def values(shapes: Mapping[str, Sequence[int]]) -> list[Any]:
        return [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))
            for name, shape in shapes.items()
        ]

    graph = onnx.helper.make_graph(nodes, "stub", values(inputs), values(outputs), constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
