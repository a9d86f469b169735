"""``tools/doctor.py --run``: a healthy tiny recipe, and copies of it broken as real faults would leave them."""

from __future__ import annotations

import json
import logging
import runpy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT, train_net_command
from toy import use_market, write_market

from qsd_plugin.core.errors import DataError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.report import run_doctor
from qsd_plugin.report.run_doctor import Finding

host.activate()

from qsd_plugin.hosts.fastreid.run_checks import diagnose_run, open_host_run  # noqa: E402  (needs the activated host)

#: Learns its six identities in 45 steps of 0.1 s; the fine-tunings take 21, and QSD's figures are written every 20.
RECIPE: dict[str, Any] = {
    "MODEL.BACKBONE.NAME": "build_osnet_backbone",
    "MODEL.BACKBONE.DEPTH": "x0_25",
    "MODEL.BACKBONE.FEAT_DIM": 128,
    "INPUT.REA.ENABLED": False,
    "INPUT.PADDING.SIZE": 4,
    "SOLVER.MAX_EPOCH": 7,
    "SOLVER.BASE_LR": 1e-5,
    "SOLVER.CHECKPOINT_PERIOD": 4,
    "RECIPE.BASELINE.MAX_EPOCH": 15,
    "RECIPE.BASELINE.BASE_LR": 3e-3,
    "TEST.EVAL_PERIOD": 50,
    "QUALITY.ROUNDS": 8,
}
Edit = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=6, per_id=8, test_ids=6)


@pytest.fixture(scope="module")
def healthy(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "healthy"
    with pytest.MonkeyPatch.context() as patch:
        train(train_net_command("QSD/market.yml", output, **RECIPE), data, patch)
    edit_report(output, {"baseline": 90.0, "control": 91.0, "qsd": 91.5})  # six test identities leave it to chance
    return output


@pytest.fixture
def broken(healthy: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the healthy run to break, with its images where the host looks for them."""
    use_market(monkeypatch, data)
    unread = shutil.ignore_patterns("*.png", "events.*", "model_best.pth")
    return Path(shutil.copytree(healthy, tmp_path / "broken", ignore=unread))


def train(command: list[str], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tools/train_net.py`` in this process, whose log handlers go away with the patch."""
    use_market(monkeypatch, data)
    monkeypatch.setattr("sys.argv", command[1:])
    monkeypatch.setattr(logging.getLogger("fastreid"), "handlers", [])
    runpy.run_path(command[1], run_name="__main__")


def doctor(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of the tool, run in this process."""
    monkeypatch.setattr("sys.argv", ["doctor.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools" / "doctor.py"), run_name="__main__")
    return int(stopped.value.code or 0)


def problems(findings: Sequence[Finding]) -> dict[tuple[str, str], str]:
    """Text of every problem by stage and check; a second one of the same check is joined to the first."""
    found: dict[tuple[str, str], str] = {}
    for finding in findings:
        if finding.verdict == "problem":
            key = (finding.stage, finding.check)
            found[key] = f"{found[key]}\n{finding.text()}" if key in found else finding.text()
            assert finding.figure
            assert finding.limit
            assert finding.next_step
    return found


def without_network(folder: Path) -> list[Finding]:
    """The findings of all checks but those that build a network, for faults that do not touch it."""
    opened = open_host_run(folder)
    names = set(run_doctor.CHECKS) - {"architecture", "preprocessing", "parameters"}
    return [finding for name in sorted(names) for finding in run_doctor.CHECKS.get(name)(opened)]


def texts(findings: Sequence[Finding], verdict: str, stage: str, check: str) -> str:
    """All findings of one verdict, stage and check."""
    wanted = (verdict, stage, check)
    return "\n".join(
        finding.text() for finding in findings if (finding.verdict, finding.stage, finding.check) == wanted
    )


def edit_config(folder: Path, **values: Any) -> None:
    """Set ``A__B=value`` in a stage's stored config."""
    file = folder / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for name, value in values.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    file.write_text(yaml.safe_dump(config))


def edit_metrics(folder: Path, edit: Edit) -> None:
    """Replace every line of a stage's metrics."""
    file = folder / "metrics.json"
    lines = [edit(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def setting(**values: float) -> Edit:
    """Overwrite figures where they are logged; ``qsd__kept`` stands for ``qsd/kept``."""
    wanted = {name.replace("__", "/"): value for name, value in values.items()}
    return lambda line: line | {name: value for name, value in wanted.items() if name in line}


def edit_weights(file: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights in a checkpoint."""
    content = torch.load(file, weights_only=True)
    edit(content["model"])
    torch.save(content, file)


def freeze(folder: Path, start: Path) -> None:
    """Leave a stage's last checkpoint as row S01 unrepaired does: only BN statistics and the loss's centres are new."""
    before = torch.load(start, weights_only=True)["model"]

    def undo(weights: dict[str, torch.Tensor]) -> None:
        moving = ("running_mean", "running_var", "num_batches_tracked", "centers")
        weights.update({name: value for name, value in before.items() if not name.endswith(moving)})

    edit_weights(folder / "model_final.pth", undo)


def edit_labels(run_folder: Path, edit: Callable[[QualityLabels], QualityLabels]) -> None:
    file = run_folder / "labels" / "Market1501.npz"
    edit(QualityLabels.load(file)).save(file)


def with_score(score: np.ndarray) -> Callable[[QualityLabels], QualityLabels]:
    return lambda labels: QualityLabels(score, labels.raw, labels.spread, labels.keys, labels.meta)


def test_healthy_run_is_one_line_with_its_figures(
    broken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = diagnose_run(broken)
    assert problems(findings) == {}
    assert {finding.check for finding in findings} >= set(run_doctor.CHECKS), "a check said nothing"
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


def test_9_nan_loss(data: Path, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Really broken: an infinite factor makes the loss infinite at the first step, and the host stops.
    command = train_net_command(
        "QSD/market.yml", broken, "--stage", "qsd", "--from-stage", "qsd", **RECIPE, **{"QSD.WEIGHT": "1e999"}
    )
    with pytest.raises(FloatingPointError):
        train(command, data, monkeypatch)
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


def edit_report(run_folder: Path, arms: dict[str, float]) -> None:
    file = run_folder / "report" / "results.json"
    results = json.loads(file.read_text())
    stored = {arm: {"all": {"rank1": 50.0, "mAP": value, "mINP": 10.0}} for arm, value in arms.items()}
    results["tests"]["Market1501"]["arms"] = stored
    file.write_text(json.dumps(results))


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
    broken: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_market(monkeypatch, tmp_path / "nowhere")
    edit_metrics(broken / "qsd", setting(lr=0.0))
    code = doctor(["--run", str(broken / "qsd"), "--json", "DATA.ROOT", str(data)], monkeypatch)
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
