"""S22: CUHK03's old protocol where NumPy has no ``np.bool``."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.hosts.fastreid import compat


class OldNumPy(types.ModuleType):
    """NumPy 1.24 to 1.26 as far as this row is concerned."""

    def __getattr__(self, name: str) -> Any:
        if name == "bool":
            raise AttributeError("module 'numpy' has no attribute 'bool'")
        return getattr(np, name)


PATCH = next(patch for patch in compat.TABLE if patch.row == "S22")


def test_s22_cuhk03_protocol_without_numpy_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.evaluation import rank

    monkeypatch.setattr(rank, "np", OldNumPy("numpy"))
    monkeypatch.setattr(compat.evaluation, "np", OldNumPy("numpy"))
    assert PATCH.needed()
    undo = (lambda: None) if "S22" in compat.disabled_rows() else PATCH.apply()
    try:
        distances = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
        ids, cams = np.array([1, 2]), np.array([0, 0])
        cmc, mean_ap = rank.evaluate_rank(
            distances, ids, np.array([1, 2, 2]), cams, np.array([1, 1, 1]), max_rank=2, use_metric_cuhk03=True
        )
    finally:
        undo()
    np.testing.assert_array_equal(cmc, [1.0, 1.0])
    assert mean_ap == 1.0


def test_s22_is_inert_where_numpy_has_bool() -> None:
    from fastreid.evaluation import rank

    assert PATCH.needed() is not hasattr(np, "bool")
    if hasattr(np, "bool"):
        assert rank.np is np
