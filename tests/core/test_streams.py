"""Random streams: what decides them, and what they leave alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from qsd_plugin.core.streams import seeded_globals


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(1))  # noqa: NPY002


def start() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


def fail(*path: int | str) -> None:
    with seeded_globals(5, *path):
        draws()
        raise RuntimeError


def test_seeded_globals_decide_all_three_generators_inside_and_none_outside() -> None:
    start()
    undisturbed = [draws() for _ in range(3)]
    start()
    found, inside = [draws()], []
    for path in (("crop", 0), ("crop", 1), ("crop", 0)):
        with seeded_globals(5, *path):
            inside.append(draws())
    with seeded_globals(6, "crop", 0):
        inside.append(draws())
    found.append(draws())
    with pytest.raises(RuntimeError):
        fail("crop", 0)
    found.append(draws())
    assert found == undisturbed
    assert inside[0] == inside[2]
    for column in zip(*inside, strict=True):
        assert len(set(column)) == 3
