"""MLR sets: which images shrink, by what, where they go; the same bytes again; and what cannot be made or read."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mlr_toy import caviar, cuhk03, market, picture, viper, write
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.mlr import MLRSettings, build_mlr
from qsd_plugin.data.mlr_folders import read_mlr, read_rates
from qsd_plugin.data.mlr_sources import read_source
from tools.build_data import main


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_market_one_camera_shrinks_and_the_others_are_copied(tmp_path: Path) -> None:
    source, target = market(tmp_path / "market"), tmp_path / "mlr_market"
    built = build_mlr(source, target, MLRSettings(seed=3))
    assert built.images == {"train": 36, "query": 9, "gallery": 19}  # 3 people x 2 cameras x 3 and a distractor
    seen = Counter()
    for row in rows(target):
        split, person, name = row["path"].split("/")
        shrunk = row["source_camera"] == "1"
        assert name.startswith(f"{person}_c{0 if shrunk else int(row['source_camera']) - 1}_")
        assert len(person) == 5
        content = (target / row["path"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        rate = int(row["rate"])
        seen[rate] += 1
        with Image.open(target / row["path"]) as image:
            assert image.size == (round(24 / rate), round(48 / rate)) == (int(row["width"]), int(row["height"]))
        if shrunk:
            assert rate in (2, 3, 4)
            assert split in ("train", "query")
        else:
            assert rate == 1
            assert split in ("train", "gallery")
            assert content == (source / row["source"]).read_bytes()
    assert set(seen) == {1, 2, 3, 4}
    assert built.rates == {rate: seen[rate] for rate in (2, 3, 4)}
    meta = json.loads((target / "mlr.json").read_text())
    assert meta["manifest_sha256"] == built.digest == hashlib.sha256((target / "manifest.csv").read_bytes()).hexdigest()
    assert (meta["kernel"], meta["seed"], meta["cameras"]["c0"]) == ("bilinear", 3, "1")


def test_shrunk_pixels_are_those_of_the_kernel(tmp_path: Path) -> None:
    source = market(tmp_path / "market")
    found = {}
    for kernel, resampling in (("bilinear", Image.Resampling.BILINEAR), ("lanczos", Image.Resampling.LANCZOS)):
        target = tmp_path / kernel
        build_mlr(source, target, MLRSettings(kernel=kernel, quality=100))
        row = next(row for row in rows(target) if row["rate"] == "3")
        with Image.open(source / row["source"]) as image:
            expected = np.asarray(image.resize((8, 16), resampling), dtype=int)
        with Image.open(target / row["path"]) as image:
            found[kernel] = np.asarray(image, dtype=int)
        assert np.abs(found[kernel] - expected).max() <= 4  # what JPEG at its best leaves
    assert np.abs(found["bilinear"] - found["lanczos"]).max() > 4


def test_same_seed_same_bytes_and_another_seed_other_rates(tmp_path: Path) -> None:
    source = market(tmp_path / "market")
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    one, two, three = (build_mlr(source, at, MLRSettings(seed=s)) for at, s in ((first, 1), (again, 1), (other, 2)))
    assert files(first) == files(again)
    assert one.digest == two.digest != three.digest
    assert read_rates(first) != read_rates(other)


def test_a_rate_does_not_depend_on_other_images(tmp_path: Path) -> None:
    source = market(tmp_path / "market")
    build_mlr(source, tmp_path / "all", MLRSettings())
    before = {row["source"]: row["rate"] for row in rows(tmp_path / "all")}
    for file in source.glob("bounding_box_train/*_000000_00.jpg"):  # the others' new names have other numbers
        file.unlink()
    build_mlr(source, tmp_path / "fewer", MLRSettings())
    after = {row["source"]: row["rate"] for row in rows(tmp_path / "fewer")}
    assert len(after) == len(before) - 12
    assert all(before[name] == rate for name, rate in after.items())


def test_rates_are_drawn_alike(tmp_path: Path) -> None:
    source = market(tmp_path / "market", people=40, tested=1, each=4)
    built = build_mlr(source, tmp_path / "mlr", MLRSettings(rates=(2, 3, 4)))
    counts = np.array(list(built.rates.values()))
    total = counts.sum()
    assert ((counts - total / 3) ** 2 / (total / 3)).sum() < 13.8  # chi-squared, 2 degrees: p > 0.001


@pytest.mark.parametrize("kind", ["cuhk03", "viper"])
def test_sets_without_a_split_hold_people_out_by_seed(tmp_path: Path, kind: str) -> None:
    source = {"cuhk03": cuhk03, "viper": viper}[kind](tmp_path / kind)
    tested = []
    for seed in range(6):
        target = tmp_path / f"mlr{seed}"
        build_mlr(source, target, MLRSettings(seed=seed, test_people=2))
        splits = read_mlr(target)
        people = {item.identity for item in splits.query}
        assert people == {item.identity for item in splits.gallery}
        assert len(people) == 2
        assert not people & {item.identity for item in splits.train}
        assert len({item.identity for item in splits.train}) == 4
        tested.append(frozenset(people))
    assert len(set(tested)) > 1
    again = read_source(source, seed=0, test_people=2)
    assert {f"{int(item.identity):05d}" for item in again.test} == tested[0]


def test_the_protocols_sizes(tmp_path: Path) -> None:
    read = read_source(viper(tmp_path / "viper", people=632))
    assert (len(read.train), len(read.test)) == (632, 632)
    with pytest.raises(ConfigError, match=r"people tested: got 100; expected 1 to 5: two cameras see 6 of 6 people"):
        read_source(cuhk03(tmp_path / "cuhk03"))


def test_caviar_is_copied_and_the_smaller_half_is_the_degraded_domain(tmp_path: Path) -> None:
    source, target = caviar(tmp_path / "CAVIARa"), tmp_path / "caviar"
    built = build_mlr(source, target, MLRSettings(test_people=1))
    assert built.images == {"train": 40, "query": 10, "gallery": 10}
    assert built.rates == {0: 30}
    for row in rows(target):
        assert ("_c0_" in row["path"]) == (row["width"] == "12") == (row["rate"] == "0")
        assert (target / row["path"]).read_bytes() == (source / row["source"]).read_bytes()
        assert not row["source"].startswith("0004"), "seen by one camera"
    read_mlr(target)
    with pytest.raises(ConfigError, match="of low resolution already: got 'caviar'; expected the seed alone"):
        build_mlr(source, tmp_path / "other", MLRSettings(kernel="box", test_people=1))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = market(tmp_path / "market"), tmp_path / "mlr_market"
    assert main(["mlr", str(source), str(target), "--rates", "3", "--camera", "2", "--kernel", "box"]) == 0
    out = capsys.readouterr().out
    assert "36 train, 9 query, 19 gallery" in out
    assert "21 by 3" in out
    assert {row["source_camera"] for row in rows(target) if row["rate"] == "3"} == {"2"}
    assert main(["mlr", str(source), str(target)]) == 2
    assert "one that is empty or does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "bicubical"}, "Kernel: got 'bicubical'; expected box or bilinear or bicubic or lanczos.*bicubic"),
        ({"rates": (1, 2)}, r"Rates: got \[1, 2\]; expected different whole numbers >= 2"),
        ({"rates": ()}, r"Rates: got \[\]"),
        ({"quality": 0}, "JPEG quality: got 0; expected 1 to 100"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLRSettings(**settings)  # type: ignore[arg-type]


def test_sources_that_cannot_be_used(tmp_path: Path) -> None:
    source, target = market(tmp_path / "market"), tmp_path / "mlr"
    with pytest.raises(ConfigError, match="Camera to shrink: got '9'; expected one of 1, 2, 3"):
        build_mlr(source, target, MLRSettings(camera="9"))
    with pytest.raises(
        ConfigError, match="Number of people tested: got 3; expected none: the source has its own split"
    ):
        build_mlr(source, target, MLRSettings(test_people=3))
    with pytest.raises(ConfigError, match=r"Kind of source: got 'market'; expected .*Did you mean 'market1501'\?"):
        build_mlr(source, target, MLRSettings(), kind="market")
    with pytest.raises(DataError, match=r"no query'; expected bounding_box_train, query and bounding_box_test"):
        build_mlr(write(tmp_path / "half", "bounding_box_train/0001_c1.jpg"), target, MLRSettings())
    with pytest.raises(
        DataError, match=r"Source of an MLR set .*holiday.*expected market1501: .*; viper: cam_a and cam_b"
    ):
        build_mlr(write(tmp_path / "holiday", "beach.png"), target, MLRSettings())
    with pytest.raises(DataError, match=r"Image of kind viper: got '.*/me.bmp'; expected cam_a and cam_b with"):
        build_mlr(write(viper(tmp_path / "viper"), "cam_a/me.bmp"), target, MLRSettings(test_people=2))
    with pytest.raises(DataError, match=r"Source of an MLR set: got '.*nowhere'; expected an existing folder"):
        build_mlr(tmp_path / "nowhere", target, MLRSettings())
    assert not target.exists()


def test_sources_of_one_domain(tmp_path: Path) -> None:
    one = write(
        tmp_path / "one",
        *(
            f"{part}/000{n}_c1_{n}.jpg"
            for n, part in enumerate(("bounding_box_train", "query", "bounding_box_test"), 1)
        ),
    )
    with pytest.raises(DataError, match="without clean images: got 'camera 1 alone'; expected images of two cameras"):
        build_mlr(one, tmp_path / "mlr", MLRSettings())
    two = market(tmp_path / "two")
    for file in two.glob("bounding_box_train/*_c1s*"):
        file.unlink()
    with pytest.raises(DataError, match=r"without degraded training images \(camera 1\).*another camera of 1, 2, 3"):
        build_mlr(two, tmp_path / "mlr", MLRSettings())
    for file in two.glob("*/*_c1s*"):
        file.unlink()
    for file in (*two.glob("query/*_c3s*"), *two.glob("bounding_box_test/*_c3s*")):
        file.unlink()
    with pytest.raises(DataError, match="without gallery images of the people searched for"):
        build_mlr(two, tmp_path / "mlr", MLRSettings(camera="2"))


def test_a_damaged_image_leaves_nothing(tmp_path: Path) -> None:
    source = market(tmp_path / "market")
    (source / "query" / "0005_c1s1_000000_00.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"Image that cannot be read: got '.*0005_c1s1_000000_00.jpg'"):
        build_mlr(source, tmp_path / "mlr", MLRSettings())
    assert [path.name for path in tmp_path.iterdir()] == ["market"]


def authors_set(root: Path) -> Path:
    """The authors' layout, without a manifest; ``val`` is a copy of training images."""
    names = [f"{split}/00001/00001_c{camera}_000{camera}.jpg" for split in ("train", "val") for camera in (0, 1)]
    return write(root, *names, "query/00002/00002_c0_0000.jpg", "gallery/00002/00002_c1_0000.jpg")


