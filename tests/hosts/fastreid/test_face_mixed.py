"""Mixed-quality test sets in the host against images degraded, embedded and scored by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from face_toy import SPEC, tiny_faces_keys
from PIL import Image
from toy import toy_cfg

from qsd_plugin.core.errors import ConfigError, QSDPluginError
from qsd_plugin.data.synthetic import build_faces
from qsd_plugin.data.synthetic.face_protocols import identification, verification
from qsd_plugin.data.verification_bin import bin_from_pairs
from qsd_plugin.degradations.levels import parse_levels
from qsd_plugin.evaluation.identification import closed_set
from qsd_plugin.evaluation.verification import verify_distances
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import face_trials, recipes, training_stages
from qsd_plugin.hosts.fastreid.face_mixed import mixed_test
from qsd_plugin.hosts.fastreid.face_report import as_table
from qsd_plugin.hosts.fastreid.face_tests import TESTS
from qsd_plugin.report.per_trial import PerTrial, join

host.activate()

LEVELS = ("lowres-0.25", "darkness-1", "blur-0.8", "compression-0.9")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    build_faces(folder, SPEC, workers=1)
    return folder


@pytest.fixture(scope="module")
def faces(cache: Path) -> Path:
    return next(cache.iterdir())


class Pooled(torch.nn.Module):
    """Embeds an image as 8 x 8 mean colours around the middle grey, and counts images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen += len(batch["images"])
        return torch.nn.functional.adaptive_avg_pool2d(batch["images"] - 127.5, 8).flatten(1)


def embed(images: list[np.ndarray]) -> torch.Tensor:
    return Pooled()({"images": torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2)})


def config(folder: Path, cache: Path, **options: Any) -> Any:
    shared = {**tiny_faces_keys(cache), "INPUT.SIZE_TEST": [48, 48], "EVALUATION.MIXED.LEVELS": LEVELS}
    return toy_cfg(folder / "out", **{**shared, **options})


def unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features.double()).numpy()


@pytest.fixture(scope="module")
def evaluated(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path, int]:
    from fastreid.engine import DefaultTrainer

    folder, model = tmp_path_factory.mktemp("run"), Pooled()
    results = DefaultTrainer.test(config(folder, cache, **{"DATASETS.TESTS": ("SyntheticFacesMixed",)}), model)
    return dict(results), folder / "out" / "evaluation", model.seen


def test_every_image_is_embedded_once_per_quality(evaluated: tuple[dict[str, float], Path, int]) -> None:
    assert evaluated[2] == 20 * 4 * (1 + len(LEVELS))  # the images of both protocols are the same ones


@pytest.mark.parametrize("side", ["one", "both"])
@pytest.mark.parametrize("text", ["clean", *LEVELS])
def test_numbers_are_those_of_the_protocols_by_hand(
    text: str, side: str, faces: Path, evaluated: tuple[dict[str, float], Path, int]
) -> None:
    pairs, search = verification(SPEC), identification(SPEC)
    # The index that seeds an image's degradation is its place among the verification's images, which come first.
    assert set(search.paths) <= set(pairs.paths)
    clean = [np.asarray(Image.open(faces / name)) for name in pairs.paths]
    if text == "clean":
        worse, condition = clean, "clean"
    else:
        (level,) = parse_levels([text])
        worse = [level.apply(image, seed=0, index=index)[0] for index, image in enumerate(clean)]
        condition = f"{text}/{side}"
    first, second = embed(worse), embed(worse if side == "both" else clean)
    numbers = evaluated[0]
    distances = np.square(unit(first)[pairs.pairs[:, 0]] - unit(second)[pairs.pairs[:, 1]]).sum(1)
    result = verify_distances(distances, pairs.issame, far_targets=(1e-2,))
    assert numbers[f"{condition}/accuracy"] == pytest.approx(100 * result.accuracy)
    assert numbers[f"{condition}/TAR@FAR=1e-02"] == pytest.approx(100 * result.at_far[0].val)
    rows = np.array([pairs.paths.index(name) for name in search.paths])
    probe, last = rows[: search.num_probe], search.num_probe + search.num_mated
    ranked = closed_set(
        first[probe],
        second[rows[search.num_probe : last]],
        search.identities[: search.num_probe],
        search.identities[search.num_probe : last],
        distractors=second[rows[last:]],
    )
    assert numbers[f"{condition}/Rank-1"] == pytest.approx(100 * ranked.rates[1])


