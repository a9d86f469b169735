"""Synthetic faces in the host: items and keys, both test sets against protocols called by hand, and the recipes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from face_toy import SPEC, tiny_faces_keys
from PIL import Image
from toy import toy_cfg

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.face_records import folder_to_records
from qsd_plugin.data.synthetic import load_face_truth
from qsd_plugin.data.synthetic.face_protocols import identification, verification
from qsd_plugin.data.verification_bin import bin_from_pairs
from qsd_plugin.evaluation.identification import closed_set
from qsd_plugin.evaluation.verification import correct_pairs, verify_distances, verify_pairs
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.face_tests import TESTS
from qsd_plugin.quality.labels import QualityLabels

host.activate()

ROOT = Path(__file__).parents[3]
#: One step of eight images per stage, with a network of a few thousand parameters.
FEW_STEPS: dict[str, Any] = {
    "MODEL.BACKBONE.WIDTH": 0.0625,
    "MODEL.BACKBONE.FEAT_DIM": 16,
    "MODEL.BACKBONE.DEPTH": "18x",
    "INPUT.SIZE_TRAIN": [32, 32],
    "INPUT.SIZE_TEST": [32, 32],
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.MAX_EPOCH": 1,
    "RECIPE.BASELINE.MAX_EPOCH": 1,
    "QUALITY.ROUNDS": 2,
    "SEED": 1,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qsd_plugin.data.synthetic import build_faces

    folder = tmp_path_factory.mktemp("cache")
    build_faces(folder, SPEC, workers=1)
    return folder


@pytest.fixture(scope="module")
def faces(cache: Path) -> Path:
    return next(cache.iterdir())


class Pooled(torch.nn.Module):
    """Embeds an image as 4 x 4 mean colours around the middle grey."""

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(batch["images"] - 127.5, 4).flatten(1)


def embed(faces: Path, names: list[str]) -> torch.Tensor:
    pixels = np.stack([np.asarray(Image.open(faces / name)) for name in names])
    return Pooled()({"images": torch.from_numpy(pixels).float().permute(0, 3, 1, 2)})


def evaluate(folder: Path, cache: Path, name: str) -> dict[str, float]:
    from fastreid.engine import DefaultTrainer

    cfg = toy_cfg(folder / "out", **{"DATASETS.TESTS": (name,), "INPUT.SIZE_TEST": [48, 48], **tiny_faces_keys(cache)})
    return dict(DefaultTrainer.test(cfg, Pooled()))


def test_items_are_the_training_part_and_keys_name_them(cache: Path, faces: Path, tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid import datasets
    from qsd_plugin.quality.keys import label_key

    made = (faces / "meta.json").stat().st_mtime_ns
    cfg = toy_cfg(tmp_path / "out", **tiny_faces_keys(cache))
    data_set, items = datasets.training_set(cfg, "SyntheticFaces")
    assert [item[0] for item in items] == [str(faces / s.path) for s in SPEC.samples() if s.folder == "train"]
    assert {item[1] for item in items} == {f"syntheticfaces_{number:05d}" for number in range(1, 9)}
    assert {item[2] for item in items} == {"syntheticfaces_0"}
    assert data_set.parse_data(items) == (8, 0)
    folder = datasets.dataset_folder(cfg, "SyntheticFaces")
    assert folder == faces
    assert label_key(items[5][0], root=folder, dataset="SyntheticFaces") == "SyntheticFaces/train/00002/001.jpg"
    assert (faces / "meta.json").stat().st_mtime_ns == made  # found in the cache


def test_verification_is_the_protocol_on_the_listed_pairs(cache: Path, faces: Path, tmp_path: Path) -> None:
    found = evaluate(tmp_path, cache, "SyntheticFacesVerification")
    data = verification(SPEC)
    features = embed(faces, data.paths)
    result = verify_pairs(features[data.pairs.ravel()], data.issame, far_targets=(1e-1, 1e-2))
    assert found["accuracy"] == found["metric"] == pytest.approx(100 * result.accuracy)
    assert found["TAR@FAR=1e-01"] == pytest.approx(100 * result.at_far[0].val)
    thirds = [found[f"{name} third"] for name in ("worst", "middle", "best")]
    # The protocol's folds are of equal length, so thirds weighted by their pairs are the accuracy.
    assert np.average(thirds, weights=[34, 33, 33]) == pytest.approx(found["accuracy"])
    truth = load_face_truth(faces)
    severity = dict(zip(truth.paths, truth.severity, strict=True))
    worse = np.array([max(severity[data.paths[row]] for row in pair) for pair in data.pairs])
    unit = torch.nn.functional.normalize(features.double()).numpy()
    distances = np.square(unit[data.pairs[:, 0]] - unit[data.pairs[:, 1]]).sum(1)
    right = correct_pairs(distances, data.issame, result)
    assert thirds[0] == pytest.approx(100 * right[np.argsort(-worse, kind="stable")[:34]].mean())
    kept = json.loads((tmp_path / "out" / "evaluation" / "SyntheticFacesVerification.json").read_text())
    assert kept["result"]["tpr"] == pytest.approx(result.tpr.tolist())
    assert kept["error_discard"]["num_pairs"] == 50


def test_verification_equals_that_of_the_exported_bin(cache: Path, faces: Path, tmp_path: Path) -> None:
    from fastreid.engine import DefaultTrainer

    bin_from_pairs(faces / "pairs.csv", tmp_path / "faces.bin", size=48)
    options = {"DATASETS.TESTS": ("VerificationBin",), "DATA.VERIFICATION": [str(tmp_path / "faces.bin")]}
    exported = DefaultTrainer.test(toy_cfg(tmp_path / "out", **options, **{"INPUT.SIZE_TEST": [48, 48]}), Pooled())
    assert exported["faces"] == pytest.approx(evaluate(tmp_path, cache, "SyntheticFacesVerification")["accuracy"])


def test_identification_among_distractors(cache: Path, faces: Path, tmp_path: Path) -> None:
    found = evaluate(tmp_path, cache, "SyntheticFacesIdentification")
    data = identification(SPEC)
    features = embed(faces, data.paths)
    probe, mated = slice(data.num_probe), slice(data.num_probe, data.num_probe + data.num_mated)
    result = closed_set(
        *(features[part] for part in (probe, mated)),
        *(data.identities[part] for part in (probe, mated)),
        distractors=features[mated.stop :],
    )
    assert result.num_gallery == 16 * 3 + 4 * 4
    assert {name: found[name] for name in ("Rank-1", "Rank-5", "Rank-20")} == {
        f"Rank-{rank}": 100 * rate for rank, rate in result.rates.items()
    }
    assert found["metric"] == found["Rank-1"]
    truth = load_face_truth(faces)
    severity = dict(zip(truth.paths, truth.severity, strict=True))
    order = np.argsort([-severity[path] for path in data.paths[probe]], kind="stable")
    for name, rows in zip(("worst", "middle", "best"), np.array_split(order, 3), strict=True):
        assert found[f"{name} third"] == pytest.approx(100 * np.mean(result.rank[rows] == 1))


@pytest.mark.parametrize(
    ("name", "metric", "number"),
    [("SyntheticFacesVerification", "accuracy", "accuracy"), ("SyntheticFacesIdentification", "rank-1", "Rank-1")],
)
def test_trials_of_built_in_faces_are_the_score_in_parts(
    cache: Path, faces: Path, tmp_path: Path, name: str, metric: str, number: str
) -> None:
    test = TESTS[name](toy_cfg(tmp_path / "out", **tiny_faces_keys(cache)))
    features = embed(faces, [str(Path(path).relative_to(faces)) for path in test.names])
    score, trials = test.score(features), test.trials(features)
    assert trials.metric_names == (metric,)
    assert set(trials.test.tolist()) == {name}
    assert set(np.unique(trials.values)) == {0.0, 100.0}
    for group, rows in trials.groups().items():
        assert trials.values[rows].mean() == pytest.approx(score.numbers[number if group == "all" else group])
    firsts = [query.split()[0] for query in trials.query.tolist()]
    assert trials.identity.tolist() == [first.split("/")[1] for first in firsts]
    truth = load_face_truth(faces)
    severity = dict(zip(truth.paths, truth.severity, strict=True))
    worst = [max(severity[path] for path in query.split()) for query in trials.query.tolist()]
    assert (-trials.quality).tolist() == worst
    assert len(set(trials.query.tolist())) == len(trials) == (100 if metric == "accuracy" else 16)


def test_correct_pairs_average_to_each_fold_s_accuracy() -> None:
    generator = np.random.default_rng(3)
    issame = generator.integers(0, 2, 97) == 1
    distances = np.clip(1.6 - 0.5 * issame + generator.normal(0, 0.5, 97), 0, 4)
    result = verify_distances(distances, issame)
    right = correct_pairs(distances, issame, result)
    parts = np.array_split(right, 10)
    assert [part.mean() for part in parts] == pytest.approx(result.fold_accuracy.tolist())


def test_labels_are_compared_with_the_true_severity_of_faces(cache: Path, faces: Path, tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid.label_reports import compare_files

    truth = load_face_truth(faces)
    train = [row for row, path in enumerate(truth.paths) if path.startswith("train/")]
    score = 100 * (1 - truth.severity[train])
    names = tuple(f"SyntheticFaces/{truth.paths[row]}" for row in train)
    QualityLabels(score, score, 0 * score, names, {"dataset": "SyntheticFaces"}).save(tmp_path / "oracle.npz")
    cfg = toy_cfg(tmp_path / "out", **{"DATASETS.NAMES": ("SyntheticFaces",), **tiny_faces_keys(cache)})
    _, found = compare_files(cfg, [tmp_path / "oracle.npz"], severity=True)
    assert next(iter(found["truth"].values()))["direction"]["agreement"] == 1.0


def train(config: str, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    options = [str(part) for pair in values.items() for part in pair]
    command = ["train_net.py", "--config-file", str(ROOT / "projects" / "QSD" / config), *options]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(ROOT / "tools" / "train_net.py"))["main"]()


@pytest.fixture(scope="module")
def demo(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``faces_demo.yml``: two steps per training stage."""
    output = tmp_path_factory.mktemp("runs") / "faces"
    with pytest.MonkeyPatch.context() as patch:
        train("faces_demo.yml", patch, **FEW_STEPS, **tiny_faces_keys(cache), OUTPUT_DIR=output)
    return output


