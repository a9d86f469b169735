"""Folders to records and back through the tool, and what its check finds."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.face_check import check_faces
from qsd_plugin.data.face_records import classes, folder_to_records, records_to_folder
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.recordio import RecordReader, RecordWriter
from qsd_plugin.data.verification_bin import save_bin
from tools.build_data import main

PEOPLE = {"ann": 3, "bob": 1, "cid": 2}


def write_faces(root: Path, size: int = 112) -> Path:
    draw = np.random.default_rng(0)
    for name, count in PEOPLE.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            coarse = draw.integers(0, 256, (7, 7, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, size)).save(root / name / f"{number}.jpg")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_faces(tmp_path / "faces")


def contents(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]


def test_layout_with_header_is_the_hosts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "train.rec"
    assert main(["folder2rec", str(folder), str(out), "--lst"]) == 0
    assert capsys.readouterr().out == f"{out}: 6 images, 3 identities\n"
    reader = RecordReader(out)
    # As arcface_torch reads it: the header's first label ends the range of image keys.
    header = reader.read(0)
    assert (header.flag, header.label.tolist()) == (2, [7.0, 10.0])
    assert [int(reader.read(key).label[0]) for key in range(1, 7)] == [0, 0, 0, 1, 2, 2]
    assert [reader.read(key).label.tolist() for key in range(7, 10)] == [[1, 4], [4, 5], [5, 7]]
    assert [reader.read(key).content for key in range(1, 7)] == contents(folder)
    assert (out.parent / "property").read_text() == "3,112,112\n"
    assert (out.parent / "train.lst").read_text().splitlines()[3] == "4\t1.000000\tbob/0.jpg"


def test_layout_without_header(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "train.rec"
    assert main(["folder2rec", str(folder), str(out), "--no-header"]) == 0
    reader = RecordReader(out)
    assert reader.image_labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert [reader.read(key).content for key in range(6)] == contents(folder)
    assert not (tmp_path / "train.lst").exists()


@pytest.mark.parametrize("flags", [[], ["--no-header"]])
def test_there_and_back_is_bit_exact(
    folder: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, back = tmp_path / "a" / "t.rec", tmp_path / "b" / "t.rec", tmp_path / "back"
    assert main(["folder2rec", str(folder), str(first), *flags]) == 0
    assert main(["rec2folder", str(first), str(back)]) == 0
    assert capsys.readouterr().out.endswith(f"{back}: 6 images, 3 identities\n")
    assert [len(list(person.iterdir())) for person in sorted(back.iterdir())] == list(PEOPLE.values())
    assert contents(back) == contents(folder)
    assert main(["folder2rec", str(back), str(second), *flags]) == 0
    for name in ("t.rec", "t.idx", "property"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_images_of_records_open_by_path(folder: Path, tmp_path: Path) -> None:
    folder_to_records(folder, tmp_path / "t.rec")
    expected = np.asarray(Image.open(folder / "bob" / "0.jpg"))
    np.testing.assert_array_equal(np.asarray(read_rgb(f"{tmp_path}/t.rec#4")), expected)
    with pytest.raises(DataError, match="unknown key: got 99"):
        read_rgb(f"{tmp_path}/t.rec#99")
    with pytest.raises(DataError, match=r"cannot be read: got '.*t\.rec#0'"):
        read_rgb(f"{tmp_path}/t.rec#0")  # the header holds no image


def test_unusable_images_are_listed_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "ann" / "1.jpg").write_bytes(b"")
    Image.new("RGB", (96, 112)).save(folder / "bob" / "0.jpg")
    Image.new("L", (112, 112)).save(folder / "cid" / "1.jpg")
    out = tmp_path / "out" / "t.rec"
    assert main(["folder2rec", str(folder), str(out)]) == 2
    said = capsys.readouterr().err
    assert "3 of 6 images cannot be stored" in said
    for reason in ("without content: got", "0.jpg: got '96x112 pixels'; expected 112x112 pixels", "got 'mode L'"):
        assert reason in said
    assert not out.parent.exists()
    assert main(["folder2rec", str(folder), str(out), "--skip-damaged", "--convert"]) == 0
    assert capsys.readouterr().out.count("left out: ") == 2
    reader = RecordReader(out)
    assert reader.image_labels.tolist() == [0, 0, 1, 1]  # bob has no image left
    assert reader.read(4).content.startswith(b"\x89PNG")
    assert check_faces(out).problems == []


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "Image without content"),
        (b"no image", "cannot be read"),
        (Image.new("L", (112, 112)), "got 'mode L'; expected an upright RGB image"),
        (Image.new("RGBA", (112, 112)), "got 'mode RGBA'; expected an upright RGB image"),
        (Image.new("RGB", (160, 160)), "got '160x160 pixels'; expected 112x112 pixels"),
    ],
    ids=["zero bytes", "text", "grey", "four channels", "other size"],
)
def test_an_older_set_survives_an_unusable_image(
    folder: Path, tmp_path: Path, image: bytes | Image.Image, reason: str
) -> None:
    out = tmp_path / "out" / "t.rec"
    folder_to_records(folder, out, listing=True)
    before = {file.name: file.read_bytes() for file in out.parent.iterdir()}
    bad = folder / "cid" / "bad.png"
    if isinstance(image, bytes):
        bad.write_bytes(image)
    else:
        image.save(bad)
    with pytest.raises(DataError, match=f"(?s)1 of 7 images cannot be stored.*{reason}") as raised:
        folder_to_records(folder, out, listing=True)
    assert str(bad) in str(raised.value)
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == before


def test_folders_that_are_none_of_faces(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Folder of faces: got '.*absent'"):
        folder_to_records(tmp_path / "absent", tmp_path / "t.rec")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Folder of faces without images"):
        folder_to_records(tmp_path / "empty", tmp_path / "t.rec")
    Image.new("RGB", (112, 112)).save(folder / "loose.jpg")
    with pytest.raises(DataError, match=r"Face without an identity: .*expected .*<identity>/loose\.jpg"):
        folder_to_records(folder, tmp_path / "t.rec")


def test_folder_to_write_must_be_empty(folder: Path, tmp_path: Path) -> None:
    folder_to_records(folder, tmp_path / "t.rec")
    with pytest.raises(DataError, match="expected one that is empty"):
        records_to_folder(tmp_path / "t.rec", folder)
    blob = bytearray((tmp_path / "t.rec").read_bytes())
    blob[int((tmp_path / "t.idx").read_text().split()[-7]) :] = b""  # cut before the last image
    (tmp_path / "t.rec").write_bytes(blob)
    with pytest.raises(DataError, match="lie outside"):
        records_to_folder(tmp_path / "t.rec", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "property", "t.idx", "t.rec"]


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan"), float("inf"), 2.0**25])
def test_labels_that_are_no_classes(label: float) -> None:
    assert classes(np.array([0, 3, 2**24], np.float32), name="a").tolist() == [0, 3, 2**24]
    with pytest.raises(DataError, match=f"a: 1 of 2 labels are no classes: got {label}"):
        classes(np.array([1, label], np.float32), name="a")


# check


def test_check_of_sound_records(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--no-header"]):
        main(["folder2rec", str(folder), str(tmp_path / "t.rec"), *flags])
        capsys.readouterr()
        assert main(["check", "--json", str(tmp_path / "t.rec")]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["counts"] == {
            "layout": "without header" if flags else "with header",
            "images": 6,
            "identities": 3,
            "identities with one image": 1,
            "most frequent sizes": {"112x112": 6},
        }
    assert main(["check", str(tmp_path / "t.rec")]) == 0
    said = capsys.readouterr().out
    assert "identities with one image  1" in said
    assert said.endswith("no problems found\n")


def test_check_names_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.rec"
    jpeg = (folder / "ann" / "0.jpg").read_bytes()
    with RecordWriter(path) as writer:
        writer.append(b"", (5, 9))
        writer.append(jpeg, 0)
        writer.append(jpeg[:300], 0)
        writer.append(jpeg, 0.5)
        writer.append(jpeg, 2)
        writer.append(b"", (1, 4))  # holds two labels
        writer.append(b"", (4, 5))
    (tmp_path / "property").write_text("85742,112,112")
    with path.open("ab") as file:
        file.write(b"rest")
    assert main(["check", str(path)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")]
    assert problems == [
        "PROBLEM: 1 images cannot be decoded: 2",
        "PROBLEM: 1 labels are no class numbers: 0.5",
        "PROBLEM: header says 9 records and the index has 7",
        "PROBLEM: 1 identity ranges do not fit the images: 5",
        f"PROBLEM: 4 bytes behind the last record of the index (byte {path.stat().st_size - 4})",
        "PROBLEM: property says 85742 classes and the records have 3",
    ]


def test_check_of_a_damaged_record_and_of_a_header_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.rec"
    folder_to_records(folder, path)
    blob = bytearray(path.read_bytes())
    lines = [line.split("\t") for line in (tmp_path / "t.idx").read_text().splitlines()]
    offset = int(lines[5][1])
    blob[offset : offset + 4] = b"oops"
    struct.pack_into("<f", blob, 8 + 24, 3.0)  # the header's first label
    path.write_bytes(blob)
    report = check_faces(path)
    assert report.problems[0].startswith(f"Record file {path}: header: got 'images up to key 2'")
    assert "1 records are cut off or damaged: 5" in report.problems
    path.write_bytes(b"oops" + blob[4:])
    report = check_faces(path)
    assert "record with key 0 at offset 0 cannot be read" in report.problems[0]
    assert report.counts["layout"] == "unknown"


def test_check_of_crops_of_several_sizes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.rec"
    folder_to_records(folder, path)
    contents = [RecordReader(path).read(key).content for key in range(1, 7)]
    for number, (place, size) in enumerate({1: (96, 96), 4: (112, 96)}.items()):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        contents[place] = (tmp_path / f"{number}.png").read_bytes()
    with RecordWriter(path, image_size=(96, 128)) as writer:
        for number, content in enumerate([*contents, b""]):
            writer.append(content, number % 2)
    assert check_faces(path).problems == [
        "1 images cannot be decoded: 6",
        "2 sizes are not those of the other crops, or not square: 96x96 (1 images), 112x96 (1 images)",
        "property says 96,128 pixels (height,width) and most images have 112,112",
    ]
    (tmp_path / "property").write_text("2")  # without a size
    assert check_faces(path).problems[-1] == "property says no pixels (height,width) and most images have 112,112"


def test_check_refuses_pickles_that_ask_for_more_than_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.bin").write_bytes(b"cposix\nsystem\n(S'touch touched'\ntR.")
    assert main(["check", str(tmp_path / "a.bin")]) == 2
    assert "it asks for posix.system" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()


def test_check_of_missing_keys(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.rec"
    folder_to_records(folder, path)
    lines = (tmp_path / "t.idx").read_text().splitlines(keepends=True)
    (tmp_path / "t.idx").write_text("".join(lines[:2] + lines[3:]))
    assert check_faces(path).problems == ["1 image keys are missing from the index: 2"]


def test_check_of_pairs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jpeg = (folder / "ann" / "0.jpg").read_bytes()
    path = tmp_path / "a.bin"
    save_bin(path, [jpeg] * 40, [True, False] * 10)
    assert main(["check", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {
        "pairs": 20,
        "matching pairs": 10,
        "non-matching pairs": 10,
        "most frequent sizes": {"112x112": 40},
    }
    save_bin(path, [jpeg] * 39 + [jpeg[:200]], [True] * 10 + [False, True] * 5, folds=None)
    assert main(["check", str(path)]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM: 1 images cannot be decoded: 39" in said
    assert "PROBLEM: 5 of 10 folds lack a kind of pairs (pairs2bin --interleave): 1, 2, 3, 4, 5" in said
    assert main(["check", str(tmp_path / "a.npz")]) == 2


def test_pairs_from_the_tool(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["ann/0.jpg,ann/1.jpg,1"] * 10 + ["ann/0.jpg,bob/0.jpg,0"] * 10
    (folder / "pairs.csv").write_text("\n".join(["first,second,same", *rows]))
    out = tmp_path / "own.bin"
    assert main(["pairs2bin", str(folder / "pairs.csv"), str(out)]) == 2
    assert "--interleave" in capsys.readouterr().err
    assert main(["pairs2bin", str(folder / "pairs.csv"), str(out), "--interleave"]) == 0
    assert capsys.readouterr().out == f"{out}: 20 pairs, 10 of them matching\n"
    assert check_faces(out).problems == []
