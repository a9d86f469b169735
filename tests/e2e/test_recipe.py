"""``tools/train_net.py`` from data folder to results table, killed, resumed and asked for the impossible."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import environment, run, train_net_command
from toy import use_market, write_market

from qsd_plugin.hosts import fastreid as host
from qsd_plugin.quality.labels import QualityLabels

host.activate()

STAGES = ("baseline", "labels", "control", "qsd", "report", "deploy")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=8, per_id=8)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recipe that was killed once, in the middle of its first stage."""
    output = tmp_path_factory.mktemp("runs") / "market"
    command = train_net_command("QSD/market.yml", output)
    log = output.parent / "first.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment(data), stdout=file, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not (output / "baseline" / "last_checkpoint").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, text = run(command, environment(data))
    assert code == 0, text
    (output.parent / "second.log").write_text(text)
    return output


def test_killed_run_is_resumed_and_every_stage_finishes(finished: Path) -> None:
    text = (finished.parent / "second.log").read_text()
    assert "Stage baseline: resuming" in text or "Stage baseline: finished earlier" in text
    for stage in STAGES:
        assert json.loads((finished / stage / "stage.json").read_text())["finished"] is True


def test_labels_cover_the_training_images_and_qsd_starts_from_the_baseline(finished: Path, data: Path) -> None:
    labels = QualityLabels.load(finished / "labels" / "Market1501.npz")
    images = sorted(map(str, data.glob("*/bounding_box_train/*.jpg")))
    assert labels.coverage(images, root=data / "Market-1501-v15.09.15") == 1.0
    start = torch.load(finished / "baseline" / "model_final.pth", weights_only=True)["model"]
    tuned = torch.load(finished / "qsd" / "model_final.pth", weights_only=True)["model"]
    control = torch.load(finished / "control" / "model_final.pth", weights_only=True)["model"]
    assert list(tuned) == list(start) == list(control)
    key = "backbone.layer4.1.conv2.weight"
    change = (tuned[key] - start[key]).norm() / start[key].norm()
    assert 0 < change < 0.1  # fine-tuned from it, not trained anew
    assert not torch.equal(tuned[key], control[key])


def test_table_holds_every_arm_overall_and_by_third(finished: Path) -> None:
    results = json.loads((finished / "report" / "results.json").read_text())
    arms = results["tests"]["Market1501"]["arms"]
    assert list(arms) == ["baseline", "control", "qsd"]
    for row in arms.values():
        assert list(row) == ["all", "worst third", "middle third", "best third"]
        assert 0 <= row["all"]["mAP"] <= 100
    host = json.loads((finished / "qsd" / "results.json").read_text())
    assert arms["qsd"]["all"]["mAP"] == pytest.approx(host["mAP"], abs=1e-3)
    assert arms["qsd"]["all"]["rank1"] == pytest.approx(host["Rank-1"], abs=1e-3)
    assert "one seed, no claim" in (finished / "report" / "results.md").read_text()
    for picture in ("rank_lists_Market1501.png", "label_histogram.png", "worst_and_best.png"):
        assert (finished / "report" / picture).read_bytes().startswith(b"\x89PNG")


def test_deploy_folder_holds_the_last_network_and_its_scores(finished: Path) -> None:
    deployed = torch.load(finished / "deploy" / "model.pth", weights_only=True)["model"]
    trained = torch.load(finished / "qsd" / "model_final.pth", weights_only=True)["model"]
    assert sorted({*trained} - {*deployed}) == ["center_loss.centers"]
    assert all(torch.equal(tensor, trained[name]) for name, tensor in deployed.items())
    results = json.loads((finished / "deploy" / "results.json").read_text())
    assert results["metrics"] == json.loads((finished / "qsd" / "results.json").read_text())
    assert "META_ARCHITECTURE: Baseline" in (finished / "deploy" / "config.yaml").read_text()


def test_second_run_skips_all_stages(finished: Path, data: Path) -> None:
    code, text = run(train_net_command("QSD/market.yml", finished), environment(data))
    assert code == 0, text
    assert text.count("finished earlier, skipped") == len(STAGES)


def test_changed_setting_is_one_paragraph_and_exit_code_two(finished: Path, data: Path) -> None:
    command = train_net_command("QSD/market.yml", finished, **{"SOLVER.BASE_LR": 0.5})
    code, text = run(command, environment(data))
    assert code == 2
    assert "SOLVER.BASE_LR: 0.0001 -> 0.5" in text
    assert "--from-stage" in text
    assert "Traceback" not in text


def test_eval_only_scores_the_last_stage_with_flip_aqe_rerank_and_roc(finished: Path, data: Path) -> None:
    flags = {f"TEST.{name}.ENABLED": True for name in ("FLIP", "AQE", "RERANK", "ROC")}
    more = {"TEST.RERANK.K1": 5, "TEST.RERANK.K2": 2, "TEST.AQE.QE_K": 2}
    code, text = run(train_net_command("QSD/market.yml", finished, "--eval-only", **flags, **more), environment(data))
    assert code == 0, text
    assert "qsd/model_final.pth" in text
    assert "TPR@FPR=1e-02" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"QSD.PARING": "inbatch"}, "Did you mean"),
        ({"DATASETS.NAMES": '("Market1502",)'}, "Market1501"),
        ({"SOLVER.IMS_PER_BATCH": 18}, "18"),
        ({"SOLVER.IMS_PER_BATCH": 64}, "identities"),
        ({"OUTPUT_DIR": "/proc/nowhere"}, "Cannot write"),
        ({"MODEL.META_ARCHITECTURE": "QSDD"}, "Did you mean 'QSD'"),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_two(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: dict[str, object],
    message: str,
) -> None:
    use_market(monkeypatch, data)
    error = refused(train_net_command("QSD/market.yml", tmp_path / "out", **overrides), monkeypatch, capsys)
    assert message in error
    assert "Traceback" not in error


def test_missing_data_folder_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_market(monkeypatch, tmp_path / "empty")
    error = refused(train_net_command("QSD/market.yml", tmp_path / "out"), monkeypatch, capsys)
    assert str(tmp_path / "empty") in error
    assert "FASTREID_DATASETS" in error


def refused(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on standard error of a command line run in this process, which must end with exit code 2."""
    monkeypatch.setattr("sys.argv", command[1:])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(command[1], run_name="__main__")
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_label_tool_makes_the_recipe_s_labels_again_and_checks_them(finished: Path, data: Path, tmp_path: Path) -> None:
    train = train_net_command("QSD/market.yml", finished)
    opts = train[train.index("MODEL.BACKBONE.DEPTH") :]
    tool = [train[0], str(Path(train[1]).with_name("quality_labels.py")), *train[2:4]]
    weights = ["--weights", str(finished / "baseline" / "model_final.pth"), "--output", str(tmp_path / "labels")]
    code, text = run([*tool, *weights, *opts], environment(data))
    assert code == 0, text
    again = QualityLabels.load(tmp_path / "labels" / "Market1501.npz")
    stored = QualityLabels.load(finished / "labels" / "Market1501.npz")
    assert again.keys == stored.keys
    assert again.score == pytest.approx(stored.score, abs=1e-3)
    assert "100.00%" in text.splitlines()[-1]
