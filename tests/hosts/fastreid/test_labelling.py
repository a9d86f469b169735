"""Labels inside fast-reid: cross-fitting, refreshing in training, norms, spread, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import ConfigError, LabelError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.quality import QualityLabels

host.activate()

from qsd_plugin.hosts.fastreid import extract, labelling, recipes, refresh  # noqa: E402 - needs the activated host
from qsd_plugin.hosts.fastreid.datasets import training_set  # noqa: E402
from qsd_plugin.hosts.fastreid.folds import check_folds, fold_of_items, training_part  # noqa: E402
from qsd_plugin.hosts.fastreid.quality import ImageQuality, file_source  # noqa: E402

SMALL = {
    "MODEL.META_ARCHITECTURE": "QSD",
    "MODEL.BACKBONE.PRETRAIN": False,
    "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
    "DATALOADER.NUM_INSTANCE": 4,
    "SOLVER.IMS_PER_BATCH": 8,
    "TEST.EVAL_PERIOD": 0,
    "QUALITY.NEGATIVES": 8,
    "QUALITY.ROUNDS": 3,
    "SEED": 5,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six identities with eight images each."""
    return write_market(tmp_path_factory.mktemp("data"), num_ids=6, per_id=8, test_ids=2)


@pytest.fixture(autouse=True)
def market(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, data)


def small_cfg(folder: Path, **overrides: Any) -> Any:
    return toy_cfg(folder, **{**SMALL, **overrides})


def items_of(cfg: Any) -> list[Any]:
    return training_set(cfg, "Market1501")[1]


def stored_labels(cfg: Any, path: Path, scores: np.ndarray, spread: np.ndarray | None = None) -> str:
    """A label file of the toy set with the given labels; its name for the config."""
    keys = labelling._keys(cfg, "Market1501", items_of(cfg))
    spread = np.full(len(keys), np.nan) if spread is None else spread
    QualityLabels(scores, scores, spread, tuple(keys), {"dataset": "Market1501", "scale": "minmax"}).save(path)
    return str(path)


# Cross-fitting


def test_a_fold_s_identities_are_not_trained_on(tmp_path: Path) -> None:
    from fastreid.data import build_reid_train_loader

    cfg = small_cfg(tmp_path, **{"DATA.FOLDS": 3, "DATA.FOLD": 2})
    items = items_of(cfg)
    fold = fold_of_items(cfg, items, 3)
    assert sorted(np.bincount(fold)[1:]) == [16, 16, 16]
    loader = build_reid_train_loader(cfg)
    assert {path for path, _, _ in loader.dataset.img_items} == {
        path for (path, _, _), own in zip(items, fold, strict=True) if own != 2
    }
    assert loader.dataset.num_classes == 4
    cfg.DATA.FOLD = 0
    assert training_part(cfg, items) == items


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"DATA.FOLD": 1}, r"DATA\.FOLD: got 1; expected 0 \(train on everybody\) to DATA\.FOLDS 0"),
        ({"DATA.FOLD": 4, "DATA.FOLDS": 3}, r"DATA\.FOLD: got 4"),
        ({"DATA.FOLD": 1, "DATA.FOLDS": 4}, r"Folds of 6 identities: got 4; expected 2 to 3"),
    ],
)
def test_impossible_folds_are_refused_when_the_loader_is_built(tmp_path: Path, overrides: Any, message: str) -> None:
    cfg = small_cfg(tmp_path, **overrides)
    with pytest.raises(ConfigError, match=message):
        training_part(cfg, items_of(cfg))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"QUALITY.NEGATIVES": 9},
            r"QUALITY\.FOLDS 3: negatives in fold 1 of Market1501: got 8; expected at least .* 9",
        ),
        ({"SOLVER.IMS_PER_BATCH": 20}, r"QUALITY\.FOLDS 3: identities left to train on: got 4; expected at least 5"),
        (
            {"QUALITY.FILES": ("a.npz",)},
            r"QUALITY\.FOLDS: got 3; expected 0 when QUALITY\.FILES names labels \(a\.npz\)",
        ),
    ],
)
def test_folds_that_would_fail_after_hours_fail_at_once(tmp_path: Path, overrides: Any, message: str) -> None:
    cfg = small_cfg(tmp_path, **{"QUALITY.FOLDS": 3, **overrides})
    with pytest.raises(ConfigError, match=message):
        check_folds(cfg, {"Market1501": items_of(cfg)})
    if "QUALITY.NEGATIVES" in overrides:
        cfg.QUALITY.METHOD = "norm"
        check_folds(cfg, {"Market1501": items_of(cfg)})


