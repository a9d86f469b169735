"""The step benchmark: both sides train the same, one through the launcher and one without it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKE

from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.insightface import benchmarks
from qsd_plugin.hosts.insightface.benchmarks import steps

TINY = steps.Size("mbf", 4, 6, dim=8)


def test_both_sides_take_the_same_steps_and_one_has_the_plugin(tmp_path: Path) -> None:
    config = steps.write_config(tmp_path, TINY, steps=20)
    with (
        steps.paced_training("plain", FAKE, config) as plain,
        steps.paced_training("plugin", FAKE, config) as plugin,
    ):
        for _ in range(3):
            plain()
        for _ in range(2):
            plugin()
        texts = {side: (tmp_path / f"{side}.log").read_text() for side in ("plain", "plugin")}
        found = {side: re.findall(r"Loss (\S+) Global Step: (\d+)", text) for side, text in texts.items()}
        # One at the start and one each time it is told to; the trainer logs a step when it has been told to go on.
        assert [step for _, step in found["plain"]] == ["1", "2", "3"]
        assert found["plugin"] == found["plain"][:2]
    assert "[qsd_plugin] host" in texts["plugin"]
    assert "methods none: plain arcface_torch" in texts["plugin"]
    assert "qsd_plugin] " not in texts["plain"]


def test_training_that_stops_is_told_with_its_last_words(tmp_path: Path) -> None:
    config = steps.write_config(tmp_path, TINY, steps=2)
    config.write_text("raise ValueError('no such luck')")
    with (
        pytest.raises(HostError, match=r"arcface_torch stopped \(plugin\): got .*ValueError: no such luck"),
        steps.paced_training("plugin", FAKE, config),
    ):
        pass


def test_rounds_start_anew_either_side_first_and_items_carry_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    @contextmanager
    def training(side: str, root: Path, config: Path) -> Iterator[Any]:
        calls.append(f"start {side}")
        yield lambda: calls.append(side)
        calls.append(f"stop {side}")

    monkeypatch.setattr(steps, "paced_training", training)
    monkeypatch.setattr(steps, "WARM_UP", 1)
    monkeypatch.setattr(steps, "ROUNDS", 2)
    items = steps.run(FAKE, (TINY, steps.Size("r50", 1, 1, device="cuda")), pairs=2)
    assert items.pop("arcface_torch step, no method, r50 B=1 C=1 cuda") == {"skipped": "not shown, no GPU"}
    (item,) = items.values()
    assert (item["limit"], item["pairs"]) == (1.02, 2)
    assert calls == [
        *("start plugin", "start plain", "plugin", "plain", "plugin", "plain", "plugin", "plain"),
        *("stop plain", "stop plugin"),
        *("start plain", "start plugin", "plain", "plugin", "plugin", "plain", "plain", "plugin"),
        *("stop plugin", "stop plain"),
    ]


def test_without_a_checkout_items_say_so_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    items = benchmarks.run(None, only="arcface_torch step")["items"]
    assert len(items) == 2
    assert {item["skipped"] for item in items.values()} == {"--host-root names no arcface_torch checkout"}
    assert benchmarks.run(None, only="nothing of that name")["items"] == {}
    with pytest.raises(HostError, match="arcface_torch checkout: got "):
        benchmarks.run(tmp_path, only="arcface_torch step")
