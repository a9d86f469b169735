"""``tools/experiment.py`` on toy data: an arm that fails, a run that is cut off, and the comparison at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT, TINY_RECIPE
from toy import write_market

from qsd_plugin.hosts import fastreid as host

host.activate()

from qsd_plugin.hosts.fastreid import experiment_training, experiments, training_stages, watched_loader  # noqa: E402  (need the activated host)
from qsd_plugin.report.experiment import read_experiment  # noqa: E402
from qsd_plugin.report.per_query import PerQuery  # noqa: E402
from tools import experiment as tool  # noqa: E402

STAGES = ["baseline", "labels", "finetune", "qsd"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms x two seeds on eight people."""
    root = tmp_path_factory.mktemp("experiment")
    data = write_market(root / "data", num_ids=8, per_id=8, test_ids=6)
    content = {
        "config": str(ROOT / "configs" / "Base-QSD.yml"),
        "output": str(root / "out"),
        "seeds": [0, 1],
        "methods": ["qsd"],
        "overrides": {
            **{key: value for key, value in TINY_RECIPE.items() if key not in ("SEED", "RECIPE.CONTROL")},
            "RECIPE.BASELINE.MAX_EPOCH": 1,
            "DATA.ROOT": str(data),
            "DATASETS": {"NAMES": ["Market1501"], "TESTS": ["Market1501"]},
        },
        "arms": {"finetune": {"overrides": {"MODEL.META_ARCHITECTURE": "Baseline"}}, "qsd": {"about": "QSD"}},
    }
    path = root / "toy.yml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def finished(file: Path) -> dict[str, Any]:
    """Three calls: one arm fails and the last one is cut off; the rest is made up for; nothing is left to do."""
    plan = experiments.Plan(read_experiment(file), ["finetune", "qsd"])
    said: list[list[str]] = [[], [], []]
    batches: dict[str, list[list[str]]] = {}
    train, following = training_stages.train, watched_loader.WatchedIterator.__next__

    def sabotaged(cfg: Any, *args: Any, **options: Any) -> Any:
        if "seed0/finetune" in cfg.OUTPUT_DIR:
            raise RuntimeError("sabotage")
        if "seed1/qsd" in cfg.OUTPUT_DIR:
            raise KeyboardInterrupt
        return train(cfg, *args, **options)

    def watched(cfg: Any, *args: Any, **options: Any) -> Any:
        batches[cfg.OUTPUT_DIR] = seen = []

        def remember(iterator: Any) -> Any:
            batch = following(iterator)
            seen.append(list(batch["img_paths"]))
            return batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watched_loader.WatchedIterator, "__next__", remember)
            return train(cfg, *args, **options)

    failures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_stages, "train", sabotaged)
        with pytest.raises(KeyboardInterrupt):
            experiments.run(plan, announce=said[0].append)
        before = experiments.listing(plan)
        patch.setattr(training_stages, "train", watched)
        failures = experiments.run(plan, announce=said[1].append)
        experiments.run(plan, announce=said[2].append)
    errors = list(Path(plan.experiment.output).rglob("error.txt"))
    return {"plan": plan, "said": said, "before": before, "failures": failures, "batches": batches, "errors": errors}


def output(finished: dict[str, Any]) -> Path:
    return Path(finished["plan"].experiment.output)


def test_failed_and_cut_off_arms_lose_nothing_else(finished: dict[str, Any]) -> None:
    first, second, third = finished["said"]
    assert "seed 0 finetune: failed" in first[2]
    assert "RuntimeError: sabotage" in first[2]
    assert finished["before"] == [
        ("all", "0", "done", "done", "failed", "done"),
        ("all", "1", "done", "done", "done", "started"),
    ]
    assert finished["failures"] == []
    ran = [line.split(":")[0] for line in second if "skipped" not in line]
    assert ran == ["[3/8] all seed 0 finetune", "[8/8] all seed 1 qsd"]
    assert len(third) == 8
    assert all("skipped" in line for line in third)
    assert finished["errors"] == []  # the failed arm's traceback went when it was made up for


def test_arms_of_a_seed_start_from_one_baseline_and_see_the_same_images_in_order(finished: dict[str, Any]) -> None:
    # The cut-off calls trained seed 0 / finetune and seed 1 / qsd under observation; each seed's other arm again here.
    plan, root = finished["plan"], output(finished) / "all"
    for seed, arm in ((0, "qsd"), (1, "finetune")):
        other = "finetune" if arm == "qsd" else "qsd"
        seen = finished["batches"][str(root / f"seed{seed}" / other)]
        assert len(seen) > 2
        cfg = experiments.block_config(plan, "all", seed, arm)
        assert _order(training_stages.derive(cfg, root / "again")) == seen
        start = torch.load(root / f"seed{seed}" / "baseline" / "model_final.pth", weights_only=True)["model"]
        for name in (arm, other):
            stage = json.loads((root / f"seed{seed}" / name / "stage.json").read_text())
            assert "baseline/model_final.pth" in stage["inputs"]
            tuned = torch.load(root / f"seed{seed}" / name / "model_final.pth", weights_only=True)["model"]
            key = "backbone.layer4.1.conv2.weight"
            assert 0 < (tuned[key] - start[key]).norm() / start[key].norm() < 0.1


