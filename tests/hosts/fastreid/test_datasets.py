"""The plugin's data sets in the host: what they list, in which form, and what they say when they cannot."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from toy import toy_cfg, use_market, write_market

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.hosts.fastreid import datasets


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8)).save(path)
    return root


def config(tmp_path: Path, **keys: Any) -> Any:
    return toy_cfg(tmp_path / "out", **{"DATA.ROOT": str(tmp_path), **keys})


def stems(items: list[datasets.Item]) -> list[tuple[str, Any, Any]]:
    return [(Path(path).stem, pid, camera) for path, pid, camera in items]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(
        tmp_path / "crops",
        "train/0002_c1_0.jpg",
        "train/0002_c12_1.jpg",
        "train/0010_c2_2.jpg",
        "query/0031_c1_3.jpg",
        "test/0031_c12_4.jpg",
        "test/0000_c2_5.jpg",
    )


def test_folder_in_the_hosts_form(tmp_path: Path, folder: Path) -> None:
    cfg = config(tmp_path, **{"DATA.FOLDER": str(folder)})
    _, train = datasets.training_set(cfg, "ReIDFolder")
    assert stems(train) == [
        ("0002_c12_1", "reidfolder_0002", "reidfolder_2"),
        ("0002_c1_0", "reidfolder_0002", "reidfolder_0"),
        ("0010_c2_2", "reidfolder_0010", "reidfolder_1"),
    ]
    _, query, gallery = datasets.test_set(cfg, "ReIDFolder")
    assert stems(query) == [("0031_c1_3", 1, 0)]
    assert stems(gallery) == [("0000_c2_5", 0, 1), ("0031_c12_4", 1, 2)]


def test_combineall_trains_on_everybody_but_the_distractors(tmp_path: Path, folder: Path) -> None:
    cfg = config(tmp_path, **{"DATA.FOLDER": str(folder)})
    _, train = datasets.training_set(cfg, "ReIDFolder", combineall=True)
    assert [pid for _, pid, _ in train].count("reidfolder_test_1") == 2
    assert len(train) == 5


def test_images_without_camera_are_each_their_own_camera(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "_told", set())
    folder = write(tmp_path / "crops", "train/a/1.jpg", "train/a/2.jpg", "query/b/3.jpg", "gallery/b/4.jpg")
    cfg = config(tmp_path, **{"DATA.FOLDER": str(folder)})
    with caplog.at_level(logging.INFO, "fastreid"):
        data_set, train = datasets.training_set(cfg, "ReIDFolder")
        _, query, gallery = datasets.test_set(cfg, "ReIDFolder")
        data_set.show_train()
    assert len({camera for _, _, camera in train}) == 2
    assert {camera for _, _, camera in query}.isdisjoint({camera for _, _, camera in gallery})
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "no camera information" in line]) == 1
    assert "| train    | 1       | 2          | 0           |" in said[-1]


def test_folder_without_split_is_split_and_the_split_is_stored(tmp_path: Path) -> None:
    names = [f"{name}/{index}.jpg" for name in "abcdefgh" for index in range(3)]
    folder = write(tmp_path / "crops", *names)
    cfg = config(tmp_path, **{"DATA.FOLDER": str(folder), "DATA.TEST_FRACTION": 0.25, "DATA.SPLIT_SEED": 9})
    _, train = datasets.training_set(cfg, "ReIDFolder")
    _, query, gallery = datasets.test_set(cfg, "ReIDFolder")
    assert (len(train), len(query), len(gallery)) == (18, 2, 4)
    assert (folder / "qsd_split_seed9_test25.csv").is_file()
    assert not {Path(path).parent for path, _, _ in train} & {Path(path).parent for path, _, _ in query + gallery}


def test_list_in_the_hosts_form(tmp_path: Path, folder: Path) -> None:
    rows = ["path,pid,camid,split", "train/0002_c1_0.jpg,ann,gate,train", "query/0031_c1_3.jpg,bob,gate,query"]
    (folder / "list.csv").write_text("\n".join([*rows, "test/0031_c12_4.jpg,bob,yard,gallery"]))
    cfg = config(tmp_path, **{"DATA.LIST": str(folder / "list.csv")})
    assert stems(datasets.training_set(cfg, "ReIDList")[1]) == [("0002_c1_0", "reidlist_ann", "reidlist_0")]
    _, query, gallery = datasets.test_set(cfg, "ReIDList")
    assert (stems(query), stems(gallery)) == ([("0031_c1_3", 0, 0)], [("0031_c12_4", 0, 1)])


@pytest.mark.parametrize(("name", "kind"), [("CUHK03Detected", "detected"), ("CUHK03Labeled", "labeled")])
def test_cuhk03_from_the_new_protocols_folders(tmp_path: Path, name: str, kind: str) -> None:
    for which, pid in (("detected", 3), ("labeled", 4)):
        names = (f"bounding_box_train/{pid:04d}_c1_1.png", f"query/{pid + 10:04d}_c1_1.png")
        write(tmp_path / "cuhk03-np" / which, *names, f"bounding_box_test/{pid + 10:04d}_c2_6.png")
    cfg = config(tmp_path)
    pid = 3 if kind == "detected" else 4
    assert stems(datasets.training_set(cfg, name)[1]) == [
        (f"{pid:04d}_c1_1", f"{name.lower()}_{pid:04d}", f"{name.lower()}_0")
    ]
    _, query, gallery = datasets.test_set(cfg, name)
    assert ([item[1:] for item in query], [item[1:] for item in gallery]) == ([(0, 0)], [(0, 1)])
    assert datasets.dataset_folder(cfg, name) == tmp_path / "cuhk03-np" / kind


def test_cuhk03_from_the_release_follows_its_kind(tmp_path: Path) -> None:
    """What the host makes of the ``.mat`` files, as it finds it on the second run."""
    base = tmp_path / "cuhk03"
    (base / "cuhk03_release").mkdir(parents=True)
    (base / "cuhk03_release" / "cuhk-03.mat").write_bytes(b"")
    for kind, count in (("detected", 1), ("labeled", 2)):
        write(base / f"images_{kind}", *(f"1_{index:03d}_1_01.png" for index in range(count + 2)))
        paths = [str(base / f"images_{kind}" / f"1_{index:03d}_1_01.png") for index in range(count + 2)]
        (base / f"cuhk03_new_protocol_config_{kind}.mat").write_bytes(b"")
        (base / f"splits_classic_{kind}.json").write_text("[]")
        split = {
            "train": [[path, index, 0] for index, path in enumerate(paths[:count])],
            "query": [[paths[-2], 900, 0]],
            "gallery": [[paths[-1], 900, 1]],
        }
        (base / f"splits_new_{kind}.json").write_text(json.dumps([split]))
    cfg = config(tmp_path)
    for name, kind, count in (("CUHK03Detected", "detected", 1), ("CUHK03Labeled", "labeled", 2)):
        data_set, train = datasets.training_set(cfg, name)
        assert len(train) == count
        assert {Path(path).parent.name for path, _, _ in train} == {f"images_{kind}"}
        data_set.show_train()
        assert [tuple(item[1:]) for item in datasets.test_set(cfg, name)[2]] == [(900, 1)]
        assert datasets.dataset_folder(cfg, name) == base


@pytest.mark.parametrize(
    ("version", "train", "test"), [("V1", "train", "test"), ("V2", "mask_train_v2", "mask_test_v2")]
)
def test_msmt17_cameras_have_two_digits(tmp_path: Path, version: str, train: str, test: str) -> None:
    """The host reads them right (the official QSD and AGW readers take one digit): 15 cameras stay 15."""
    base = tmp_path / f"MSMT17_{version}"
    names = {camera: f"0000/0000_{camera:03d}_{camera:02d}_0303morning_0008_0.jpg" for camera in range(1, 16)}
    write(base / train, *names.values())
    write(base / test, *names.values())
    for split in ("train", "val", "query", "gallery"):
        cameras = {"train": range(1, 16), "val": [3], "query": [9, 10], "gallery": range(1, 16)}[split]
        (base / f"list_{split}.txt").write_text("".join(f"{names[camera]} 0\n" for camera in cameras))
    cfg = config(tmp_path)
    _, items = datasets.training_set(cfg, "MSMT17")
    assert {camera for _, _, camera in items} == {f"msmt17_{number}" for number in range(15)}
    assert all(camera == f"msmt17_{int(Path(path).name.split('_')[2]) - 1}" for path, _, camera in items)
    _, query, gallery = datasets.test_set(cfg, "MSMT17")
    assert [camera for _, _, camera in query] == [8, 9]
    assert [camera for _, _, camera in gallery] == list(range(15))


def test_synthetic_pedestrians_are_made_once(tmp_path: Path) -> None:
    small = {"NUM_TRAIN_IDENTITIES": 2, "NUM_TEST_IDENTITIES": 2, "NUM_DISTRACTORS": 1, "CAMERAS_PER_IDENTITY": 2}
    keys = {f"DATA.SYNTHETIC.{key}": value for key, value in {**small, "IMAGES_PER_CAMERA": 2}.items()}
    cfg = config(tmp_path, **keys, **{"DATA.CACHE": str(tmp_path / "cache")})
    _, train = datasets.training_set(cfg, "SyntheticPedestrians")
    _, query, gallery = datasets.test_set(cfg, "SyntheticPedestrians")
    assert (len(train), len(query), len(gallery)) == (8, 4, 8)
    folder = datasets.dataset_folder(cfg, "SyntheticPedestrians")
    assert folder.parent == tmp_path / "cache"
    made = (folder / "meta.json").stat().st_mtime_ns
    datasets.training_set(cfg, "SyntheticPedestrians")
    assert (folder / "meta.json").stat().st_mtime_ns == made


def test_cache_folder_follows_config_then_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(datasets.CACHE_VARIABLE, "/from/environment")
    assert datasets.cache_folder(config(tmp_path, **{"DATA.CACHE": "/from/config"})) == Path("/from/config")
    assert datasets.cache_folder(config(tmp_path)) == Path("/from/environment")
    monkeypatch.delenv(datasets.CACHE_VARIABLE)
    assert datasets.cache_folder(config(tmp_path)) == Path.home() / ".cache" / "qsd_plugin"


def test_items_of_the_hosts_sets_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glob

    root = write_market(tmp_path, num_ids=3, per_id=3)
    files = glob.glob
    monkeypatch.setattr(glob, "glob", lambda pattern: sorted(files(pattern), key=lambda name: name[::-1]))
    cfg = config(tmp_path, **{"DATA.ROOT": str(root)})
    for items in (datasets.training_set(cfg, "Market1501")[1], *datasets.test_set(cfg, "Market1501")[1:]):
        paths = [path for path, _, _ in items]
        assert paths == sorted(paths)


def test_label_folder_of_the_hosts_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_market(tmp_path, num_ids=2, per_id=2)
    use_market(monkeypatch, root)
    cfg = toy_cfg(tmp_path / "out")
    assert datasets.datasets_root(cfg) == str(root)
    assert datasets.dataset_roots(cfg) == {"Market1501": root / "Market-1501-v15.09.15"}


def test_registration_twice_changes_nothing() -> None:
    datasets.register_datasets()
    from fastreid.data.datasets import DATASET_REGISTRY

    assert DATASET_REGISTRY.get("ReIDFolder") is datasets.ReIDFolder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ReIDFolder", r"DATA\.FOLDER: got ''; expected the folder with the images\. Add it to the command line: DATA"),
        ("ReIDList", r"DATA\.LIST: got ''; expected a CSV file with the columns path,pid,camid"),
    ],
)
def test_own_data_needs_its_key(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        datasets.training_set(config(tmp_path), name)


@pytest.mark.parametrize("name", ["Market1501", "MSMT17", "DukeMTMC"])
@pytest.mark.filterwarnings("ignore:The current data structure is deprecated")
def test_missing_data_folder_names_itself_and_the_remedy(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"Data set {name}: got .*; expected its folder in .*DATA\.ROOT or FASTREID"):
        datasets.training_set(config(tmp_path), name)


def test_missing_cuhk03_names_both_layouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"CUHK03 is not there.*cuhk03-np .*cuhk-03\.mat.*DATA\.ROOT or FASTREID"):
        datasets.training_set(config(tmp_path), "CUHK03Detected")


def test_cuhk03_release_without_its_reader_names_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cuhk03"
    (base / "cuhk03_release").mkdir(parents=True)
    for file in (
        "cuhk03_release/cuhk-03.mat",
        *(f"cuhk03_new_protocol_config_{k}.mat" for k in ("detected", "labeled")),
    ):
        (base / file).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"got 'h5py'; expected h5py, imageio and scipy\. Install them .*cuhk03-np/"):
        datasets.training_set(config(tmp_path), "CUHK03Labeled")


def test_empty_data_folder_is_refused(tmp_path: Path) -> None:
    for part in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "Market-1501-v15.09.15" / part).mkdir(parents=True)
    with pytest.raises(DataError, match=r"Market1501 has no training images: got '.*'; expected a data folder with"):
        datasets.training_set(config(tmp_path), "Market1501")
    with pytest.raises(DataError, match="Market1501 has no query images"):
        datasets.test_set(config(tmp_path), "Market1501")


def test_names_in_test_items_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.data.datasets import DATASET_REGISTRY
    from fastreid.data.datasets.bases import ImageDataset

    class Wrong(ImageDataset):
        def __init__(self, root: str, **kwargs: Any) -> None:
            super().__init__([("a", "1", "1")], [("a", "wrong_1", "wrong_1")], [("b", 1, 1)], **kwargs)

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "Wrong", Wrong)
    with pytest.raises(
        DataError, match=r"Wrong: query images: got \('a', 'wrong_1', 'wrong_1'\); expected .* integers"
    ):
        datasets.test_set(config(tmp_path), "Wrong")
