"""The recipe runner: skip, resume, stale, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qsd_plugin.core.errors import StageError
from qsd_plugin.core.stages import MARKER, Stage, run_recipe


def recipe(root: Path, log: list[str], *, epochs: int = 3, data: str = "d", fail_in: str = "") -> list[Stage]:
    """Two stages; the second reads the first's output."""

    def first(folder: Path, resume: bool) -> None:
        log.append(f"first resume={resume}")
        if fail_in == "first":
            raise KeyboardInterrupt
        (folder / "model").write_text(f"{epochs}")

    def second(folder: Path, resume: bool) -> None:
        log.append(f"second resume={resume}")
        if fail_in == "second":
            raise KeyboardInterrupt
        (folder / "labels").write_text("x")

    return [
        Stage("first", first, keys={"EPOCHS": epochs}, data=data, outputs=["model"]),
        Stage("second", second, inputs=[root / "first" / "model"], outputs=["labels"]),
    ]


def run(root: Path, log: list[str], **options: object) -> list[str]:
    stage_options = {key: options.pop(key) for key in ("epochs", "data", "fail_in") if key in options}
    said: list[str] = []
    run_recipe(recipe(root, log, **stage_options), root, announce=said.append, **options)  # type: ignore[arg-type]
    return said


def test_second_run_skips_what_is_finished(tmp_path: Path) -> None:
    log: list[str] = []
    run(tmp_path, log)
    said = run(tmp_path, log)
    assert log == ["first resume=False", "second resume=False"]
    assert all("skipped" in line for line in said)


def test_cut_off_stage_is_resumed_and_later_ones_start_fresh(tmp_path: Path) -> None:
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, log, fail_in="first")
    run(tmp_path, log)
    assert log == ["first resume=False", "first resume=True", "second resume=False"]


def test_changed_key_stops_and_names_key_values_and_remedies(tmp_path: Path) -> None:
    run(tmp_path, [])
    with pytest.raises(StageError, match=r"EPOCHS: 3 -> 4.*--from-stage first.*--accept-stale"):
        run(tmp_path, [], epochs=4)


def test_cut_off_stage_with_changed_key_is_stale_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [], fail_in="first")
    with pytest.raises(StageError, match="EPOCHS"):
        run(tmp_path, [], epochs=4)


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    run(tmp_path, [])
    with pytest.raises(StageError, match="other images"):
        run(tmp_path, [], data="other")


def test_accept_stale_keeps_finished_stages(tmp_path: Path) -> None:
    log: list[str] = []
    run(tmp_path, log)
    run(tmp_path, log, epochs=4, accept_stale=True)
    assert len(log) == 2


def test_from_stage_redoes_it_and_all_later_ones(tmp_path: Path) -> None:
    log: list[str] = []
    run(tmp_path, log)
    run(tmp_path, log, epochs=4, from_stage="first")
    assert log[2:] == ["first resume=False", "second resume=False"]
    assert json.loads((tmp_path / "first" / MARKER).read_text())["keys"] == {"EPOCHS": 4}


def test_changed_input_file_makes_the_reader_stale(tmp_path: Path) -> None:
    run(tmp_path, [])
    (tmp_path / "first" / "model").write_text("retrained")
    with pytest.raises(StageError, match="input first/model has other content"):
        run(tmp_path, [])


def test_single_stage_without_its_input_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"first.model"):
        run(tmp_path, [], only="second")


def test_unknown_stage_suggests(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="Did you mean 'second'"):
        run(tmp_path, [], only="secnod")


def test_missing_output_is_an_error_and_the_stage_stays_unfinished(tmp_path: Path) -> None:
    stage = Stage("empty", lambda folder, resume: None, outputs=["model"])
    with pytest.raises(StageError, match="without its output"):
        run_recipe([stage], tmp_path, announce=lambda line: None)
    assert json.loads((tmp_path / "empty" / MARKER).read_text())["finished"] is False
