"""The plugin's loaders: the host's batches bit for bit, damaged images, partners, several data sets."""

from __future__ import annotations

import copy
import logging
import pickle
import random
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_cfg, use_market, write_market

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import DataError
from qsd_plugin.hosts.fastreid import datasets, loaders

IDENTITY_SAMPLER = {"DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler"}
AUGMENTED = {"INPUT.FLIP.ENABLED": True, "INPUT.PADDING.ENABLED": True, "INPUT.REA.ENABLED": True}


@pytest.fixture(autouse=True)
def no_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_records", {})


@pytest.fixture
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_market(tmp_path / "data", num_ids=6, per_id=6)
    use_market(monkeypatch, root)
    return root / "Market-1501-v15.09.15"


def train_loader(cfg: Any, **options: Any) -> Any:
    from fastreid.data import build_reid_train_loader

    return build_reid_train_loader(cfg, **options)


def host_builder(name: str) -> Any:
    """What stands behind the plugin's builder."""
    from fastreid.data import build

    return getattr(build, name).__wrapped__


def seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002  (the host draws from the global generators)
    torch.manual_seed(5)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    )


def spoil(folder: Path, *patterns: str) -> list[str]:
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    for path in files:
        path.write_bytes(path.read_bytes()[:200])
    return [str(path) for path in files]


