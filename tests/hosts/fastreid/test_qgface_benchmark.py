"""The two-view step's benchmark: both sides train on the same 2 N images, and QGFace does contrast pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.benchmarks import host_steps, qgface_step

host.activate()

TINY = qgface_step.Size(18, 0.0625, 8, 32, queue=16, classes=12)


@pytest.mark.parametrize("baseline", list(qgface_step.LIMITS))
def test_both_sides_train_on_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, baseline: str) -> None:
    built: list[Any] = []
    passes: dict[int, torch.Tensor] = {}
    build = qgface_step.build

    def spy(cfg: Any, seed: int) -> Any:
        model = build(cfg, seed)
        built.append(model)
        model.backbone.register_forward_pre_hook(lambda module, inputs: passes.update({id(module): inputs[0].clone()}))
        return model

    monkeypatch.setattr(qgface_step, "build", spy)
    steps = qgface_step.step_functions(TINY, baseline, tmp_path, seed=0)
    qgface, other = built
    assert [type(model).__name__ for model in built] == ["QGFaceBaseline", "Baseline"]
    assert type(other.heads).__name__ == {"AdaFace": "AdaFaceHead", "ArcFace": "EmbeddingHead"}[baseline]
    before = [model.heads.weight.detach().clone() for model in built]
    for step in steps:
        step()
    mine, theirs = (passes[id(model.backbone)] for model in built)
    assert len(mine) == 16
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for model, weight in zip(built, before, strict=True):
        assert not torch.equal(model.heads.weight, weight)
    assert qgface.qgface_queue.size == 16
    assert qgface.qgface_shares()["contrasted"] > 0


def test_items_name_baseline_and_size_and_carry_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def ratio(build: Any, pairs: int, rounds: int) -> dict[str, Any]:
        return {"median": 1.0, "low": 1.0, "high": 1.0, "pairs": pairs}

    monkeypatch.setattr(host_steps, "pooled_ratio", ratio)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    items = qgface_step.run([TINY, qgface_step.Size(34, 1.0, 256, 112, device="cuda")], pairs=7)["items"]
    assert items.pop("QGFace step over AdaFace, IR-34 x1 112x112, 256 images, queue 8192 x 512, cuda") == {
        "skipped": "not shown, no GPU"
    }
    items.pop("QGFace step over ArcFace, IR-34 x1 112x112, 256 images, queue 8192 x 512, cuda")
    name = "IR-18 x0.0625 32x32, 8 images, queue 16 x 512, cpu"
    assert {item: (figures["limit"], figures["pairs"]) for item, figures in items.items()} == {
        f"QGFace step over AdaFace, {name}": (1.05, 7),
        f"QGFace step over ArcFace, {name}": (1.05, 7),
    }
