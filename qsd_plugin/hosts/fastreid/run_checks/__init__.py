"""The run doctor's checks that need fast-reid: its networks, its data sets, its names of levels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qsd_plugin.hosts.fastreid.compat.checkpoint_files import read_checkpoint
from qsd_plugin.hosts.fastreid.run_checks import levels, preprocessing, stored_runs
from qsd_plugin.report.run_doctor import Finding, Run, diagnose, open_run

__all__ = ["diagnose_run", "levels", "open_host_run", "preprocessing"]


def open_host_run(folder: Path) -> Run:
    """The run in ``folder``, with checkpoints of any origin that are safe to read.

    Raises:
        DataError: There is no run.
    """
    return open_run(folder, lambda path: read_checkpoint(path)["model"])


def diagnose_run(folder: Path, opts: Sequence[str] = ()) -> list[Finding]:
    """Every check on the run in ``folder``.

    Args:
        folder: A recipe's ``OUTPUT_DIR``, or that of a single training.
        opts: ``KEY VALUE`` pairs for the stored configs, such as ``DATA.ROOT`` where the images have moved.

    Raises:
        DataError: There is no run.
    """
    with stored_runs.overriding(opts):
        return diagnose(open_host_run(folder))
