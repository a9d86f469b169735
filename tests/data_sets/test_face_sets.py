"""Lists of TinyFace and IJB: what is read, and what a damaged folder says."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.face_sets import read_ijb, read_tinyface


def tinyface(root: Path) -> Path:
    for name in ("Probe/12_1.jpg", "Probe/7_a.jpg", "Gallery_Match/12_2.jpg", "Gallery_Distractor/99.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def ijb(root: Path) -> Path:
    (root / "meta").mkdir()
    scores = [
        f"{name}.jpg {' '.join(str(10 * number + i) for i in range(10))} 0.{number}" for number, name in enumerate("ab")
    ]
    (root / "meta" / "ijbc_name_5pts_score.txt").write_text("\n".join(scores) + "\n")
    (root / "meta" / "ijbc_face_tid_mid.txt").write_text("a.jpg 5 70\nb.jpg 6 71\n")
    (root / "meta" / "ijbc_template_pair_label.txt").write_text("5 6 1\n5 5 0\n")
    return root


def test_tinyface_lists(tmp_path: Path) -> None:
    data = read_tinyface(tinyface(tmp_path))
    assert [path.name for path in data.paths] == ["12_1.jpg", "7_a.jpg", "12_2.jpg", "99.jpg"]
    assert data.identities.tolist() == [12, 7, 12, -100]
    assert (data.num_probe, data.num_mated) == (2, 1)
    twin = tmp_path / "Probe" / "more" / "12_1.png"
    twin.parent.mkdir()
    twin.touch()
    with pytest.raises(DataError, match=r"TinyFace: two images with the name Probe/12_1: got '.*12_1\.(jpg|png) and "):
        read_tinyface(tmp_path)
    twin.unlink()
    (tmp_path / "Gallery_Match" / "face.jpg").touch()
    with pytest.raises(DataError, match=r"Name of a TinyFace image: got '.*face\.jpg'; expected a number and _"):
        read_tinyface(tmp_path)
    (tmp_path / "Gallery_Distractor" / "99.jpg").unlink()
    with pytest.raises(DataError, match=r"TinyFace: got '.*Gallery_Distractor'; expected images in each"):
        read_tinyface(tmp_path)


def test_ijb_lists(tmp_path: Path) -> None:
    data = read_ijb(ijb(tmp_path))
    assert data.paths == [tmp_path / "loose_crop" / "a.jpg", tmp_path / "loose_crop" / "b.jpg"]
    assert data.points[1].tolist() == [[10, 11], [12, 13], [14, 15], [16, 17], [18, 19]]
    assert data.detector_score.tolist() == [0.0, 0.1]
    assert (data.templates.tolist(), data.medias.tolist()) == ([5, 6], [70, 71])
    assert (data.pairs.tolist(), data.genuine.tolist()) == ([[5, 6], [5, 5]], [True, False])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("name_5pts_score", "a.jpg 1 2 3\n", r"line 1: got 'a.jpg 1 2 3'; expected a name and 11 numbers"),
        ("name_5pts_score", "", "name_5pts_score and face_tid_mid differ; expected the same images|differ"),
        ("face_tid_mid", "b.jpg 5 70\na.jpg 6 71\n", "name_5pts_score and face_tid_mid differ"),
        ("face_tid_mid", "a.jpg 5 70\nb.jpg 6 x\n", "face_tid_mid.txt, line 2: got 'b.jpg 6 x'"),
        ("template_pair_label", "5 6 2\n", r"template_pair_label.txt: got \[\[5, 6, 2\]\]; expected two templates"),
        ("template_pair_label", "5 six 1\n", "template_pair_label.txt: got .*; expected integers"),
        ("template_pair_label", None, r"IJB list: got \[\]; expected one file ijbb_template_pair_label.txt or"),
    ],
)
def test_damaged_ijb_lists(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    file = ijb(tmp_path) / "meta" / f"ijbc_{name}.txt"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(DataError, match=message):
        read_ijb(tmp_path)