def test_demo_runs_through_the_recipe(demo: Path, faces: Path) -> None:
    for stage in ("baseline", "labels", "control", "qsd", "report"):
        assert json.loads((demo / stage / "stage.json").read_text())["finished"] is True
    labels = QualityLabels.load(demo / "labels" / "SyntheticFaces.npz")
    paths = [str(faces / sample.path) for sample in SPEC.samples() if sample.folder == "train"]
    assert labels.coverage(paths, root=faces) == 1.0
    states = {
        stage: torch.load(demo / stage / "model_final.pth", weights_only=True)["model"]
        for stage in ("baseline", "control", "qsd")
    }
    key = "backbone.layer4.1.conv2.weight"
    assert not torch.equal(states["baseline"][key], states["qsd"][key])
    assert not torch.equal(states["control"][key], states["qsd"][key])


def test_report_of_the_demo_is_what_the_stages_measured(demo: Path) -> None:
    results = json.loads((demo / "report" / "results.json").read_text())
    assert list(results["tests"]) == ["SyntheticFacesVerification", "SyntheticFacesIdentification"]
    for name, test in results["tests"].items():
        assert list(test["arms"]) == ["baseline", "control", "qsd"]
        for arm, numbers in test["arms"].items():
            measured = json.loads((demo / arm / "results.json").read_text())[name]
            assert numbers == pytest.approx(measured, abs=1e-3)
    text = (demo / "report" / "results.md").read_text()
    assert "SyntheticFacesVerification, 80 images, one seed, no claim (seed 1), percent" in text
    assert "| worst third" in text
    for picture in ("SyntheticFacesVerification_det.png", "label_histogram.png", "worst_and_best.png"):
        assert (demo / "report" / picture).read_bytes().startswith(b"\x89PNG")


