"""Every method and mix as a training of a few steps, and a tree with a backbone of its owner's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

QSD_FILE = {"labels": "labels.csv"}
DEGRADED = {"partner": "degraded", "quality": "norm"}


class Run(NamedTuple):
    """A training.

    Args:
        methods: ``config.qsd_plugin``; ``None``: no such key.
        logged: What its log line looks like; "" for none.
        keys: More of the host's config.
    """

    methods: dict[str, Any] | None
    logged: str = ""
    keys: dict[str, Any] = {}  # noqa: RUF012 - read only


RUNS: dict[str, Run] = {
    "no method": Run(None),
    "ArcFace, exact": Run({"methods": [], "margin_gradient": "exact"}, r"softmax \S+$"),
    "AdaFace": Run({"methods": ["AdaFace"]}, r"softmax \S+  norm_mean"),
    "AdaFace, straight-through": Run(
        {"methods": ["AdaFace"], "adaface": {"gradient": "straight_through"}}, r"softmax \S+  norm_mean"
    ),
    "AdaFace, sampled classes": Run(
        {"methods": ["AdaFace"]}, r"softmax \S+", {"sample_rate": 0.7, "fp16": True, "gradient_acc": 2}
    ),
    "QSD": Run({"methods": ["QSD"], "qsd": QSD_FILE}, r"softmax \S+  qsd \S+  qsd_kept [1-8]"),
    "QSD without labels": Run({"methods": ["QSD"], "qsd": DEGRADED}, r"qsd \S+"),
    "QUD": Run({"methods": ["QUD"]}, r"qud \S+  qud_mean_cosine"),
    "QGFace": Run({"methods": ["QGFace"], "qgface": {"queue_size": 32}}, r"softmax \S+ .*qgface \S+"),
    "QSD, AdaFace": Run(
        {"methods": ["QSD", "AdaFace"], "qsd": {**QSD_FILE, "classify": "both"}},
        r"qsd \S+  qsd_kept [1-8] .*norm_mean",
    ),
    "QUD, AdaFace": Run({"methods": ["QUD", "AdaFace"], "qud": {"loss": "cosine"}}, r"softmax \S+  qud \S+"),
    "QUD, QSD": Run({"methods": ["QUD", "QSD"], "qsd": QSD_FILE}, r"softmax \S+  qsd \S+ .*qud \S+"),
    "QGFace, QSD, QUD": Run(
        {"methods": ["QGFace", "QSD", "QUD"], "qgface": {"queue_size": 32}, "qsd": DEGRADED},
        r"softmax \S+  qsd \S+ .*qud \S+ .*qgface \S+",
    ),
}

ADDED_BACKBONE = """

import torch as torch_for_mine

_stock = get_model


def get_model(name, **kwargs):
    return Mine(kwargs["num_features"]) if name == "mine" else _stock(name, **kwargs)


class Mine(torch_for_mine.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.stem = torch_for_mine.nn.Conv2d(3, 4, 3, stride=16)
        self.last = torch_for_mine.nn.Linear(4 * 49, size)

    def forward(self, x):
        return self.last(self.stem(x).flatten(1))
"""


def modified_tree(host_root: Path, root: Path) -> Path:
    """A copy with one more backbone, without batch norm, and one more key in the config."""
    shutil.copytree(host_root, root)
    backbones = root / "backbones" / "__init__.py"
    backbones.write_text(backbones.read_text() + ADDED_BACKBONE)
    with (root / "configs" / "base.py").open("a") as file:
        file.write("\nconfig.my_key = 3\n")
    return root


def with_files(methods: dict[str, Any] | None, faces: Path, teacher: Path) -> dict[str, Any] | None:
    """The options with the paths of this session."""
    if methods is None:
        return None
    methods = dict(methods)
    if methods.get("qsd", {}).get("labels"):
        methods["qsd"] = {**methods["qsd"], "labels": str(faces / "labels.csv")}
    if "QUD" in methods["methods"]:
        named = {"network": teacher.parent.name, "weights": str(teacher)}
        methods["qud"] = {"queue_size": 40, **methods.get("qud", {}), "teacher": named}
    return methods


def losses(text: str) -> list[float]:
    """What a run logged."""
    return [float(number) for number in re.findall(r"Loss (\S+)", text)]
