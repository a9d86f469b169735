"""``tools/doctor.py --run`` on a healthy tiny recipe, and on copies with faults in what a run starts from.

Those are kernels that never moved, the form of images, labels, and another network. What goes wrong in training is in
``test_run_doctor_training.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from doctor_runs import (
    doctor,
    edit_config,
    edit_labels,
    edit_metrics,
    edit_weights,
    freeze,
    problems,
    setting,
    texts,
    with_score,
    without_network,
)
from toy import use_market

from qsd_plugin.core.errors import DataError
from qsd_plugin.hosts.fastreid.run_checks import diagnose_run
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.report import run_doctor


def test_healthy_run_is_one_line_with_its_figures(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = diagnose_run(broken)
    assert problems(findings) == {}
    of_others = {"teacher", "queue", "norms", "contrast", "degradation"}  # of QUD, of QGFace, of DIL
    assert {finding.check for finding in findings} >= set(run_doctor.CHECKS) - of_others, "a check said nothing"
    code = doctor(["--run", str(broken)], monkeypatch)
    text = capsys.readouterr().out
    assert code == 0
    assert len(text.splitlines()) == 1, text
    for figure in (
        "nothing wrong",
        "kernels changed",
        "100.0% of 48 images",
        "21 steps",
        "of 24 pairs a step",
        "mAP",
    ):
        assert figure in text


def test_1_parameters_that_never_moved(broken: Path) -> None:
    freeze(broken / "qsd", broken / "baseline" / "model_final.pth")
    found = problems(diagnose_run(broken))
    assert set(found) == {("qsd", "parameters")}
    text = found["qsd", "parameters"]
    assert "No parameter of the network moved from baseline/model_final.pth to model_final.pth: 0 of " in text
    assert " kernels changed, by 0.00% overall" in text
    assert "(limit: every kernel that is not frozen)" in text
    assert "S01" in text


def test_1_baseline_is_compared_with_its_own_first_checkpoint(broken: Path) -> None:
    freeze(broken / "baseline", broken / "baseline" / "model_0003.pth")
    text = problems(diagnose_run(broken))["baseline", "parameters"]
    assert "from baseline/model_0003.pth to model_final.pth: 0 of " in text


def test_2_checkpoint_trained_on_bgr_images(broken: Path) -> None:
    def swap(weights: dict[str, torch.Tensor]) -> None:
        weights["backbone.conv1.conv.weight"] = weights["backbone.conv1.conv.weight"].flip(1)

    edit_weights(broken / "baseline" / "model_final.pth", swap)
    found = problems(diagnose_run(broken))
    assert set(found) == {("baseline", "preprocessing")}
    text = found["baseline", "preprocessing"]
    assert "baseline/model_final.pth was trained on images in another form: BGR channels" in text
    assert "% with BGR channels (limit: 15% between them)" in text
    assert "Swap the input channels of the checkpoint's first kernel" in text


def test_3_wrong_mean_and_standard_deviation(broken: Path) -> None:
    edit_config(broken / "qsd", MODEL__PIXEL_MEAN=[0.0] * 3, MODEL__PIXEL_STD=[1.0] * 3)
    found = problems(diagnose_run(broken))
    assert set(found) == {("qsd", "preprocessing"), ("qsd", "settings")}
    text = found["qsd", "preprocessing"]
    assert "in another form: ImageNet mean and std" in text
    assert "% with ImageNet mean and std (limit: 15% between them)" in text
    assert "Set MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]" in text
    settings = found["qsd", "settings"]
    assert "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] -> [0.0, 0.0, 0.0]" in settings
    assert "--from-stage qsd" in settings


def test_4_constant_labels(broken: Path) -> None:
    edit_labels(broken, with_score(np.full(48, 50.0)))
    found = problems(diagnose_run(broken))
    assert set(found) == {("labels", "labels")}
    text = found["labels", "labels"]
    assert "All labels are equal, so no image can teach another: standard deviation 0.0, range 50.0 to 50.0" in text
    assert "(limit: 2 of 100)" in text
    assert "--from-stage labels" in text


def test_5_labels_of_another_data_set(broken: Path) -> None:
    def rename(labels: QualityLabels) -> QualityLabels:
        keys = tuple(f"CUHK03Detected/train/{index}.png" for index in range(len(labels)))
        meta = {**labels.meta, "dataset": "CUHK03Detected"}
        return QualityLabels(labels.score, labels.raw, labels.spread, keys, meta)

    edit_labels(broken, rename)
    found = problems(diagnose_run(broken))
    assert set(found) == {("labels", "labels"), ("labels", "coverage")}
    assert "belong to another data set: 48 images of CUHK03Detected (limit: Market1501)" in found["labels", "labels"]
    text = found["labels", "coverage"]
    assert "a key of the file: CUHK03Detected/train/0.png): 0.0% of 48 images of Market1501 labelled" in text
    assert "(limit: 99%, QUALITY.MIN_COVERAGE)" in text


def test_5_labels_of_three_quarters_of_the_images(broken: Path) -> None:
    def cut(labels: QualityLabels) -> QualityLabels:
        return QualityLabels(labels.score[:36], labels.raw[:36], labels.spread[:36], labels.keys[:36], labels.meta)

    edit_labels(broken, cut)
    found = problems(without_network(broken))
    assert set(found) == {("labels", "coverage")}
    assert "75.0% of 48 images" in found["labels", "coverage"]


def test_6_saturated_labels(broken: Path) -> None:
    score = np.r_[np.linspace(20, 80, 18), np.full(30, 100.0)]
    edit_labels(broken, with_score(score))
    found = problems(diagnose_run(broken))
    assert set(found) == {("labels", "labels")}
    text = found["labels", "labels"]
    assert "62.5% within 1% of the ends (0.0% at 0, 62.5% at 100) (limit: 10%)" in text
    assert "QUALITY.SCALE rank" in text


def test_14_checkpoint_of_another_width(broken: Path) -> None:
    edit_config(broken / "qsd", MODEL__BACKBONE__DEPTH="x0_5", MODEL__BACKBONE__FEAT_DIM=256)
    found = problems(diagnose_run(broken))
    assert set(found) == {("qsd", "architecture"), ("qsd", "settings")}
    assert "model_final.pth belongs to another architecture: it holds" in found["qsd", "architecture"]
    assert "(limit: the same kernels)" in found["qsd", "architecture"]
    assert "MODEL.BACKBONE.DEPTH x0_25 -> x0_5" in found["qsd", "settings"]


def test_missing_images_and_figures_are_unknown_and_no_problem(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_market(monkeypatch, tmp_path / "nowhere")
    edit_metrics(broken / "qsd", lambda line: {} if "qsd/kept" in line else line)
    findings = diagnose_run(broken)
    assert problems(findings) == {}
    unknown = texts(findings, "unknown", "baseline", "preprocessing")
    assert str(tmp_path / "nowhere") in unknown
    assert "add DATA.ROOT FOLDER to this command" in unknown
    assert "Coverage cannot be told" in texts(findings, "unknown", "labels", "coverage")
    assert "20 steps, after which they are first written" in texts(findings, "unknown", "qsd", "pairs")


def test_single_training_folder_as_json_with_images_elsewhere(
    broken: Path, run_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_market(monkeypatch, tmp_path / "nowhere")
    edit_metrics(broken / "qsd", setting(lr=0.0))
    code = doctor(["--run", str(broken / "qsd"), "--json", "DATA.ROOT", str(run_data)], monkeypatch)
    report = json.loads(capsys.readouterr().out)
    assert code == 1
    assert report["verdict"] == "problem"
    by_check = {finding["check"]: finding for finding in report["findings"]}
    assert by_check["learning rate"]["verdict"] == "problem"
    assert by_check["learning rate"]["stage"] == "qsd"
    assert by_check["learning rate"]["limit"] == "above 0"
    assert by_check["preprocessing"]["verdict"] == "ok"
    assert by_check["labels"]["verdict"] == "ok"
    assert "control" not in by_check  # which lies beside this folder


def test_folder_without_a_run_is_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(["--run", str(tmp_path)], monkeypatch) == 2
    assert "Pass the OUTPUT_DIR that tools/train_net.py was given" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"Run folder: got '.*absent'; expected the OUTPUT_DIR"):
        diagnose_run(tmp_path / "absent")
