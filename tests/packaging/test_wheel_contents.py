"""What an installed wheel carries: the package, the tools and the configs, with their relative bases intact."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library tree that goes into a wheel, built from a copy so that the clone stays clean."""
    source = tmp_path_factory.mktemp("source") / "clone"
    ignore = shutil.ignore_patterns(".venv*", ".git", "logs", "*_cache", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)
    target = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / "qsd_plugin"


def test_configs_and_tools_lie_inside_the_package(built: Path) -> None:
    shipped = sorted(path.relative_to(ROOT / "projects").as_posix() for path in (ROOT / "projects").rglob("*.yml"))
    packed = sorted(
        path.relative_to(built / "model_zoo/projects").as_posix()
        for path in (built / "model_zoo/projects").rglob("*.yml")
    )
    assert packed == shipped
    assert (built / "tools" / "train_net.py").is_file()
    assert (built / "py.typed").is_file()


def test_config_of_the_wheel_loads_with_its_bases_outside_the_clone(built: Path, tmp_path: Path) -> None:
    code = (
        "import qsd_plugin.hosts.fastreid, qsd_plugin.model_zoo as zoo\n"
        "from fastreid.config import get_cfg\n"
        "cfg = get_cfg(); path = zoo.get_config_file('QSD/market.yml'); cfg.merge_from_file(path)\n"
        "print(path, cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.LOSSES.NAME)"
    )
    path = str(built.parent)
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in "
        f"repr(f).lower()]; sys.path.insert(0, {path!r})\n{code}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(built) in done.stdout
    assert "QSD ('CrossEntropyLoss', 'WeightedTripletLoss', 'CenterLoss')" in done.stdout


def test_no_dependency_is_a_host() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert "fastreid" not in setup.partition("install_requires")[2].partition("],")[0].replace("fast-reid", "")
