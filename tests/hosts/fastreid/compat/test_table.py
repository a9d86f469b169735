"""The patch table: every row of the map is there, has a proof, and the proof fails without the patch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.fastreid import compat

HERE = Path(__file__).parent
ROWS = {patch.row: patch for patch in compat.TABLE}
TESTS = {
    name: path for path in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}


def test_every_row_of_the_host_map_is_in_the_table_once() -> None:
    assert {f"S{number:02d}" for number in range(1, 26)} <= set(ROWS)
    assert len(ROWS) == len(compat.TABLE)


@pytest.mark.parametrize("row", ROWS)
def test_row_has_a_proof(row: str) -> None:
    patch = ROWS[row]
    assert patch.proof in TESTS
    assert patch.proof.startswith(f"test_{row.lower().replace('-', '_')}")
    assert patch.where
    assert patch.symptom
    assert patch.action


@pytest.fixture(scope="module")
def without_patch() -> dict[str, subprocess.CompletedProcess[str]]:
    """The proof of every row that is applied here, run in a fresh process with that row switched off."""
    applied = [patch for patch, state in compat.status() if state == "applied"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip([patch.row for patch in applied], pool.map(run_without, applied), strict=True))


def run_without(patch: compat.Patch) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{TESTS[patch.proof]}::{patch.proof}"],
        env={**os.environ, compat.DISABLE_VARIABLE: patch.row, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS)
def test_proof_fails_without_the_patch(row: str, without_patch: dict[str, subprocess.CompletedProcess[str]]) -> None:
    if row not in without_patch:
        pytest.skip(f"{row}: not needed in this environment, so unproven here")
    done = without_patch[row]
    if done.returncode == 0 and " skipped" in done.stdout:
        pytest.skip(f"{row}: its proof needs what this machine lacks, so unproven here")
    assert done.returncode == 1, f"{ROWS[row].proof} passed without its patch\n{done.stdout[-2000:]}"


def test_unknown_row_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compat.DISABLE_VARIABLE, "S1")
    with pytest.raises(ConfigError, match=r"QSD_PLUGIN_DISABLE: got 'S1'.*Did you mean"):
        compat.disabled_rows()