def test_recipe_trains_the_folds_before_the_labels_and_notices_changes(tmp_path: Path) -> None:
    options = {"RECIPE.NAME": "qsd", "RECIPE.CONTROL": True}
    plain = {stage.name: stage for stage in recipes.build_recipe(small_cfg(tmp_path, **options), None)}
    assert list(plain) == ["baseline", "labels", "control", "qsd", "report", "deploy"]
    stages = recipes.build_recipe(small_cfg(tmp_path, **options, **{"QUALITY.FOLDS": 2}), None)
    crossed = {stage.name: stage for stage in stages}
    assert list(crossed) == ["baseline", "fold1", "fold2", "labels", "control", "qsd", "report", "deploy"]
    assert crossed["baseline"].keys == plain["baseline"].keys
    assert [crossed[f"fold{k}"].keys["DATA.FOLD"] for k in (1, 2)] == [1, 2]
    differing = {key for key, value in crossed["fold1"].keys.items() if plain["baseline"].keys[key] != value}
    assert differing == {"DATA.FOLD", "DATA.FOLDS"}
    assert [path.parent.name for path in crossed["labels"].inputs] == ["fold1", "fold2"]
    assert crossed["labels"].keys["QUALITY.FOLDS"] == 2 != plain["labels"].keys["QUALITY.FOLDS"]
    assert crossed["report"].inputs == plain["report"].inputs


# Refreshing


def trainer(cfg: Any, *, resume: bool = False) -> Any:
    from fastreid.engine import DefaultTrainer
    from fastreid.utils.env import seed_all_rng

    seed_all_rng(1)
    built = DefaultTrainer(cfg)
    built.resume_or_load(resume=resume)
    return built


def hook_of(running: Any) -> Any:
    (hook,) = [hook for hook in running._hooks if isinstance(hook, refresh.RefreshHook)]
    return hook


def origin(running: Any) -> str:
    """Name of the label file in use."""
    return Path(running.model._qsd_quality.source.labels[0].origin.split()[-1]).name


def start_labels(folder: Path) -> dict[str, Any]:
    cfg = small_cfg(folder)
    return {"QUALITY.FILES": (stored_labels(cfg, folder / "start.npz", np.linspace(5, 95, 48)),)}


