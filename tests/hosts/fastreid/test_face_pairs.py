"""Own lists of faces in the host: grey images of several sizes to train on and to verify, and results per trial."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.face_split import split_faces
from qsd_plugin.data.verification_bin import bin_from_pairs
from qsd_plugin.evaluation.verification import verify_pairs
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.face_protocol import WITHOUT_TRIALS, FaceTest, Score
from qsd_plugin.hosts.fastreid.face_tests import TESTS

SIZES = ((42, 48), (23, 28))  # as the real grey sets, four times smaller


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``faces/<identity>/<brightness>.png``, grey, and ``split/``: eight people to train on, twelve to verify."""
    folder = tmp_path_factory.mktemp("grey")
    draw = np.random.default_rng(0)
    for person in range(20):
        (folder / "faces" / f"p{person:02d}").mkdir(parents=True)
        coarse = draw.integers(0, 160, (4, 4))
        for number in range(4):
            noisy = np.clip(coarse + draw.normal(0, 45, (4, 4)) + 20 * number, 0, 255).astype(np.uint8)
            image = Image.fromarray(noisy).resize(SIZES[number % 2], Image.Resampling.NEAREST)
            image.save(folder / "faces" / f"p{person:02d}" / f"{20 * number}.png")
    split_faces(folder / "faces", folder / "split", test_fraction=0.6, pairs=120, quality_from_name=r"(\d+)\.png")
    return folder


