"""The teacher's embeddings from a cache are those it would give, for the image and the flip that the student sees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import ConfigError, DataError, StageError
from qsd_plugin.core.stages import run_recipe
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.data.feature_cache import FeatureCache
from qsd_plugin.data.recordio import RecordWriter
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import cached_features, datasets, feature_caching, loaders
from qsd_plugin.methods.qud import FeatureQueue, ModuleTeacher, Teacher, qud_loss

host.activate()

DIM = 24
SETS = {"DATASETS.NAMES": ("Market1501", "ReIDFolder"), "INPUT.FLIP.ENABLED": True, "INPUT.SIZE_TRAIN": [48, 20]}


@pytest.fixture(autouse=True)
def no_earlier_runs(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(loaders, "_records", {})
    use_market(monkeypatch, data)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in Market-1501's layout, and 16 of other sizes in a folder."""
    root = write_market(tmp_path_factory.mktemp("data"), num_ids=6, per_id=8)
    generator = np.random.default_rng(1)
    for number in range(16):
        pixels = generator.integers(0, 256, size=(31 + 3 * number, 30, 3), dtype=np.uint8)
        for part in ("train", "query", "gallery") if number == 0 else ("train",):
            folder = root / "crops" / part / str(number // 4)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished cache of both data sets for each dtype."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_market(monkeypatch, data)
        folders = {}
        for dtype in ("float16", "float32"):
            folders[dtype] = tmp_path_factory.mktemp(dtype)
            cfg = cache_cfg(folders[dtype] / "out", data, **{"QUD.CACHE.DTYPE": dtype})
            feature_caching.build_cache(cfg, make_teacher(), items_of(cfg), folders[dtype] / "cache")
    return {dtype: folder / "cache" for dtype, folder in folders.items()}


def cache_cfg(output: Path, data: Path, **keys: Any) -> Any:
    cfg = toy_cfg(output, **{**SETS, "DATA.FOLDER": str(data / "crops"), "MODEL.META_ARCHITECTURE": "QUD", **keys})
    cfg.QUD.setdefault("TEACHER", type(cfg)()).SOURCE = "cache"
    return cfg


def items_of(cfg: Any) -> dict[str, list[Any]]:
    return {name: datasets.training_set(cfg, name)[1] for name in cfg.DATASETS.NAMES}


def make_teacher(scale: float = 1.0) -> Teacher:
    """A teacher of its own size, colours and normalisation that tells left from right."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2), nn.PReLU(8), nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(48, DIM)
    )
    stream = torch_stream(0, "teacher")
    weights = {name: scale * torch.randn(w.shape, generator=stream) for name, w in network.state_dict().items()}
    mean, std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    return ModuleTeacher(network, weights, mean=mean, std=std, size=(40, 28), colour="BGR")


def train_batches(cfg: Any, count: int) -> list[dict[str, Any]]:
    from fastreid.data import build_reid_train_loader

    np.random.seed(5)  # noqa: NPY002  (the host's sampler draws its seed from the global generator)
    torch.manual_seed(5)
    return list(islice(build_reid_train_loader(cfg), count))


def file_views(paths: list[str], cfg: Any) -> torch.Tensor:
    """The images behind ``paths`` in the size of training."""
    height, width = cfg.INPUT.SIZE_TRAIN
    images = [Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for path in paths]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cached_embeddings_are_the_live_teachers(tmp_path: Path, data: Path, made: dict[str, Path], dtype: str) -> None:
    cfg = cache_cfg(tmp_path, data, **{"QUD.CACHE.FOLDER": str(made[dtype])})
    teacher, flips = make_teacher(), []
    queue, student = FeatureQueue(64, DIM), torch.randn(16, DIM, generator=torch_stream(0, "student"))
    for batch in train_batches(cfg, 8):
        cached, live = batch["teacher_features"], teacher(batch["images"])
        assert (cached.dtype, tuple(cached.shape)) == (getattr(torch, dtype), (16, DIM))
        if dtype == "float32":
            assert torch.equal(cached, live)
        else:
            assert ((cached - live).abs() <= live.abs() * 2**-11 + 2**-25).all()
        losses = [qud_loss(student, keys, queue.features, 0.1) for keys in (cached, live)]
        assert abs(losses[0] - losses[1]) < 2e-3
        assert (teacher(batch["images"].flip(3)) - live).norm(dim=1).min() > 1  # the other row would be far off
        queue.enqueue(live)
        stored = file_views(batch["img_paths"], cfg)
        for image, plain in zip(batch["images"], stored, strict=True):
            flips.append(torch.equal(image, plain.flip(2)))
            assert flips[-1] or torch.equal(image, plain)
    assert 44 < sum(flips) < 84  # of 128, three and a half standard deviations
    assert {"crops" in path for path in batch["img_paths"]} == {True, False}


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path, data: Path, made: dict[str, Path]) -> None:
    loaded = []
    for workers in (0, 2):
        keys = {"DATALOADER.NUM_WORKERS": workers, "QUD.CACHE.FOLDER": str(made["float16"])}
        loaded.append(train_batches(cache_cfg(tmp_path, data, **keys), 6))
    for first, second in zip(*loaded, strict=True):
        assert first["img_paths"] == second["img_paths"]
        for key in ("images", "teacher_features", "targets"):
            assert torch.equal(first[key], second[key])
    keys = {"SEED": 1, "QUD.CACHE.FOLDER": str(made["float16"])}
    other = train_batches(cache_cfg(tmp_path, data, **keys), 6)
    assert not all(torch.equal(a["images"], b["images"]) for a, b in zip(loaded[0], other, strict=True))


@pytest.mark.parametrize("probability", [0.0, 1.0, None])
def test_flips_follow_the_config(tmp_path: Path, data: Path, made: dict[str, Path], probability: float | None) -> None:
    flip = {"INPUT.FLIP.ENABLED": probability is not None, "INPUT.FLIP.PROB": probability or 0.0}
    cfg = cache_cfg(tmp_path, data, **flip, **{"QUD.CACHE.FOLDER": str(made["float32"])})
    (batch,) = train_batches(cfg, 1)
    stored = file_views(batch["img_paths"], cfg)
    assert torch.equal(batch["images"], stored.flip(3) if probability else stored)
    assert torch.equal(batch["teacher_features"], make_teacher()(batch["images"]))


def test_flips_that_qsd_shares_choose_the_row(tmp_path: Path, data: Path, made: dict[str, Path]) -> None:
    keys = {"MODEL.META_ARCHITECTURE": "QSD", "QSD.BASE": "QUD", "QSD.PAIR_FLIP": "shared", "SEED": 0}
    keys |= {"DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler", "QUD.CACHE.FOLDER": str(made["float32"])}
    cfg = cache_cfg(tmp_path, data, **keys)
    cfg.QUD.BASE = "Baseline"
    shared = []
    for batch in train_batches(cfg, 4):
        assert torch.equal(batch["teacher_features"], make_teacher()(batch["images"]))
        stored = file_views(batch["img_paths"], cfg)
        mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(batch["images"], stored, strict=True)]
        for target in batch["targets"].unique():
            own = {flag for flag, other in zip(mirrored, batch["targets"], strict=True) if other == target}
            assert len(own) == 1
            shared += list(own)
    assert {*shared} == {True, False}


def test_a_part_of_the_cached_images_finds_its_rows(tmp_path: Path, data: Path, made: dict[str, Path]) -> None:
    keys = {"DATASETS.NAMES": ("ReIDFolder",), "QUD.CACHE.FOLDER": str(made["float32"])}  # rows 48 to 63
    for batch in train_batches(cache_cfg(tmp_path, data, **keys), 2):
        assert torch.equal(batch["teacher_features"], make_teacher()(batch["images"]))


def test_other_teachers_leave_the_loader_as_it_is(tmp_path: Path, data: Path) -> None:
    cfg = cache_cfg(tmp_path, data, **{"INPUT.REA.ENABLED": True})
    cfg.QUD.TEACHER.SOURCE = "network"
    (batch,) = train_batches(cfg, 1)
    assert set(batch) == {"images", "targets", "camids", "img_paths"}


# --- making it


def interrupted(batches: Iterator[Any], after: int) -> Iterator[Any]:
    yield from islice(batches, after)
    raise KeyboardInterrupt


def test_interrupted_cache_goes_on_to_the_same_bytes(
    tmp_path: Path, data: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = cache_cfg(tmp_path / "out", data, **{"QUD.CACHE.DTYPE": "float32", "DATALOADER.NUM_WORKERS": 1})
    folder, items, whole = tmp_path / "cache", items_of(cfg), feature_caching._embedded
    with monkeypatch.context() as patched:
        patched.setattr(feature_caching, "_embedded", lambda *args: interrupted(whole(*args), 2))
        with pytest.raises(KeyboardInterrupt):
            feature_caching.build_cache(cfg, make_teacher(), items, folder)
    assert not (folder / "cache.json").exists()
    seen: list[list[int]] = []
    with monkeypatch.context() as patched:
        patched.setattr(feature_caching, "_embedded", lambda *args: (seen.extend(args[-1]), whole(*args))[1])
        feature_caching.build_cache(cfg, make_teacher(), items, folder)
    assert [rows[0] for rows in seen] == [32, 48]  # what was done is kept
    assert (folder / "features.npy").read_bytes() == (made["float32"] / "features.npy").read_bytes()
    feature_caching.build_cache(cfg, make_teacher(), items, folder)  # finished: nothing to do
    assert FeatureCache(folder).rows(feature_caching.image_keys(cfg, items)).tolist() == list(range(64))


def test_ranks_do_their_shares(
    tmp_path: Path, data: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastreid.utils import comm

    cfg = cache_cfg(tmp_path / "out", data, **{"QUD.CACHE.DTYPE": "float32"})
    whole, shares = feature_caching._embedded, []
    monkeypatch.setattr(comm, "get_local_size", lambda: 2)
    monkeypatch.setattr(feature_caching, "_embedded", lambda *args: (shares.append(args[-1]), whole(*args))[1])
    monkeypatch.setattr(feature_caching, "rank", lambda: 1)
    with pytest.raises(DataError, match="32 of 64 images have none yet: got 'Market1501/bounding_box_train/0001_"):
        feature_caching.build_cache(cfg, make_teacher(), items_of(cfg), tmp_path / "cache")
    monkeypatch.setattr(feature_caching, "rank", lambda: 0)
    feature_caching.build_cache(cfg, make_teacher(), items_of(cfg), tmp_path / "cache")
    assert [[rows[0] for rows in share] for share in shares] == [[16, 48], [0, 32]]
    features = (tmp_path / "cache" / "features.npy").read_bytes()
    assert features == (made["float32"] / "features.npy").read_bytes()


def test_damaged_images_are_left_out_and_replaced_with_their_row(tmp_path: Path, data: Path) -> None:
    crops = tmp_path / "crops"
    shutil.copytree(data / "crops", crops)
    broken = crops / "train" / "1" / "5.png"
    broken.write_bytes(broken.read_bytes()[:200])
    keys = {"DATASETS.NAMES": ("ReIDFolder",), "DATA.MAX_CORRUPT": 0.1, "QUD.CACHE.DTYPE": "float32"}
    cfg = cache_cfg(tmp_path / "out", data, **{**keys, "DATA.FOLDER": str(crops)})
    feature_caching.build_cache(cfg, make_teacher(), items_of(cfg), tmp_path / "out" / "cache")
    header = json.loads((tmp_path / "out" / "cache" / "cache.json").read_text())
    assert header["left_out"] == ["ReIDFolder/train/1/5.png"]
    replaced = 0
    for batch in train_batches(cfg, 3):
        assert str(broken) not in batch["img_paths"]
        replaced += len(batch["img_paths"]) - len(set(batch["img_paths"]))
        torch.testing.assert_close(batch["teacher_features"], make_teacher()(batch["images"]), rtol=1e-5, atol=1e-4)
    assert replaced
    cfg.DATA.MAX_CORRUPT = 0.01
    with pytest.raises(DataError, match=r"1 of 16 training images .*5\.png: got '6\.25%'; expected at most 1\.00%"):
        feature_caching.build_cache(cfg, make_teacher(), items_of(cfg), tmp_path / "strict")
    assert not (tmp_path / "strict" / "cache.json").exists()


def test_records_are_cached_by_their_keys(tmp_path: Path, data: Path) -> None:
    with RecordWriter(tmp_path / "faces.rec") as writer:
        for number, path in enumerate(sorted((data / "crops" / "train").glob("*/*.png"))):
            writer.append(path.read_bytes(), label=number // 4)
    keys = {"DATASETS.NAMES": ("FaceRecord",), "DATA.RECORD": str(tmp_path / "faces.rec"), "DATASETS.TESTS": ()}
    cfg = cache_cfg(tmp_path / "out", data, **keys, **{"QUD.CACHE.DTYPE": "float32"})
    feature_caching.build_cache(cfg, make_teacher(), items_of(cfg), tmp_path / "out" / "cache")
    keys_stored = json.loads((tmp_path / "out" / "cache" / "keys.json").read_text())
    assert sorted(keys_stored) == sorted(f"faces#{number}" for number in range(16))
    (batch,) = train_batches(cfg, 1)
    assert torch.equal(batch["teacher_features"], make_teacher()(batch["images"]))


# --- what is refused


def test_every_augmentation_but_mirroring_is_named(tmp_path: Path, data: Path, made: dict[str, Path]) -> None:
    cfg = cache_cfg(tmp_path, data)
    switches = {name for name, node in cfg.INPUT.items() if isinstance(node, dict) and "ENABLED" in node}
    assert switches == {"FLIP", *feature_caching.OFFENDING}  # another host's may know more
    feature_caching.check_cacheable(cfg)
    for name in sorted(switches - {"FLIP"}):
        cfg = cache_cfg(tmp_path, data, **{f"INPUT.{name}.ENABLED": True, "QUD.CACHE.FOLDER": str(made["float16"])})
        for refuse in (feature_caching.check_cacheable, feature_caching.plain_transforms, cached_batch):
            with pytest.raises(ConfigError, match=f"and no other: got 'INPUT.{name}.ENABLED True'; expected no "):
                refuse(cfg)
    keys = {"INPUT.REA.ENABLED": True, "INPUT.CROP.ENABLED": True, "MODEL.META_ARCHITECTURE": "QSD", "QSD.BASE": "QUD"}
    cfg = cache_cfg(tmp_path, data, **keys, **{"QSD.PAIRING": "partner"})
    cfg.QUD.BASE = "Baseline"
    with pytest.raises(
        ConfigError,
        match=r"got 'INPUT.CROP.ENABLED True, INPUT.REA.ENABLED True, QSD.PAIRING partner'; expected no augmentation "
        r"but INPUT.FLIP, and one image per sample\. Turn these off, or let the teacher look at every image anew: "
        r"QUD.TEACHER.SOURCE network or onnx\.",
    ):
        feature_caching.build_cache(cfg, make_teacher(), {}, tmp_path)


def cached_batch(cfg: Any) -> Any:
    return train_batches(cfg, 1)


def test_transforms_that_no_key_names_are_refused(
    tmp_path: Path, data: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastreid.data import build, build_reid_train_loader
    from torchvision import transforms

    cfg = cache_cfg(tmp_path, data, **{"QUD.CACHE.FOLDER": str(made["float16"])})
    own = transforms.Compose([transforms.RandomGrayscale(), *feature_caching.plain_transforms(cfg).transforms])
    with pytest.raises(ConfigError, match='got "build_reid_train_loader with transforms of the caller\'s"'):
        build_reid_train_loader(cfg, transforms=own)
    with pytest.raises(ConfigError, match='got "build_reid_train_loader with partner images of the caller\'s"'):
        build_reid_train_loader(cfg, partner=True)
    monkeypatch.setattr(build, "build_transforms", lambda cfg, is_train: own)
    with pytest.raises(ConfigError, match=r"one time to the next: got 'RandomGrayscale'; expected Resize and ToTensor"):
        cached_batch(cfg)


def test_caches_of_something_else_are_refused(
    tmp_path: Path, data: Path, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError,
        match=rf"got '{tmp_path}/cache'; expected a folder with a finished cache \(cache.json\), because "
        r"QUD.TEACHER.SOURCE is cache. Make it, or finish it, with: python tools/train_net.py --config-file CONFIG "
        r"--stage cache, or name yours in QUD.CACHE.FOLDER\.",
    ):
        cached_batch(cache_cfg(tmp_path, data))
    given = {"QUD.CACHE.FOLDER": str(made["float16"])}
    with pytest.raises(DataError, match="another image size: got '48x20, bicubic'; expected 32x16, bicubic"):
        cached_batch(cache_cfg(tmp_path, data, **given, **{"INPUT.SIZE_TRAIN": [32, 16]}))
    cfg = cache_cfg(tmp_path, data, **given)
    cfg.QUD.TEACHER.DIM = 512
    with pytest.raises(DataError, match="embedding size: got 24; expected 512"):
        cached_batch(cfg)
    assert cached_features.open_cache(cache_cfg(tmp_path, data, **given)).dim == DIM
    (tmp_path / "more" / "train" / "9").mkdir(parents=True)
    for part in ("train", "query", "gallery"):
        shutil.copytree(data / "crops" / part, tmp_path / "more" / part, dirs_exist_ok=True)
    shutil.copy(data / "crops" / "train" / "0" / "0.png", tmp_path / "more" / "train" / "9" / "new.png")
    with pytest.raises(DataError, match=r"1 of 65 images are not in it: got 'ReIDFolder/train/9/new\.png'"):
        cached_batch(cache_cfg(tmp_path, data, **given, **{"DATA.FOLDER": str(tmp_path / "more")}))
    monkeypatch.setattr(feature_caching, "decoder", lambda: "another one")
    with pytest.raises(DataError, match=r"made with another decoder: got 'Pillow .*jpeg.*'; expected another one"):
        cached_batch(cache_cfg(tmp_path, data, **given))


# --- the stage


def test_stage_is_skipped_resumed_and_stale(tmp_path: Path, data: Path) -> None:
    weights, log = tmp_path / "teacher.pth", []
    weights.write_bytes(b"first")

    def stages(**keys: Any) -> Any:
        cfg = cache_cfg(tmp_path / "out", data, **{"DATASETS.NAMES": ("ReIDFolder",), **keys})

        def teacher() -> Teacher:
            log.append(weights.read_bytes())
            return make_teacher(2.0 if log[-1] == b"second" else 1.0)

        return feature_caching.cache_stages(cfg, teacher, items_of(cfg), inputs=[weights])

    def run(**options: Any) -> None:
        run_recipe(stages(), tmp_path / "out", announce=lambda line: None, **options)

    run()
    first = FeatureCache(tmp_path / "out" / "cache")
    before = first.read(0, mirrored=False)
    run()
    assert log == [b"first"]
    with pytest.raises(
        StageError, match=r"QUD.CACHE.DTYPE: 'float16' -> 'float32'.*--from-stage cache.*--accept-stale"
    ):
        run_recipe(stages(**{"QUD.CACHE.DTYPE": "float32"}), tmp_path / "out", announce=lambda line: None)
    with pytest.raises(StageError, match="image size: '48x20, bicubic' -> '32x16, bicubic'"):
        run_recipe(stages(**{"INPUT.SIZE_TRAIN": [32, 16]}), tmp_path / "out", announce=lambda line: None)
    weights.write_bytes(b"second")
    with pytest.raises(
        StageError,
        match=r"'cache' in .* was made with other settings: input .*/teacher\.pth has other "
        r"content\..* Run it again with --from-stage cache",
    ):
        run()
    run(from_stage="cache")
    second = FeatureCache(tmp_path / "out" / "cache")
    different = {name for name, value in first.identity.items() if second.identity[name] != value}
    assert different == {"teacher weights"}
    assert not np.array_equal(before, second.read(0, mirrored=False))
    assert log == [b"first", b"second"]


def test_there_is_no_stage_without_need(tmp_path: Path, data: Path) -> None:
    def unused() -> Teacher:
        raise AssertionError

    cfg = cache_cfg(tmp_path, data, **{"QUD.CACHE.FOLDER": str(tmp_path)})
    assert feature_caching.cache_stages(cfg, unused, items_of(cfg), inputs=[]) == []
    cfg.QUD.CACHE.FOLDER, cfg.INPUT.REA.ENABLED = "", True
    with pytest.raises(ConfigError, match=r"INPUT\.REA\.ENABLED True"):  # before the teacher's hours of training
        feature_caching.cache_stages(cfg, unused, items_of(cfg), inputs=[])
    cfg.QUD.TEACHER.SOURCE = "network"
    assert feature_caching.cache_stages(cfg, unused, items_of(cfg), inputs=[]) == []
