"""The plugin's samplers inside fast-reid: by name from YAML, with the run's labels, continued by ``--resume``."""

from __future__ import annotations

import types
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import ConfigError, LabelError, RegistryError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import datasets, recipes, registries, sampler_state, samplers
from qsd_plugin.quality.labels import QualityLabels

host.activate()

STEPS = 4  # per epoch: 64 images in batches of 16
QUALITY = "QualityIdentitySampler"
BALANCED = "QualityBalancedSampler"
WEIGHTED = "SetReWeightSampler"
SEEDED = "SeededTrainingSampler"
IDENTITIES = "SeededIdentitySampler"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=8, per_id=8, test_ids=2)


@pytest.fixture(autouse=True)
def market(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, data)


@pytest.fixture(scope="module")
def scores(data: Path) -> dict[str, float]:
    """A label for every training image by its file name, all different."""
    names = sorted(path.name for path in data.glob("*/bounding_box_train/*.jpg"))
    labels = np.linspace(0, 100, len(names))[np.random.default_rng(0).permutation(len(names))]
    return dict(zip(names, labels.tolist(), strict=True))


@pytest.fixture
def labels(scores: dict[str, float], tmp_path: Path) -> Path:
    return save(scores, tmp_path / "labels.npz")


def save(scores: dict[str, float], path: Path) -> Path:
    values = np.array(list(scores.values()))
    keys = tuple(f"Market1501/bounding_box_train/{name}" for name in scores)
    header = {"dataset": "Market1501", "scale": "minmax"}
    path.parent.mkdir(parents=True, exist_ok=True)
    QualityLabels(values, values, np.zeros(len(values)), keys, header).save(path)
    return path


def sampler_cfg(folder: Path, sampler: str, **overrides: Any) -> Any:
    options = {"DATALOADER.SAMPLER_TRAIN": sampler, "TEST.EVAL_PERIOD": 100, **overrides}
    if sampler == WEIGHTED:
        options["DATALOADER.SET_WEIGHT"] = [1]
    return toy_cfg(folder / "out", **options)


def batches(cfg: Any, count: int) -> list[list[str]]:
    """File names of the first batches."""
    from fastreid.data import build_reid_train_loader

    return [[Path(path).name for path in batch["img_paths"]] for batch in islice(build_reid_train_loader(cfg), count)]


# By name, with labels.


def test_halves_of_each_identity_by_yaml_for_any_number_of_workers(
    tmp_path: Path, labels: Path, scores: dict[str, float]
) -> None:
    config = tmp_path / "quality.yml"
    config.write_text(
        f"SEED: 3\nDATALOADER:\n  SAMPLER_TRAIN: {QUALITY}\n  NUM_INSTANCE: 4\nQUALITY:\n  FILES: ('{labels}',)\n"
    )
    found = []
    for workers in (0, 1, 2):
        cfg = toy_cfg(tmp_path / "out", **{"DATALOADER.NUM_WORKERS": workers})
        cfg.merge_from_file(str(config))
        found.append(batches(cfg, 8))
    assert found[0] == found[1] == found[2]
    for batch in found[0]:
        blocks = [batch[start : start + 4] for start in range(0, 16, 4)]
        assert len({block[0][:4] for block in blocks}) == 4
        for block in blocks:
            own = sorted((name for name in scores if name[:4] == block[0][:4]), key=scores.__getitem__)
            assert set(block[:2]) < set(own[4:])
            assert set(block[2:]) < set(own[:4])


