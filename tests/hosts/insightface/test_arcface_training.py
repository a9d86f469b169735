"""Whole trainings by the tree's own script: every method, combinations, export, verification, resuming, modified trees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAKE, Trainings, imported_host

QSD_FILE = {"labels": "labels.csv"}
DEGRADED = {"partner": "degraded", "quality": "norm"}


@pytest.fixture(scope="module")
def teacher(trainings: Trainings) -> Path:
    """The weights of a plain run."""
    output, _ = trainings.train(None, network="r18" if trainings.root == FAKE else "mbf")
    return output / "model.pt"


def with_files(methods: dict[str, Any], faces: Path, teacher: Path, network: str) -> dict[str, Any]:
    """The options with the paths of this session."""
    methods = dict(methods)
    if methods.get("qsd", {}).get("labels"):
        methods["qsd"] = {**methods["qsd"], "labels": str(faces / "labels.csv")}
    if "QUD" in methods["methods"]:
        named = {"network": network, "weights": str(teacher)}
        methods["qud"] = {"queue_size": 40, **methods.get("qud", {}), "teacher": named}
    return methods


RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "adaface": ({"methods": ["AdaFace"]}, r"softmax \S+  norm_mean"),
    "exact": ({"methods": [], "margin_gradient": "exact"}, r"softmax \S+$"),
    "qsd": ({"methods": ["QSD"], "qsd": {**QSD_FILE, "classify": "both"}}, r"qsd \S+  qsd_kept [1-8] "),
    "qsd+adaface": ({"methods": ["QSD", "AdaFace"], "qsd": QSD_FILE}, r"qsd \S+ .*norm_mean"),
    "qsd norm": ({"methods": ["QSD"], "qsd": DEGRADED}, r"qsd \S+"),
    "qud": ({"methods": ["QUD"]}, r"softmax|qud \S+  qud_mean_cosine"),
    "qud+adaface": ({"methods": ["QUD", "AdaFace"], "qud": {"loss": "cosine"}}, r"softmax \S+  qud \S+"),
    "qgface": ({"methods": ["QGFace"], "qgface": {"queue_size": 32}}, r"qgface \S+  qgface_active"),
    "all": (
        {"methods": ["QGFace", "QSD", "QUD"], "qgface": {"queue_size": 32}, "qsd": DEGRADED},
        r"softmax \S+  qsd \S+ .*qud \S+ .*qgface \S+",
    ),
}


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"Loss (\S+)", text)]


@pytest.mark.parametrize("name", RUNS)
def test_method_trains_and_its_weights_load_into_the_plain_network(
    name: str, trainings: Trainings, faces: Path, teacher: Path, host_root: Path
) -> None:
    methods, logged = RUNS[name]
    network = "r18" if host_root == FAKE else "mbf"
    output, text = trainings.train(with_files(methods, faces, teacher, network))
    assert re.search(f"qsd_plugin .*{logged}", text, re.M), text
    assert losses(text)
    assert all(0 < loss < 200 for loss in losses(text))
    stored = torch.load(output / "model.pt", weights_only=True)
    with imported_host(host_root):
        from backbones import get_model

        torch.manual_seed(2048)
        plain = get_model("mbf", dropout=0.0, fp16=False, num_features=16)
        fresh = {key: value.clone() for key, value in plain.state_dict().items()}
        plain.load_state_dict(stored, strict=True)
    moved = [key for key, value in plain.named_parameters() if not torch.equal(value, fresh[key])]
    assert set(moved) >= {key for key, value in plain.named_parameters() if value.requires_grad}
    head = torch.load(output / "checkpoint_gpu_0.pt", weights_only=True)["state_dict_softmax_fc"]
    assert ("weight" in head) == (name != "qud")
