"""Splits of a folder of faces: people apart, folds, evenness, the same lists everywhere, nothing half written."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.files import new_folder
from qsd_plugin.data.face_split import split_faces
from qsd_plugin.data.pair_drawing import allot, draw_pairs
from qsd_plugin.data.verification_bin import load_bin
from tools.build_data import main

ANGLES = r"A([+-]\d+)E([+-]\d+)"


def write_faces(root: Path, people: int, images: int = 4) -> Path:
    """Grey PNGs of 24x24, named by light angles that grow with the number of the image."""
    for person in range(people):
        (root / f"p{person:02d}").mkdir(parents=True)
        for number in range(images):
            name = f"p{person:02d}_A{-10 * number:+04d}E{5 * person:+03d}.png"
            grey = np.full((24, 24), 5 * person + number, dtype=np.uint8)
            Image.fromarray(grey).save(root / f"p{person:02d}" / name)
    return root


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 people, one of them with a single image."""
    root = write_faces(tmp_path_factory.mktemp("many") / "faces", 44)
    for file in sorted((root / "p43").iterdir())[1:]:
        file.unlink()
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("few") / "faces", 12)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def person(path: str) -> str:
    return Path(path).parent.name


@pytest.mark.parametrize(("folder", "pairs", "own"), [("many", 220, True), ("few", 60, False)])
def test_pairs_are_those_of_people_held_apart(
    folder: str, pairs: int, own: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(folder)
    done = split_faces(root, tmp_path / "out", pairs=pairs, quality_from_name=ANGLES)
    train, listed = rows(tmp_path / "out" / "train.csv"), rows(tmp_path / "out" / "pairs.csv")
    trained = {row["identity"] for row in train}
    tested = {person(row[side]) for row in listed for side in ("first", "second")}
    people = {path.name for path in root.iterdir()}
    assert len(trained) == done.train_identities == len(people) // 2
    assert tested == people - trained
    files = [row["path"] for row in train]
    assert files == [str(path) for name in sorted(trained) for path in sorted((root / name).iterdir())]
    assert all(row["identity"] == person(row["path"]) for row in train)
    assert all(os.path.isfile(row[side]) for row in listed for side in ("first", "second"))

    assert len(listed) == len({frozenset((row["first"], row["second"])) for row in listed}) == done.pairs == pairs
    folds = [listed[start : start + pairs // 10] for start in range(0, pairs, pairs // 10)]
    for fold in folds:
        same = [int(row["same"]) for row in fold]
        assert same == [int(person(row["first"]) == person(row["second"])) for row in fold]
        assert sum(same) == len(same) // 2
        assert max(abs(2 * sum(same[:end]) - end) for end in range(len(same))) <= 1  # spread, not in two blocks
        assert all(row["identity"] == person(row["first"]) for row in fold)
    in_folds = Counter(name for fold in folds for name in {person(row[s]) for row in fold for s in ("first", "second")})
    assert (max(in_folds.values()) == 1) == own == done.own_people
    for row in listed:
        angles = [
            abs(int(part)) for side in ("first", "second") for part in Path(row[side]).stem.split("_A")[1].split("E")
        ]
        assert float(row["quality"]) == -max(angles)


def test_nobody_stands_for_more_pairs_than_others() -> None:
    drawn, own = draw_pairs({f"p{n}": 40 for n in range(14)}, 3000, seed=3)
    assert not own
    genuine = Counter(a for (a, _), (b, _) in drawn if a == b)
    couples = Counter(frozenset((a, b)) for (a, _), (b, _) in drawn if a != b)
    assert set(genuine.values()) == {1500 // 14, 1500 // 14 + 1}
    assert len(couples) == 14 * 13 // 2
    assert set(couples.values()) == {1500 // 91, 1500 // 91 + 1}
    # The first image's person is the pair's in statistics: 107 impostor pairs each, give or take 4 standard deviations.
    first = Counter(a for (a, _), (b, _) in drawn if a != b)
    assert max(abs(count - 1500 / 14) for count in first.values()) < 4 * np.sqrt(1500 / 14 / 2)


def test_people_with_few_images_give_what_they_have() -> None:
    drawn, _ = draw_pairs({"a": 2, "b": 3, "c": 30}, 100, seed=0)
    assert Counter(a for (a, _), (b, _) in drawn if a == b) == {"a": 1, "b": 3, "c": 46}


def test_shares_are_even_as_far_as_capacities_allow() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        capacity = generator.integers(0, 30, 12)
        total = int(generator.integers(0, capacity.sum() + 1))
        shares = allot(capacity, total, generator)
        assert shares.sum() == total
        assert ((shares >= 0) & (shares <= capacity)).all()
        open_ones = shares[shares < capacity]
        assert not len(open_ones) or shares.max() - open_ones.min() <= 1


def test_lists_are_the_same_everywhere_and_others_with_another_seed(few: Path, tmp_path: Path) -> None:
    done = [
        split_faces(few, tmp_path / name, pairs=40, seed=seed) for name, seed in (("a", 0), ("again", 0), ("other", 1))
    ]
    moved = split_faces(write_faces(tmp_path / "moved", 12), tmp_path / "elsewhere", pairs=40)
    for file in ("train.csv", "pairs.csv", "split.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert done[0] == done[1] == moved
    assert done[2].digest != done[0].digest
    assert rows(tmp_path / "other" / "train.csv") != rows(tmp_path / "a" / "train.csv")
    text = (tmp_path / "elsewhere" / "pairs.csv").read_text()
    assert text.replace(str(tmp_path / "moved"), str(few)) == (tmp_path / "a" / "pairs.csv").read_text()
    assert json.loads((tmp_path / "a" / "split.json").read_text())["digest"] == done[0].digest
    assert set(rows(tmp_path / "a" / "pairs.csv")[0]) == {"first", "second", "same", "identity"}


def test_single_images_are_trained_on(many: Path, tmp_path: Path) -> None:
    for seed in range(3):
        split_faces(many, tmp_path / str(seed), pairs=20, test_fraction=0.9, seed=seed)
        assert "p43" in {row["identity"] for row in rows(tmp_path / str(seed) / "train.csv")}


def test_tool_writes_what_pairs2bin_takes(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["face-split", str(few), str(tmp_path / "out"), "--pairs", "20", "--test-fraction", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "train.csv: 36 images of 9 people" in said
    assert "20 pairs, half of them genuine, of 12 images of 3 other people\nFolds share people" in said
    listed, out = tmp_path / "out" / "pairs.csv", tmp_path / "own.bin"
    assert main(["pairs2bin", str(listed), str(out), "--size", "24", "--convert"]) == 0
    assert load_bin(out).issame.tolist() == [row["same"] == "1" for row in rows(listed)]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pairs": 50}, r"Number of pairs: got 50; expected a multiple of 20.*Such as 40"),
        ({"pairs": 0}, r"Number of pairs: got 0; .*Such as 20"),
        (
            {"pairs": 100},
            r"Number of pairs of the 6 people held out: got 100; expected at most 60:.*--pairs 60 or less",
        ),
        ({"test_fraction": 1.0}, r"Share of identities held out for testing: got 1.0"),
        ({"test_fraction": 0.95}, r"12 people, 12 of them with two images; 11 held out.*--test-fraction"),
        ({"test_fraction": 0.1}, r"1 held out.*expected two people or more to train on, and two or more"),
        ({"seed": -1}, r"Seed of a split: got -1"),
        ({"quality_from_name": "A("}, r"Pattern for qualities: got 'A\('; expected a regular expression"),
        ({"quality_from_name": r"A[+-]\d+"}, r"Pattern for qualities: .*expected groups that find numbers"),
        ({"quality_from_name": r"B(\d+)"}, r"Quality from a file's name: got '.*p00/p00_A.*\.png'; expected a name in"),
        ({"quality_from_name": r"(p)\d"}, r"Quality from a file's name: got '.*p00_A.*\.png'"),
    ],
)
def test_what_cannot_be_split_is_refused(few: Path, tmp_path: Path, changes: dict[str, object], text: str) -> None:
    options = {"pairs": 40, **changes}
    with pytest.raises((ConfigError, DataError), match=text):
        split_faces(few, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_complete_or_absent(few: Path, tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "a").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    split_faces(few, tmp_path / "out", pairs=40)
    before = (tmp_path / "out" / "pairs.csv").read_bytes()
    with pytest.raises(DataError, match=r"Folder to write: got '.*out'; expected one that is empty"):
        split_faces(few, tmp_path / "out", pairs=20)
    assert (tmp_path / "out" / "pairs.csv").read_bytes() == before


@pytest.mark.real_data
def test_real_faces_by_light_angle(tmp_path: Path) -> None:
    root = os.environ.get("QSD_TEST_DATA")
    if not root:
        pytest.skip("QSD_TEST_DATA names no folder of research images")
    done = split_faces(Path(root) / "yale-b", tmp_path / "out", quality_from_name=ANGLES)
    assert (done.train_identities, done.test_identities, done.own_people) == (14, 14, False)
    assert done.train_images + done.test_images == 1774 - 2  # two images of people held out occur in no pair
    qualities = np.array([float(row["quality"]) for row in rows(tmp_path / "out" / "pairs.csv")])
    assert (qualities.min(), qualities.max()) == (-130, 0)
