"""Whole trainings by the tree's own script: verification, resuming, modified trees, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arcface_runs import DEGRADED, RUNS, losses, modified_tree, with_files
from conftest import Trainings, last_state
from faces import write_faces


def forget(output: Path, key: str) -> None:
    """Turn one entry of the head round."""
    file = output / "checkpoint_gpu_0.pt"
    stored = torch.load(file, weights_only=True)
    stored["state_dict_softmax_fc"][key].neg_()
    torch.save(stored, file)


def test_resumed_run_is_the_run_that_was_not_interrupted(
    trainings: Trainings, faces: Path, teacher: Path, tmp_path: Path
) -> None:
    methods = with_files(RUNS["QGFace, QSD, QUD"].methods, faces, teacher)
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
    trainings: Trainings, faces: Path, teacher: Path, tmp_path: Path
) -> None:
    from tools.arcface_shards import main as shards

    methods = with_files(RUNS["QGFace, QSD, QUD"].methods, faces, teacher)
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
    root = modified_tree(host_root, tmp_path / "modified")
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
    text = refused({"methods": ["QGFace"]}, dali=True)
    assert "config.dali: got True; expected False with QGFace" in text
    text = refused({"methods": ["QSD"], "qsd": {**DEGRADED, "start_epoch": 2}})
    assert "config.qsd_plugin qsd start_epoch: got 2; expected settings that hold from the first step" in text


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
