"""Pairs, labels and checks between the host's data sets and its loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faces import CLASSES, IMAGES, PER_CLASS, face, write_faces
from PIL import Image

from qsd_plugin.core.errors import DataError, LabelError
from qsd_plugin.hosts.insightface import compat
from qsd_plugin.hosts.insightface.loaders import training_loader, with_names
from qsd_plugin.hosts.insightface.option_checks import read_options
from qsd_plugin.hosts.insightface.pairs import CheckedDataset, PairDataset


@pytest.fixture
def loader(host: None, tmp_path: Path) -> Iterator[Any]:
    """A function from the config's keys to the loader of a run of one process, without a GPU."""
    import torch.distributed as dist

    names = ("loader on CPU", "seed on CPU") if not torch.cuda.is_available() else ()
    undos = [shim.apply() for shim in compat.SHIMS if shim.name in names]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)

    def build(root: Path, methods: dict[str, Any], *, workers: int = 0, **keys: Any) -> Any:
        from dataset import get_dataloader

        config = {"num_classes": CLASSES, "num_image": IMAGES, "seed": 5, "qsd_plugin": methods, **keys}
        arguments = (str(root), 0, 6, False, False, config["seed"], workers)
        return training_loader(get_dataloader, config, read_options(config), arguments)

    yield build
    dist.destroy_process_group()
    for undo in undos:
        undo()


def qsd(faces: Path, **options: Any) -> dict[str, Any]:
    return {"methods": ["QSD"], "qsd": {"labels": str(faces / "labels.csv"), **options}}


