"""``tools/doctor.py --run`` on copies of a healthy tiny recipe with faults of training.

Those are pairs, levels, losses, NaN, controls, learning rates, accuracy, and stages that did not finish. What a
run starts from is in ``test_run_doctor.py``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import train_net_command
from doctor_runs import (
    RECIPE,
    edit_config,
    edit_metrics,
    edit_report,
    edit_weights,
    freeze,
    problems,
    setting,
    texts,
    train,
    without_network,
)

from qsd_plugin.hosts.fastreid.run_checks import diagnose_run


def test_7_all_pairs_tied(broken: Path) -> None:
    levels = {f"qsd__loss__backbone.conv{index}": 0.0 for index in (3, 4, 5)}
    levels |= {"qsd__loss__heads.bottleneck": 0.0, "qsd__loss__heads:pred_class_logits": 0.0}
    pairs = {"qsd__kept": 0.0, "qsd__ties": 24.0, "qsd__dropped_low": 0.0, "qsd__empty": 1.0}
    edit_metrics(broken / "qsd", setting(**levels, **pairs, loss_qsd=0.0))
    found = problems(diagnose_run(broken))
    assert set(found) == {("qsd", "pairs"), ("qsd", "loss")}
    text = found["qsd", "pairs"]
    assert (
        "Hardly a pair teaches: 0% of 24 pairs a step (dropped_high 0%, dropped_low 0%, dropped_unsure 0%, ties 100%"
        in text
    )
    assert "(limit: 50%). Both images have the same label" in text
    assert "Steps have no pair at all: 100.0% (limit: 1%)" in text
    assert "QSD's term is zero, so this stage trained without it: 0.0% of the total loss" in found["qsd", "loss"]


def test_7_steps_without_pairs_are_seen_in_runs_that_did_not_count_them(broken: Path) -> None:
    def old(line: dict[str, Any]) -> dict[str, Any]:
        line.pop("qsd/empty", None)
        return line | ({"qsd/kept": 0.0, "qsd/dropped_low": 24.0} if "qsd/kept" in line else {})

    edit_metrics(broken / "qsd", old)
    text = problems(without_network(broken))["qsd", "pairs"]
    assert "dropped_low 100%" in text
    assert "lower QSD.TAU" in text
    assert "Steps have no pair at all: 100.0%" in text


def test_7_each_bound_has_its_own_limit_and_later_reasons_are_counted(broken: Path) -> None:
    def lose(line: dict[str, Any]) -> dict[str, Any]:
        values = {"qsd/kept": 14.4, "qsd/dropped_low": 4.8, "qsd/dropped_high": 2.4, "qsd/dropped_unsure": 2.4}
        return line | (values if "qsd/kept" in line else {})

    edit_metrics(broken / "qsd", lose)
    findings = without_network(broken)
    assert problems(findings) == {}
    assert "dropped_unsure 10%" in texts(findings, "ok", "qsd", "pairs")
    warning = texts(findings, "warning", "qsd", "pairs")
    assert "Many pairs are lost as dropped_high: 10% (limit: 5%)" in warning
    assert "dropped_low" not in warning


def test_8_one_level_dominates(broken: Path) -> None:
    levels = {"backbone.conv3": 0.001, "backbone.conv4": 0.6, "backbone.conv5": 0.001, "heads.bottleneck": 0.02}
    edit_metrics(broken / "qsd", setting(**{f"qsd__loss__{name}": value for name, value in levels.items()}))
    found = problems(diagnose_run(broken))
    assert set(found) == {("qsd", "levels")}
    text = found["qsd", "levels"]
    assert "One level, backbone.conv4, dominates QSD's term" in text
    # 0.6 of 0.622 and a tenth of the logits' loss.
    assert "backbone.conv4 95%" in text or "backbone.conv4 94%" in text or "backbone.conv4 96%" in text
    assert "(limit: 90% for one level)" in text
    assert "QSD.TAPS \"['backbone.conv4=0.1', ...]\"" in text


def test_8_logits_count_with_their_preset_weight(broken: Path) -> None:
    # Without the preset's 0.1 the logits would have 10 of 10.8 and be reported.
    levels = {"backbone.conv3": 0.2, "backbone.conv4": 0.2, "backbone.conv5": 0.2, "heads.bottleneck": 0.2}
    values = {f"qsd__loss__{name}": value for name, value in levels.items()}
    edit_metrics(broken / "qsd", setting(**values, **{"qsd__loss__heads:pred_class_logits": 10.0}))
    findings = without_network(broken)
    assert problems(findings) == {}
    assert "heads:pred_class_logits 56%" in texts(findings, "ok", "qsd", "levels")


def test_8_exploding_and_outweighing_term(broken: Path) -> None:
    steps = iter(range(1, 100))

    def explode(line: dict[str, Any]) -> dict[str, Any]:
        value = 0.5 * 4.0 ** next(steps)
        return line | ({"loss_qsd": value, "total_loss": value + 0.6} if "loss_qsd" in line else {})

    edit_metrics(broken / "qsd", explode)
    found = problems(without_network(broken))
    assert set(found) == {("qsd", "loss")}
    assert "QSD's term explodes: from 2 to 8.19e+03 (limit: a factor of 10)" in found["qsd", "loss"]
    assert "QSD's term outweighs the host's losses" in found["qsd", "loss"]


def test_9_nan_loss(run_data: Path, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Really broken: an infinite factor makes the loss infinite at the first step, and the host stops.
    command = train_net_command(
        "QSD/market.yml", broken, "--stage", "qsd", "--from-stage", "qsd", **RECIPE, **{"QSD.WEIGHT": "1e999"}
    )
    with pytest.raises(FloatingPointError):
        train(command, run_data, monkeypatch)
    found = problems(diagnose_run(broken))
    assert set(found) == {("qsd", "finished"), ("qsd", "finite")}
    text = found["qsd", "finite"]
    assert "The loss became infinite or NaN and the host stopped: iteration 0 (limit: none)" in text
    assert "--from-stage qsd" in text
    stopped = "0 steps logged, stopped by FloatingPointError (model_interrupted.pth was kept) (limit: 7 epochs)"
    assert stopped in found["qsd", "finished"]


def test_9_nan_in_figures_and_in_weights(broken: Path) -> None:
    edit_metrics(broken / "control", setting(loss_center=float("nan")))

    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["heads.weight"][0, 0] = torch.nan

    edit_weights(broken / "qsd" / "model_final.pth", poison)
    found = problems(diagnose_run(broken))
    assert set(found) == {("control", "finite"), ("qsd", "finite")}
    assert "Logged figures are infinite or NaN: loss_center" in found["control", "finite"]
    assert (
        "model_final.pth holds weights that are infinite or NaN: 1 tensors, first heads.weight"
        in found["qsd", "finite"]
    )


def test_9_damaged_checkpoint(broken: Path) -> None:
    file = broken / "qsd" / "model_final.pth"
    file.write_bytes(file.read_bytes()[:10_000])
    findings = diagnose_run(broken)
    found = problems(findings)
    assert set(found) == {("qsd", "finite")}
    assert f"Checkpoint unreadable: Checkpoint {file} (limit: readable)" in found["qsd", "finite"]
    assert "The check parameters could not be made" in texts(findings, "unknown", "", "parameters")


def test_10_worse_than_the_control(broken: Path) -> None:
    edit_report(broken, {"baseline": 70.0, "control": 72.0, "qsd": 70.5})
    found = problems(diagnose_run(broken))
    assert set(found) == {("qsd", "control")}
    text = found["qsd", "control"]
    assert "On Market1501 qsd is worse than control: mAP 70.5, control 72.0 (-1.5) (limit: -1;" in text
    assert "QSD.WEIGHT" in text


def test_10_half_a_point_is_no_difference(broken: Path) -> None:
    edit_report(broken, {"baseline": 70.0, "control": 72.0, "qsd": 71.5})
    findings = without_network(broken)
    assert problems(findings) == {}
    assert "mAP 71.5, control 72.0 (-0.5)" in texts(findings, "ok", "qsd", "control")


def test_10_no_control_was_run(broken: Path) -> None:
    shutil.rmtree(broken / "control")
    edit_report(broken, {"baseline": 70.0, "qsd": 71.5})
    findings = without_network(broken)
    assert problems(findings) == {}
    warning = texts(findings, "warning", "qsd", "control")
    assert "No control was run" in warning
    assert "Set RECIPE.CONTROL True" in warning


def test_10_control_of_other_length(broken: Path) -> None:
    edit_config(broken / "control", SOLVER__MAX_EPOCH=3)
    edit_metrics(broken / "control", lambda line: line if line["iteration"] < 9 else {})
    found = problems(without_network(broken))
    assert set(found) == {("qsd", "control")}
    assert "SOLVER.MAX_EPOCH 3 there, 7 here; 9 steps there, 21 here" in found["qsd", "control"]


def test_11_learning_rate_zero(broken: Path) -> None:
    edit_config(broken / "qsd", SOLVER__BASE_LR=0.0)
    edit_config(broken / "control", SOLVER__BASE_LR=0.0)
    for name in ("qsd", "control"):
        edit_metrics(broken / name, setting(lr=0.0))
        freeze(broken / name, broken / "baseline" / "model_final.pth")
    found = problems(diagnose_run(broken))
    assert set(found) == {(name, check) for name in ("qsd", "control") for check in ("learning rate", "parameters")}
    text = found["qsd", "learning rate"]
    assert "The learning rate was zero, so nothing was trained: up to 0 (limit: above 0)" in text
    assert "--from-stage qsd" in text


def test_11_training_inside_the_warm_up(broken: Path) -> None:
    edit_config(broken / "baseline", SOLVER__WARMUP_ITERS=2000)
    edit_metrics(broken / "baseline", setting(lr=0.0001))
    found = problems(without_network(broken))
    assert set(found) == {("baseline", "learning rate")}
    text = found["baseline", "learning rate"]
    assert "45 of 2000 warm-up steps, learning rate up to 0.0001 of 0.003 (limit: at least 2000 steps)" in text
    assert "RECIPE.BASELINE.WARMUP_ITERS" in text


def test_12_classifier_not_learnt(broken: Path) -> None:
    edit_metrics(broken / "baseline", setting(cls_accuracy=0.1875))

    def forget(weights: dict[str, torch.Tensor]) -> None:
        weights["heads.weight"] = torch.zeros(6, 128)  # every image is the first identity: chance in any preprocessing

    edit_weights(broken / "baseline" / "model_final.pth", forget)
    findings = diagnose_run(broken)
    found = problems(findings)
    assert set(found) == {("baseline", "training accuracy")}
    text = found["baseline", "training accuracy"]
    # One in six by chance, and a fifth of the way from there to 1.
    assert "(6 identities, chance is 16.7%): 18.8% at the end (limit: 33%)" in text
    assert "quality labels of such a network mean nothing" in text
    warning = texts(findings, "warning", "baseline", "preprocessing")
    assert "does not know its training images in any colour order or normalisation" in warning


def test_12_fine_tuning_that_lost_the_classifier(broken: Path) -> None:
    def drop(line: dict[str, Any]) -> dict[str, Any]:
        return line | ({"cls_accuracy": 0.25} if line["iteration"] == 2 else {})

    edit_metrics(broken / "qsd", drop)
    edit_metrics(broken / "baseline", setting(cls_accuracy=1.0))
    found = problems(without_network(broken))
    assert set(found) == {("qsd", "training accuracy")}
    text = found["qsd", "training accuracy"]
    assert "far below the end of baseline (100.0%): 25.0% at the first log line (limit: 80.0%)" in text


def test_13_stage_cut_off_before_the_last_one(broken: Path) -> None:
    for name in ("qsd", "report", "deploy"):
        shutil.rmtree(broken / name)
    control = broken / "control"
    marker = json.loads((control / "stage.json").read_text()) | {"finished": False}
    (control / "stage.json").write_text(json.dumps(marker))
    (control / "model_final.pth").unlink()
    (control / "corrupt_images.txt").write_text("a.jpg\nb.jpg\n")
    edit_metrics(control, lambda line: line if line["iteration"] < 12 else {})
    with (control / "metrics.json").open("a") as file:
        file.write('{"cls_accuracy": 0.9')  # a kill in the middle of a line
    findings = without_network(broken)
    found = problems(findings)
    assert set(found) == {("control", "finished")}
    assert "12 steps logged (limit: 7 epochs). Give the same command again" in found["control", "finished"]
    assert "only baseline, labels, control begun (limit: stage qsd)" in texts(findings, "warning", "", "finished")
    assert "first a.jpg: 2 images (limit: 0; DATA.MAX_CORRUPT 0.01)" in texts(
        findings, "warning", "control", "finished"
    )