def test_labels_are_refreshed_in_training_and_taken_up_again_on_resume(tmp_path: Path) -> None:
    options = {
        **start_labels(tmp_path),
        "QUALITY.REFRESH_EPOCHS": 2,
        "SOLVER.MAX_EPOCH": 4,
        "QUALITY.CONTROL": "reverse",
    }
    running = trainer(small_cfg(tmp_path / "out", **options))
    used = set()
    step = running._trainer.run_step

    def record() -> None:
        step()
        used.add((running.epoch, origin(running)))

    running._trainer.run_step = record
    running.train()
    refreshed = "labels_epoch_002.npz"
    assert sorted(used) == [(0, "start.npz"), (1, "start.npz"), (2, refreshed), (3, refreshed)]
    assert not (tmp_path / "out" / "labels_epoch_004.npz").exists()  # nothing is left to train with them
    made = QualityLabels.load(tmp_path / "out" / refreshed)
    assert made.meta["extractor"] == "the network in training after 2 epochs"
    in_use, _ = running.model._qsd_quality([path for path, _, _ in items_of(running.cfg)], None, torch.device("cpu"))
    np.testing.assert_allclose(in_use.numpy(), 100 - made.score, rtol=1e-5)  # reversed, as the control asks

    # The labels belong to the network as the checkpoint of the same epoch holds it.
    cfg = small_cfg(tmp_path / "eval", **{"MODEL.META_ARCHITECTURE": "Baseline"})
    model = extract.load_model(cfg, tmp_path / "out" / "model_0001.pth")
    again = labelling.label_with(cfg, model, "Market1501", items_of(cfg), extractor="")
    np.testing.assert_allclose(made.score, again.score, atol=1e-3)

    # Interrupted after three epochs: the labels in force are those made after two.
    (tmp_path / "out" / "last_checkpoint").write_text("model_0002.pth")
    resumed = trainer(small_cfg(tmp_path / "out", **options), resume=True)
    resumed.epoch = resumed.start_epoch
    hook_of(resumed).before_epoch()
    assert (resumed.start_epoch, origin(resumed)) == (3, refreshed)
    (tmp_path / "out" / refreshed).unlink()
    with pytest.raises(
        LabelError, match=r"Labels refreshed after epoch 2: got '.*labels_epoch_002\.npz'; expected an ex"
    ):
        hook_of(resumed).before_epoch()

    # Two epochs, and the labels made after the second are gone: the same network makes them again.
    (tmp_path / "out" / "last_checkpoint").write_text("model_0001.pth")
    repeated = trainer(small_cfg(tmp_path / "out", **options), resume=True)
    repeated.epoch = repeated.start_epoch
    hook_of(repeated).before_epoch()
    np.testing.assert_allclose(QualityLabels.load(tmp_path / "out" / refreshed).score, made.score, atol=1e-3)


