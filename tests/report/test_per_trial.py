"""Trials of several face test sets in one comparison: each metric is about its own trials."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.core.errors import DataError
from qsd_plugin.report.aggregate import difference, summarise
from qsd_plugin.report.bootstrap import IdentityBootstrap
from qsd_plugin.report.comparison import as_markdown
from qsd_plugin.report.experiment import Arm, Experiment
from qsd_plugin.report.per_trial import FILE, PerTrial, join, load_outcome

PAIRS, PROBES = 60, 36
SETTINGS = {
    "RECIPE.NAME": "qud",
    "MODEL.BACKBONE.NAME": "build_mobilefacenet_backbone",
    "MODEL.BACKBONE.DEPTH": "",
    "INPUT.SIZE_TEST": [48, 48],
    "SOLVER.MAX_EPOCH": 4,
}


def trials(test: str, metric: str, values: np.ndarray) -> PerTrial:
    count = len(values)
    return PerTrial(
        query=np.array([f"{test} {number}" for number in range(count)]),
        test=np.full(count, test),
        identity=np.array([f"person{number % 12:02d}" for number in range(count)]),
        quality=np.arange(count, dtype=np.float64) * (1 if test == "pairs" else 100),
        values=values[:, None],
        names=np.array([metric]),
    )


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """The student gains 10 points of accuracy on every pair and loses 20 of rank 1 on the worst probes."""
    made = Experiment(
        "faces", "c.yml", str(tmp_path), {}, [0, 1], {"all": {}}, {"mse": Arm("m"), "qud": Arm("q")}, "mse", ["qud"], []
    )
    generator = np.random.default_rng(0)
    for split, seed in made.blocks:
        accuracy, rank_1 = generator.uniform(0, 80, PAIRS), generator.uniform(20, 100, PROBES)
        loss = np.where(np.arange(PROBES) < PROBES // 3, 20.0, 0.0)
        for arm, pairs, probes in (("mse", accuracy, rank_1), ("qud", accuracy + 10, rank_1 - loss)):
            folder = made.folder(split, seed) / arm
            join([trials("pairs", "accuracy", pairs), trials("probes", "rank-1", probes)]).save(folder / FILE)
            summary = {"test": "Faces", "quality": "severity", "training_images": 7, "environment": {"device": "CPU"}}
            (folder / "results.json").write_text(json.dumps({**summary, "settings": SETTINGS}))
    return made


def test_every_metric_is_averaged_over_its_own_trials_and_thirds(experiment: Experiment) -> None:
    summary = summarise(experiment, reference="mse", draws=500)
    assert summary["metrics"] == ["accuracy", "rank-1"]
    assert summary["primary"] == "accuracy"
    by_group = {group: difference(summary, "qud", "mse", group) for group in ("all", "worst third", "best third")}
    assert all(by_group.values())
    values = {
        group: [entry["metrics"][m]["value"] for m in summary["metrics"]] for group, entry in by_group.items() if entry
    }
    assert values["all"] == pytest.approx([10, -20 / 3])
    assert values["worst third"] == pytest.approx([10, -20])
    assert values["best third"] == pytest.approx([10, 0])
    runs = [load_outcome(experiment.folder(*block) / "mse") for block in experiment.blocks]
    own = [run.metrics()[:PAIRS, 0].mean() for run in runs if run]
    assert summary["arms"]["mse"]["metrics"]["all"]["accuracy"]["mean"] == pytest.approx(np.mean(own))


def test_an_interval_is_that_of_the_metric_s_trials_alone() -> None:
    generator = np.random.default_rng(1)
    pairs, probes = generator.normal(size=PAIRS), generator.normal(size=PROBES)
    both = join([trials("pairs", "accuracy", pairs), trials("probes", "rank-1", probes)])
    together = IdentityBootstrap([both.identity], draws=300).intervals([both.metrics()])
    for found, part in zip(together, (trials("pairs", "a", pairs), trials("probes", "r", probes)), strict=True):
        (alone,) = IdentityBootstrap([part.identity], draws=300).intervals([part.metrics()])
        assert found.value == pytest.approx(alone.value)
        assert (found.low, found.high) == pytest.approx((alone.low, alone.high))


def test_the_page_names_both_metrics_and_the_conditions(experiment: Experiment) -> None:
    text = as_markdown(json.loads(json.dumps(summarise(experiment, reference="mse", draws=500))))
    assert "mobilefacenet_backbone, 48x48 crops, 4 epochs from scratch, last epoch" in text
    assert "| accuracy " in text
    assert "| rank-1 " in text
    assert "Difference in accuracy to `mse`" in text


def test_results_by_quality_of_the_images_have_a_table_of_their_own(experiment: Experiment) -> None:
    names = np.array(["mixed/accuracy", "clean/accuracy", "lowres-0.1/one/accuracy"])
    for block in experiment.blocks:
        for arm, gains in (("mse", (0, 0, 0)), ("qud", (2.5, -1, 6))):
            file = experiment.folder(*block) / arm / FILE
            run = trials("pairs", "accuracy", np.arange(PAIRS, dtype=np.float64))
            replace(run, values=run.values + np.array(gains), names=names).save(file)
    page = as_markdown(summarise(experiment, reference="mse", draws=500))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert rows.count([]) < len(rows)
    heads = [row for row in rows if row[:1] in (["arm"], ["images"])]
    assert heads[0][:3] == ["arm", "runs", "mixed/accuracy"]  # the mean alone: there may be many conditions
    assert "clean/accuracy" not in heads[0]
    assert heads[-1] == ["images", "mse", "qud - mse"]
    assert ["clean/accuracy", "29.50 ± 0.00", "-1.00 [-1.00, -1.00]"] in rows
    assert ["lowres-0.1/one/accuracy", "29.50 ± 0.00", "+6.00 [+6.00, +6.00]"] in rows
    assert "`qud` against `mse`: +2.50 [+2.50, +2.50] mixed/accuracy: a gain is shown." in page


def test_no_thirds_where_a_test_set_has_no_quality() -> None:
    known = trials("probes", "rank-1", np.zeros(PROBES))
    unknown = replace(trials("pairs", "accuracy", np.zeros(PAIRS)), quality=np.full(PAIRS, np.nan))
    assert list(known.groups()) == ["all", "worst third", "middle third", "best third"]
    for part in (unknown, join([known, unknown])):
        assert {name: rows.tolist() for name, rows in part.groups().items()} == {"all": list(range(len(part)))}


def test_other_files_are_refused_and_unfinished_runs_are_none(tmp_path: Path) -> None:
    assert load_outcome(tmp_path) is None
    np.savez(tmp_path / FILE, query=np.array(["a"]))
    with pytest.raises(DataError, match="missing arrays"):
        load_outcome(tmp_path)
