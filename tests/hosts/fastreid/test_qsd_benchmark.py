"""The step benchmark: both sides are whole training steps over the images it says they are over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.benchmarks import qsd_step

host.activate()

TINY = qsd_step.Size(18, 8, 32, 16)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[int]]]:
    """Every model the benchmark builds, with the number of images in each pass through its backbone."""
    built: list[tuple[Any, list[int]]] = []
    build = qsd_step._build

    def spy(cfg: Any, seed: int) -> Any:
        model = build(cfg, seed)
        passes: list[int] = []
        model.backbone.register_forward_pre_hook(lambda _module, inputs: passes.append(len(inputs[0])))
        built.append((model, passes))
        return model

    monkeypatch.setattr(qsd_step, "_build", spy)
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


def test_items_name_size_and_pairing_and_carry_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratio(a: Any, b: Any, pairs: int) -> dict[str, Any]:
        a(), b()
        return {"median": 1.0, "low": 1.0, "high": 1.0, "pairs": pairs}

    monkeypatch.setattr(qsd_step, "paired_ratio", ratio)
    monkeypatch.setattr(qsd_step, "WARM_UP", 0)
    items = qsd_step.run([TINY, qsd_step.Size(50, 64, 256, 128, "cuda")], pairs=7)["items"]
    assert items.pop("QSD step, R50 256x128 B=64 cuda") == {"skipped": "not shown, no GPU"}
    assert {name: item.get("limit") for name, item in items.items()} == {
        "QSD step, R18 32x16 B=8 cpu, in batch": 1.03,
        "QSD step, R18 32x16 B=8 cpu, partner, separate forward": 1.05,
        "QSD step, R18 32x16 B=8 cpu, partner, joint forward": 1.05,
        "baseline step, R18 32x16 B=8 cpu, two forwards": None,
    }
    assert {item["pairs"] for item in items.values()} == {7}
