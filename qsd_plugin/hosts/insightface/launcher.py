"""Running a checkout's own ``train_v2.py``, unchanged, with the plugin's methods: on GPUs or a CPU, or by torchrun."""

from __future__ import annotations

import importlib.util
import os
import runpy
import socket
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from qsd_plugin.core.distributed import leave_group
from qsd_plugin.core.errors import ConfigError, HostError, did_you_mean
from qsd_plugin.hosts.insightface import compat
from qsd_plugin.hosts.insightface.checkout import (
    IMPORTS,
    SCRIPT,
    check_contracts,
    find_checkout,
    host_module,
    on_path,
)
from qsd_plugin.hosts.insightface.option_checks import read_options
from qsd_plugin.hosts.insightface.session import Session

_MARK = "__qsd_plugin__"
#: The checkout whose trainer this process runs: there, a config that calls ``activate()`` has nothing left to do.
_launched: list[Path] = []


def train(host_root: Path, config: str) -> None:
    """Train in this process, which is one of a torchrun group or alone.

    Args:
        host_root: The checkout, see :func:`~.checkout.find_checkout`.
        config: Name of a config of the checkout (``configs/ms1mv3_r50``) or a Python file of one's own.

    Raises:
        HostError: The checkout is none that the plugin knows.
        ConfigError: No such config, or it asks for something impossible.
    """
    root = find_checkout(host_root)
    with ExitStack() as scope:
        _launched.append(root)
        scope.callback(_launched.clear)
        scope.enter_context(on_path(root))
        scope.enter_context(_clean_checkout())
        scope.callback(compat.apply_shims("import", _announce))
        for name in IMPORTS.values():
            host_module(name)
        check_contracts(root)
        name = load_config(root, config)
        merged = {**host_module("configs.base").config, **sys.modules[f"configs.{name}"].config}
        options = read_options(merged)
        scope.callback(compat.apply_shims("run", _announce))
        scope.enter_context(_replaced_names())
        scope.enter_context(_one_process())
        _announce(f"host {root}, config {name}, methods {', '.join(options.methods) or 'none: plain arcface_torch'}")
        arguments, sys.argv = sys.argv, [str(root / SCRIPT), f"configs/{name}"]
        scope.callback(setattr, sys, "argv", arguments)
        scope.callback(leave_group)
        runpy.run_path(str(root / SCRIPT), run_name="__main__")


def run_processes(command: list[str], nproc: int) -> int:
    """Run a command under torchrun on this machine, with a port of its own; its exit code."""
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={nproc}"]
    return subprocess.call([*torchrun, "--master_addr=127.0.0.1", f"--master_port={port}", *command])


def load_config(root: Path, config: str) -> str:
    """Import a config as ``configs.<name>``, where the host looks for it; its name.

    Raises:
        ConfigError: There is none, or it has no ``config``.
    """
    file = Path(config).expanduser()
    known = sorted(path.stem for path in (root / "configs").glob("*.py") if path.stem not in ("__init__", "base"))
    name = file.stem if file.suffix == ".py" else file.name
    if file.suffix == ".py" and file.is_file():
        host_module("configs.base")
        spec = importlib.util.spec_from_file_location(f"configs.{name}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"configs.{name}"] = module
        spec.loader.exec_module(module)
    elif name in known:
        module = host_module(f"configs.{name}")
    else:
        raise ConfigError(
            "Config of the training",
            value=config,
            expected="a Python file, or a name out of the checkout's configs/",
            remedy=did_you_mean(name, known),
        )
    if not isinstance(getattr(module, "config", None), Mapping):
        raise ConfigError(f"Config {config}", expected="a dict called config, as in the checkout's configs/")
    return name


def activate_in_main() -> None:
    """See :func:`qsd_plugin.hosts.insightface.activate`."""
    main: Any = sys.modules["__main__"]
    if _launched or hasattr(main, _MARK):
        return
    file = Path(str(getattr(main, "__file__", "")))
    missing = [name for name in IMPORTS if not hasattr(main, name)]
    if file.name != SCRIPT or missing:
        raise HostError(
            "activate()",
            value=str(file),
            expected=f"to be called by a config that arcface_torch's {SCRIPT} imports",
            remedy="Or start the training with tools/train_arcface.py, which needs no call.",
        )
    root = find_checkout(file.parent)
    check_contracts(root)
    compat.apply_shims("run", _announce)
    names = Session(*(getattr(main, name) for name in IMPORTS)).names()
    vars(main).update(names)
    setattr(main, _MARK, True)


@contextmanager
def _replaced_names() -> Iterator[None]:
    """Inside, the script's imports yield the session's names.

    The modules that the script imports from are replaced by copies, because the host's classes find themselves by the
    global names of the originals.
    """
    originals = {name: host_module(module) for name, module in IMPORTS.items()}
    session = Session(*(getattr(module, name) for name, module in originals.items()))
    try:
        for name, value in session.names().items():
            original = originals[name]
            shadow = types.ModuleType(original.__name__, original.__doc__)
            vars(shadow).update(vars(original))
            setattr(shadow, name, value)
            sys.modules[original.__name__] = shadow
        yield
    finally:
        sys.modules.update({module.__name__: module for module in originals.values()})


@contextmanager
def _one_process() -> Iterator[None]:
    """Outside torchrun: the variables of a group of one, whose port is free; the script's own is always the same."""
    if "RANK" in os.environ:
        yield
        return
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _clean_checkout() -> Iterator[None]:
    """Inside, nothing compiled is written into the checkout."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _announce(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"[qsd_plugin] {line}", flush=True)
