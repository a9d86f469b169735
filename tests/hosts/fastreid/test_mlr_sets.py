"""Sets of two resolutions in fast-reid: found by any of their names, evaluated as papers do, paired by DIL."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dil_toy import ROWS, dil_cfg
from PIL import Image
from torch import Tensor, nn
from toy import toy_cfg, use_market, write_market

sys.path.insert(0, str(Path(__file__).parents[2] / "data_sets"))

from mlr_toy import caviar, cuhk03, market, viper, write

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.mlr import MLRSettings, build_mlr
from qsd_plugin.data.mlr_folders import read_rates
from qsd_plugin.evaluation.retrieval import rank
from qsd_plugin.evaluation.single_shot import rank_single_shot
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.datasets import dataset_folder, training_set
from qsd_plugin.hosts.fastreid.dil_pairs import PairDraws
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import schedule_of
from qsd_plugin.hosts.fastreid.report import load_test
from qsd_plugin.model_zoo import get_config_file
from qsd_plugin.report.per_query import quality_groups
from qsd_plugin.report.per_trial import PerTrial

host.activate()


class Thumbnails(nn.Module):
    """A network that sees eight grey values."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return F.adaptive_avg_pool2d(batch["images"].float().mean(dim=1, keepdim=True), (4, 2)).flatten(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four sets, each under one of its names."""
    root = tmp_path_factory.mktemp("mlr")
    tested = MLRSettings(test_people=3)
    build_mlr(market(root / "Market", each=4), root / "mlr_market", MLRSettings())
    build_mlr(cuhk03(root / "cuhk03", people=8), root / "MLR_CUHK03", tested)
    build_mlr(viper(root / "VIPeR"), root / "MLR-VIPeR", tested)
    build_mlr(caviar(root / "CAVIARa"), root / "caviar", MLRSettings(test_people=2))
    return root


def config(root: Path, out: Path, **keys: Any) -> Any:
    return toy_cfg(out, **{"DATA.ROOT": str(root), **keys})


def evaluated(cfg: Any, name: str) -> dict[str, float]:
    from fastreid.engine import DefaultTrainer
    from fastreid.evaluation import inference_on_dataset

    loader, evaluator = DefaultTrainer.build_evaluator(cfg, name)
    return dict(inference_on_dataset(Thumbnails(), loader, evaluator))


def embedded(cfg: Any, name: str) -> tuple[Any, ...]:
    """Embeddings and labels of a test set, one image after the other."""
    from fastreid.data.transforms import build_transforms

    _, query, gallery = datasets.test_set(cfg, name)
    transform = build_transforms(cfg, is_train=False)
    sides = [
        torch.cat([Thumbnails()({"images": transform(Image.open(path))[None]}) for path, _, _ in items])
        for items in (query, gallery)
    ]
    columns = [[item[column] for item in items] for column in (1, 2) for items in (query, gallery)]
    return (*sides, *(np.array(column) for column in columns)), [path for path, _, _ in query]


@pytest.mark.parametrize("name", ["MLRMarket1501", "MLRCUHK03", "MLRVIPeR", "CAVIAR"])
def test_the_degraded_domain_is_camera_0(root: Path, tmp_path: Path, name: str) -> None:
    cfg = config(root, tmp_path)
    _, train = training_set(cfg, name)
    folder = dataset_folder(cfg, name)
    rates = read_rates(folder)
    for path, _, camera in train:
        assert (camera == f"{name.lower()}_0") == (rates[Path(path).relative_to(folder).as_posix()] != 1)
    _, query, gallery = datasets.test_set(cfg, name)
    assert {camera for _, _, camera in query} == {0}
    assert 0 not in {camera for _, _, camera in gallery}


def test_a_missing_set_says_how_it_is_made(tmp_path: Path) -> None:
    message = r"Data set MLRVIPeR: got 'none of mlr_viper, MLR-VIPeR, MLR_VIPeR'.*build_data.py mlr SOURCE .*mlr_viper"
    with pytest.raises(DataError, match=message):
        training_set(config(tmp_path, tmp_path / "out"), "MLRVIPeR")
    write(tmp_path, "mlr_viper/a.jpg", "MLR_VIPeR/a.jpg")
    with pytest.raises(DataError, match=r"got \['mlr_viper', 'MLR_VIPeR'\]; expected one of these"):
        training_set(config(tmp_path, tmp_path / "out"), "MLRVIPeR")


