"""Synthetic faces: the same from every process, people held apart, landmarks on the features, the truth beside them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.align import norm_crop, similarity, template
from qsd_plugin.data.face_records import folder_to_records, records_to_folder
from qsd_plugin.data.recordio import RecordReader
from qsd_plugin.data.synthetic import FaceTruth, SyntheticFaces, build_faces, face_storage, load_face_truth
from qsd_plugin.data.synthetic.damage import DEGRADATIONS, total_severity
from qsd_plugin.data.synthetic.face_conditions import Conditions, draw_conditions, rotation
from qsd_plugin.data.synthetic.face_picture import draw_face
from qsd_plugin.data.synthetic.face_protocols import identification, verification
from qsd_plugin.data.synthetic.face_surface import NOWHERE, make_surface, surface
from qsd_plugin.data.synthetic.face_traits import FaceTraits, draw_traits, mean_face
from qsd_plugin.data.synthetic.faces import FaceSample, render_face
from qsd_plugin.data.verification_bin import bin_from_pairs, load_bin

TINY = SyntheticFaces(
    num_train_identities=3, num_test_identities=16, num_distractors=4, images_per_identity=3, num_pairs=60
)
#: Mean colours of four pictures without degradation.
GOLDEN_MEANS = np.array(
    [[63.17, 55.34, 44.43], [154.1, 147.63, 132.57], [139.16, 128.05, 111.06], [107.72, 87.96, 74.37]]
)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_faces(tmp_path_factory.mktemp("cache"), TINY, workers=1)


@pytest.fixture(scope="module")
def truth(folder: Path) -> FaceTruth:
    return load_face_truth(folder)


def test_two_processes_write_the_same_files_as_one(folder: Path, tmp_path: Path) -> None:
    again = build_faces(tmp_path, TINY, workers=2)
    assert again.name == folder.name
    assert files(again) == files(folder)
    assert len(files(folder)) == 23 * 3 + 3


def test_a_picture_depends_on_seed_identity_and_index_only() -> None:
    larger = dataclasses.replace(TINY, num_train_identities=50, images_per_identity=9, num_pairs=20)
    for sample in reversed([sample for sample in TINY.samples() if sample.identity <= 3]):
        assert np.array_equal(render_face(larger, sample).image, render_face(TINY, sample).image)
    first = render_face(TINY, FaceSample("test", 1, 0)).image
    others = [render_face(TINY, sample).image for sample in (FaceSample("test", 2, 0), FaceSample("test", 1, 1))]
    others.append(render_face(dataclasses.replace(TINY, seed=1), FaceSample("test", 1, 0)).image)
    assert not any(np.array_equal(other, first) for other in others)


def test_people_are_held_apart() -> None:
    spec = SyntheticFaces()
    samples = spec.samples()
    assert [sample.path for sample in samples] == sorted({sample.path for sample in samples})
    parts = {part: {s.identity for s in samples if s.folder == part} for part in ("train", "test", "distractors")}
    assert {part: len(people) for part, people in parts.items()} == {"train": 300, "test": 100, "distractors": 50}
    assert len(set.union(*parts.values())) == 450
    # Nobody held apart is somebody trained on under another number.
    some = [surface(0, who) for part in parts.values() for who in sorted(part)[:20]]
    traits = np.array([dataclasses.astuple(face.traits) for face in some])
    distances = np.linalg.norm((traits[:, None] - traits[None]) / traits.std(0), axis=2)[np.triu_indices(60, 1)]
    assert distances.min() > 0.5 * np.sqrt(2 * traits.shape[1])


def surface_traits(seed: int, identity: int) -> FaceTraits:
    return draw_traits(numpy_stream(seed, "face", identity))


def test_traits_follow_their_distributions_and_no_two_move_together() -> None:
    traits = np.array([dataclasses.astuple(surface_traits(0, who)) for who in range(450)])
    fields = dataclasses.fields(FaceTraits)
    spread = np.array([field.metadata["spread"] for field in fields])
    mean = np.array([field.metadata["mean"] for field in fields])
    assert np.array_equal(np.array(dataclasses.astuple(mean_face())), mean)
    assert np.abs((traits.mean(0) - mean) / spread).max() < 4 / np.sqrt(450)
    assert np.abs(traits.std(0) / spread - 1).max() < 0.15
    correlation = np.corrcoef(traits.T) - np.eye(len(fields))
    assert np.abs(correlation).max() < 0.25


def test_truth_covers_every_picture(folder: Path, truth: FaceTruth) -> None:
    samples = TINY.samples()
    assert truth.paths == [sample.path for sample in samples]
    assert truth.identity.tolist() == [sample.identity for sample in samples]
    for sample, severity, marks in zip(samples, truth.severity, truth.landmarks, strict=True):
        made = render_face(TINY, sample)
        assert severity == total_severity(made.severities)
        assert np.allclose(marks, made.landmarks, rtol=0, atol=6e-4)
        jpeg = io.BytesIO()
        Image.fromarray(made.image).save(jpeg, format="JPEG", quality=95)
        assert (folder / sample.path).read_bytes() == jpeg.getvalue()
    stacked = np.stack([truth.by_degradation[name] for name in DEGRADATIONS])
    assert set(np.count_nonzero(stacked, axis=0)) == {0, 1, 2}
    assert np.allclose(truth.severity, 1.0 - np.prod(1.0 - stacked, axis=0), rtol=0, atol=1e-15)
    place = 7
    conditions = render_face(TINY, samples[place]).conditions
    for name, values in truth.conditions.items():
        assert values[place] == pytest.approx(getattr(conditions, name), abs=1e-6)
    assert {name: str(values[place]) for name, values in truth.worn.items()} == {
        name: getattr(conditions, name) for name in ("hairstyle", "beard", "glasses")
    }


def test_severity_grows_damage_and_level_zero_is_clean() -> None:
    none = dataclasses.replace(TINY, degradation=0.0)
    damage = []
    for sample in TINY.samples()[:24]:
        full, clean = render_face(TINY, sample), render_face(none, sample)
        assert not any(clean.severities.values())
        assert np.array_equal(full.landmarks, clean.landmarks)
        if not full.severities:
            assert np.array_equal(full.image, clean.image)
        elif total_severity(full.severities) > 0.5:
            damage.append(np.abs(full.image.astype(float) - clean.image).mean())
    assert len(damage) > 3
    assert min(damage) > 3.0


def test_the_pictures_of_version_1_have_not_changed() -> None:
    """A failure means that a change altered the pictures: raise face_storage.VERSION, and re-run what was measured."""
    assert face_storage.VERSION == 1
    spec = SyntheticFaces(degradation=0.0)
    found = [
        render_face(spec, FaceSample("train", identity, index)).image.mean(axis=(0, 1))
        for identity, index in ((1, 0), (2, 3), (300, 5), (450, 19))
    ]
    # Half a level: far below what another face or light would do, above what another libm could.
    assert np.abs(np.array(found) - GOLDEN_MEANS).max() < 0.5


def plain_conditions(**changes: object) -> Conditions:
    """A face seen straight on in even light, without anything worn."""
    drawn = draw_conditions(numpy_stream(0), mean_face())
    plain = dataclasses.replace(
        drawn, yaw=0.0, pitch=0.0, smile=0.0, mouth=0.0, brows=0.0, lids=1.0, gaze=(0.0, 0.0), light_azimuth=0.0
    )
    plain = dataclasses.replace(plain, light_elevation=0.2, ambient=0.7, exposure=1.0, cast=(1.0, 1.0, 1.0))
    plain = dataclasses.replace(plain, hairstyle="short", beard="none", glasses="none")
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def drawn(size: int = 112, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    face = make_surface(mean_face(), numpy_stream(5))
    return draw_face(face, plain_conditions(**changes), size, numpy_stream(6))


@pytest.mark.parametrize("yaw", [-0.45, 0.0, 0.45])
@pytest.mark.parametrize("pitch", [-0.2, 0.2])
def test_landmarks_lie_on_the_features(yaw: float, pitch: float) -> None:
    """Against the picture: pupils are the darkest spots around, and lips are redder than the skin about them."""
    size = 224
    picture, marks = drawn(size, yaw=yaw, pitch=pitch)
    grey, red = picture.mean(axis=2), picture[:, :, 0] / picture.sum(axis=2)
    rows, columns = np.mgrid[:size, :size]
    for mark in marks[:2]:
        distance = np.hypot(columns - mark[0], rows - mark[1])
        assert grey[distance < 3].mean() < 0.6 * grey[(distance > 22) & (distance < 30)].mean()
        dark = np.argwhere((grey < 60) & (distance < 12))
        assert np.hypot(*(dark.mean(axis=0) - mark[::-1])) < 3.5
    middle = marks[3:].mean(axis=0)
    lips, chin = (np.hypot(columns - middle[0], rows - middle[1] - down) < 4 for down in (0, 30))
    assert red[lips].mean() > 1.04 * red[chin].mean()


def test_crops_are_aligned_as_arcface_aligns() -> None:
    residuals, moved = [], []
    for identity in range(1, 9):
        for index in range(3):
            made = render_face(SyntheticFaces(degradation=0.0), FaceSample("train", identity, index))
            marks = made.landmarks
            again = similarity(marks, template(112))
            # Up to the detector's errors there is nothing left to align, whatever the pose.
            moved.append(np.abs(again @ np.array([56.0, 56.0, 1.0]) - 56.0).max())
            residuals.append(np.linalg.norm(marks - template(112), axis=1).mean())
    assert np.median(moved) < 1.5
    assert 1.0 < np.mean(residuals) < 12.0
    made = render_face(SyntheticFaces(degradation=0.0), FaceSample("train", 1, 0))
    crop = norm_crop(made.image, made.landmarks)
    assert np.abs(crop[20:90, 20:90].astype(float) - made.image[20:90, 20:90]).mean() < 12


def test_size_changes_the_scale_only() -> None:
    small, marks_small = drawn(56)
    large, marks_large = drawn(112)
    assert np.allclose(2 * marks_small, marks_large, rtol=0, atol=1e-9)
    halved = large.reshape(56, 2, 56, 2, 3).mean(axis=(1, 3))
    assert np.corrcoef(small.mean(2)[10:50, 14:42].ravel(), halved.mean(2)[10:50, 14:42].ravel())[0, 1] > 0.85


def test_turning_the_head_moves_the_nose_to_that_side_and_hides_the_other() -> None:
    nose = []
    for yaw in (-0.5, 0.0, 0.5):
        _, marks = drawn(yaw=yaw)
        nose.append(marks[2, 0] - marks[:2, 0].mean())
    assert nose[0] < -4 < nose[1] < 4 < nose[2]
    turn = rotation(0.3, -0.2)
    assert np.allclose(turn @ turn.T, np.eye(3))
    assert np.linalg.det(turn) == pytest.approx(1.0)
    assert (rotation(0.3, 0.0) @ (0, 0, 1))[0] > 0  # to the right of the picture
    assert (rotation(0.0, 0.3) @ (0, 0, 1))[1] > 0  # down


def test_light_from_the_right_lights_the_right_half() -> None:
    right, marks = drawn(light_azimuth=1.0, ambient=0.3)
    left, _ = drawn(light_azimuth=-1.0, ambient=0.3)
    row, centre = slice(60, 75), int(marks[2, 0])
    halves = [
        picture[row, centre + 6 : centre + 25].mean() - picture[row, centre - 25 : centre - 6].mean()
        for picture in (right, left)
    ]
    assert halves[0] > 25
    assert halves[1] < -25


@pytest.mark.parametrize(
    "change",
    [
        {"smile": 1.0},
        {"mouth": 1.0},
        {"lids": 0.12},
        {"glasses": "thick"},
        {"glasses": "dark"},
        {"beard": "full"},
        {"hairstyle": "fringe"},
        {"hairstyle": "long"},
        {"hairstyle": "cap"},
    ],
    ids=str,
)
def test_what_is_worn_or_done_shows_and_leaves_the_rest(change: dict[str, object]) -> None:
    plain, _ = drawn()
    changed, _ = drawn(**change)
    difference = np.abs(changed - plain).mean(axis=2)
    assert difference.max() > 40
    assert np.median(difference) < 2.5 or "hairstyle" in change or "mouth" in change or "smile" in change


def test_surface_has_a_nose_and_an_outline() -> None:
    face = surface(0, 1)
    inside = face.height > NOWHERE
    assert 0.3 < inside.mean() < 0.8
    assert np.allclose(np.linalg.norm(face.normal[inside], axis=1), 1.0, atol=1e-5)
    nose, eyes = face.landmarks[2, 2], face.landmarks[:2, 2]
    assert nose > eyes.max() + 0.2
    assert not np.array_equal(surface(0, 2).height, face.height)


def test_verification_pairs() -> None:
    spec = SyntheticFaces()
    data = verification(spec)
    identity = np.array([int(path.split("/")[1]) for path in data.paths])
    first, second = identity[data.pairs].T
    assert data.pairs.shape == (3000, 2)
    assert np.array_equal(first == second, data.issame)
    assert (data.pairs[:, 0] != data.pairs[:, 1]).all()
    assert len({tuple(sorted(pair)) for pair in data.pairs.tolist()}) == 3000
    assert identity.min() > spec.num_train_identities
    folds = np.split(np.arange(3000), 10)
    people = [set(identity[data.pairs[fold]].ravel().tolist()) for fold in folds]
    assert [int(data.issame[fold].sum()) for fold in folds] == [150] * 10
    assert all(not people[mine] & people[other] for mine in range(10) for other in range(mine))
    assert sum(map(len, people)) == 150
    assert np.array_equal(verification(spec).pairs, data.pairs)
    assert not np.array_equal(verification(dataclasses.replace(spec, seed=1)).pairs, data.pairs)


def test_identification_sets() -> None:
    spec = SyntheticFaces()
    data = identification(spec)
    first, last = data.num_probe, data.num_probe + data.num_mated
    probe, mated, others = (set(data.identities[rows].tolist()) for rows in np.split(np.arange(3000), [first, last]))
    assert (first, last - first, len(data.paths) - last) == (1700, 300, 1000)
    assert len(set(data.paths)) == 3000
    assert probe == mated == set(range(301, 401))
    assert others == set(range(401, 451))
    assert [int(path.split("/")[1]) for path in data.paths] == data.identities.tolist()


def test_export_to_records_and_back(folder: Path, tmp_path: Path) -> None:
    done = folder_to_records(folder / "train", tmp_path / "train.rec", listing=True)
    assert (done.images, done.identities, done.skipped) == (9, ["00001", "00002", "00003"], {})
    originals = [path.read_bytes() for path in sorted((folder / "train").rglob("*.jpg"))]
    with RecordReader(tmp_path / "train.rec") as reader:
        assert [bytes(image) for image in reader.read_many(reader.image_keys).contents] == originals
        assert reader.image_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        ranges = [reader.read(key).label.tolist() for key in reader.identity_keys.tolist()]
    assert ranges == [list(pair) for pair in pairwise([1, 4, 7, 10])]
    records_to_folder(tmp_path / "train.rec", tmp_path / "again")
    assert [path.read_bytes() for path in sorted((tmp_path / "again").rglob("*.jpg"))] == originals


def test_export_to_a_verification_set(folder: Path, tmp_path: Path) -> None:
    bin_from_pairs(folder / "pairs.csv", tmp_path / "faces.bin")
    images, issame = load_bin(tmp_path / "faces.bin")
    data = verification(TINY)
    assert issame.tolist() == data.issame.tolist()
    assert images == [(folder / data.paths[row]).read_bytes() for row in data.pairs.ravel().tolist()]
    with (folder / "pairs.csv").open(newline="") as file:
        assert [row["same"] == "1" for row in csv.DictReader(file)] == data.issame.tolist()
    assert np.asarray(Image.open(io.BytesIO(images[0]))).shape == (112, 112, 3)


def test_meta_tells_how_to_make_the_set_again(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    assert SyntheticFaces(**meta["parameters"]) == TINY
    assert meta["images"] == 69
    assert folder.name.startswith("synthetic_faces_v1_")


def test_truth_of_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Synthetic set: got '.*'; expected a folder with truth\.csv and meta\.json"):
        load_face_truth(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_identities": 0}, r"num_train_identities: got 0; expected 1 to"),
        ({"images_per_identity": 1}, r"images_per_identity: got 1; expected 2 to"),
        ({"size": 16}, r"size: got 16; expected 32 to 1024"),
        ({"degradation": -0.1}, r"degradation: got -0\.1; expected 0 to 1"),
        ({"num_pairs": 3010}, r"num_pairs: got 3010; expected a multiple of 20, at most 57000"),
        ({"num_pairs": 57020}, r"num_pairs: got 57020; expected a multiple of 20, at most 57000"),
        ({"num_test_identities": 10, "num_distractors": 9}, r"together: got 19; expected at least 20.*Raise num_test"),
        ({"num_train_identities": 99_999}, r"identities in all: got 100149; expected at most 99999"),
    ],
)
def test_impossible_parameters_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticFaces(**changes)  # type: ignore[arg-type]