def test_names_files_and_table(evaluated: tuple[dict[str, float], Path, int]) -> None:
    numbers, folder, _ = evaluated
    conditions = ["clean", *(f"{text}/{side}" for text in LEVELS for side in ("one", "both"))]
    measures = ("accuracy", "TAR@FAR=1e-02", "Rank-1")
    assert set(numbers) == {f"{condition}/{name}" for condition in conditions for name in measures} | {"metric"}
    means = [(numbers[f"{each}/accuracy"] + numbers[f"{each}/Rank-1"]) / 2 for each in conditions]
    assert numbers["metric"] == pytest.approx(np.mean(means))
    assert any(numbers[f"{level}/one/accuracy"] != numbers[f"{level}/both/accuracy"] for level in LEVELS)
    kept = json.loads((folder / "SyntheticFacesMixed.json").read_text())
    assert list(kept) == ["levels", "sides", "seed", *conditions]
    assert 100 * kept["blur-0.8/one"]["verification"]["accuracy"] == numbers["blur-0.8/one/accuracy"]
    assert 100 * kept["darkness-1/both"]["SyntheticFaces"]["rates"]["1"] == numbers["darkness-1/both/Rank-1"]
    rows = (folder / "SyntheticFacesMixed.md").read_text().splitlines()
    assert [cell.strip() for cell in rows[0].split("|")[1:-1]] == ["images", *measures]
    assert [row.split("|")[1].strip() for row in rows[2:]] == conditions
    assert f"{numbers['darkness-1/one/Rank-1']:.2f}" in rows[2 + conditions.index("darkness-1/one")]
    arms = dict.fromkeys(("baseline", "qgface"), numbers)
    text = as_table({"note": "n", "seed": 1, "tests": {"SyntheticFacesMixed": {"images": 9, "arms": arms}}})
    shown = f"{numbers['lowres-0.25/one/accuracy']:.1f}"
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert ["result", "baseline", "qgface"] in rows
    assert ["lowres-0.25/one/accuracy", shown, shown] in rows


def test_trials_are_the_numbers_in_parts(
    cache: Path, faces: Path, tmp_path: Path, evaluated: tuple[dict[str, float], Path, int]
) -> None:
    test = TESTS["SyntheticFacesMixed"](config(tmp_path, cache))
    features = embed([np.asarray(test.read(index)) for index in range(len(test.names))])
    test.trials(features).save(tmp_path / "per_trial.npz")
    trials = PerTrial.load(tmp_path / "per_trial.npz")
    numbers, names = evaluated[0], trials.metric_names
    assert trials.primary == names[0] == "mixed/accuracy"
    means = dict(zip(names, np.nanmean(trials.values, axis=0).tolist(), strict=True))
    for text in ("clean", *(f"{level}/{side}" for level in LEVELS for side in ("one", "both"))):
        assert means[f"{text}/accuracy"] == pytest.approx(numbers[f"{text}/accuracy"])
        assert means[f"{text}/rank-1"] == pytest.approx(numbers[f"{text}/Rank-1"])
    for metric in ("accuracy", "rank-1"):
        columns = [names.index(f"{level}/{side}/{metric}") for level in LEVELS for side in ("one", "both")]
        own = ~np.isnan(trials.values[:, columns[0]])
        joint = trials.values[own, names.index(f"mixed/{metric}")]
        np.testing.assert_allclose(joint, trials.values[own][:, columns].mean(axis=1))
    assert set(trials.test.tolist()) == {"SyntheticFacesVerification mixed", "SyntheticFacesIdentification mixed"}
    plain = [TESTS[f"SyntheticFaces{name}"](config(tmp_path, cache)) for name in ("Verification", "Identification")]
    base = join([one.trials(torch.randn(len(one.names), 3)) for one in plain])
    for column in ("query", "identity", "quality"):
        assert getattr(trials, column).tolist() == getattr(base, column).tolist()
    assert list(trials.groups()) == ["all", "worst third", "middle third", "best third"]
    assert test.quality_name == "true severity of degradation"


def test_images_are_the_same_in_any_order_and_process(cache: Path, tmp_path: Path) -> None:
    test = TESTS["SyntheticFacesMixed"](config(tmp_path, cache))
    clean = 20 * 4
    rows = [3, clean + 3, 2 * clean + 7, 4 * clean + 79]
    first = [np.asarray(test.read(row)) for row in rows]
    other = pickle.loads(pickle.dumps(test.read))  # a spawned loader process
    assert [np.array_equal(other(row), image) for row, image in zip(rows[::-1], first[::-1], strict=True)] == [True] * 4
    assert test.names[clean + 3] == f"{test.names[3]} at lowres-0.25"
    reseeded = TESTS["SyntheticFacesMixed"](config(tmp_path, cache, **{"EVALUATION.MIXED.SEED": 1}))
    images = [(test.read(clean + row), reseeded.read(clean + row)) for row in range(6)]
    assert not all(np.array_equal(one, two) for one, two in images)