@pytest.mark.parametrize("draws", [0, 3])
def test_single_shot_is_the_default_where_papers_have_it(root: Path, tmp_path: Path, draws: int) -> None:
    cfg = config(root, tmp_path, **{"TEST.SINGLE_SHOT.DRAWS": draws})
    found = evaluated(cfg, "MLRCUHK03")
    inputs, paths = embedded(cfg, "MLRCUHK03")
    expected, whole = rank_single_shot(*inputs, draws=draws, seed=0), rank(*inputs)
    assert found["Rank-1"] == pytest.approx(100 * expected.cmc[0])
    assert found["Rank-5"] == pytest.approx(100 * expected.cmc[:5][-1])
    assert found["MRR"] == pytest.approx(100 * expected.mean_reciprocal)
    assert found["mAP"] == pytest.approx(100 * whole.mAP)
    assert found["metric"] == pytest.approx((found["Rank-1"] + found["MRR"]) / 2)
    rates = read_rates(root / "MLR_CUHK03")
    own = np.array([rates[Path(path).relative_to(root / "MLR_CUHK03").as_posix()] for path in paths])
    for rate in np.unique(own):
        rows = own == rate
        assert found[f"rate {rate}/MRR"] == pytest.approx(100 * expected.reciprocal[rows].mean())
        assert found[f"rate {rate}/Rank-1"] == pytest.approx(100 * expected.hits[rows, 0].mean())
    stored = json.loads((tmp_path / "evaluation" / "MLRCUHK03.json").read_text())
    assert stored["numbers"] == pytest.approx(found)
    assert stored["whole_gallery"]["Rank-1"] == pytest.approx(100 * whole.cmc[0])
    assert stored["definitions"]["MRR"].endswith("what papers with this protocol call mAP")
    assert stored["draws"] == (draws or "exact expectation")
    assert stored["queries"]["all"] == len(own) == sum(stored["queries"].values()) / 2
    assert stored["set"]["manifest_sha256"] == json.loads((root / "MLR_CUHK03/mlr.json").read_text())["manifest_sha256"]
    assert "| rate 2 " in (tmp_path / "evaluation" / "MLRCUHK03.md").read_text()
    trials = PerTrial.load(tmp_path / "evaluation" / "MLRCUHK03_per_trial.npz")
    assert (trials.metric_names, trials.primary) == (("MRR", "rank1", "mAP"), "MRR")
    np.testing.assert_allclose(trials.metrics()[:, 0], 100 * expected.reciprocal)
    np.testing.assert_allclose(trials.metrics()[:, 2], 100 * whole.ap)
    np.testing.assert_array_equal(trials.quality, -own)
    assert [Path(name).name for name in trials.query] == [Path(path).name for path in paths]


