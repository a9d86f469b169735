"""``folder2rec``, ``rec2folder`` and ``pairs2bin`` killed or failing at every step that writes: all or nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.face_check import check_faces
from qsd_plugin.data.recordio import RecordReader
from tools.build_data import main

PEOPLE, EACH = 4, 5
#: The functions of ``os`` through which everything comes into its place.
STEPS = ("fsync", "replace", "unlink", "chmod")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``old/`` and ``new/`` faces, ``pairs.csv`` and ``faces.rec``."""
    root, draw = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    for name, people in (("old", PEOPLE - 1), ("new", PEOPLE)):
        for number in range(people * EACH):
            file = root / name / f"{number // EACH}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (1, 1, 3), dtype=np.uint8)).resize((112, 112)).save(file)
    rows = [f"new/0/0.png,new/{(same and '0/1') or '1/5'}.png,{int(same)}" for same in [True, False] * 10]
    (root / "pairs.csv").write_text("\n".join(["first,second,same", *rows]))
    assert main(["folder2rec", str(root / "new"), str(root / "faces.rec")]) == 0
    return root


def command(name: str, inputs: Path, out: Path) -> list[str]:
    return {
        "folder2rec": ["folder2rec", str(inputs / "new"), str(out / "train.rec"), "--lst"],
        "rec2folder": ["rec2folder", str(inputs / "faces.rec"), str(out / "faces")],
        "pairs2bin": ["pairs2bin", str(inputs / "pairs.csv"), str(out / "own.bin")],
    }[name]


def interrupted(step: str, after: int, arguments: list[str], act: Callable[[], None]) -> int:
    """Run the tool in a child that ``act``s instead of the call number ``after`` of ``os.<step>``; the wait status."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    calls, real = [0], getattr(os, step)

    def counted(*values: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] > after:
            setattr(os, step, real)
            act()
        return real(*values, **options)

    code = 3
    try:
        setattr(os, step, counted)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = main(arguments)
    finally:
        os._exit(code)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(28, "No space left on device")


def visible(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.relative_to(folder).parts[0].startswith(".")
    }


@pytest.fixture(scope="module")
def complete(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What each command leaves when nothing happens to it."""
    outcomes = {}
    for name in ("folder2rec", "rec2folder", "pairs2bin"):
        out = tmp_path_factory.mktemp(name)
        assert main(command(name, inputs, out)) == 0
        outcomes[name] = visible(out)
    return outcomes


@pytest.mark.parametrize("act", [kill, fail], ids=["killed", "failed"])
@pytest.mark.parametrize("name", ["folder2rec", "rec2folder", "pairs2bin"])
def test_everything_or_nothing_usable(
    inputs: Path, complete: dict[str, dict[str, bytes]], tmp_path: Path, name: str, act: Callable[[], None]
) -> None:
    stopped = 0
    for step in STEPS:
        for after in range(99):
            out = tmp_path / f"{step}{after}"
            out.mkdir()
            status = interrupted(step, after, command(name, inputs, out), act)
            if status == 0:
                break
            stopped += 1
            assert os.WIFSIGNALED(status) == (act is kill)
            left = visible(out)
            if name == "folder2rec":  # several files: without the index, which comes last, there is no data set
                assert "train.idx" not in left or left == complete[name]
            else:
                assert left in ({}, complete[name])
            if act is fail:
                assert not [path for path in out.iterdir() if path.name.startswith(".")]
            if not left or name == "folder2rec":  # what a killed command left is in nobody's way
                assert main(command(name, inputs, out)) == 0
                assert visible(out) == complete[name]
    assert stopped >= 2


@pytest.mark.parametrize("act", [kill, fail], ids=["killed", "failed"])
def test_an_older_set_stays_or_is_refused(inputs: Path, tmp_path: Path, act: Callable[[], None]) -> None:
    """Records in place of others: the old set, the new one, or a clear error, never a mixture."""
    outcomes = set()
    for step in STEPS:
        for after in range(99):
            out = tmp_path / f"{step}{after}"
            assert main(["folder2rec", str(inputs / "old"), str(out / "train.rec"), "--lst"]) == 0
            if interrupted(step, after, command("folder2rec", inputs, out), act) == 0:
                break
            if not (out / "train.idx").exists():
                with pytest.raises(DataError, match=r"train\.idx'; expected the \.idx file that was written with"):
                    RecordReader(out / "train.rec")
                outcomes.add("refused")
                continue
            report = check_faces(out / "train.rec")
            assert report.problems == []
            outcomes.add(report.counts["identities"])
            assert len((out / "train.lst").read_text().splitlines()) == report.counts["images"]
    assert {PEOPLE - 1, "refused"} <= outcomes


@pytest.mark.parametrize("place", ["first", "last"])
def test_damaged_record_stops_the_way_back_without_a_trace(inputs: Path, tmp_path: Path, place: str) -> None:
    reader = RecordReader(inputs / "faces.rec")
    key = int(reader.image_keys[0 if place == "first" else -1])
    blob = bytearray((inputs / "faces.rec").read_bytes())
    blob[reader.index.offset(key)] ^= 1
    (tmp_path / "faces.rec").write_bytes(blob)
    (tmp_path / "faces.idx").write_bytes((inputs / "faces.idx").read_bytes())
    assert main(["rec2folder", str(tmp_path / "faces.rec"), str(tmp_path / "back")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces.idx", "faces.rec"]