def test_one_side_degrades_the_first_images_only(cache: Path, tmp_path: Path) -> None:
    base = TESTS["SyntheticFacesIdentification"](config(tmp_path, cache))
    test = mixed_test([base], levels=["px-12", "px-8"], sides=["one"])
    probes = identification(SPEC).num_probe
    assert len(test.names) == len(base.names) + 2 * probes
    features = torch.randn(len(test.names), 4, generator=torch.Generator().manual_seed(1))
    assert base.sides is not None
    for number, text in enumerate(("px-12", "px-8")):
        worse = features[: len(base.names)].clone()
        start = len(base.names) + number * probes
        worse[:probes] = features[start : start + probes]
        expected = base.sides.compare(worse, features[: len(base.names)]).numbers["Rank-1"]
        assert test.score(features).numbers[f"{text}/one/Rank-1"] == expected


def test_cross_resolution_of_a_bin_file(cache: Path, faces: Path, tmp_path: Path) -> None:
    from fastreid.engine import DefaultTrainer

    bin_from_pairs(faces / "pairs.csv", tmp_path / "lfw.bin", size=48)
    options = {"DATASETS.TESTS": ("CRLFW", "VerificationBinMixed"), "DATA.CRLFW": str(tmp_path / "lfw.bin")}
    options |= {"DATA.VERIFICATION": [str(tmp_path / "lfw.bin")], "EVALUATION.MIXED.LEVELS": ("px-12", "px-8")}
    results = DefaultTrainer.test(config(tmp_path, cache, **options), Pooled())
    found, mixed = results["CRLFW"], results["VerificationBinMixed"]
    assert list(found) == ["clean/lfw", *(f"px-{side}/one/lfw" for side in (8, 12, 16, 20)), "metric"]
    pairs = verification(SPEC)
    clean = [np.asarray(Image.open(faces / name)) for name in pairs.paths]
    for side in (8, 12):
        small = [Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR) for image in clean]
        worse = [np.asarray(image.resize((48, 48), Image.Resampling.BILINEAR)) for image in small]
        ends = unit(embed(worse))[pairs.pairs[:, 0]], unit(embed(clean))[pairs.pairs[:, 1]]
        result = verify_distances(np.square(ends[0] - ends[1]).sum(1), pairs.issame)
        assert found[f"px-{side}/one/lfw"] == mixed[f"px-{side}/one/lfw"] == pytest.approx(100 * result.accuracy)
    assert set(mixed) - set(found) == {"px-8/both/lfw", "px-12/both/lfw"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CRLFW", {}, "DATA.CRLFW: got ''; expected lfw.bin"),
        ("TinyFaceMixed", {}, "DATA.TINYFACE: got ''"),
        ("SyntheticFacesMixed", {"EVALUATION.MIXED.LEVELS": ("lowers-0.5",)}, "Did you mean 'lowres'"),
        ("SyntheticFacesMixed", {"EVALUATION.MIXED.SIDES": ("two",)}, r"EVALUATION.MIXED.SIDES: got \['two'\]"),
        ("SyntheticFacesMixed", {"EVALUATION.MIXED.SEED": -1}, "EVALUATION.MIXED.SEED: got -1; expected 0 or more"),
    ],
)
def test_what_is_refused(cache: Path, tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QSDPluginError, match=message):
        TESTS[name](config(tmp_path, cache, **options))


def test_settings_of_the_evaluation_belong_to_stages_that_evaluate(cache: Path, tmp_path: Path) -> None:
    tests = ("SyntheticFacesMixed",)
    mixed = config(tmp_path, cache, **{"DATASETS.TESTS": tests, "TEST.FLIP.ENABLED": True, "TEST.FUSION": "concat"})
    assert recipes.evaluation_keys(mixed) == {
        "EVALUATION.MIXED.LEVELS": LEVELS,
        "EVALUATION.MIXED.SIDES": ("one", "both"),
        "EVALUATION.MIXED.SEED": 0,
        "TEST.FUSION": "concat",
    }
    assert recipes.evaluation_keys(config(tmp_path, cache)) == {}
    kept = training_stages.relevant_keys(mixed, ())  # what a training depends on
    assert not any(key.startswith(("EVALUATION.", "TEST.", "DATA.CRLFW")) for key in kept)
    assert "DATA.FACES.SIZE" in kept


def test_experiments_take_them_and_not_templates() -> None:
    face_trials.check("SyntheticFacesMixed")
    face_trials.check("TinyFace")
    with pytest.raises(
        ConfigError, match=r"DATASETS.TESTS of an experiment: got 'IJBB'; expected one of CRLFW, .*FacePairs"
    ):
        face_trials.check("IJBB")