def test_market_is_compared_with_the_whole_gallery_as_the_host_does_it(root: Path, tmp_path: Path) -> None:
    from fastreid.engine import DefaultTrainer
    from fastreid.evaluation import ReidEvaluator, inference_on_dataset

    cfg = config(root, tmp_path)
    found = evaluated(cfg, "MLRMarket1501")
    loader, count = DefaultTrainer.build_test_loader(cfg, "MLRMarket1501")
    plain = inference_on_dataset(Thumbnails(), loader, ReidEvaluator(cfg, count))
    for key in ("Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "metric"):
        assert found[key] == pytest.approx(plain[key]), key
    assert "MRR" not in found
    weights = np.array(
        [
            json.loads((tmp_path / "evaluation/MLRMarket1501.json").read_text())["queries"][f"rate {rate}"]
            for rate in (2, 3, 4)
        ]
    )
    parts = np.array([found[f"rate {rate}/mAP"] for rate in (2, 3, 4)])
    assert (weights * parts).sum() / weights.sum() == pytest.approx(found["mAP"])


def test_the_protocol_can_be_chosen_for_any_set(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_market(tmp_path / "data")
    use_market(monkeypatch, tmp_path / "data")
    cfg = toy_cfg(tmp_path / "out", **{"TEST.GALLERY": "single"})
    found = evaluated(cfg, "Market1501")
    inputs, _ = embedded(cfg, "Market1501")
    assert found["MRR"] == pytest.approx(100 * rank_single_shot(*inputs).mean_reciprocal)
    assert not any("/" in name for name in found)
    assert PerTrial.load(tmp_path / "out/evaluation/Market1501_per_trial.npz").groups().keys() == {"all"}
    whole = config(root, tmp_path / "other", **{"TEST.GALLERY": "all"})
    assert "MRR" not in evaluated(whole, "MLRVIPeR")
    whole.TEST.GALLERY = "one"
    with pytest.raises(ConfigError, match=r"TEST.GALLERY: got 'one'; expected auto or all or single"):
        evaluated(whole, "MLRVIPeR")


def test_caviar_has_no_rates(root: Path, tmp_path: Path) -> None:
    found = evaluated(config(root, tmp_path), "CAVIAR")
    assert found["MRR"] > 0
    assert not any("/" in name for name in found)


def test_reports_group_the_queries_by_rate(root: Path, tmp_path: Path) -> None:
    test = load_test(config(root, tmp_path), "MLRMarket1501")
    assert test.quality_name == "how little the query was shrunk (minus its rate)"
    groups = quality_groups(test.quality)
    assert [set(test.quality[rows]) for rows in groups.values()] == [{-4, -3, -2}, {-4}, {-3}, {-2}]


CAMERAS = ["mlrcuhk03_0", "mlrcuhk03_0", "mlrcuhk03_1", "market1501_0"]


def test_dil_takes_the_domain_from_the_data_set(tmp_path: Path) -> None:
    names = {"DATASETS.NAMES": ("MLRCUHK03", "Market1501")}
    cfg = dil_cfg(tmp_path, **names)
    assert schedule_of(cfg).other == "unpaired"
    draws = PairDraws(CAMERAS, cfg)
    for draw in range(12 * ROWS):
        better, worse = draws.pair(draw % 4, draw)
        assert better in (2, 3), "cameras of another set that have the same number are clean"
        assert worse == better if draws.iteration(draw) % 2 else worse in (0, 1)
    assert schedule_of(dil_cfg(tmp_path)).other == "unsupervised"
    assert schedule_of(dil_cfg(tmp_path, **names, **{"DIL.PAIRS.OTHER": "unsupervised"})).other == "unsupervised"
    assert schedule_of(dil_cfg(tmp_path, **{"DIL.PAIRS.DEGRADED_CAMERAS": [1]})).other == "unpaired"
    chosen = PairDraws(CAMERAS, dil_cfg(tmp_path, **names, **{"DIL.PAIRS.DEGRADED_CAMERAS": [1]}))
    assert chosen.pair(0, ROWS) == (0, 2)


def test_dil_needs_images_of_both_domains(tmp_path: Path) -> None:
    for cameras in (CAMERAS[:2], CAMERAS[2:]):
        with pytest.raises(ConfigError, match=r"got \['mlrcuhk03_0'\]; expected images of both domains"):
            PairDraws(cameras, dil_cfg(tmp_path, **{"DATASETS.NAMES": ("MLRCUHK03",)}))


@pytest.mark.parametrize("name", ["mlr_market", "mlr_cuhk03", "mlr_market_small"])
def test_shipped_configs_need_no_key_for_the_domain(root: Path, tmp_path: Path, name: str) -> None:
    from fastreid.config import get_cfg

    from qsd_plugin.hosts.fastreid.recipes_dil import stage1_config

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(f"DIL/{name}.yml"))
    cfg.DATA.ROOT = str(root)
    first = stage1_config(cfg, tmp_path)
    cameras = [camera for _, _, camera in training_set(cfg, cfg.DATASETS.NAMES[0])[1]]
    draws = PairDraws(cameras, first)
    assert draws.schedule.other == "unpaired"
    better, worse = draws.pair(0, first.SOLVER.IMS_PER_BATCH)
    assert cameras[worse].endswith("_0")
    assert not cameras[better].endswith("_0")
