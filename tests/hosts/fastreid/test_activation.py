"""Activation: which host is chosen, what is registered, and that imports follow the arrows of the design."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qsd_plugin
from qsd_plugin import model_zoo
from qsd_plugin.core.errors import ConfigError, HostError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.run import HOST_VARIABLE, select_host

PACKAGE = Path(qsd_plugin.__file__).parent
ROOT = PACKAGE.parent

#: Some of the names that the plugin registers.
OURS = ("QSD", "SyntheticPedestrians", "QualityIdentitySampler")

#: What each folder may import of the package, besides itself and core.
ARROWS: dict[str, set[str]] = {
    "core": set(),
    "degradations": set(),
    "quality": set(),
    "networks": set(),
    "model_zoo": set(),
    "data": {"degradations", "quality"},
    "methods": {"networks", "quality", "degradations", "data"},
    "evaluation": {"networks", "quality", "degradations", "data"},
    "export": {"networks", "quality", "degradations", "data"},
    "report": {"methods", "evaluation", "export", "networks", "quality", "degradations", "data"},
    "hosts": {
        *("report", "methods", "evaluation", "export", "networks"),
        *("quality", "degradations", "data", "model_zoo", "run"),
    },
    "run": {"hosts"},
}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        assert imported_modules(path) == set()
        return
    for name in imported_modules(path):
        top, _, rest = name.partition(".")
        if top == "qsd_plugin" and rest:
            folder = rest.partition(".")[0]
            assert folder in {own, "core", "__version__", *ARROWS[own]}, f"{own} must not import {name}"
        if top in ("fastreid", "insightface"):
            # The ranking benchmark measures the host's code beside ours.
            assert own == "hosts" or "benchmarks" in path.parts, f"only hosts/ may import {name}"
        if own == "methods" and rest.startswith("methods."):
            method = path.relative_to(PACKAGE).parts[1]
            assert rest.split(".")[1] == method, f"methods do not import each other: {name}"


def test_script_inside_a_checkout_selects_that_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOST_VARIABLE, "")
    (tmp_path / "fastreid").mkdir()
    (tmp_path / "fastreid" / "__init__.py").touch()
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / "train_net.py"
    script.touch()
    assert select_host(script, None) == tmp_path
    assert select_host(script, "wheel") is None
    other = tmp_path / "elsewhere.py"
    assert select_host(other.parent / "x" / "y.py", str(tmp_path)) == tmp_path
    with pytest.raises(HostError, match=r"contains fastreid/.*--host wheel"):
        select_host(script, str(tmp_path / "tools"))


def test_missing_host_is_one_sentence() -> None:
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fastreid' else real(name, *a)\n"
        "import qsd_plugin.hosts.fastreid"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "HostError: fast-reid is not installed. Install it" in done.stderr.splitlines()[-1]


def test_activation_twice_changes_nothing() -> None:
    from fastreid.config import get_cfg
    from fastreid.engine import default_setup
    from fastreid.modeling.meta_arch.baseline import Baseline

    before = (Baseline.losses, default_setup, get_cfg().dump())
    host.activate()
    from fastreid.engine import default_setup as again

    assert before == (Baseline.losses, again, get_cfg().dump())


def test_every_shipped_config_merges_into_the_host_defaults_and_is_short() -> None:
    from fastreid.config import get_cfg

    assert "QSD/market.yml" in model_zoo.list_configs()
    for name in model_zoo.list_configs():
        path = Path(model_zoo.get_config_file(name))
        get_cfg().merge_from_file(str(path))
        assert len(path.read_text().splitlines()) <= 25, name


def test_unknown_config_name_suggests() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'QSD/market.yml'"):
        model_zoo.get_config_file("QSD/markt.yml")


def test_every_plugin_key_has_a_comment() -> None:
    """In the functions that add keys, each assignment to a node stands below a comment."""
    from fastreid.config import get_cfg

    get_cfg()
    for name in ("config.py", "config_data.py", "config_protocols.py", "config_qud.py", "config_qud_cache.py"):
        lines = (PACKAGE / "hosts" / "fastreid" / name).read_text().splitlines()
        for number, line in enumerate(lines):
            stripped = line.strip()
            if stripped.startswith(("node.", "cfg.MODEL.LOSSES.", "cfg.SEED")) and " = " in stripped:
                above = lines[number - 1].strip()
                is_group = stripped.endswith(("= type(cfg)()", "= node()"))
                in_loop = "[" in stripped.partition(" = ")[0]  # its fields are described above the loop
                assert above.startswith("#") or is_group or in_loop, f"{name}:{number + 1}: {stripped}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["fastreid", "S01", "applied"]),
        (["--registry"], ["META_ARCHITECTURE", *(f"{name}   (qsd_plugin)" for name in OURS)]),
        (
            ["--taps", "--config-file", str(ROOT / "projects/QSD/demo.yml")],
            ["backbone.layer2.1", "4x128x8x4", "heads:pred_class_logits", "0.1"],
        ),
    ],
)
def test_doctor(arguments: list[str], expected: list[str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in expected:
        assert text in done.stdout
