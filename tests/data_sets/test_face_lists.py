"""Lists of faces and of pairs: what they give, and what is said of each way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.face_lists import read_faces, read_pairs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/1.png", "b/0.png", "a/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def written(folder: Path, text: str) -> Path:
    (folder / "lists").mkdir(exist_ok=True)
    (folder / "lists" / "list.csv").write_text(text, encoding="utf-8-sig")
    return folder / "lists" / "list.csv"


def test_faces_are_sorted_by_identity(folder: Path) -> None:
    file = written(folder, f"camera, identity, path\n1, zoe, {folder}/a/0.png\n, bob, ../b/1.png\n2, bob, ../b/0.png\n")
    expected = [("b/0.png", "bob"), ("b/1.png", "bob"), ("a/0.png", "zoe")]
    assert read_faces(file) == [(f"{folder}/{path}", who) for path, who in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,pid\n../a/0.png,1\n",
            r"Face list .*list\.csv: header line: got \['identity'\]; expected columns path,id",
        ),
        ("path,identity\n", r"Face list without images"),
        ("path,identity\n../a/0.png,\n", r"Face list .*list\.csv, line 2: .*expected a path and an identity"),
        (
            "path,identity\n../a/0.png,x\n../a/9.png,x\n",
            r"Face list .*: 1 of 2 files do not exist: got \['.*/a/9\.png'\]",
        ),
        ("path,identity\n../a/0.png,x\n../a/0.png,y\n", r"Face list .*: 1 files are listed more than once"),
    ],
)
def test_wrong_face_list(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_faces(written(folder, text))


def test_missing_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Face list: got '.*none\.csv'; expected an existing CSV file"):
        read_faces(tmp_path / "none.csv")


def test_pairs_keep_their_order(folder: Path) -> None:
    file = written(folder, "quality,second,first,same\n-3.5,../a/0.png,../b/0.png,0\n2,../b/1.png,../b/0.png,1\n")
    listed = read_pairs(file)
    assert listed.first == [folder / "b" / "0.png"] * 2
    assert listed.second == [folder / "a" / "0.png", folder / "b" / "1.png"]
    assert listed.same.tolist() == [False, True]
    assert listed.identity is None
    assert listed.quality is not None
    assert listed.quality.tolist() == [-3.5, 2.0]
    assert read_pairs(written(folder, "first,second,same,identity\na,b,1,ann\n")).identity == ["ann"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,b,1,ann,", "line 2: .*expected an identity and a quality, a number, for every pair or no such column"),
        ("a,b,1,,3", "line 2: .*expected an identity and a quality"),
        ("a,b,1,ann,nan", "line 2: .*expected an identity and a quality"),
        ("a,b,1,ann,good", "line 2: .*expected an identity and a quality"),
        ("a,,1,ann,3", "line 2: .*expected two images and 0 or 1"),
        ("a,b,yes,ann,3", "line 2: .*expected two images and 0 or 1"),
    ],
)
def test_wrong_pair_list(folder: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(written(folder, f"first,second,same,identity,quality\n{line}\n"))
