"""From results per query to table, verdict and picture, on runs whose answer is known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.report.aggregate import difference, summarise
from qsd_plugin.report.comparison import as_markdown, verdict
from qsd_plugin.report.experiment import Arm, Experiment, load_description
from qsd_plugin.report.forest import draw_differences
from qsd_plugin.report.per_query import PerQuery, identity_names

SETTINGS = {
    "RECIPE.NAME": "qsd",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.DEPTH": "18x",
    "INPUT.SIZE_TEST": [64, 32],
    "RECIPE.BASELINE.MAX_EPOCH": 5,
    "SOLVER.MAX_EPOCH": 1,
    "QUALITY.CONTROL": "none",
}


def result(ap: np.ndarray, *, first: int = 0) -> PerQuery:
    count = len(ap)
    return PerQuery(
        query=np.array([f"q{first + number:03d}.jpg" for number in range(count)]),
        identity=np.array([f"person{(first + number) // 2:03d}" for number in range(count)]),
        quality=np.arange(count, dtype=np.float64),
        ap=ap,
        inp=ap / 2,
        first_hit=np.where(ap > 0.5, 1, 3),
    )


def write_run(experiment: Experiment, split: str, seed: int, arm: str, run: PerQuery) -> None:
    folder = experiment.folder(split, seed) / arm
    run.save(folder / "per_query.npz")
    settings = {**SETTINGS, "QUALITY.CONTROL": "reverse" if arm == "reversed" else "none", "OUTPUT_DIR": arm}
    summary = {
        "test": "Toy",
        "quality": "sharpness",
        "training_images": 9,
        "environment": {"device": "CPU"},
        "settings": settings,
    }
    (folder / "results.json").write_text(json.dumps(summary))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Two splits x two seeds; QSD gains 4 points everywhere, the worst third 10 more; reversing it changes nothing."""
    arms = {name: Arm(f"about {name}") for name in ("finetune", "qsd", "reversed", "shuffled")}
    made = Experiment(
        "toy",
        "c.yml",
        str(tmp_path),
        {},
        [0, 1],
        {"a": {}, "b": {}},
        arms,
        "finetune",
        ["qsd"],
        ["reversed", "shuffled"],
    )
    generator = np.random.default_rng(0)
    for place, (split, seed) in enumerate(made.blocks):
        base = generator.uniform(0.2, 0.6, 60)
        gain = 0.04 + 0.001 * place + np.where(np.arange(60) < 20, 0.1, 0.0)
        noise = generator.normal(0, 0.02, 60)
        first = 0 if split == "a" else 200
        for arm, ap in {
            "finetune": base,
            "qsd": base + gain,
            "reversed": base + gain + noise - noise.mean(),
            "shuffled": base + gain - 0.03 + noise,
        }.items():
            write_run(made, split, seed, arm, result(ap, first=first))
    made.save()
    return made


def test_difference_mean_spread_and_thirds_are_those_built_in(experiment: Experiment) -> None:
    summary = summarise(experiment, reference="finetune", draws=2000)
    # Blocks in order: seed 0 of a and b, seed 1 of a and b, with 0, 0.1, 0.2 and 0.3 points on top of 4 + 10 / 3.
    found = difference(summary, "qsd", "finetune")
    assert found is not None
    assert found["metrics"]["mAP"]["value"] == pytest.approx(4 + 10 / 3 + 0.15)
    assert found["metrics"]["mAP"]["std"] == pytest.approx(0.2 / np.sqrt(2))
    assert sorted(found["metrics"]["mAP"]["per_run"]) == pytest.approx(
        [7.333 + step for step in (0, 0.1, 0.2, 0.3)], abs=1e-3
    )
    assert found["metrics"]["mINP"]["value"] == pytest.approx((4 + 10 / 3 + 0.15) / 2)
    assert found["metrics"]["mAP"]["identities"] == 60
    worst, best = (difference(summary, "qsd", "finetune", group) for group in ("worst third", "best third"))
    assert worst is not None
    assert worst["metrics"]["mAP"]["value"] == pytest.approx(14.15)
    assert best is not None
    assert best["metrics"]["mAP"]["value"] == pytest.approx(4.15)
    runs = [PerQuery.load(experiment.folder(*block) / "qsd" / "per_query.npz").ap.mean() for block in experiment.blocks]
    shown = summary["arms"]["qsd"]["metrics"]["all"]["mAP"]
    assert shown["mean"] == pytest.approx(100 * np.mean(runs))
    a, b = 100 * np.std(runs[0::2], ddof=1), 100 * np.std(runs[1::2], ddof=1)
    assert shown["std"] == pytest.approx(np.sqrt((a**2 + b**2) / 2))


def test_verdict_follows_its_rules(experiment: Experiment) -> None:
    gain, against_reversed, against_shuffled = verdict(summarise(experiment, reference="finetune", draws=2000))
    assert "+7.48" in gain
    assert gain.endswith("a gain is shown.")
    assert "not told apart; there is no evidence that quality is what helps here" in against_reversed
    assert against_shuffled.endswith("better than without what this control takes away.")
    turned = verdict(summarise(experiment, reference="reversed", draws=2000))
    assert "no difference is shown" in turned[0]
    assert "80 %" in turned[0]


