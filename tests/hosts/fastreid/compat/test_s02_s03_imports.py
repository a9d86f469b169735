"""S02, S03: every module of the host can be imported, and nothing that helped stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

_IMPORT_EVERYTHING = """
import collections, importlib, json, pkgutil, sys
import qsd_plugin.hosts.fastreid
import fastreid

residue = ["torch._six"] * ("torch._six" in sys.modules) + ["Mapping"] * hasattr(collections, "Mapping")
failed, names = {}, []
for module in pkgutil.walk_packages(fastreid.__path__, "fastreid.", onerror=lambda name: None):
    # Its build script, which runs setup() when imported.
    if module.name.endswith("rank_cylib.setup"):
        continue
    names.append(module.name)
    try:
        importlib.import_module(module.name)
    except Exception as error:
        failed[module.name] = repr(error)
print("RESULT" + json.dumps({"failed": failed, "count": len(names), "residue": residue}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a fresh process says after activating the plugin and importing the whole host."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _IMPORT_EVERYTHING],
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout.rpartition("RESULT")[2])
    return result


def test_s02_every_host_module_imports_and_no_stub_stays(imported: dict[str, Any]) -> None:
    assert imported["failed"] == {}
    assert imported["count"] > 100
    assert "torch._six" not in imported["residue"]


def test_s03_collections_is_left_as_it_was(imported: dict[str, Any]) -> None:
    assert imported["failed"] == {}
    assert "Mapping" not in imported["residue"]
