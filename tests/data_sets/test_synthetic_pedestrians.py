from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.synthetic import SyntheticPedestrians, Truth, build, load_truth, pedestrians, storage
from qsd_plugin.data.synthetic.appearance import Appearance, draw_appearance
from qsd_plugin.data.synthetic.cameras import camera
from qsd_plugin.data.synthetic.damage import DEGRADATIONS, total_severity
from qsd_plugin.data.synthetic.figure import Pose, draw_figure
from qsd_plugin.data.synthetic.pedestrians import Sample, render

TINY = SyntheticPedestrians(
    num_train_identities=3,
    num_test_identities=2,
    num_distractors=1,
    num_cameras=3,
    cameras_per_identity=2,
    images_per_camera=2,
)
#: Mean colour of four pictures without degradation.
GOLDEN_MEANS = np.array(
    [[103.65, 86.10, 92.20], [107.67, 111.54, 95.53], [152.97, 148.65, 140.84], [114.60, 109.66, 102.06]]
)
MARKET_NAME = re.compile(r"([-\d]+)_c(\d)")


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def parts(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Identity and camera of every picture in each of the three folders, read from its name as Market readers do."""
    found: dict[str, list[tuple[int, int]]] = {"bounding_box_train": [], "query": [], "bounding_box_test": []}
    for path in pictures(folder):
        match = MARKET_NAME.search(path)
        assert match is not None
        found[path.split("/")[0]].append((int(match[1]), int(match[2])))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cache"), TINY, workers=1)


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return load_truth(folder)


def test_two_processes_write_the_same_files_as_one(folder: Path, tmp_path: Path) -> None:
    again = build(tmp_path, TINY, workers=2)
    assert again.name == folder.name
    assert pictures(again) == pictures(folder)
    assert (again / "truth.csv").read_bytes() == (folder / "truth.csv").read_bytes()
    assert (again / "meta.json").read_bytes() == (folder / "meta.json").read_bytes()


def test_another_seed_makes_another_set(folder: Path, tmp_path: Path) -> None:
    other = build(tmp_path, dataclasses.replace(TINY, seed=1), workers=1)
    assert other.name != folder.name
    assert not set(pictures(other).values()) & set(pictures(folder).values())


def test_a_picture_depends_on_seed_identity_camera_and_index_only() -> None:
    larger = dataclasses.replace(TINY, num_train_identities=50, images_per_camera=9, cameras_per_identity=3)
    shared = [sample for sample in TINY.samples() if sample.identity <= 3]
    assert shared
    for sample in reversed(shared):
        assert np.array_equal(render(larger, sample)[0], render(TINY, sample)[0])
    first = render(TINY, Sample("query", 1, 1, 0))[0]
    for other in (Sample("query", 2, 1, 0), Sample("query", 1, 2, 0), Sample("query", 1, 1, 1)):
        assert not np.array_equal(render(TINY, other)[0], first)


def test_layout_is_that_of_market(folder: Path) -> None:
    found = parts(folder)
    assert {name: len(listed) for name, listed in found.items()} == {
        "bounding_box_train": 3 * 2 * 2,
        "query": 2 * 2,
        "bounding_box_test": 2 * 2 + 1 * 2 * 2,
    }
    for path in pictures(folder):
        assert re.fullmatch(r"\w+/\d{4}_c[1-3]s1_\d{6}_00\.jpg", path)
        with Image.open(folder / path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 128))


def test_people_are_either_trained_on_or_searched_for(folder: Path) -> None:
    identities = {name: {identity for identity, _ in listed} for name, listed in parts(folder).items()}
    assert identities["bounding_box_train"] == {1, 2, 3}
    assert identities["query"] == {4, 5}
    assert identities["bounding_box_test"] == {4, 5, 6}  # 6 is the distractor


def test_every_query_has_a_match_in_another_camera(folder: Path) -> None:
    found = parts(folder)
    assert len(set(found["query"])) == len(found["query"])  # one query per person and camera
    for identity, seen_by in found["query"]:
        assert any(other == identity and by != seen_by for other, by in found["bounding_box_test"])


def test_default_set_stays_within_what_market_readers_accept() -> None:
    listed = SyntheticPedestrians().samples()
    assert len({sample.path for sample in listed}) == len(listed) == 4500
    assert [sample.path for sample in listed] == sorted(sample.path for sample in listed)
    assert {sample.camera for sample in listed} == {1, 2, 3, 4, 5, 6}
    assert max(sample.identity for sample in listed) <= 1501


def test_truth_covers_every_picture(folder: Path, truth: Truth) -> None:
    assert truth.paths == list(pictures(folder))
    for path, identity, seen_by in zip(truth.paths, truth.identity, truth.camera, strict=True):
        match = MARKET_NAME.search(path)
        assert match is not None
        assert (int(match[1]), int(match[2])) == (identity, seen_by)


def test_severity_is_that_of_the_degradations_applied(truth: Truth) -> None:
    stacked = np.stack([truth.by_degradation[name] for name in DEGRADATIONS])
    assert stacked.shape == (7, len(truth.paths))
    assert set(np.count_nonzero(stacked, axis=0)) == {0, 1, 2}
    assert np.allclose(truth.severity, 1.0 - np.prod(1.0 - stacked, axis=0), rtol=0, atol=1e-15)
    assert truth.severity.max() <= 1.0
    for place, sample in enumerate(TINY.samples()):
        _, severities = render(TINY, sample)
        assert severities == {name: row[place] for name, row in zip(DEGRADATIONS, stacked, strict=True) if row[place]}


def test_total_severity() -> None:
    assert total_severity({}) == 0.0
    assert total_severity({"blur": 0.5}) == 0.5
    assert total_severity({"blur": 0.5, "noise": 0.5}) == 0.75
    assert total_severity({"blur": 1.0, "noise": 0.2}) == 1.0


def test_degradation_level_scales_severities_and_changes_nothing_else() -> None:
    mild, none = dataclasses.replace(TINY, degradation=0.25), dataclasses.replace(TINY, degradation=0.0)
    damage = []
    for sample in TINY.samples():
        full, severities = render(TINY, sample)
        assert render(mild, sample)[1] == {name: 0.25 * value for name, value in severities.items()}
        clean, nothing = render(none, sample)
        assert not any(nothing.values())
        if not severities:
            assert np.array_equal(full, clean)
        elif total_severity(severities) > 0.5:
            damage.append(np.abs(full.astype(float) - clean).mean())
    assert min(damage) > 3.0


def test_the_pictures_of_version_1_have_not_changed() -> None:
    """A failure means that a change altered the pictures: raise storage.VERSION, and re-run what was measured."""
    assert storage.VERSION == 1
    found = [
        render(SyntheticPedestrians(degradation=0.0), Sample("query", identity, seen_by, 0))[0].mean(axis=(0, 1))
        for identity, seen_by in ((1, 1), (2, 3), (3, 5), (4, 6))
    ]
    # Half a level: far below what another colour, pose or scene would do, above what another libm could.
    assert np.abs(np.array(found) - GOLDEN_MEANS).max() < 0.5


def test_a_complete_set_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "render", fail)
    assert build(folder.parent, TINY, workers=1) == folder


def test_an_interrupted_build_leaves_nothing_and_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(storage, "render", fail_after(3))
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "cache", TINY, workers=1)
    assert list((tmp_path / "cache").iterdir()) == []
    assert pictures(build(tmp_path / "cache", TINY, workers=1)) == pictures(folder)


def test_a_folder_without_its_marker_is_replaced(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / folder.name
    (broken / "query").mkdir(parents=True)
    (broken / "query" / "9999_c1s1_000000_00.jpg").write_bytes(b"half a file")
    assert build(tmp_path, TINY, workers=1) == broken
    assert pictures(broken) == pictures(folder)
    assert list(tmp_path.iterdir()) == [broken]


def test_the_slower_of_two_builders_takes_the_faster_ones_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage._write

    def overtaken(building: Path, spec: SyntheticPedestrians, workers: int) -> None:
        write(building, spec, workers)
        monkeypatch.setattr(storage, "_write", write)
        (build(tmp_path, spec, workers=1) / "faster").touch()

    monkeypatch.setattr(storage, "_write", overtaken)
    made = build(tmp_path, TINY, workers=1)
    assert (made / "faster").exists()
    assert pictures(made) == pictures(folder)
    assert list(tmp_path.iterdir()) == [made]


def test_meta_tells_how_to_make_the_set_again(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    assert SyntheticPedestrians(**meta["parameters"]) == TINY
    assert meta["images"] == len(pictures(folder))
    assert folder.name.startswith("synthetic_pedestrians_v1_")


def test_a_script_without_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from qsd_plugin.data.synthetic import SyntheticPedestrians, build\n"
        f"build({str(tmp_path / 'cache')!r}, SyntheticPedestrians(), workers=2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert re.search(r'Worker processes .*got 2; .* under `if __name__ == "__main__":`, or pass workers=1', done.stderr)


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"Cache folder for synthetic data: got '.*file/cache'.*Choose another one"):
        build(tmp_path / "file" / "cache", TINY)


def test_truth_of_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Synthetic set: got '.*'; expected a folder with truth\.csv and meta\.json"):
        load_truth(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_identities": 0}, r"num_train_identities: got 0; expected 1 to 1501"),
        ({"num_cameras": 7}, r"num_cameras: got 7; expected 2 to 6"),
        ({"num_cameras": 3, "cameras_per_identity": 4}, r"cameras_per_identity: got 4; expected 2 to 3"),
        ({"images_per_camera": 1}, r"images_per_camera: got 1; expected 2 to"),
        ({"degradation": 1.2}, r"degradation: got 1\.2; expected 0 to 1"),
        ({"seed": -1}, r"seed: got -1; expected 0 to"),
        ({"num_train_identities": 1400}, r"identities in all: got 1575; expected at most 1501.*Lower num_train"),
    ],
)
def test_impossible_parameters_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticPedestrians(**changes)  # type: ignore[arg-type]


def person(**changes: object) -> Appearance:
    """An average person in black and white, so that a coloured thing can be counted in a picture."""
    plain = dataclasses.replace(
        draw_appearance(numpy_stream(0)),
        skin=(90.0, 90.0, 90.0),
        hair=(90.0, 90.0, 90.0),
        hairstyle="short",
        headwear="none",
        top=(60.0, 60.0, 60.0),
        top_second=(60.0, 60.0, 60.0),
        pattern="plain",
        cut="waist",
        bottom=(60.0, 60.0, 60.0),
        legwear="trousers",
        shoes=(60.0, 60.0, 60.0),
        carried="nothing",
        height=1.0,
        girth=1.0,
        legs=1.0,
        stoop=0.0,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def seen(who: Appearance, facing: float, *, pitch: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    pose = Pose(facing=facing, pitch=pitch, phase=0.0, stride=0.0, elbow=0.1, spread=0.1)
    return draw_figure(who, pose, shape=(128, 64), feet=(32.0, 118.0), scale=108.0, light=(0.0, -0.6, 0.8))


def red_area(who: Appearance, facing: float) -> float:
    colour, _ = seen(who, facing)
    return float((colour[:, :, 0] > colour[:, :, 1] + 40).sum())


RED = (230.0, 20.0, 20.0)


def test_a_person_is_as_tall_as_asked_for_and_stands_on_the_ground() -> None:
    _, coverage = seen(person(), 0.0)
    rows = np.nonzero(coverage.max(axis=1) > 0.5)[0]
    assert abs(rows[0] - (118 - 108)) <= 2
    assert abs(rows[-1] - 118) <= 3
    assert np.abs(np.average(np.arange(64), weights=coverage.sum(axis=0)) - 31.5) < 0.7
    assert coverage.min() == 0.0
    assert coverage.max() <= 1.0 + 1e-6


def test_turning_a_person_narrows_it_and_mirroring_the_turn_mirrors_the_picture() -> None:
    _, front = seen(person(), 0.0)
    _, side = seen(person(), math.pi / 2)
    assert side[40:60].sum() < 0.8 * front[40:60].sum()
    colour, _ = seen(person(), 0.7)
    mirrored, _ = seen(person(), -0.7)
    assert np.abs(colour - mirrored[:, ::-1]).mean() < 2.0


def test_a_camera_that_looks_down_sees_a_shorter_person() -> None:
    heights = [np.count_nonzero(seen(person(), 0.0, pitch=pitch)[1].max(axis=1) > 0.5) for pitch in (0.0, 0.3, 0.6)]
    assert heights[0] > heights[1] > heights[2]


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({"carried": "backpack", "carried_colour": RED}, (0.0, math.pi / 2, math.pi)),
        ({"pattern": "print", "pattern_scale": 1.0, "top_second": RED}, (math.pi, 0.9, 0.0)),
        ({"pattern": "open", "pattern_scale": 1.0, "top_second": RED}, (math.pi, 0.9, 0.0)),
        ({"side_stripe": False, "hairstyle": "short", "hair": RED}, (0.0, math.pi / 2, math.pi)),
    ],
)
def test_what_is_seen_of_a_thing_depends_on_the_side(
    changes: dict[str, object], order: tuple[float, float, float]
) -> None:
    least, more, most = (red_area(person(**changes), facing) for facing in order)
    assert least < more < most


def test_a_shoulder_bag_hangs_on_the_side_it_is_worn() -> None:
    areas = {
        side: red_area(person(carried="shoulder bag", carried_colour=RED, carried_side=side), math.pi / 2)
        for side in (-1, 1)
    }
    # Turned by pi / 2 a person walks to the right and shows the camera the right side, where side +1 carries the bag.
    assert areas[1] > 2.0 * areas[-1]


@pytest.mark.parametrize("carried", ["backpack", "shoulder bag", "handbag"])
@pytest.mark.parametrize("legwear", ["trousers", "shorts", "skirt", "long skirt"])
def test_clothes_and_bags_reach_the_picture(carried: str, legwear: str) -> None:
    assert red_area(person(carried=carried, carried_colour=RED), math.pi) > 20.0
    assert red_area(person(legwear=legwear, bottom=RED), 0.0) > 200.0


def test_cameras_differ_in_colour_direction_and_place() -> None:
    cameras = [camera(0, index, 6) for index in range(1, 7)]
    grey = np.full((4, 4, 3), 128.0, dtype=np.float32)
    casts = np.array([view.respond(grey).mean(axis=(0, 1)) for view in cameras])
    for mine in range(6):
        for other in range(mine):
            assert np.abs(casts[mine] - casts[other]).max() > 4.0
            assert np.abs(cameras[mine].scene - cameras[other].scene).mean() > 10.0
    paths = sorted(view.path % math.pi for view in cameras)
    assert np.allclose(np.diff(paths), math.pi / 6)


def test_many_people_share_the_colours_of_their_clothes() -> None:
    people = [draw_appearance(numpy_stream(0, "identity", identity)) for identity in range(300)]
    tops = np.array([who.top for who in people])
    nearest = np.linalg.norm(tops[:, None] - tops[None], axis=2) + 1e3 * np.eye(300)
    assert np.median((nearest < 30.0).sum(axis=1)) > 20
    assert len({(who.pattern, who.sleeves, who.cut, who.legwear, who.carried) for who in people}) > 150


def fail(*_: object) -> None:
    raise AssertionError("a picture was made")


def fail_after(count: int) -> Callable[[SyntheticPedestrians, Sample], tuple[np.ndarray, dict[str, float]]]:
    made = iter(range(count))

    def interrupted(spec: SyntheticPedestrians, sample: Sample) -> tuple[np.ndarray, dict[str, float]]:
        if next(made, None) is None:
            raise KeyboardInterrupt
        return pedestrians.render(spec, sample)

    return interrupted