class Pooled(torch.nn.Module):
    """Embeds an image as 4 x 4 mean colours around the middle grey."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(batch["images"] - 127.5, 4).flatten(1)


def embed(paths: list[str]) -> torch.Tensor:
    """The same by hand: grey repeated, resized as the host resizes."""
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) for path in paths]
    return Pooled()({"images": torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2)})


def config(tmp_path: Path, file: Path | str, **more: Any) -> Any:
    keys = {"DATASETS.TESTS": ("FacePairs",), "DATA.PAIRS": str(file), "INPUT.SIZE_TEST": [32, 32], **more}
    return toy_cfg(tmp_path / "out", **keys)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(file: Path, listed: list[dict[str, str]], *columns: str) -> Path:
    lines = [",".join(columns), *(",".join(row[name] for name in columns) for row in listed)]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize("name", ["FaceList", "FaceFolder"])
def test_grey_images_of_several_sizes_are_trained_on(root: Path, tmp_path: Path, name: str) -> None:
    from fastreid.data import build_reid_train_loader

    listed = rows(root / "split" / "train.csv")
    people = sorted({row["identity"] for row in listed}) if name == "FaceList" else [f"p{n:02d}" for n in range(20)]
    keys: dict[str, Any] = {
        "DATASETS.NAMES": (name,),
        "DATA.LIST": str(root / "split" / "train.csv"),
        "DATA.FOLDER": str(root / "faces"),
        "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
        "SOLVER.IMS_PER_BATCH": 32,
        "INPUT.SIZE_TRAIN": [32, 32],
        "INPUT.FLIP.ENABLED": False,
        "INPUT.PADDING.ENABLED": False,
    }
    cfg = toy_cfg(tmp_path / "out", **keys)
    batch = next(iter(build_reid_train_loader(cfg)))
    assert batch["images"].shape == (32, 3, 32, 32)
    assert {Image.open(path).size for path in batch["img_paths"]} == set(SIZES)
    assert torch.equal(Pooled()(batch), embed(batch["img_paths"]))
    assert [people[target] for target in batch["targets"]] == [Path(path).parent.name for path in batch["img_paths"]]


def test_items_of_a_list(root: Path, tmp_path: Path) -> None:
    cfg = toy_cfg(tmp_path / "out", **{"DATA.LIST": str(root / "split" / "train.csv")})
    data_set, items = datasets.training_set(cfg, "FaceList")
    listed = rows(root / "split" / "train.csv")
    assert items == [(row["path"], f"facelist_{row['identity']}", "facelist_0") for row in listed]
    assert data_set.parse_data(items) == (8, 0)
    assert datasets.dataset_folder(cfg, "FaceList") == root / "faces"
    with pytest.raises(ConfigError, match=r"DATA.LIST: .*path,identity"):
        datasets.training_set(toy_cfg(tmp_path / "none"), "FaceList")


def test_verification_is_the_protocol_on_the_listed_pairs(root: Path, tmp_path: Path) -> None:
    from fastreid.engine import DefaultTrainer

    file = root / "split" / "pairs.csv"
    found = dict(DefaultTrainer.test(config(tmp_path, file), Pooled()))
    listed = rows(file)
    same = np.array([row["same"] == "1" for row in listed])
    features = embed([row[side] for row in listed for side in ("first", "second")])
    result = verify_pairs(features, same, far_targets=(1e-1, 1e-2))
    assert 0.55 < result.accuracy < 0.95
    assert found["accuracy"] == found["metric"] == pytest.approx(100 * result.accuracy)
    assert found["TAR@FAR=1e-01"] == pytest.approx(100 * result.at_far[0].val)

    # Trial by trial: what each fold's threshold makes of its own pairs.
    test = TESTS["FacePairs"](config(tmp_path, file))
    trials = test.trials(embed(list(test.names)))
    unit = torch.nn.functional.normalize(features.double()).numpy()
    distance = np.square(unit[0::2] - unit[1::2]).sum(1)
    right = (distance < np.repeat(result.fold_threshold, len(listed) // 10)) == same
    assert trials.names.tolist() == ["accuracy"]
    assert trials.values[:, 0].tolist() == (100.0 * right).tolist()
    assert trials.identity.tolist() == [Path(row["first"]).parent.name for row in listed]
    worse = [-max(int(Path(row[side]).stem) for side in ("first", "second")) for row in listed]
    assert trials.quality.tolist() == worse
    names = [f"{Path(row[side]).parent.name}/{Path(row[side]).name}" for row in listed for side in ("first", "second")]
    assert trials.query.tolist() == [f"{a} {b}" for a, b in zip(names[::2], names[1::2], strict=True)]
    for group, chosen in trials.groups().items():
        key = "accuracy" if group == "all" else group
        assert found[key] == pytest.approx(trials.values[chosen].mean())
    assert list(trials.groups())[1:] == ["worst third", "middle third", "best third"]
    kept = json.loads((tmp_path / "out" / "evaluation" / "FacePairs.json").read_text())
    assert kept["error_discard"]["num_pairs"] == 60


def test_of_folds_of_unequal_length_the_fold_means_agree(root: Path, tmp_path: Path) -> None:
    """113 pairs: three folds of twelve, seven of eleven. Neither identity nor quality is listed."""
    listed = rows(root / "split" / "pairs.csv")[:113]
    file = write(tmp_path / "own.csv", listed, "first", "second", "same")
    test = TESTS["FacePairs"](config(tmp_path, file))
    features = embed(list(test.names))
    numbers, trials = test.score(features).numbers, test.trials(features)
    parts = np.array_split(trials.values[:, 0], 10)
    assert [len(part) for part in parts] == [12] * 3 + [11] * 7
    assert np.mean([part.mean() for part in parts]) == pytest.approx(numbers["accuracy"])
    assert trials.values.mean() == pytest.approx(numbers["accuracy"], abs=100 * 3 / 113)
    assert list(numbers) == ["accuracy", "TAR@FAR=1e-01", "TAR@FAR=1e-02", "metric"]
    assert list(trials.groups()) == ["all"]
    assert len(set(trials.identity.tolist())) == 113


def test_trials_of_verification_bins(root: Path, tmp_path: Path) -> None:
    listed = rows(root / "split" / "pairs.csv")
    square = tmp_path / "square"
    for row in listed:
        for side in ("first", "second"):
            copy = square / Path(row[side]).parent.name / Path(row[side]).name
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.open(row[side]).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC).save(copy)
            row[side] = str(copy)
    for name, part in (("one", listed[:60]), ("two", listed[60:100])):
        bin_from_pairs(
            write(tmp_path / f"{name}.csv", part, "first", "second", "same"), tmp_path / f"{name}.bin", size=32
        )
    cfg = toy_cfg(tmp_path / "out", **{"DATA.VERIFICATION": [str(tmp_path / f"{name}.bin") for name in ("one", "two")]})
    test = TESTS["VerificationBin"](cfg)
    features = embed([row[side] for row in listed[:100] for side in ("first", "second")])
    numbers, trials = test.score(features).numbers, test.trials(features)
    same = np.array([row["same"] == "1" for row in listed])
    for name, start, end in (("one", 0, 60), ("two", 60, 100)):
        own = trials.test == name
        assert own.sum() == end - start
        assert trials.values[own].mean() == pytest.approx(numbers[name])
        assert numbers[name] == pytest.approx(
            100 * verify_pairs(features[2 * start : 2 * end], same[start:end]).accuracy
        )
    assert numbers["one"] != numbers["two"]
    assert list(trials.groups()) == ["all"]
    assert len(set(trials.identity.tolist())) == 100  # every pair is a cluster of its own


def test_other_protocols_have_no_trials() -> None:
    test = FaceTest([], lambda index: Image.new("RGB", (1, 1)), lambda features: Score({}, {}))
    with pytest.raises(ConfigError, match=r"without results per trial; expected one of pairs, or of probes"):
        test.trials(torch.zeros(0, 1))
    assert set(TESTS) >= WITHOUT_TRIALS == {"IJB", "IJBB", "IJBC"}


def test_lists_that_cannot_be_verified(root: Path, tmp_path: Path) -> None:
    listed = rows(root / "split" / "pairs.csv")
    columns = ("first", "second", "same")
    with pytest.raises(ConfigError, match=r"DATA.PAIRS: .*face-split writes one"):
        TESTS["FacePairs"](config(tmp_path, ""))
    with pytest.raises(DataError, match=r"Pair list: got '.*none\.csv'; expected an existing CSV file"):
        TESTS["FacePairs"](config(tmp_path, tmp_path / "none.csv"))
    few = write(tmp_path / "few.csv", listed[:19], *columns)
    with pytest.raises(DataError, match=r"Pair list .*few\.csv: 1 of 10 folds lack .*Interleave both kinds"):
        TESTS["FacePairs"](config(tmp_path, few))
    blocks = write(tmp_path / "blocks.csv", sorted(listed, key=lambda row: row["same"]), *columns)
    with pytest.raises(DataError, match=r"blocks\.csv: 10 of 10 folds lack matching or non-matching pairs"):
        TESTS["FacePairs"](config(tmp_path, blocks))
    lost = write(tmp_path / "lost.csv", [{**listed[0], "second": "gone.png"}, *listed[1:]], *columns)
    with pytest.raises(DataError, match=r"Pair list .*lost\.csv: 1 of 49 files do not exist: got \['.*/gone\.png'\]"):
        TESTS["FacePairs"](config(tmp_path, lost))