@pytest.mark.parametrize("sampler", ["TrainingSampler", "NaiveIdentitySampler", "BalancedIdentitySampler"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_hosts_bit_for_bit(tmp_path: Path, market: Path, sampler: str, workers: int) -> None:
    from fastreid.data.build import build_transforms
    from fastreid.data.common import CommDataset

    keys = {"DATALOADER.SAMPLER_TRAIN": sampler, "DATALOADER.NUM_WORKERS": workers, **AUGMENTED}
    cfg = toy_cfg(tmp_path / "out", **keys)
    _, items = datasets.training_set(cfg, "Market1501")  # sorted, which the host leaves to the file system
    seed_everything()
    host_set = CommDataset(items, build_transforms(cfg, is_train=True))
    host = list(islice(host_builder("build_reid_train_loader")(cfg, train_set=host_set), 5))
    seed_everything()
    ours = list(islice(train_loader(cfg), 5))
    assert all(same(*pair) for pair in zip(host, ours, strict=True))
    assert ours[0]["images"].dtype == torch.float32


def test_test_loader_is_the_hosts(tmp_path: Path, market: Path) -> None:
    from fastreid.data import build_reid_test_loader
    from fastreid.data.build import build_transforms
    from fastreid.data.common import CommDataset

    cfg = toy_cfg(tmp_path / "out")
    _, query, gallery = datasets.test_set(cfg, "Market1501")
    host_set = CommDataset(query + gallery, build_transforms(cfg, is_train=False), relabel=False)
    host, _ = host_builder("build_reid_test_loader")(cfg, test_set=host_set, num_query=len(query))
    ours, num_query = build_reid_test_loader(cfg, dataset_name="Market1501")
    assert num_query == 4
    assert all(same(*pair) for pair in zip(host, ours, strict=True))


def test_loader_answers_for_the_hosts_loader(tmp_path: Path, market: Path) -> None:
    loader = train_loader(toy_cfg(tmp_path / "out"))
    assert loader.dataset.num_classes == 6
    assert len(loader.dataset) == 36
    assert loader.num_workers == 0
    assert copy.copy(loader).dataset is loader.dataset


def test_foreign_training_sets_pass_through(tmp_path: Path, market: Path) -> None:
    from fastreid.data.common import CommDataset

    cfg = toy_cfg(tmp_path / "out")
    own = CommDataset(datasets.training_set(cfg, "Market1501")[1], lambda image: torch.zeros(1))
    loader = train_loader(cfg, train_set=own)
    assert loader.dataset is own
    assert not isinstance(loader, loaders.WatchedLoader)
    assert host_builder("build_reid_train_loader").__name__ == "build_reid_train_loader"


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_image_is_replaced_within_its_identity(
    tmp_path: Path, market: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = spoil(market, "bounding_box_train/0001_*_00000[0-3]_*", "bounding_box_train/0002_*_000001_*")
    keys = {"DATA.MAX_CORRUPT": 0.5, "DATALOADER.NUM_WORKERS": workers, **IDENTITY_SAMPLER}
    cfg = toy_cfg(tmp_path / "out", **keys)
    loader = train_loader(cfg)
    seen: set[str] = set()
    with caplog.at_level(logging.WARNING, "fastreid"):
        for batch in islice(loader, 30):
            assert set(batch) == {"images", "targets", "camids", "img_paths"}
            assert set(Counter(batch["targets"].tolist()).values()) == {4}  # the balance of the batch is kept
            for path, target, camera in zip(batch["img_paths"], batch["targets"], batch["camids"], strict=True):
                pid, name = loader.dataset.pids[target], Path(path).name
                assert pid == f"market1501_{int(name[:4])}"
                assert loader.dataset.cams[camera] == f"market1501_{int(name[6]) - 1}"  # the camera of what is shown
            seen.update(batch["img_paths"])
    assert seen.isdisjoint(spoiled)
    assert len([line for line in caplog.messages if "cannot be decoded" in line]) == 5  # each image once
    assert loaders.corrupt_images(cfg).summary().startswith("5 of 36 training images could not be decoded (all in ")
    assert (tmp_path / "out" / "corrupt_images.txt").read_text().split() != []


def test_replacement_is_the_same_every_time(tmp_path: Path, market: Path) -> None:
    (spoiled,) = spoil(market, "bounding_box_train/0001_*_000000_*")
    train_set = train_loader(toy_cfg(tmp_path / "out")).dataset
    index = [item[0] for item in train_set.img_items].index(spoiled)
    assert len({train_set[index]["img_paths"] for _ in range(5)}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_images_stop_the_run_with_the_list(tmp_path: Path, market: Path, workers: int) -> None:
    first, second = spoil(market, "bounding_box_train/000[12]_*_000000_*")
    cfg = toy_cfg(tmp_path / "out", **{"DATA.MAX_CORRUPT": 0.03, "DATALOADER.NUM_WORKERS": workers})
    with pytest.raises(DataError, match=rf"2 of 36 .*{first}, {second}: got '5\.56%'; expected at most 3\.00%"):
        list(islice(train_loader(cfg), 10))


def test_identity_without_a_readable_image_is_named(tmp_path: Path, market: Path) -> None:
    spoil(market, "bounding_box_train/0003_*")
    cfg = toy_cfg(tmp_path / "out", **{"DATA.MAX_CORRUPT": 1.0})
    with pytest.raises(DataError, match=r"without a readable image: got 'market1501_3'.*0003_c1s1_000000_00\.jpg"):
        list(islice(train_loader(cfg), 10))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_test_image_is_named(tmp_path: Path, market: Path, workers: int) -> None:
    from fastreid.data import build_reid_test_loader

    (spoiled,) = spoil(market, "query/0008_*")
    cfg = toy_cfg(tmp_path / "out", **{"DATALOADER.NUM_WORKERS": workers})
    loader, _ = build_reid_test_loader(cfg, dataset_name="Market1501")
    with pytest.raises(DataError, match=f"cannot be read: got '{spoiled}'; expected a complete image file"):
        list(loader)


def partner_batches(cfg: Any, count: int) -> list[dict[str, Any]]:
    seed_everything()
    return list(islice(train_loader(cfg, partner=True), count))


def test_partner_shows_the_same_identity_in_another_image(tmp_path: Path, market: Path) -> None:
    cfg = toy_cfg(tmp_path / "out", **IDENTITY_SAMPLER, **AUGMENTED)
    partners = defaultdict(set)
    for batch in partner_batches(cfg, 10):
        assert set(batch) - {"images", "targets", "camids", "img_paths"} == {
            "partner_images",
            "partner_paths",
            "partner_valid",
        }
        assert batch["partner_images"].shape == batch["images"].shape
        assert batch["partner_valid"].dtype == torch.bool
        assert batch["partner_valid"].all()
        for anchor, partner in zip(batch["img_paths"], batch["partner_paths"], strict=True):
            assert Path(anchor).name[:4] == Path(partner).name[:4]
            assert anchor != partner
            partners[anchor].add(partner)
    assert max(len(names) for names in partners.values()) > 2  # drawn anew each time


def test_partner_image_is_the_one_its_path_names(tmp_path: Path, market: Path) -> None:
    batch = partner_batches(toy_cfg(tmp_path / "out"), 1)[0]
    for images, paths in ((batch["images"], batch["img_paths"]), (batch["partner_images"], batch["partner_paths"])):
        expected = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() for path in paths]
        assert torch.equal(images, torch.stack(expected))


def test_partners_leave_the_anchors_as_they_are(tmp_path: Path, market: Path) -> None:
    cfg = toy_cfg(tmp_path / "out", **IDENTITY_SAMPLER)
    with_partners = partner_batches(cfg, 3)
    seed_everything()
    for batch, paired in zip(islice(train_loader(cfg), 3), with_partners, strict=True):
        assert same(batch, {key: paired[key] for key in batch})


def test_every_other_image_is_equally_likely(tmp_path: Path, market: Path) -> None:
    train_set = train_loader(toy_cfg(tmp_path / "out", SEED=3), partner=True).dataset
    times = Counter(train_set[loaders.DrawnIndex(8, draw)]["partner_paths"] for draw in range(800))
    others = {item[0] for item in train_set.img_items[6:12]} - {train_set.img_items[8][0]}
    assert set(times) == others
    assert all(abs(count - 160) < 46 for count in times.values())  # 4 standard deviations


def test_partners_do_not_depend_on_the_number_of_workers(tmp_path: Path, market: Path) -> None:
    paths = []
    for workers in (0, 1, 2):
        cfg = toy_cfg(tmp_path / "out", **IDENTITY_SAMPLER, **{"DATALOADER.NUM_WORKERS": workers})
        paths.append([batch["partner_paths"] for batch in partner_batches(cfg, 6)])
    assert paths[0] == paths[1] == paths[2]
    cfg = toy_cfg(tmp_path / "out", SEED=1, **IDENTITY_SAMPLER)
    assert [batch["partner_paths"] for batch in partner_batches(cfg, 6)] != paths[0]


def test_single_image_is_its_own_partner_and_marked(
    tmp_path: Path, market: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in sorted(market.glob("bounding_box_train/0004_*"))[1:]:
        path.unlink()
    with caplog.at_level(logging.WARNING, "fastreid"):
        loader = train_loader(toy_cfg(tmp_path / "out"), partner=True)
    assert any("1 of 6 training identities have one image only (market1501_4)" in line for line in caplog.messages)
    for sample in (loader.dataset[index] for index in range(len(loader.dataset))):
        alone = Path(sample["img_paths"]).name.startswith("0004")
        assert sample["partner_valid"] is not alone
        assert (sample["partner_paths"] == sample["img_paths"]) is alone


def test_damaged_partner_is_replaced_and_never_by_the_anchor(tmp_path: Path, market: Path) -> None:
    spoiled = spoil(market, "bounding_box_train/0001_*_00000[2-5]_*")
    train_set = train_loader(toy_cfg(tmp_path / "out"), partner=True).dataset
    for draw in range(20):
        sample = train_set[loaders.DrawnIndex(0, draw)]
        assert sample["partner_paths"] == str(market / "bounding_box_train/0001_c2s1_000001_00.jpg")
        assert sample["partner_valid"]
        assert set(sample["corrupt_paths"].split()) <= set(spoiled)
    spoil(market, "bounding_box_train/0001_*_000001_*")
    assert not train_set[0]["partner_valid"]  # nobody is left


def test_drawn_index_survives_the_way_to_a_worker() -> None:
    index = pickle.loads(pickle.dumps(loaders.DrawnIndex(7, 41)))
    assert (index, index.draw) == (7, 41)


def test_partners_follow_the_config(tmp_path: Path, market: Path) -> None:
    cfg = toy_cfg(tmp_path / "out", **{"QSD.PAIRING": "partner"})
    assert "partner_images" not in next(iter(train_loader(cfg)))
    cfg.MODEL.META_ARCHITECTURE = "QSD"
    assert "partner_images" in next(iter(train_loader(cfg)))


def test_two_data_sets_are_combined(tmp_path: Path, market: Path) -> None:
    crops = tmp_path / "crops"
    for pid in ("1", "2", "person"):
        (crops / "train" / pid).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (32, 64), (index, 9, 9)).save(crops / "train" / pid / f"{index}.png")
    for part in ("query", "gallery"):
        (crops / part / "9").mkdir(parents=True)
        Image.new("RGB", (32, 64)).save(crops / part / "9" / f"{part}.png")
    keys = {"DATASETS.NAMES": ("Market1501", "ReIDFolder"), "DATA.FOLDER": str(crops)}
    cfg = toy_cfg(tmp_path / "out", **IDENTITY_SAMPLER, **keys)
    loader = train_loader(cfg)
    assert loader.dataset.num_classes == 9  # people called 1 and 2 in both sets are four people
    assert loader.dataset.num_cameras == 3 + 12
    assert [Path(item[0]).name for item in loader.dataset.img_items[-12:-8]] == ["0.png", "1.png", "2.png", "3.png"]
    sources = Counter(str(crops) in path for batch in islice(loader, 20) for path in batch["img_paths"])
    assert sources[True] > 50
    assert sources[False] > 50
    weighted = {"DATALOADER.SAMPLER_TRAIN": "SetReWeightSampler", "DATALOADER.SET_WEIGHT": [3, 1]}
    for batch in islice(train_loader(toy_cfg(tmp_path / "out", **keys, **weighted)), 5):
        assert Counter(str(crops) in path for path in batch["img_paths"]) == {False: 12, True: 4}


def test_loader_of_another_set_as_precise_bn_builds_it(tmp_path: Path, market: Path) -> None:
    cfg = toy_cfg(tmp_path / "out")
    train_loader(cfg)
    other = cfg.clone()
    other.DATASETS.NAMES = ("Market1501",)
    other.DATALOADER.NUM_WORKERS = 0
    other.freeze()
    assert len(next(iter(train_loader(other, combineall=True)))["images"]) == 16
    assert loaders.corrupt_images(cfg) is loaders.corrupt_images(other)


def test_every_kind_of_image_trains_and_tests(tmp_path: Path) -> None:
    from fastreid.data import build_reid_test_loader

    crops = tmp_path / "crops"
    for part in ("train", "query", "gallery"):
        (crops / part / "7").mkdir(parents=True)
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16"):
            size, name = (32, 64), f"{mode.replace(';', '')}.png"
            image = Image.fromarray(np.zeros((64, 32), np.uint16)) if mode == "I;16" else Image.new(mode, size)
            image.save(crops / part / "7" / name)
    names = {"DATASETS.NAMES": ("ReIDFolder",), "DATASETS.TESTS": ("ReIDFolder",), "DATA.FOLDER": str(crops)}
    cfg = toy_cfg(tmp_path / "out", **names, **{"SOLVER.IMS_PER_BATCH": 6})
    assert next(iter(train_loader(cfg)))["images"].shape == (6, 3, 64, 32)
    loader, num_query = build_reid_test_loader(cfg, dataset_name="ReIDFolder")
    assert (num_query, sum(len(batch["images"]) for batch in loader)) == (6, 12)


def test_install_can_be_undone() -> None:
    from fastreid.data import build
    from fastreid.engine import defaults

    before = build.build_reid_train_loader
    undo = loaders.install()
    assert defaults.build_reid_train_loader is build.build_reid_train_loader is not before
    undo()
    assert defaults.build_reid_train_loader is build.build_reid_train_loader is before
