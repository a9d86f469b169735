"""The run doctor without a host: opening folders, telling findings, checks that later methods add."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qsd_plugin.core.errors import CheckpointError, DataError, RegistryError
from qsd_plugin.report.run_doctor import CHECKS, Finding, Run, as_json, as_text, check, diagnose, open_run, worst

FINE = Finding("finite", "baseline", "ok", "All finite", "3 log lines")
BAD = Finding("pairs", "qsd", "problem", "Hardly a pair teaches", "3%", "50%", "See the labels.")
ODD = Finding("labels", "qsd", "warning", "Labels hardly differ", "1.0", "2", "See QUALITY.SCALE.")


def write_stage(folder: Path, events: list[dict[str, float]], *, written: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    if written:
        (folder / "stage.json").write_text(json.dumps({"finished": True, "written": written}))
    return folder


def test_worst_stage_and_worst_sentence_come_first() -> None:
    text = as_text([FINE, ODD, BAD], "runs/one")
    assert text.splitlines() == [
        "qsd",
        "  PROBLEM Hardly a pair teaches: 3% (limit: 50%). See the labels.",
        "  WARNING Labels hardly differ: 1.0 (limit: 2). See QUALITY.SCALE.",
        "",
        "baseline",
        "  fine: finite 3 log lines.",
    ]
    assert worst([FINE, ODD]) == "warning"
    content = json.loads(as_json([FINE, BAD], "runs/one"))
    assert content["verdict"] == "problem"
    assert content["findings"][1] == {
        "check": "pairs",
        "stage": "qsd",
        "verdict": "problem",
        "sentence": "Hardly a pair teaches",
        "figure": "3%",
        "limit": "50%",
        "next_step": "See the labels.",
    }


def test_nothing_wrong_is_one_line() -> None:
    text = as_text([FINE], "runs/one")
    assert text == "runs/one: nothing wrong in 1 checks. baseline: finite 3 log lines."


def test_later_methods_add_checks_and_one_that_fails_silences_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CHECKS, "_entries", {})

    @check("broken")
    def broken(run: Run) -> list[Finding]:
        raise DataError("Teacher cache", value="x.npz", remedy="Make it again.")

    @check("teacher")
    def teacher(run: Run) -> list[Finding]:
        return [Finding("teacher", stage.name, "ok", "Teacher", f"{stage.iterations} steps") for stage in run.stages]

    write_stage(tmp_path / "student", [{"iteration": 9}], written="2025-01-01T00:00:01")
    write_stage(tmp_path / "cache", [], written="2025-01-01T00:00:02")
    (tmp_path / "notes").mkdir()
    findings = diagnose(open_run(tmp_path))
    told = [(finding.check, finding.stage, finding.verdict, finding.figure) for finding in findings]
    assert told == [
        ("broken", "", "unknown", "Teacher cache: got 'x.npz'. Make it again"),
        ("teacher", "student", "ok", "10 steps"),  # in the order in which stages were begun
        ("teacher", "cache", "ok", "0 steps"),
    ]
    with pytest.raises(RegistryError, match="registered already"):
        check("teacher")(broken)


def test_resumed_run_counts_an_iteration_once_and_with_its_last_value(tmp_path: Path) -> None:
    events = [{"iteration": 199, "lr": 1.0}, {"iteration": 399, "lr": 2.0}, {"iteration": 199, "lr": 3.0}]
    stage = open_run(write_stage(tmp_path / "qsd", events)).stages[0]
    assert stage.series("lr") == [3.0, 2.0]
    assert stage.iterations == 400


def test_weights_are_read_from_host_and_bare_files_and_damage_is_named(tmp_path: Path) -> None:
    stage = write_stage(tmp_path / "qsd", [{"iteration": 1}])
    run = open_run(stage)
    kernel = torch.ones(2, 3)
    torch.save({"model": {"kernel": kernel}, "epoch": 3}, stage / "model_final.pth")
    torch.save({"kernel": kernel}, stage / "bare.pth")
    (stage / "damaged.pth").write_bytes(b"<html>")
    for name in ("model_final.pth", "bare.pth"):
        assert torch.equal(run.read_weights(stage / name)["kernel"], kernel)
    with pytest.raises(CheckpointError, match=r"damaged\.pth.*It may be cut off"):
        run.read_weights(stage / "damaged.pth")
