"""Person test sets with degraded queries against queries degraded, embedded and ranked by hand."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.degradations.levels import parse_levels
from qsd_plugin.evaluation.retrieval import rank
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import datasets, face_tests, recipes
from qsd_plugin.report.per_trial import PerTrial

host.activate()

LEVELS = ("lowres-0.25", "darkness-1", "blur-0.8", "compression-0.9")


class Pooled(torch.nn.Module):
    """Embeds an image as 8 x 4 mean colours around the middle grey, and counts images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen += len(batch["images"])
        return torch.nn.functional.adaptive_avg_pool2d(batch["images"] - 127.5, (8, 4)).flatten(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    write_market(folder / "data", num_ids=2, per_id=2, test_ids=6)
    return folder


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, folder / "data")


def config(folder: Path, **options: Any) -> Any:
    shared = {"EVALUATION.MIXED.LEVELS": LEVELS, "DATASETS.TESTS": ("Market1501Mixed",)}
    return toy_cfg(folder / "out", **{**shared, **options})


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> tuple[dict[str, float], int, PerTrial]:
    from fastreid.engine import DefaultTrainer

    model = Pooled()
    with pytest.MonkeyPatch.context() as patch:
        use_market(patch, folder / "data")
        cfg = config(folder)
        numbers = dict(DefaultTrainer.test(cfg, model))
        test = face_tests.build_test(cfg, "Market1501Mixed")
    size = tuple(cfg.INPUT.SIZE_TEST)
    images = [pixels(test.read(index), size) for index in range(len(test.names))]
    return numbers, model.seen, test.trials(embed(images))


def pixels(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC))


def embed(images: list[np.ndarray]) -> torch.Tensor:
    return Pooled()({"images": torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2)})


def by_hand(folder: Path, text: str) -> Any:
    """The ranking with queries at one level, ``clean`` included, and a gallery as it is."""
    cfg = config(folder)
    _, query, gallery = datasets.test_set(cfg, "Market1501")
    size = tuple(cfg.INPUT.SIZE_TEST)
    shown = [np.asarray(Image.open(path).convert("RGB")) for path, _, _ in query]
    if text != "clean":
        (level,) = parse_levels([text])
        shown = [level.apply(image, seed=0, index=index)[0] for index, image in enumerate(shown)]
    queries = embed([pixels(Image.fromarray(image), size) for image in shown])
    others = embed([pixels(Image.open(path).convert("RGB"), size) for path, _, _ in gallery])
    (query_ids, query_cams), (ids, cams) = ([[item[k] for item in side] for k in (1, 2)] for side in (query, gallery))
    return rank(queries, others, query_ids, ids, query_cams, cams, metric=cfg.TEST.METRIC)


def test_the_gallery_is_embedded_once_and_every_query_once_per_quality(
    folder: Path, evaluated: tuple[dict[str, float], int, PerTrial]
) -> None:
    _, query, gallery = datasets.test_set(config(folder), "Market1501")
    assert evaluated[1] == len(query) * (1 + len(LEVELS)) + len(gallery)


@pytest.mark.parametrize("text", ["clean", *LEVELS])
def test_numbers_and_trials_are_those_by_hand(
    text: str, folder: Path, evaluated: tuple[dict[str, float], int, PerTrial]
) -> None:
    numbers, _, trials = evaluated
    result = by_hand(folder, text)
    for key, value in (("mAP", result.mAP), ("Rank-1", result.cmc[0]), ("mINP", result.mINP)):
        assert numbers[f"{text}/{key}"] == pytest.approx(100 * value, abs=1e-4)
    place = trials.metric_names.index(f"{text}/mAP")
    np.testing.assert_allclose(trials.values[:, place], 100 * result.ap, rtol=1e-5)
    np.testing.assert_array_equal(trials.values[:, place + 1], 100.0 * (result.first_hit == 1))


def test_the_mean_over_levels_is_what_verdicts_are_about(
    folder: Path, evaluated: tuple[dict[str, float], int, PerTrial]
) -> None:
    numbers, _, trials = evaluated
    assert trials.primary == "mixed/mAP"
    columns = [trials.metric_names.index(f"{text}/mAP") for text in LEVELS]
    np.testing.assert_allclose(trials.values[:, 0], trials.values[:, columns].mean(axis=1))
    # Degradation must matter here, or the test above would compare equal things.
    assert len({round(numbers[f"{text}/mAP"], 6) for text in ("clean", *LEVELS)}) > 3
    assert all(name.startswith("query/") for name in trials.query.tolist())
    table = (folder / "out" / "evaluation" / "Market1501Mixed.md").read_text()
    assert table.splitlines()[0].split("|")[1:3] == [table.splitlines()[0].split("|")[1], " Rank-1   "]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["clean", *LEVELS]


def test_levels_decide_whether_a_finished_evaluation_counts(folder: Path) -> None:
    assert recipes.evaluation_keys(config(folder))["EVALUATION.MIXED.LEVELS"] == LEVELS
    assert recipes.evaluation_keys(config(folder, **{"DATASETS.TESTS": ("Market1501",)})) == {}


def test_loader_processes_can_be_sent_the_images(folder: Path) -> None:
    test = face_tests.build_test(config(folder), "Market1501Mixed")
    again = pickle.loads(pickle.dumps(test.read))
    last = len(test.names) - 1
    assert test.names[last].endswith(f"at {LEVELS[-1]}")
    assert np.array_equal(np.asarray(again(last)), np.asarray(test.read(last)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"EVALUATION.MIXED.LEVELS": ("blurr-1",)}, "Degradation of a level: got 'blurr-1'. Did you mean 'blur'"),
        ({"EVALUATION.MIXED.LEVELS": ("dil_res-1",)}, "Degradation of a level"),
        ({"EVALUATION.MIXED.SEED": -1}, "EVALUATION.MIXED.SEED: got -1"),
        ({"TEST.RERANK.ENABLED": True}, "TEST.RERANK.ENABLED: got True; expected False with the test set Market1501M"),
    ],
)
def test_what_cannot_be_done_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        face_tests.build_test(config(folder, **options), "Market1501Mixed")