def test_balanced_batches_by_yaml(tmp_path: Path, labels: Path, scores: dict[str, float]) -> None:
    config = tmp_path / "balanced.yml"
    config.write_text(
        f"SEED: 3\nDATALOADER:\n  SAMPLER_TRAIN: {BALANCED}\n"
        f"QUALITY:\n  FILES: ('{labels}',)\n  BALANCE:\n    BINS: 4\n    EDGES: width\n"
    )
    cfg = toy_cfg(tmp_path / "out")
    cfg.merge_from_file(str(config))
    for batch in batches(cfg, 8):
        assert Counter(min(int(scores[name] // 25), 3) for name in batch) == {0: 4, 1: 4, 2: 4, 3: 4}


def test_sampler_sees_the_labels_that_the_loss_sees(tmp_path: Path, labels: Path, scores: dict[str, float]) -> None:
    cfg = sampler_cfg(tmp_path, QUALITY, **{"SEED": 3, "QUALITY.FILES": (str(labels),), "QUALITY.CONTROL": "reverse"})
    for batch in batches(cfg, 4):
        for block in (batch[start : start + 4] for start in range(0, 16, 4)):
            assert max(scores[name] for name in block[:2]) < min(scores[name] for name in block[2:])


def test_labels_of_the_recipe_are_found_and_missing_ones_name_the_command(
    tmp_path: Path, scores: dict[str, float]
) -> None:
    cfg = sampler_cfg(tmp_path, QUALITY)
    with pytest.raises(
        LabelError, match=r"Market1501\.npz'; expected an existing .*tools/train_net\.py.*--stage labels"
    ):
        batches(cfg, 1)
    save(scores, tmp_path / "out" / "labels" / "Market1501.npz")
    assert len(batches(cfg, 1)[0]) == 16


def test_unlabelled_images_are_left_out_and_counted_in_the_log_as_flat_identities_are(
    tmp_path: Path, scores: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    some = {name: 50.0 if name.startswith("0003") else score for name, score in list(scores.items())[1:]}
    files = (str(save(some, tmp_path / "some.npz")),)
    cfg = sampler_cfg(tmp_path, QUALITY, **{"QUALITY.FILES": files, "QUALITY.MIN_COVERAGE": 0.9})
    with caplog.at_level("WARNING", "fastreid"):
        shown = {name for batch in batches(cfg, 30) for name in batch}
    assert shown == set(some)  # the other seven images of its identity fill the groups
    assert any("1 of 64 training images have no quality label: QualityId" in line for line in caplog.messages)
    assert any("1 of 8 training identities have no two different labels" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("sampler", "overrides", "error", "message"),
    [
        ("QualityIdentitySampeler", {}, RegistryError, r"SAMPLER_TRAIN: got 'Qual.*mean 'QualityIdentitySampler'"),
        ("NaiveIdentitySampeler", {}, RegistryError, r"DATALOADER\.SAMPLER_TRAIN.*'NaiveIdentitySampler'"),
        (
            QUALITY,
            {"QUALITY.SOURCE": "embedding_norm"},
            ConfigError,
            r"got 'embedding_norm'; expected file with.*labels",
        ),
        (QUALITY, {"DATALOADER.NUM_INSTANCE": 1, "SOLVER.IMS_PER_BATCH": 4}, ConfigError, "at least 2, one from each"),
        (BALANCED, {"QUALITY.BALANCE.EDGES": "widths"}, ConfigError, r"EDGES\): got 'widths'\. Did you mean 'width'"),
        (BALANCED, {"QUALITY.BALANCE.BINS": 0}, ConfigError, r"BINS\): got 0; expected at least 2"),
    ],
)
def test_mistakes_are_refused(
    tmp_path: Path, labels: Path, sampler: str, overrides: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        batches(sampler_cfg(tmp_path, sampler, **{"QUALITY.FILES": (str(labels),), **overrides}), 1)


def test_training_sets_of_the_callers_get_the_samplers_too(tmp_path: Path, labels: Path) -> None:
    from fastreid.data import build_reid_train_loader
    from fastreid.data.common import CommDataset

    cfg = sampler_cfg(tmp_path, QUALITY, **{"SEED": 3, "QUALITY.FILES": (str(labels),)})
    own = CommDataset(datasets.training_set(cfg, "Market1501")[1], lambda image: torch.zeros(1))
    loader = build_reid_train_loader(cfg, train_set=own)
    paths = [[Path(path).name for path in batch["img_paths"]] for batch in islice(loader, 4)]
    assert paths == batches(cfg, 4)
    cfg.DATALOADER.SAMPLER_TRAIN = "QualitySampler"
    with pytest.raises(RegistryError, match="Did you mean 'QualityIdentitySampler'"):
        build_reid_train_loader(cfg, train_set=own)


@pytest.mark.parametrize("sampler", [QUALITY, BALANCED])
def test_ranks_share_the_identities_of_a_step(
    tmp_path: Path, labels: Path, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = sampler_cfg(tmp_path, sampler, **{"SEED": 3, "QUALITY.FILES": (str(labels),), "QUALITY.BALANCE.BINS": 4})
    _, items = datasets.training_set(cfg, "Market1501")
    monkeypatch.setattr(samplers, "world_size", lambda: 2)
    streams = []
    for rank in (0, 1):
        monkeypatch.setattr(samplers, "rank", lambda rank=rank: rank)
        streams.append(samplers.build_sampler(cfg, items, [0] * len(items)))
    for step in range(10):
        owners = [Counter(items[index][1] for index in stream.batch(step)) for stream in streams]
        assert [set(owner.values()) for owner in owners] == [{4}, {4}]
        assert owners[0].keys().isdisjoint(owners[1])


def test_two_sets_are_balanced_each_over_its_own_labels(tmp_path: Path, scores: dict[str, float]) -> None:
    values = np.array(list(scores.values()))
    crops = tmp_path / "crops"
    for name in scores:
        for folder in ("train", "query", "gallery"):
            (crops / folder / f"9{name[:4]}").mkdir(parents=True, exist_ok=True)
        (crops / "train" / f"9{name[:4]}" / name).touch()
        for folder in ("query", "gallery"):
            (crops / folder / f"9{name[:4]}" / f"{folder}_{name}").touch()
    keys = tuple(f"ReIDFolder/train/9{name[:4]}/{name}" for name in scores)
    header = {"dataset": "ReIDFolder", "scale": "none"}
    low = QualityLabels(values / 1000, values, np.zeros(64), keys, header)  # far below the other set's labels
    low.save(tmp_path / "low.npz")
    files = (str(save(scores, tmp_path / "labels.npz")), str(tmp_path / "low.npz"))
    keys_of_run = {"DATASETS.NAMES": ("Market1501", "ReIDFolder"), "DATA.FOLDER": str(crops), "QUALITY.FILES": files}
    more = {"QUALITY.SCALE": "none", "QUALITY.BALANCE.BINS": 2, "SOLVER.IMS_PER_BATCH": 32, "SEED": 0}
    cfg = sampler_cfg(tmp_path, BALANCED, **keys_of_run, **more)
    (_, first), (_, second) = (datasets.training_set(cfg, name) for name in cfg.DATASETS.NAMES)
    items = [*first, *second]
    sampler = samplers.build_sampler(cfg, items, [0] * 64 + [1] * 64)
    for step in range(20):
        shown = [(index // 64, scores[Path(items[index][0]).name] > 50) for index in sampler.batch(step)]
        counts = Counter(shown)
        assert all(counts[which, True] == counts[which, False] for which in (0, 1))


def test_registry_lists_host_and_plugin_samplers() -> None:
    names = registries.registered_names()["DATALOADER.SAMPLER_TRAIN"]
    assert names == {
        "BalancedIdentitySampler": False,
        "ImbalancedDatasetSampler": False,
        "NaiveIdentitySampler": False,
        BALANCED: True,
        QUALITY: True,
        SEEDED: True,
        IDENTITIES: True,
        WEIGHTED: True,
        "TrainingSampler": False,
    }


def test_host_knows_the_names_said_to_be_its_own(tmp_path: Path) -> None:
    for name in samplers.HOST_SAMPLERS:
        assert len(batches(sampler_cfg(tmp_path, name), 1)[0]) == 16


def test_recipe_trains_its_baseline_without_labels_and_its_control_with_the_same_sampler(
    tmp_path: Path, labels: Path
) -> None:
    overrides = {
        "MODEL.META_ARCHITECTURE": "QSD",
        "QUALITY.FILES": (str(labels),),
        "RECIPE.NAME": "qsd",
        "RECIPE.CONTROL": True,
    }
    stages = {stage.name: stage for stage in recipes.build_recipe(sampler_cfg(tmp_path, QUALITY, **overrides), None)}
    key = "DATALOADER.SAMPLER_TRAIN"
    assert [stages[name].keys[key] for name in ("baseline", "control", "qsd")] == [
        "NaiveIdentitySampler",
        QUALITY,
        QUALITY,
    ]
    assert labels in stages["control"].inputs
    assert not any(name.startswith("QSD.") for name in stages["control"].keys)
    plain = {stage.name: stage for stage in recipes.build_recipe(sampler_cfg(tmp_path, WEIGHTED, **overrides), None)}
    assert plain["baseline"].keys[key] == WEIGHTED
    assert labels not in plain["control"].inputs
    with pytest.raises(ConfigError, match="QualityIdentitySampler, which chooses images before"):
        recipes.build_recipe(sampler_cfg(tmp_path, QUALITY, **{**overrides, "QUALITY.SOURCE": "embedding_norm"}), None)


# Seeded in all that an image goes through.

AUGMENTED: dict[str, Any] = {f"INPUT.{name}.ENABLED": True for name in ("FLIP", "PADDING", "REA", "CJ", "AUTOAUG")}


def pictures(cfg: Any, count: int, *, first: int = 0, **options: Any) -> list[torch.Tensor]:
    """The images of ``count`` batches from the step ``first`` on."""
    from fastreid.data import build_reid_train_loader

    loader = build_reid_train_loader(cfg, **options)
    sampler_state.sampler_of(loader).step = first
    return [batch["images"] for batch in islice(loader, count)]


@pytest.mark.parametrize("sampler", [SEEDED, IDENTITIES])
def test_augmentation_is_that_of_the_draw_for_any_number_of_workers_and_from_any_step(
    tmp_path: Path, sampler: str
) -> None:
    from fastreid.data.transforms import build_transforms

    cfg = sampler_cfg(tmp_path, sampler, **AUGMENTED, SEED=3)
    torch.manual_seed(7)
    whole = torch.stack(pictures(cfg, 6))
    after = torch.rand(1)
    torch.manual_seed(7)
    pictures(cfg, 1)
    assert torch.equal(torch.rand(1), after)  # images draw nothing from the stream of the process that loads them
    cfg.DATALOADER.NUM_WORKERS = 2
    assert torch.equal(torch.stack(pictures(cfg, 6)), whole)
    assert torch.equal(torch.stack(pictures(cfg, 2, first=4)), whole[4:])
    cfg.SEED = 4
    assert not torch.equal(torch.stack(pictures(cfg, 6)), whole)
    # Transforms of the caller's are seeded as well.
    own = build_transforms(cfg, is_train=True)
    again = torch.stack(pictures(cfg, 6, transforms=own))
    assert torch.equal(torch.stack(pictures(cfg, 2, first=4, transforms=own)), again[4:])


def test_partners_are_augmented_on_their_own_and_seeded_too(tmp_path: Path) -> None:
    from fastreid.data import build_reid_train_loader

    keys = {"MODEL.META_ARCHITECTURE": "QSD", "QSD.PAIRING": "partner", "SEED": 3, "INPUT.FLIP.ENABLED": True}
    cfg = sampler_cfg(tmp_path, SEEDED, **keys)
    found = []
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        found.append([*islice(build_reid_train_loader(cfg), 4)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["partner_images"], other["partner_images"])
    plain = {**keys, "INPUT.FLIP.ENABLED": False}
    still = [*islice(build_reid_train_loader(sampler_cfg(tmp_path, SEEDED, **plain)), 4)]
    mirrored = [
        torch.cat([(one[key] != other[key]).flatten(1).any(1) for one, other in zip(found[0], still, strict=True)])
        for key in ("images", "partner_images")
    ]
    assert not torch.equal(*mirrored)  # QSD.PAIR_FLIP independent


def test_live_and_cached_teachers_see_the_same_mirrored_images(tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid import cached_features, pair_views

    cfg = sampler_cfg(tmp_path, SEEDED, **{"INPUT.FLIP.ENABLED": True, "SEED": 3})
    still = sampler_cfg(tmp_path, SEEDED, **{"INPUT.FLIP.ENABLED": False, "SEED": 3})
    shown, plain = torch.cat(pictures(cfg, 4)), torch.cat(pictures(still, 4))
    views = cached_features.drawn_flips(cfg, None)
    assert isinstance(views, pair_views.PairViews)
    flips = torch.tensor([views.mirrors(draw, 0) for draw in range(len(plain))])
    assert 0 < flips.sum() < len(flips)
    assert torch.equal(shown, torch.where(flips[:, None, None, None], plain.flip(3), plain))


def test_precise_bn_draws_with_the_seeded_sampler_itself(tmp_path: Path) -> None:
    from fastreid.engine.hooks import PreciseBN

    precise = {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.DATASET": "Market1501"}
    running, _ = trainer(sampler_cfg(tmp_path, SEEDED, **precise))
    (hook,) = (hook for hook in running._hooks if isinstance(hook, PreciseBN))
    own, other = (sampler_state.sampler_of(loader) for loader in (running._trainer.data_loader, hook._data_loader))
    assert type(own) is type(other)
    assert own is not other


# Continued by --resume.


class PowerCutError(Exception):
    """Ends a training in the middle of an epoch."""


def trainer(cfg: Any, *, cut_at: int | None = None, learn: bool = False) -> tuple[Any, list[Any]]:
    """A host trainer, and the list that it writes each step's images (and partners) to; learns nothing by default."""
    from fastreid.engine import DefaultTrainer

    running = DefaultTrainer(cfg)
    running.test = lambda cfg, model: {}  # evaluation is not what is tested
    seen: list[Any] = []
    loop, host_step = running._trainer, running._trainer.run_step
    host_forward = loop.model.forward

    def watch(batch: dict[str, Any]) -> None:
        if len(seen) == cut_at:
            raise PowerCutError
        seen.append((batch["img_paths"], batch.get("partner_paths")))

    def forward(batch: dict[str, Any]) -> Any:
        if loop.model.training:
            watch(batch)
        return host_forward(batch)

    if learn:
        loop.model.forward = forward
    loop.run_step = host_step if learn else lambda: watch(next(loop._data_loader_iter))
    return running, seen


def train(cfg: Any, *, resume: bool, **options: Any) -> list[Any]:
    running, seen = trainer(cfg, **options)
    running.resume_or_load(resume=resume)
    running.train()
    return seen


@pytest.mark.parametrize(
    ("sampler", "overrides"),
    [
        (QUALITY, {"DATALOADER.NUM_WORKERS": 2, "SEED": 5}),
        (BALANCED, {"QUALITY.BALANCE.BINS": 4}),  # SEED -1: another one each run, unless the checkpoint brings it
        (WEIGHTED, {}),
        (SEEDED, {"DATALOADER.NUM_WORKERS": 2}),
        (IDENTITIES, {"DATALOADER.NUM_WORKERS": 2}),
    ],
)
def test_resumed_training_sees_the_batches_of_the_uninterrupted_one(
    tmp_path: Path, labels: Path, sampler: str, overrides: dict[str, Any]
) -> None:
    cfg = sampler_cfg(tmp_path, sampler, **{"QUALITY.FILES": (str(labels),), "SOLVER.MAX_EPOCH": 3, **overrides})
    whole = train(cfg, resume=False)
    assert len(whole) == 3 * STEPS
    assert len({tuple(paths) for paths, _ in whole}) == 3 * STEPS
    for epoch in (0, 1):
        stored = torch.load(tmp_path / "out" / f"model_{epoch:04d}.pth", weights_only=True)
        assert stored["sampler"]["step"] == (epoch + 1) * STEPS
        (tmp_path / "out" / "last_checkpoint").write_text(f"model_{epoch:04d}.pth")
        assert train(cfg, resume=True) == whole[(epoch + 1) * STEPS :]


@pytest.mark.parametrize("cut_at", [2, STEPS + 1])
def test_interrupted_epoch_sees_its_batches_again(tmp_path: Path, labels: Path, cut_at: int) -> None:
    keys = {"QUALITY.FILES": (str(labels),), "SOLVER.MAX_EPOCH": 2}
    whole = train(sampler_cfg(tmp_path / "whole", QUALITY, SEED=7, **keys), resume=False)
    with pytest.raises(PowerCutError):
        train(sampler_cfg(tmp_path / "cut", QUALITY, SEED=7, **keys), resume=False, cut_at=cut_at)
    # The stored seed counts, not the one in the config.
    again = train(sampler_cfg(tmp_path / "cut", QUALITY, SEED=8, **keys), resume=True)
    assert again == whole[cut_at // STEPS * STEPS :]
    assert train(sampler_cfg(tmp_path / "other", QUALITY, SEED=8, **keys), resume=False) != whole


def test_partners_go_on_with_the_anchors(tmp_path: Path, labels: Path) -> None:
    keys = {"MODEL.META_ARCHITECTURE": "QSD", "QSD.PAIRING": "partner", "QUALITY.FILES": (str(labels),)}
    cfg = sampler_cfg(tmp_path, QUALITY, **keys, **{"SOLVER.MAX_EPOCH": 2})
    whole = train(cfg, resume=False)
    assert all(len(partners) == 16 for _, partners in whole)
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000.pth")
    assert train(cfg, resume=True) == whole[STEPS:]


def test_qsd_trains_on_blocks_with_a_gap_in_each_and_is_resumed(
    tmp_path: Path, labels: Path, scores: dict[str, float]
) -> None:
    keys = {"MODEL.META_ARCHITECTURE": "QSD", "QUALITY.FILES": (str(labels),), "SOLVER.MAX_EPOCH": 2}
    cfg = sampler_cfg(tmp_path, QUALITY, **keys, **{"INPUT.SIZE_TRAIN": [32, 16], "INPUT.SIZE_TEST": [32, 16]})
    running, whole = trainer(cfg, learn=True)
    assert running.model._qsd_block == 4
    running.train()
    assert len(whole) == 2 * STEPS
    for paths, _ in whole:
        labels_of_batch = np.array([scores[Path(path).name] for path in paths]).reshape(4, 4)
        assert (labels_of_batch[:, :2].min(axis=1) > labels_of_batch[:, 2:].max(axis=1)).all()
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000.pth")
    assert train(cfg, resume=True, learn=True) == whole[STEPS:]


def test_checkpoint_of_another_sampler_goes_on_at_its_epoch(tmp_path: Path, labels: Path) -> None:
    keys = {"QUALITY.FILES": (str(labels),), "SOLVER.MAX_EPOCH": 2, "SEED": 5}
    train(sampler_cfg(tmp_path, "NaiveIdentitySampler", **keys), resume=False)
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000.pth")
    whole = train(sampler_cfg(tmp_path / "new", QUALITY, **keys), resume=False)
    assert train(sampler_cfg(tmp_path, QUALITY, **keys), resume=True) == whole[STEPS:]


def test_precise_bn_draws_without_labels(tmp_path: Path, labels: Path) -> None:
    from fastreid.engine.hooks import PreciseBN

    precise = {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.DATASET": "Market1501"}
    missing = {"QUALITY.FILES": (str(labels),), "DATASETS.NAMES": ("Market1501",)}
    running, _ = trainer(sampler_cfg(tmp_path, QUALITY, **precise, **missing))
    (hook,) = (hook for hook in running._hooks if isinstance(hook, PreciseBN))
    assert sampler_state.sampler_of(hook._data_loader) is None
    assert running.cfg.DATALOADER.SAMPLER_TRAIN == QUALITY
    assert sampler_state.sampler_of(running._trainer.data_loader) is not None


def test_loader_that_reads_ahead_in_a_thread_is_stopped_before_it_starts_again(tmp_path: Path, labels: Path) -> None:
    sampler = samplers.build_sampler(
        cfg := sampler_cfg(tmp_path, WEIGHTED), datasets.training_set(cfg, "Market1501")[1], []
    )
    calls: list[str] = []

    class Threaded:
        def __iter__(self) -> Any:
            calls.append(f"start at {sampler.step}")
            return iter(())

        def shutdown(self) -> None:
            calls.append("stop")

    hook = sampler_state.SamplerHook(sampler)
    loop = types.SimpleNamespace(data_loader=Threaded(), _data_loader_iter=None)
    hook.trainer = types.SimpleNamespace(_trainer=loop, start_iter=0)
    hook.before_train()
    assert calls == []
    hook.trainer.start_iter = 12
    hook.before_train()
    assert calls == ["stop", "start at 12"]