def epoch(loader: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader.sampler.set_epoch(number)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def test_pairs_show_one_person_and_carry_their_labels(loader: Any, faces: Path) -> None:
    made = loader(faces, qsd(faces))
    images, targets = epoch(made, 0)
    assert images.shape == (IMAGES, 2, 3, 112, 112)
    assert targets.dtype == torch.float64
    label, quality_1, valid_1, quality_2, valid_2 = targets.T
    assert sorted(label.tolist()) == sorted([float(i // PER_CLASS) for i in range(IMAGES)])
    assert (quality_1 != quality_2).all()  # every image of a class has another quality, and none is its own partner
    assert valid_1.bool().all()
    assert valid_2.bool().all()
    # The noise of an image follows from its quality: the pictures are those that the labels belong to.
    rough = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean(dim=(2, 3, 4))
    assert ((rough[:, 0] > rough[:, 1]) == (quality_1 < quality_2)).all()


def test_partners_are_drawn_evenly_and_follow_from_seed_and_epoch(loader: Any, faces: Path) -> None:
    dataset: PairDataset = loader(faces, qsd(faces)).dataset
    drawn = [dataset.partner(5, number) for number in range(300)]
    assert set(drawn) == {4, 6, 7}
    assert min(np.bincount(drawn)[[4, 6, 7]]) > 70
    again, other = loader(faces, qsd(faces)).dataset, loader(faces, qsd(faces), seed=6).dataset
    assert drawn == [again.partner(5, number) for number in range(300)]
    assert drawn != [other.partner(5, number) for number in range(300)]


@pytest.mark.parametrize("kind", ["identity", "degraded", "single"])
def test_images_do_not_depend_on_workers_and_differ_between_epochs(kind: str, loader: Any, faces: Path) -> None:
    degraded = {"methods": ["QGFace"]}
    methods = {"identity": qsd(faces), "degraded": degraded, "single": {"methods": ["AdaFace"]}}[kind]
    alone, forked = loader(faces, methods), loader(faces, methods, workers=2)
    first = epoch(alone, 0)
    torch.manual_seed(123)  # the global generator must not matter
    for one, other in zip(first, epoch(forked, 0), strict=True):
        assert torch.equal(one, other)
    of_epochs = []
    for number in range(2):
        alone.sampler.set_epoch(number)  # which also deals the images out in another order
        of_epochs.append(torch.stack([alone.dataset[index][0] for index in range(8)]))
    assert not torch.equal(*of_epochs)


def test_views_are_a_clean_and_a_degraded_one(loader: Any, faces: Path) -> None:
    images, targets = epoch(loader(faces, {"methods": ["QGFace"]}), 0)
    assert images.shape == (IMAGES, 2, 3, 112, 112)
    assert targets.dtype == torch.int64
    rough = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean(dim=(2, 3, 4))
    noisy = rough[:, 0] > 0.15  # rescaling takes noise away
    assert (rough[noisy, 1] < rough[noisy, 0]).all()
    assert noisy.sum() > 4
    assert -1 <= images.min() < images.max() <= 1


def test_lone_image_is_its_own_partner_and_teaches_nothing(loader: Any, faces: Path, tmp_path: Path) -> None:
    for index in range(8):
        folder = tmp_path / "images" / ("a" if index == 0 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.jpg").write_bytes(face(int(index > 0), 5, index))
    made = loader(tmp_path / "images", {"methods": ["QSD"], "qsd": {"quality": "norm"}}, num_classes=2, num_image=8)
    _, targets = made.dataset[0]
    assert targets.tolist() == [0, 0, 1, 0, 0]
    assert made.dataset.partner(0, 3) == 0
    assert made.dataset[1][1][4] == 1


def test_folders_find_their_labels_by_path(loader: Any, tmp_path: Path) -> None:
    root = tmp_path / "crops"
    for index in range(8):
        (root / str(index % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (112, 112), (index * 20, 0, 0)).save(root / str(index % 2) / f"{index}.png")
    lines = "".join(f"crops/{index % 2}/{index}.png,{index * 10}\n" for index in range(8))
    (tmp_path / "labels.csv").write_text("key,score\n" + lines)
    made = loader(root, qsd(tmp_path, label_scale="none"), num_classes=2, num_image=8)
    _, target = made.dataset[0]
    assert target[:3].tolist() == [0, 0, 1]
    assert float(target[3]) in (20, 40, 60)


def test_classes_that_do_not_fit_are_refused(loader: Any, faces: Path, tmp_path: Path) -> None:
    for methods in ({"methods": ["AdaFace"]}, {"methods": ["QGFace"]}, qsd(faces)):
        with pytest.raises(DataError, match=r"config.num_classes: 5, and .*train.rec has 6 identities"):
            loader(faces, methods, num_classes=5)
    dataset: CheckedDataset = loader(faces, {"methods": ["AdaFace"]}).dataset
    with pytest.raises(DataError, match=r"config.num_classes: 6, and .*train.rec#4 has class 6; expected classes 0"):
        dataset.check(6, 3)


def test_labels_that_cover_too_little_are_refused(loader: Any, faces: Path, tmp_path: Path) -> None:
    lines = (faces / "labels.csv").read_text().splitlines(keepends=True)
    (tmp_path / "labels.csv").write_text("".join(lines[:-12]))
    with pytest.raises(LabelError) as caught:
        loader(faces, qsd(tmp_path))
    assert "covers 12 of 24 images; expected at least 99.0% (min_coverage)" in str(caught.value)
    assert "Without a label: " in str(caught.value)
    _, targets = epoch(loader(faces, qsd(tmp_path, min_coverage=0.5)), 0)
    assert targets[:, 2].sum() == 12


def test_wrong_number_of_images_is_told(loader: Any, faces: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader(faces, {"methods": ["AdaFace"]}, num_image=1000, num_classes=9)
    assert "config.num_image is 1000, the training set has 24" in caplog.text
    assert "config.num_classes is 9" in caplog.text


def test_function_with_other_names_leaves_the_original_alone() -> None:
    copy = with_names(write_faces, {"CLASSES": 1})
    assert copy.__globals__["CLASSES"] == 1
    assert write_faces.__globals__["CLASSES"] == CLASSES
    assert copy.__kwdefaults__ == write_faces.__kwdefaults__