def test_the_authors_own_folders(tmp_path: Path) -> None:
    splits = read_mlr(authors_set(tmp_path / "MLR-CUHK03"))
    assert [(item.identity, item.camera) for item in splits.train] == [("00001", "0"), ("00001", "1")]
    assert ([item.camera for item in splits.query], [item.camera for item in splits.gallery]) == (["0"], ["1"])
    assert read_rates(splits.root) == {}


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("gallery/*/*", "", "no folder gallery'; expected train, query, gallery with"),
        ("train/*/*_c0*", "", r"no degraded training images \(camera c0\)"),
        ("train/*/*_c1*", "", r"no clean training images \(cameras c1, c2, ...\)"),
        ("", "query/00003/00003_c1_0000.jpg", r"queries that are not degraded"),
        ("", "gallery/00003/00003_c0_0000.jpg", r"degraded gallery images"),
        ("", "gallery/00003/face.jpg", "gallery image without a camera: got '.*face.jpg'"),
    ],
)
def test_folders_that_are_no_mlr_set(tmp_path: Path, removed: str, added: str, message: str) -> None:
    root = authors_set(tmp_path / "set")
    for file in root.glob(removed) if removed else ():
        file.unlink()
        if removed.startswith("gallery"):
            file.parent.rmdir()
            file.parent.parent.rmdir()
    write(root, *([added] if added else []))
    with pytest.raises(DataError, match=message):
        read_mlr(root)


def test_a_set_that_is_not_its_manifests(tmp_path: Path) -> None:
    build_mlr(market(tmp_path / "market"), tmp_path / "mlr", MLRSettings())
    extra = tmp_path / "mlr" / "train" / "00001" / "00001_c1_0099.jpg"
    picture("extra").save(extra)
    with pytest.raises(DataError, match="0 images missing, 1 that it does not list'; expected its 64 images"):
        read_mlr(tmp_path / "mlr")
    extra.unlink()
    read_mlr(tmp_path / "mlr")
    manifest = tmp_path / "mlr" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",2,", ",3,", 1))
    with pytest.raises(DataError, match=r"Manifest .*manifest.csv: got 'other content'; expected SHA-256"):
        read_mlr(tmp_path / "mlr")
    manifest.unlink()
    with pytest.raises(DataError, match=r"Manifest of .*FileNotFoundError"):
        read_rates(tmp_path / "mlr")
