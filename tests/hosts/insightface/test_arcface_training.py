"""Whole trainings by the tree's own script: methods and mixes, export, verification, resuming, modified trees."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAKE, Trainings, imported_host
from faces import write_faces

QSD_FILE = {"labels": "labels.csv"}
DEGRADED = {"partner": "degraded", "quality": "norm"}


@pytest.fixture(scope="module")
def teacher(trainings: Trainings) -> Path:
    """The weights of a plain run."""
    output, _ = trainings.train(None, network="r18" if trainings.root == FAKE else "mbf")
    return output / "model.pt"


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
    "qsd+adaface": (
        {"methods": ["QSD", "AdaFace"], "qsd": {**QSD_FILE, "classify": "both"}},
        r"qsd \S+  qsd_kept [1-8] .*norm_mean",
    ),
    "qsd norm": ({"methods": ["QSD"], "qsd": DEGRADED}, r"qsd \S+"),
    "qud": ({"methods": ["QUD"]}, r"qud \S+  qud_mean_cosine"),
    "qud+adaface": ({"methods": ["QUD", "AdaFace"], "qud": {"loss": "cosine"}}, r"softmax \S+  qud \S+"),
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
    assert re.search(f"-qsd_plugin .*{logged}", text, re.M), text
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


def last_state(output: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """Network, head and momentum of a checkpoint as one flat dict."""
    stored = torch.load(output / f"checkpoint_gpu_{rank}.pt", weights_only=True)
    states = stored["state_optimizer"]["state"]
    momentum = {f"momentum {key}": value["momentum_buffer"] for key, value in states.items()}
    return {**stored["state_dict_backbone"], **stored["state_dict_softmax_fc"], **momentum}


def forget(output: Path, key: str) -> None:
    """Turn one entry of the head round."""
    file = output / "checkpoint_gpu_0.pt"
    stored = torch.load(file, weights_only=True)
    stored["state_dict_softmax_fc"][key].neg_()
    torch.save(stored, file)


def test_resumed_run_is_the_run_that_was_not_interrupted(
    trainings: Trainings, faces: Path, teacher: Path, host_root: Path, tmp_path: Path
) -> None:
    methods = with_files(RUNS["all"][0], faces, teacher, "r18" if host_root == FAKE else "mbf")
    whole, _ = trainings.train(methods, num_epoch=2)
    # Half of the epochs of twice the length: the schedule is the same, and it stops in between.
    half, _ = trainings.train(methods, num_epoch=1, num_image=48)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(half, spoilt)
    trainings.train(methods, num_epoch=2, resume=True, output=str(half))
    expected, found = last_state(whole), last_state(half)
    assert expected.keys() == found.keys()
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert not different, different
    assert {"terms.qud.queue.features", "terms.qgface.queue.embeddings", "margin_softmax.statistics.mean"} <= set(found)
    forget(spoilt, "terms.qud.queue.features")
    trainings.train(methods, num_epoch=2, resume=True, output=str(spoilt))
    assert not torch.equal(expected["weight"], last_state(spoilt)["weight"])  # the control


def test_two_processes_agree_and_resume_as_one(
    trainings: Trainings, faces: Path, teacher: Path, host_root: Path, tmp_path: Path
) -> None:
    from tools.arcface_shards import main as shards

    methods = with_files(RUNS["all"][0], faces, teacher, "r18" if host_root == FAKE else "mbf")
    output, text = trainings.train(methods, processes=2, batch_size=4, num_epoch=1, num_image=48)
    assert losses(text)
    first, second = (last_state(output, rank) for rank in range(2))
    shared = [key for key in first if key.startswith(("terms.", "margin_softmax."))]
    assert len(shared) >= 10
    for key in shared:
        assert torch.equal(first[key], second[key]), key
    assert first["weight"].shape == second["weight"].shape == (3, 16)
    assert not torch.equal(first["weight"], second["weight"])
    one, back = tmp_path / "one", tmp_path / "two"
    shards([str(output), "--processes", "1", "--output", str(one)])
    shards([str(one), "--processes", "2", "--output", str(back)])
    joined = last_state(one)
    assert torch.equal(joined["weight"], torch.cat([first["weight"], second["weight"]]))
    for rank, expected in enumerate((first, second)):
        again = last_state(back, rank)
        heads = [key for key in expected if key in ("weight", *shared) or key.startswith("momentum")]
        assert all(torch.equal(again[key], expected[key]) for key in heads)
    resumed, text = trainings.train(methods, num_epoch=2, resume=True, output=str(one))
    assert last_state(resumed)["weight"].shape == (6, 16)
    assert not torch.equal(last_state(resumed)["weight"], joined["weight"])


def test_verification_sets_are_scored_on_the_way(trainings: Trainings) -> None:
    _, text = trainings.train({"methods": ["AdaFace"]}, verbose=3)
    accuracy = re.search(r"\[lfw\]\[3\]Accuracy-Flip: (\d\.\d+)", text)
    assert accuracy is not None, text
    assert 0.5 <= float(accuracy[1]) <= 1


def test_config_of_ones_own_activates_the_plugin_in_the_script_itself(trainings: Trainings) -> None:
    call = "from qsd_plugin.hosts.insightface import activate; activate(); activate()"
    config = trainings.config({"methods": ["QSD"], "qsd": DEGRADED}, call)
    codes, text = trainings.run(config, plain=True)
    assert codes == [0], text
    assert re.search(r"qsd_plugin .*qsd \S+", text), text


def test_modified_tree_with_another_backbone_and_key_works(
    trainings: Trainings, faces: Path, host_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "modified"
    shutil.copytree(host_root, root)
    backbones = root / "backbones" / "__init__.py"
    backbones.write_text(backbones.read_text() + ADDED_BACKBONE)
    with (root / "configs" / "base.py").open("a") as file:
        file.write("\nconfig.my_key = 3\n")
    labels = {"labels": str(faces / "labels.csv")}
    named = {"methods": ["QSD"], "qsd": {**labels, "levels": {"stem": 1.0, "embedding": 0.5}}}
    codes, text = trainings.run(trainings.config(named, network="mine", output=str(tmp_path / "out")), root=root)
    assert codes == [0], text
    assert {"stem.weight", "last.bias"} < set(torch.load(tmp_path / "out" / "model.pt", weights_only=True))
    codes, text = trainings.run(trainings.config({"methods": ["QSD"], "qsd": labels}, network="mine"), root=root)
    assert codes == [2]
    assert "config.qsd_plugin qsd levels: got {}; expected levels for a Mine" in text
    assert "Its modules are: stem, last." in text


def test_what_cannot_work_is_refused_by_name(trainings: Trainings) -> None:
    refused = trainings.refused
    text = refused({"methods": ["AdaFace"]}, num_classes=5)
    assert "config.num_classes: 5, and" in text
    assert "has 6 identities; expected classes 0 to 4" in text
    text = refused({"methods": ["QSD"], "qsd": {**DEGRADED, "wieght": 2.0}})
    assert "config.qsd_plugin qsd: unknown option: got 'wieght'. Did you mean 'weight'?" in text


def test_damaged_record_ends_the_run_instead_of_hanging(trainings: Trainings, tmp_path: Path) -> None:
    folder = write_faces(tmp_path / "bad", damaged=True)
    assert "image of a record or verification set" in trainings.refused({"methods": ["AdaFace"]}, rec=str(folder))


def test_tool_starts_its_processes_itself(
    trainings: Trainings, host_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = "from qsd_plugin.hosts.insightface import activate; activate()"  # not needed here, and no harm
    config = trainings.config({"methods": ["AdaFace"]}, call, batch_size=4, output=str(tmp_path / "out"))
    tool = Path(__file__).parents[3] / "tools" / "train_arcface.py"
    command = [sys.executable, str(tool), "--host-root", str(host_root), "--nproc", "2", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert last_state(tmp_path / "out", 1)["weight"].shape == (3, 16)
    from tools.train_arcface import main

    with pytest.raises(SystemExit, match="2"):
        main(["--host-root", str(tmp_path), str(config)])
    assert "HostError: arcface_torch checkout: got " in capsys.readouterr().err
