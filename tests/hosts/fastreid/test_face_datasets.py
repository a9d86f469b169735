"""Faces in the host: items, batches from forked workers, labels by key, and what is said where there is no test set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.face_records import folder_to_records
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.loaders import TrainSet
from qsd_plugin.quality.keys import KeyIndex, label_key

PEOPLE = {"ann": 4, "bob": 4, "cid": 4}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images/<identity>/*.png``, each of one colour, and the same in ``train.rec``."""
    root = tmp_path_factory.mktemp("faces")
    for place, (name, count) in enumerate(PEOPLE.items()):
        (root / "images" / name).mkdir(parents=True)
        for number in range(count):
            colour = (60 * place, 50 * number, 200)
            Image.new("RGB", (112, 112), colour).save(root / "images" / name / f"{number}.png")
    folder_to_records(root / "images", root / "train.rec")
    return root


def config(tmp_path: Path, **keys: Any) -> Any:
    return toy_cfg(tmp_path / "out", **keys)


def test_items_of_a_record(faces: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, **{"DATA.RECORD": str(faces / "train.rec")})
    data_set, items = datasets.training_set(cfg, "FaceRecord")
    assert sorted(items, key=lambda item: int(item[0].rpartition("#")[2])) == [
        (f"{faces}/train.rec#{key}", f"facerecord_{(key - 1) // 4}", "facerecord_0") for key in range(1, 13)
    ]
    assert data_set.parse_data(items) == (3, 0)
    folder = datasets.dataset_folder(cfg, "FaceRecord")
    assert folder == faces
    keys = [label_key(path, root=folder, dataset="FaceRecord") for path, _, _ in items]
    assert sorted(keys) == sorted(f"train#{key}" for key in range(1, 13))
    rows = KeyIndex(keys, dataset="FaceRecord").rows([item[0] for item in items], root=folder)
    assert rows.tolist() == list(range(12))


def test_items_of_a_folder(faces: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, **{"DATA.FOLDER": str(faces / "images")})
    _, items = datasets.training_set(cfg, "FaceFolder")
    assert items == [
        (f"{faces}/images/{name}/{number}.png", f"facefolder_{name}", "facefolder_0")
        for name in PEOPLE
        for number in range(4)
    ]
    assert datasets.dataset_folder(cfg, "FaceFolder") == faces / "images"


def test_classes_keep_their_numbers(tmp_path: Path) -> None:
    root = tmp_path / "many"
    for number in range(12):
        (root / f"{number:02d}").mkdir(parents=True)
        Image.new("RGB", (112, 112)).save(root / f"{number:02d}" / "a.png")
    folder_to_records(root, tmp_path / "many.rec", header=False)
    _, items = datasets.training_set(config(tmp_path, **{"DATA.RECORD": str(tmp_path / "many.rec")}), "FaceRecord")
    train_set = TrainSet(items, lambda image: image, seed=0)
    relabelled = {int(path.rpartition("#")[2]): train_set.pid_dict[pid] for path, pid, _ in items}
    assert relabelled == {number: number for number in range(12)}


@pytest.mark.parametrize(("name", "workers"), [("FaceRecord", 2), ("FaceFolder", 0)])
def test_batches_hold_the_images_and_their_classes(faces: Path, tmp_path: Path, name: str, workers: int) -> None:
    from fastreid.data import build_reid_train_loader

    keys: dict[str, Any] = {
        "DATA.RECORD": str(faces / "train.rec"),
        "DATA.FOLDER": str(faces / "images"),
        "DATASETS.NAMES": (name,),
        "DATALOADER.NUM_WORKERS": workers,
        "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
        "SOLVER.IMS_PER_BATCH": 12,
        "INPUT.SIZE_TRAIN": [112, 112],
        "INPUT.FLIP.ENABLED": False,
        "INPUT.PADDING.ENABLED": False,
    }
    batch = next(iter(build_reid_train_loader(config(tmp_path, **keys))))
    assert batch["images"].shape == (12, 3, 112, 112)
    for image, target, path in zip(batch["images"], batch["targets"], batch["img_paths"], strict=True):
        if name == "FaceRecord":
            place, number = divmod(int(path.rpartition("#")[2]) - 1, 4)
        else:
            place, number = list(PEOPLE).index(Path(path).parent.name), int(Path(path).stem)
        assert int(target) == place
        assert torch.equal(image.amax(dim=(1, 2)), torch.tensor([60.0 * place, 50.0 * number, 200.0]))
        assert torch.equal(image.amin(dim=(1, 2)), image.amax(dim=(1, 2)))


def test_damaged_record_is_replaced_by_another_image_of_its_identity(faces: Path, tmp_path: Path) -> None:
    blob = bytearray((faces / "train.rec").read_bytes())
    offsets = np.loadtxt(faces / "train.idx", dtype=np.int64)[:, 1]
    blob[offsets[2] + 60 : offsets[3]] = bytes(int(offsets[3] - offsets[2] - 60))
    (tmp_path / "train.rec").write_bytes(blob)
    (tmp_path / "train.idx").write_bytes((faces / "train.idx").read_bytes())
    _, items = datasets.training_set(config(tmp_path, **{"DATA.RECORD": str(tmp_path / "train.rec")}), "FaceRecord")
    train_set = TrainSet(items, lambda image: image, seed=0)
    broken = next(index for index, item in enumerate(items) if item[0].endswith("#2"))
    sample = train_set[broken]
    assert sample["corrupt_paths"] == f"{tmp_path}/train.rec#2"
    assert sample["img_paths"] in {f"{tmp_path}/train.rec#{key}" for key in (1, 3, 4)}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (2000, r"\d+ of 12 records lie outside .*cut off"),
        (30, r"key 11 at offset .*cannot be read.*cut off or damaged"),
    ],
)
def test_record_file_that_is_cut_off_stops_before_training(
    faces: Path, tmp_path: Path, missing: int, message: str
) -> None:
    file = tmp_path / "train.rec"
    folder_to_records(faces / "images", file, header=False)
    file.write_bytes(file.read_bytes()[:-missing])
    with pytest.raises(DataError, match=message):
        datasets.training_set(config(tmp_path, **{"DATA.RECORD": str(file)}), "FaceRecord")


def test_what_is_missing_is_named(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DATA\.RECORD: got ''; expected a \.rec file with its \.idx"):
        datasets.training_set(config(tmp_path), "FaceRecord")
    with pytest.raises(ConfigError, match=r"DATA\.FOLDER: got ''; expected a folder with one folder per identity"):
        datasets.training_set(config(tmp_path), "FaceFolder")
    cfg = config(tmp_path, **{"DATA.RECORD": str(faces / "train.rec")})
    with pytest.raises(DataError, match=r"FaceRecord has no query images.*for training only"):
        datasets.test_set(cfg, "FaceRecord")
