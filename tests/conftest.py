"""The suite runs on the CPU, also where there is a GPU: only ``-m gpu`` shows CUDA to torch."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA before anything imports torch; the repairs for machines without it are what most tests are about."""
    if "gpu" not in config.getoption("markexpr"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Small tensors: a second thread only waits for the first, and the second core has a test process of its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
