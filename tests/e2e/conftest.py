"""Lets end-to-end tests share the host tests' toy data, and the run that the doctor's tests break copies of."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))


@pytest.fixture(scope="session")
def run_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of :func:`healthy_run`."""
    from toy import write_market

    return write_market(tmp_path_factory.mktemp("data"), num_ids=6, per_id=8, test_ids=6)


@pytest.fixture(scope="session")
def healthy_run(run_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny recipe, trained once per process."""
    from commands import train_net_command
    from doctor_runs import RECIPE, edit_report, train

    output = tmp_path_factory.mktemp("runs") / "healthy"
    with pytest.MonkeyPatch.context() as patch:
        train(train_net_command("QSD/market.yml", output, **RECIPE), run_data, patch)
    edit_report(output, {"baseline": 90.0, "control": 91.0, "qsd": 91.5})  # six test identities leave it to chance
    return output


@pytest.fixture
def broken(healthy_run: Path, run_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the healthy run to break, with its images where the host looks for them."""
    from toy import use_market

    use_market(monkeypatch, run_data)
    unread = shutil.ignore_patterns("*.png", "events.*", "model_best.pth")
    return Path(shutil.copytree(healthy_run, tmp_path / "broken", ignore=unread))
