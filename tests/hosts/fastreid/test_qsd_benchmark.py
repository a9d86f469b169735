"""The step benchmark: both sides are whole training steps over the images it says they are over."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.benchmarks import host_steps, qsd_step

host.activate()

TINY = qsd_step.Size(18, 8, 32, 16)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[int]]]:
    """Every model the benchmark builds, with the number of images in each pass through its backbone."""
    built: list[tuple[Any, list[int]]] = []
    build = qsd_step.build

    def spy(cfg: Any, seed: int) -> Any:
        model = build(cfg, seed)
        passes: list[int] = []
        model.backbone.register_forward_pre_hook(lambda _module, inputs: passes.append(len(inputs[0])))
        built.append((model, passes))
        return model

    monkeypatch.setattr(qsd_step, "build", spy)
    monkeypatch.setattr(qsd_step, "WARM_UP", 0)
    return built


@pytest.mark.parametrize(
    ("pairing", "qsd_passes", "baseline_passes"),
    [
        ("in batch", [8], [8]),
        ("partner, separate forward", [8, 8], [16]),
        ("partner, joint forward", [16], [16]),
    ],
)
def test_both_sides_train_on_the_same_images(
    tmp_path: Path, models: list[Any], pairing: str, qsd_passes: list[int], baseline_passes: list[int]
) -> None:
    steps = qsd_step.step_functions(TINY, pairing, tmp_path, seed=0)
    assert [type(model).__name__ for model, _ in models] == ["QSDBaseline", "Baseline"]
    for step, (model, passes), expected in zip(steps, models, (qsd_passes, baseline_passes), strict=True):
        passes.clear()
        before = model.backbone.conv1.weight.detach().clone()
        step()
        assert passes == expected
        assert not torch.equal(model.backbone.conv1.weight, before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is built and which steps run, in order, with nothing behind either."""
    calls: list[str] = []

    def build(cfg: Any, seed: int) -> Any:
        calls.append(f"build {cfg.MODEL.META_ARCHITECTURE}")
        return SimpleNamespace(name=cfg.MODEL.META_ARCHITECTURE, _qsd_quality=SimpleNamespace())

    monkeypatch.setattr(qsd_step, "build", build)
    monkeypatch.setattr(qsd_step, "trainer_step", lambda cfg, model, batch: lambda: calls.append(model.name))
    monkeypatch.setattr(qsd_step, "WARM_UP", 1)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # seconds, where all tests run in one process
    return calls


def test_both_sides_are_built_anew_in_each_round_and_come_first_in_turn(calls: list[str]) -> None:
    results = qsd_step.run([TINY], pairs=4, only="in batch")
    (item,) = results["items"].values()
    assert (results["rounds"], item["pairs"]) == (4, 4)
    built_and_warmed_up = ["build QSD", "build Baseline", "QSD", "Baseline"]
    other_way_round = ["build Baseline", "build QSD", "Baseline", "QSD"]
    untimed = ["QSD", "Baseline"]
    rounds = [
        *(built_and_warmed_up + untimed + ["QSD", "Baseline"]),
        *(other_way_round + untimed + ["Baseline", "QSD"]),
    ]
    assert calls == rounds * 2


@pytest.mark.parametrize("baseline_first", [False, True])
def test_qsd_is_the_first_side_whichever_is_built_first(tmp_path: Path, calls: list[str], baseline_first: bool) -> None:
    steps = qsd_step.step_functions(TINY, "in batch", tmp_path, 0, baseline_first)
    calls.clear()
    for step in steps:
        step()
    assert calls == ["QSD", "Baseline"]


def test_items_name_size_and_pairing_and_carry_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratio(build: Any, pairs: int, rounds: int) -> dict[str, Any]:
        for step in build(False):
            step()
        return {"median": 1.0, "low": 1.0, "high": 1.0, "pairs": pairs}

    monkeypatch.setattr(host_steps, "pooled_ratio", ratio)
    monkeypatch.setattr(qsd_step, "WARM_UP", 0)
    items = qsd_step.run([TINY, qsd_step.Size(50, 64, 256, 128, "cuda")], pairs=7)["items"]
    skipped = [name for name, item in items.items() if item == {"skipped": "not shown, no GPU"}]
    assert len(skipped) == 4
    assert all("R50 256x128 B=64 cuda" in name for name in skipped)
    items = {name: item for name, item in items.items() if name not in skipped}
    assert {name: item.get("limit") for name, item in items.items()} == {
        "QSD step, R18 32x16 B=8 cpu, in batch": 1.03,
        "QSD step, R18 32x16 B=8 cpu, partner, separate forward": 1.05,
        "QSD step, R18 32x16 B=8 cpu, partner, joint forward": 1.05,
        "baseline step, R18 32x16 B=8 cpu, two forwards": None,
    }
    assert {item["pairs"] for item in items.values()} == {7}