def test_paper_recipe_runs_on_records(faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_to_records(faces / "train", tmp_path / "train.rec", size=48)
    bin_from_pairs(faces / "pairs.csv", tmp_path / "lfw.bin", size=48)
    data = {"DATA.RECORD": tmp_path / "train.rec", "DATA.VERIFICATION": [str(tmp_path / "lfw.bin")]}
    train("ms1mv2_r50.yml", monkeypatch, **FEW_STEPS, **data, OUTPUT_DIR=tmp_path / "run")
    results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
    assert list(results["tests"]["VerificationBin"]["arms"]) == ["baseline", "qsd"]
    measured = json.loads((tmp_path / "run" / "qsd" / "results.json").read_text())
    assert results["tests"]["VerificationBin"]["arms"]["qsd"] == pytest.approx(measured, abs=1e-3)


def test_paper_recipe_is_as_specified() -> None:
    """Section 3.3: four maps and the embedding, weight 1 each. Section 6: a hundredth of the learning rate."""
    from fastreid.config import get_cfg
    from fastreid.modeling.meta_arch import build_model

    from qsd_plugin.networks.taps import TapRecorder

    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "projects" / "QSD" / "ms1mv2_r50.yml"))
    solver, baseline = cfg.SOLVER, cfg.RECIPE.BASELINE
    assert pytest.approx(1 / 100) == solver.BASE_LR / baseline.BASE_LR
    assert pytest.approx(3 / 4) == solver.MAX_EPOCH / baseline.MAX_EPOCH
    cfg.MODEL.HEADS.NUM_CLASSES = 3
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    levels = [f"backbone.layer{stage}" for stage in (1, 2, 3, 4)]
    assert dict(model._qsd_loss.level_weights) == dict.fromkeys([*levels, "heads.bottleneck"], 1.0)
    with TapRecorder(model, levels) as recorded, torch.no_grad():
        model({"images": torch.zeros(1, 3, 112, 112)})
    shapes = [tuple(recorded[level].shape[1:]) for level in levels]
    assert shapes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


def test_recipes_take_one_kind_of_test_set(cache: Path, tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid import recipes

    names = ("SyntheticFacesVerification", "SyntheticPedestrians")
    cfg = toy_cfg(tmp_path / "out", **{"DATASETS.TESTS": names, **tiny_faces_keys(cache)})
    with pytest.raises(ConfigError, match=r"DATASETS.TESTS of a recipe: .*expected either face test sets or person"):
        recipes.check_final_stage(cfg, faces=True)