def _order(cfg: Any) -> list[list[str]]:
    """Image paths of the batches of the first epoch of a training of ``cfg``, which is not trained."""
    from fastreid import engine

    engine.default_setup(cfg, experiment_training.ARGUMENTS)
    trainer = engine.DefaultTrainer(cfg)
    batches = iter(trainer.data_loader)
    return [list(next(batches)["img_paths"]) for _ in range(trainer.iters_per_epoch)]


def test_results_per_query_are_those_of_the_host_s_evaluation(finished: dict[str, Any]) -> None:
    folder = output(finished) / "all" / "seed1" / "qsd"
    run = PerQuery.load(folder / "per_query.npz")
    assert len(run) == len(set(run.identity.tolist())) == 6
    assert all(name.startswith("query/") for name in run.query.tolist())
    cfg = experiments.block_config(finished["plan"], "all", 1, "qsd")
    expected = training_stages.evaluate(
        training_stages.derive(cfg, folder.parent / "evaluation", MODEL__WEIGHTS=str(folder / "model_final.pth")),
        experiment_training.ARGUMENTS,
    )
    assert run.metrics().mean(axis=0) == pytest.approx([expected[key] for key in ("Rank-1", "mAP", "mINP")], abs=1e-3)
    stored = json.loads((folder / "results.json").read_text())
    assert stored["mAP"] == pytest.approx(expected["mAP"], abs=1e-3)
    assert np.all(run.quality > 0)


def test_blocks_in_processes_of_their_own_report_every_stage(finished: dict[str, Any]) -> None:
    said: list[str] = []
    assert experiments.run(finished["plan"], jobs=2, announce=said.append) == []
    assert sorted(line.partition("] ")[2] for line in said) == sorted(
        f"all seed {seed} {stage}: skipped" for seed in (0, 1) for stage in STAGES
    )
    for seed in (0, 1):
        assert "Stage qsd: finished earlier" in (output(finished) / "all" / f"seed{seed}" / "console.log").read_text()


def test_comparison_names_both_arms(
    finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", str(output(finished)), "--draws", "500"])
    compare.main()
    text = capsys.readouterr().out
    assert "2 seeds, 1 split(s); split all: 64 training images, 6 queries of 6 identities" in text
    assert "`qsd` (QSD): MODEL.META_ARCHITECTURE Baseline -> QSD" in text
    assert "`qsd` against `finetune`" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "finetun"], "Arm: unknown arm: got 'finetun'. Did you mean 'finetune'?"),
        (["--from-stage", "lables"], "unknown arm: got 'lables'"),
        (["QSD.PARING", "inbatch"], "Did you mean"),
        (["SEED"], "pairs KEY VALUE"),
        (["--jobs", "0"], "--jobs: got 0"),
        (["RECIPE.NAME", "none"], "qsd or qud or qgface or dil in an experiment, or nothing"),
        (
            ["DATASETS.TESTS", "('Market1501', 'DukeMTMC')"],
            "one person re-identification set, or face test sets, in an experiment",
        ),
        (["SOLVER.MAX_EPOCH", "2"], "SOLVER.MAX_EPOCH: 1 -> 2"),
    ],
)
def test_mistakes_on_the_command_line_are_named(
    finished: dict[str, Any],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(file), *arguments])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == (1 if "MAX_EPOCH" in arguments[0] else 2)
    assert message in capsys.readouterr().err


def test_list_shows_the_state_of_every_stage(
    finished: dict[str, Any], file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--list", str(file), "OUTPUT_DIR", str(file.parent / "other")])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert not stopped.value.code
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["split", "seed", *STAGES]
    assert rows[2:] == [["all", "0"], ["all", "1"]]


def test_progress_foresees_the_rest_from_the_mean_of_each_kind(finished: dict[str, Any]) -> None:
    said: list[str] = []
    progress = experiments.Progress(finished["plan"], 2, said.append)
    assert progress.remaining() is None
    progress.stage_ended(experiments.Event("all", 0, "baseline", 100.0))
    progress.stage_ended(experiments.Event("all", 0, "labels", 10.0))
    progress.stage_ended(experiments.Event("all", 0, "finetune", 40.0))
    # Left: qsd of seed 0, and baseline, labels and two arms of seed 1, shared by two jobs.
    assert progress.remaining() == (40 + 100 + 10 + 40 + 40) / 2
    assert said[-1] == "[3/8] all seed 0 finetune: 0:40, ETA 1:55"
    progress.stage_ended(experiments.Event("all", 1, "baseline", None, "it broke"))
    assert said[-1].startswith("[7/8] all seed 1 baseline: failed")  # its arms are lost with it
    assert [event.error for event in progress.failures] == ["it broke"]


@pytest.mark.parametrize(
    ("redo", "again"),
    [
        ("baseline", ["baseline", "labels", "finetune", "qsd", "report"]),
        ("labels", ["labels", "qsd", "report"]),
        ("qsd", ["qsd", "report"]),
        (None, []),
    ],
)
def test_a_stage_run_again_takes_along_what_depends_on_it(file: Path, redo: str | None, again: list[str]) -> None:
    plan = experiments.Plan(read_experiment(file), ["finetune", "qsd"], redo=redo)
    assert [stage for stage in (*STAGES, "report") if experiments._is_redone(plan, stage)] == again