def test_verdict_names_a_loss_a_better_control_a_single_seed_and_missing_runs(experiment: Experiment) -> None:
    for split, seed in experiment.blocks:
        run = PerQuery.load(experiment.folder(split, seed) / "qsd" / "per_query.npz")
        write_run(experiment, split, seed, "qsd", result(run.ap - 0.2, first=0 if split == "a" else 200))
    (experiment.folder("b", 1) / "shuffled" / "per_query.npz").unlink()
    lines = verdict(summarise(experiment, reference="finetune", draws=2000))
    assert lines[0] == "1 runs are unfinished."
    assert lines[1].endswith("a loss is shown.")
    assert lines[2].endswith("the control is better; quality is not what helps here.")
    one = Experiment(**{**experiment.__dict__, "seeds": [0]})
    lines = verdict(summarise(one, reference="finetune", draws=2000))
    assert lines[0] == "One seed, no claim."
    assert lines[1].endswith("a loss with this seed, which more seeds must confirm.")


def test_page_holds_conditions_table_and_what_differs(experiment: Experiment) -> None:
    summary = summarise(experiment, reference="finetune", draws=2000)
    text = as_markdown(json.loads(json.dumps(summary)))
    assert "resnet_backbone 18x, 64x32 crops, baseline 5 epochs, fine-tuning 1 epochs, last epoch" in text
    assert "split a: 9 training images, 60 queries of 30 identities" in text
    assert "`reversed` (about reversed): QUALITY.CONTROL none -> reverse" in text
    assert "`qsd` (about qsd): none" in text
    assert "2.80 bootstrap standard errors" in text


def test_picture_has_a_line_per_difference_in_the_method_s_colour(experiment: Experiment, tmp_path: Path) -> None:
    draw_differences(summarise(experiment, reference="finetune", draws=2000), tmp_path / "deep" / "forest.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "forest.png").convert("RGB")).astype(int)
    blue = (np.abs(pixels - (0x3B, 0x6F, 0xB6)).max(axis=2) <= 3).any(axis=1)
    # qsd - finetune, qsd - reversed and qsd - shuffled: three separate bands of rows.
    assert int((np.diff(blue.astype(int)) == 1).sum()) == 3


def test_runs_on_other_queries_and_folders_without_runs_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    write_run(experiment, "a", 1, "qsd", result(np.full(60, 0.5), first=7))
    with pytest.raises(DataError, match="arm qsd seed 1 has other queries"):
        summarise(experiment, reference="finetune", draws=2000)
    with pytest.raises(ConfigError, match=r"experiment\.json"):
        load_description(tmp_path / "nowhere")
    empty = Experiment(**{**experiment.__dict__, "output": str(tmp_path / "empty")})
    with pytest.raises(DataError, match="without finished runs"):
        summarise(empty, reference="finetune", draws=2000)


def test_tool_writes_page_json_and_picture_and_refuses_an_unknown_reference(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import compare

    moved = tmp_path.rename(tmp_path.with_name("moved"))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(moved), "--draws", "200"])
    compare.main()
    page = (moved / "comparison.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    stored = json.loads((moved / "comparison.json").read_text())
    assert stored["bootstrap"]["draws"] == 200
    assert all(line in page for line in stored["verdict"])
    assert (moved / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for option, wrong, near in (("--reference", "finetunes", "finetune"), ("--split", "aa", "a")):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(moved), option, wrong])
        with pytest.raises(SystemExit) as stopped:
            compare.main()
        assert stopped.value.code == 2
        assert f"Did you mean '{near}'" in capsys.readouterr().err


def test_tool_compares_on_one_split_alone(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools import compare

    # Queries of the other split without qualities leave no thirds for both together.
    unknown = result(np.full(60, 0.5))
    for seed in experiment.seeds:
        for arm in experiment.arms:
            write_run(experiment, "b", seed, arm, replace(unknown, quality=np.full(60, np.nan)))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path), "--split", "a", "--draws", "200"])
    compare.main()
    alone = json.loads((tmp_path / "comparison_a.json").read_text())
    assert (alone["splits"], alone["experiment"]) == (["a"], f"{experiment.name}, a")
    worst, best = (difference(alone, "qsd", "finetune", group) for group in ("worst third", "best third"))
    assert worst is not None
    assert worst["metrics"]["mAP"]["value"] == pytest.approx(14.1)
    assert best is not None
    assert best["metrics"]["mAP"]["value"] == pytest.approx(4.1)
    assert not (tmp_path / "comparison.json").exists()


def test_an_identity_has_one_name_in_every_split() -> None:
    first = identity_names(["b/2.jpg", "a/1.jpg", "a/2.jpg"], [0, 1, 1])
    second = identity_names(["a/2.jpg", "c/1.jpg", "a/1.jpg"], [0, 5, 0])
    assert first == {1: "a/1.jpg", 0: "b/2.jpg"}
    assert second[0] == first[1]