def test_refreshing_leaves_the_training_alone(tmp_path: Path) -> None:
    """No weight, batch statistic, mode or random stream changes; frozen modules stay in eval mode."""
    import random

    running = trainer(small_cfg(tmp_path / "out", **start_labels(tmp_path), **{"QUALITY.REFRESH_EPOCHS": 1}))
    running.model.backbone.layer1.eval()
    before = {name: value.clone() for name, value in running.model.state_dict().items()}
    modes = {name: module.training for name, module in running.model.named_modules()}
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    hook_of(running)._refresh(1)
    assert (tmp_path / "out" / "labels_epoch_001.npz").is_file()
    assert {name: module.training for name, module in running.model.named_modules()} == modes
    assert False in modes.values()
    assert all(torch.equal(running.model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert np.random.get_state()[1].tolist() == streams[1]  # noqa: NPY002
    assert random.getstate() == streams[2]


def test_refreshed_labels_are_there_before_the_checkpoint(tmp_path: Path) -> None:
    from fastreid.engine.hooks import PeriodicCheckpointer

    running = trainer(small_cfg(tmp_path / "out", **start_labels(tmp_path), **{"QUALITY.REFRESH_EPOCHS": 1}))
    places = {type(hook): place for place, hook in enumerate(running._hooks)}
    assert places[refresh.RefreshHook] < places[PeriodicCheckpointer]
    control = trainer(small_cfg(tmp_path / "c", **{"MODEL.META_ARCHITECTURE": "Baseline", "QUALITY.REFRESH_EPOCHS": 1}))
    assert not [hook for hook in control._hooks if isinstance(hook, refresh.RefreshHook)]


def test_several_data_sets_have_a_file_each(tmp_path: Path) -> None:
    cfg = small_cfg(tmp_path, **{"DATASETS.NAMES": ("Market1501", "DukeMTMC")})
    assert [path.name for path in refresh.refreshed_files(cfg, 12)] == [
        "labels_epoch_012_Market1501.npz",
        "labels_epoch_012_DukeMTMC.npz",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"QUALITY.REFRESH_EPOCHS": -1}, r"REFRESH_EPOCHS: got -1; expected 0 \(never\) or more"),
        (
            {"QUALITY.REFRESH_EPOCHS": 1, "QUALITY.SOURCE": "embedding_norm"},
            r"expected 0 with QUALITY\.SOURCE embedding_",
        ),
        (
            {"QUALITY.REFRESH_EPOCHS": 1, "QUALITY.FOLDS": 2},
            r"expected 0 with QUALITY\.FOLDS 2\..*Choose one of the two",
        ),
        ({"QUALITY.METHOD": "sdd_figa"}, r"QUALITY\.METHOD: got 'sdd_figa'\. Did you mean 'sdd_fiqa'"),
        (
            {"QUALITY.FILES": ("a.npz",), "DATASETS.NAMES": ("Market1501", "DukeMTMC")},
            r"QUALITY\.FILES: got \('a\.npz',\); expected one label file per training set",
        ),
        (
            {"QUALITY.FILES": ("a.npz", "./a.npz"), "DATASETS.NAMES": ("Market1501", "DukeMTMC")},
            r"QUALITY\.FILES names one file for several training sets",
        ),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageQuality(small_cfg(tmp_path, **overrides))


# Labels in use


def test_spread_is_on_the_scale_of_the_labels_and_unknown_elsewhere(tmp_path: Path) -> None:
    cfg = small_cfg(tmp_path)
    file = stored_labels(cfg, tmp_path / "a.npz", np.linspace(5, 95, 48), np.linspace(1, 2, 48))
    paths = [path for path, _, _ in items_of(cfg)]
    device = torch.device("cpu")
    for scale, expected in (("minmax", np.linspace(1, 2, 48)), ("rank", np.full(48, np.nan))):
        quality = ImageQuality(small_cfg(tmp_path, **{"QUALITY.FILES": (file,), "QUALITY.SCALE": scale}))
        spread = quality.spread(paths, device)
        assert (spread.dtype, spread.shape) == (torch.float32, (48,))
        np.testing.assert_allclose(spread.numpy(), expected, rtol=1e-6)
    norm = ImageQuality(small_cfg(tmp_path, **{"QUALITY.SOURCE": "embedding_norm"}))
    assert norm.spread(paths, device).isnan().all()


def test_equal_labels_stop_training_and_odd_ones_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)
    cfg = small_cfg(tmp_path)
    equal = stored_labels(cfg, tmp_path / "equal.npz", np.full(48, 7.0))
    with pytest.raises(LabelError, match=r"equal\.npz: all 48 labels are equal: got 7\.0"):
        file_source(small_cfg(tmp_path, **{"QUALITY.FILES": (equal,)}))
    unit = stored_labels(cfg, tmp_path / "unit.npz", np.linspace(0.1, 0.9, 48))
    file_source(small_cfg(tmp_path, **{"QUALITY.FILES": (unit,)}))
    assert "The labels span 0.1 to 0.9 of a scale from 0 to 100" in caplog.text


def test_norm_labels_are_the_norms_before_the_neck(tmp_path: Path) -> None:
    from fastreid.modeling.meta_arch import build_model

    cfg = small_cfg(tmp_path, **{"MODEL.META_ARCHITECTURE": "Baseline", "QUALITY.METHOD": "norm"})
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    model.heads.bottleneck[0].running_var.fill_(9.0)  # a neck that changes the norm
    items = items_of(cfg)[:5]
    labels = labelling.label_with(cfg, model, "Market1501", items, extractor="x")
    images = [extract.embed(cfg, model, [item], tap="heads.pool_layer") for item in items]
    with torch.no_grad():
        batch = {"images": torch.stack([_pixels(item[0]) for item in items])}
        maps = model.backbone(model.preprocess_image(batch))
        pooled = model.heads.pool_layer(maps).flatten(1)
    torch.testing.assert_close(torch.cat(images), pooled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(labels.raw, pooled.norm(dim=1).numpy(), rtol=1e-4)
    assert labels.meta["method"] == "norm"


def _pixels(path: str) -> torch.Tensor:
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float()
