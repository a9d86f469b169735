"""Packed evaluation sets: released layouts in small, what comes back, and everything that is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.align import norm_crop, similarity, template
from qsd_plugin.data.face_packing import encoded, pack_eval
from qsd_plugin.data.face_sets import read_ijb, read_tinyface
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.packed_faces import (
    Manifest,
    blue_image,
    check_blue,
    packed_ijb,
    packed_scface,
    packed_tinyface,
    read_manifest,
)
from qsd_plugin.data.recordio import RecordReader, RecordWriter
from qsd_plugin.data.scface import read_scface, scface_split

SIZE = 112
TINYFACE = (
    "Probe/12_1.jpg",
    "Probe/7_9.jpg",
    "Gallery_Match/12_2.jpg",
    "Gallery_Match/7_1.jpg",
    "Gallery_Distractor/9.jpg",
)
SCFACE = (
    "mugshot_frontal_cropped_all/001_frontal.jpg",
    "mugshot_frontal_cropped_all/002_frontal.jpg",
    "mugshot_rotation_all/001_L1.jpg",
    "surveillance_cameras_distance_1/cam_1/001_cam1_1.jpg",
    "surveillance_cameras_distance_3/cam_5/002_cam5_3.jpg",
    "surveillance_cameras_IR_cam8/001_cam8.jpg",
    "surveillance_cameras_distance_2/cam_6/001_cam6_2.jpg",
)


def picture(seed: int, size: int = SIZE, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).convert(mode)


def write(root: Path, names: tuple[str, ...], **options: Any) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, **options).save(root / name, quality=95)
    return root


def write_ijb(root: Path, kind: str = "ijbb") -> Path:
    random = np.random.default_rng(1)
    names = tuple(f"{number}.jpg" for number in (10, 9, 2))  # neither sorted as numbers nor as text
    write(root / "loose_crop", names, size=150)
    (root / "meta").mkdir()
    points = template(SIZE) * 1.2 + random.normal(0, 3, (3, 5, 2)).round(2)
    rows = [f"{n} {' '.join(map(str, p.ravel()))} 0.{k}" for k, (n, p) in enumerate(zip(names, points, strict=True), 5)]
    (root / "meta" / f"{kind}_name_5pts_score.txt").write_text("\n".join(rows))
    owners = zip(names, (3, 1, 3), strict=True)
    (root / "meta" / f"{kind}_face_tid_mid.txt").write_text("\n".join(f"{n} {t} 7" for n, t in owners))
    (root / "meta" / f"{kind}_template_pair_label.txt").write_text("1 3 0\n3 3 1\n")
    return root


def test_tinyface_comes_back_as_it_is(tmp_path: Path) -> None:
    root = write(tmp_path / "tinyface" / "Testing_Set", TINYFACE).parent
    manifest = pack_eval("tinyface", root, tmp_path / "t.rec")
    assert manifest.names.tolist() == list(TINYFACE)
    assert manifest.role.tolist() == ["probe"] * 2 + ["gallery"] * 2 + ["distractor"]
    assert manifest.label.tolist() == [12, 7, 12, 7, -100]
    packed, listed = packed_tinyface(tmp_path / "t.rec"), read_tinyface(root)
    assert packed.identities.tolist() == listed.identities.tolist()
    assert (packed.num_probe, packed.num_mated) == (2, 2)
    for one, other in zip(packed.paths, listed.paths, strict=True):
        assert np.array_equal(read_rgb(one), read_rgb(other))
    with RecordReader(tmp_path / "t.rec") as reader:  # bytes as they were, behind the colour test
        assert [bytes(reader.read(key).content) for key in range(1, 6)] == [p.read_bytes() for p in listed.paths]
    assert sorted(path.name for path in tmp_path.glob("t.*")) == ["t.idx", "t.manifest.npz", "t.rec"]
    assert list(tmp_path.glob(".*")) == []


def test_scface_by_stems_wherever_the_folder_lies(tmp_path: Path) -> None:
    root = write(tmp_path / "cam9_frontal" / "scface", SCFACE)  # the official reader matches these words anywhere
    manifest = pack_eval("scface", root, tmp_path / "s.rec")
    assert manifest.names.tolist() == sorted(
        name for name in SCFACE if not any(x in name for x in ("L1", "cam6", "cam8"))
    )
    assert manifest.role.tolist() == ["gallery", "gallery", "probe", "probe"]
    assert manifest.label.tolist() == [1, 2, 1, 2]
    assert manifest.distance.tolist() == [-1, -1, 1, 3]
    packed = packed_scface(tmp_path / "s.rec")
    assert packed.names == read_scface(root).names
    split = scface_split(packed.names)
    assert np.array_equal(read_rgb(packed.paths[split.probe[1]]), read_rgb(root / SCFACE[4]))
    held_out = split.without_first(1)
    assert (held_out.gallery_ids.tolist(), held_out.probe_ids.tolist()) == ([2], [2])
    assert (held_out.gallery.tolist(), held_out.probe.tolist(), held_out.distance.tolist()) == ([1], [3], [3])
    with pytest.raises(DataError, match=r"SCface: two images with the name 001_cam1_1: got '.* and .*'"):
        read_scface(write(root, ("surveillance_cameras_all/001_cam1_1.jpg",)))


@pytest.mark.parametrize("count", [4, 5])
def test_scface_is_aligned_by_its_list(tmp_path: Path, count: int) -> None:
    root = write(tmp_path / "scface", SCFACE, size=200)
    target = template(SIZE)
    target = np.stack([*target[:3], target[3:].mean(axis=0)]) if count == 4 else target
    # A face turned by 20 degrees, 1.3 times as large, elsewhere.
    turn = 1.3 * np.exp(1j * np.radians(20))
    points = target @ np.array([[turn.real, turn.imag], [-turn.imag, turn.real]]) + (40.0, 5.0)
    rows = [f"{Path(name).stem}\t" + "\t".join(f"{value:.9f}" for value in points.ravel()) for name in SCFACE]
    (tmp_path / "all.txt").write_text("\n".join(rows))
    pack_eval("scface", root, tmp_path / "s.rec", landmarks=tmp_path / "all.txt")
    packed = packed_scface(tmp_path / "s.rec")
    import cv2

    matrix = similarity(points, target)
    assert np.allclose(matrix[:, :2] @ points.T + matrix[:, 2:], target.T)
    for path, name in zip(packed.paths, packed.names, strict=True):
        expected = cv2.warpAffine(np.asarray(read_rgb(root / name)), matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR)
        assert np.array_equal(read_rgb(path), expected)
    (tmp_path / "all.txt").write_text("\n".join(rows[:-3]))
    with pytest.raises(DataError, match=r"1 images are not in it: got \['002_cam5_3'\]"):
        pack_eval("scface", root, tmp_path / "s.rec", landmarks=tmp_path / "all.txt")
    (tmp_path / "all.txt").write_text("\n".join(row.rpartition("\t")[0] for row in rows))
    with pytest.raises(DataError, match=r"expected 8 or 10 in every line"):
        pack_eval("scface", root, tmp_path / "s.rec", landmarks=tmp_path / "all.txt")


@pytest.mark.parametrize("kind", ["ijbb", "ijbc"])
def test_ijb_is_aligned_without_loss(tmp_path: Path, kind: str) -> None:
    root = write_ijb(tmp_path / "ijb", kind)
    manifest = pack_eval(kind, root, tmp_path / "i.rec")
    packed, listed = packed_ijb(tmp_path / "i.rec", kind), read_ijb(root)
    assert packed.points is None
    for column in ("templates", "medias", "detector_score", "pairs", "genuine"):
        assert np.array_equal(getattr(packed, column), getattr(listed, column))
    assert listed.points is not None
    for one, other, points in zip(packed.paths, listed.paths, listed.points, strict=True):
        assert np.array_equal(read_rgb(one), norm_crop(np.asarray(read_rgb(other)), points))
    assert manifest.names.tolist() == ["loose_crop/10.jpg", "loose_crop/9.jpg", "loose_crop/2.jpg"]
    with pytest.raises(DataError, match=rf"Packed evaluation set .*i\.rec: got '{kind}'; expected tinyface"):
        packed_tinyface(tmp_path / "i.rec")
    other = {"ijbb": "ijbc", "ijbc": "ijbb"}[kind]
    with pytest.raises(DataError, match=rf"IJB list: got \[\]; expected one file {other}_name_5pts_score\.txt in"):
        pack_eval(other, root, tmp_path / "o.rec")
    pack_eval(kind, root, tmp_path / "j.rec", quality=95)
    assert (tmp_path / "j.rec").stat().st_size < (tmp_path / "i.rec").stat().st_size
    near = np.asarray(read_rgb(packed_ijb(tmp_path / "j.rec").paths[0])).astype(int) - read_rgb(packed.paths[0])
    assert 0 < np.abs(near).mean() < 4


def test_blue_comes_out_blue_and_swapped_channels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for quality in (0, 1, 75, 100):
        check_blue(encoded(blue_image(SIZE), quality), name="x")
    root = write(tmp_path / "tinyface", TINYFACE)
    pack_eval("tinyface", root, tmp_path / "t.rec")
    record, _ = read_manifest(tmp_path / "t.rec", "tinyface")
    with RecordReader(record) as reader:
        assert np.asarray(read_rgb(f"{record}#0"))[5, 5].tolist() == [0, 0, 255]
        contents = [bytes(reader.read(key).content) for key in range(len(reader))]
    # The same file as a writer makes it that takes OpenCV's order for RGB.
    red = encoded(Image.fromarray(np.asarray(blue_image(SIZE))[..., ::-1].copy()), 0)
    swapped = [red.ljust(len(contents[0]), b"\0"), *contents[1:]]
    with RecordWriter(record, image_size=None) as writer:
        for content in swapped:
            writer.append(content, 0)
    with pytest.raises(
        DataError, match=r"Colour test of .*t\.rec: got 'blue, green, red'; expected its record 0 to come"
    ):
        packed_tinyface(tmp_path / "t.rec")
    # A packer whose encoder swaps them is stopped before anything lies there.
    packing = importlib.import_module("qsd_plugin.data.face_packing")
    monkeypatch.setattr(packing, "blue_image", lambda size: Image.new("RGB", (size, size), (255, 0, 0)))
    with pytest.raises(DataError, match=r"Colour test of .*got 'blue, green, red'"):
        pack_eval("tinyface", root, tmp_path / "other.rec")
    assert list(tmp_path.glob("other*")) == []


def test_nothing_half_written(tmp_path: Path) -> None:
    root = write(tmp_path / "tinyface", TINYFACE)
    pack_eval("tinyface", root, tmp_path / "t.rec")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("t.*")}
    picture(3, mode="L").save(root / "Gallery_Distractor" / "9.jpg")
    with pytest.raises(DataError, match=r"9\.jpg: got 'mode L'; expected an upright RGB image"):
        pack_eval("tinyface", root, tmp_path / "t.rec")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("t.*")} == before
    assert list(tmp_path.glob(".*")) == []
    assert pack_eval("tinyface", root, tmp_path / "t.rec", convert=True).names.tolist() == list(TINYFACE)
    (root / "Probe" / "7_9.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"Image that cannot be read: got '.*7_9\.jpg'"):
        pack_eval("tinyface", root, tmp_path / "new.rec", convert=True)
    assert list(tmp_path.glob("new*")) == []


@pytest.mark.parametrize(
    ("kind", "names", "options", "kind_of_error", "message"),
    [
        ("tinyfaces", TINYFACE, {}, ConfigError, "Evaluation set: got 'tinyfaces'. Did you mean 'tinyface'"),
        ("tinyface", TINYFACE[:2], {}, DataError, "TinyFace: got '.*Gallery_Match'; expected images in each"),
        ("tinyface", TINYFACE, {"size": 128}, DataError, r"12_1\.jpg: got '112x112 pixels'; expected 128x128 pixels"),
        ("tinyface", TINYFACE, {"landmarks": "a.txt"}, ConfigError, "List of landmarks.*expected none with tinyface"),
        ("tinyface", TINYFACE, {"quality": 101}, ConfigError, "JPEG quality: got 101; expected 1 to 100, or 0"),
        ("scface", SCFACE[3:5], {}, DataError, "SCface images: got '0 mug shots, 2 probes'; expected some of both"),
        ("scface", (*SCFACE, "x/9_cam9_1.jpg"), {}, DataError, "Name of an SCface image: got '9_cam9_1.jpg'"),
        (
            "scface",
            SCFACE,
            {"landmarks": "no.txt"},
            DataError,
            r"List of landmarks: got 'no\.txt'; expected a stem and",
        ),
        ("ijbb", TINYFACE, {}, DataError, r"IJB list: got \[\]; expected one file ijbb_name_5pts_score\.txt"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, kind: str, names: tuple[str, ...], options: dict[str, Any], kind_of_error: type, message: str
) -> None:
    root = write(tmp_path / "set", names)
    with pytest.raises(kind_of_error, match=message):
        pack_eval(kind, root, tmp_path / "out" / "x.rec", **options)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_other_records_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "tinyface", TINYFACE)
    with pytest.raises(DataError, match=r"Folder of tinyface: got '.*nowhere'; expected an existing folder"):
        pack_eval("tinyface", tmp_path / "nowhere", tmp_path / "t.rec")
    with pytest.raises(DataError, match=r"expected a name that ends in \.rec"):
        pack_eval("tinyface", root, tmp_path / "t.bin")
    pack_eval("tinyface", root, tmp_path / "t.rec")
    with pytest.raises(DataError, match=r"Manifest of a packed evaluation set: got '.*other\.manifest\.npz'"):
        packed_tinyface(tmp_path / "other.rec")
    manifest = Manifest.load(tmp_path / "t.manifest.npz")
    with RecordWriter(tmp_path / "t.rec", image_size=None) as writer:
        writer.append(encoded(blue_image(SIZE), 0), 0)
    with pytest.raises(DataError, match=r"got '1 records, \d+ bytes'; expected 6 records, \d+ bytes, as its manifest"):
        packed_tinyface(tmp_path / "t.rec")
    about = manifest.about()
    assert about["kind"] == "tinyface"
    assert about["size"] == SIZE


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_data = importlib.import_module("tools.build_data")
    root = write(tmp_path / "tinyface", TINYFACE)
    target = str(tmp_path / "t.rec")
    assert build_data.main(["pack-eval", "tinyface", str(root), target]) == 0
    expected = f"{target}: 5 images (2 probe, 2 gallery, 1 distractor); colour test passed\n"
    assert capsys.readouterr().out == expected
    assert build_data.main(["pack-eval", "ijbc", str(write_ijb(tmp_path / "ijb", "ijbc")), target]) == 0
    assert "3 images (3 template), 2 pairs of templates; colour test passed" in capsys.readouterr().out
    assert build_data.main(["pack-eval", "tinyface", str(tmp_path), target]) == 2
    assert "TinyFace: got " in capsys.readouterr().err
