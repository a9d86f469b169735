"""An arcface_torch tree (the checkout that QSD_TEST_ARCFACE names, or the small one here), faces, and trainings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faces import CLASSES, IMAGES, write_faces

from qsd_plugin.hosts.insightface import compat
from qsd_plugin.hosts.insightface.checkout import FILES, find_checkout, on_path
from qsd_plugin.hosts.insightface.mxnet_standin import modules

FAKE = Path(__file__).parent / "fake_host"
VARIABLE = "QSD_TEST_ARCFACE"


@pytest.fixture(scope="session")
def host_root() -> Path:
    """The tree that the tests run against."""
    given = os.environ.get(VARIABLE)
    return FAKE if not given else find_checkout(Path(given))


@pytest.fixture(scope="session")
def checkout() -> Path:
    """A real checkout, for tests that the small tree says nothing about."""
    given = os.environ.get(VARIABLE)
    if not given:
        pytest.skip(f"{VARIABLE} names no arcface_torch checkout")
    return find_checkout(Path(given))


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record folder of 6 classes with 4 images each, labels, and a verification set."""
    return write_faces(tmp_path_factory.mktemp("faces"))


@contextmanager
def imported_host(root: Path) -> Iterator[None]:
    """Inside, modules of the tree can be imported; afterwards they are forgotten."""
    before = set(sys.modules)
    standin = modules()
    sys.modules.update(standin)
    with on_path(root):
        yield
    names = {Path(file).parts[0].removesuffix(".py") for file in FILES} | {"mxnet"}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in names:
            del sys.modules[name]


@pytest.fixture
def host(host_root: Path) -> Iterator[None]:
    """:func:`imported_host` of the tree."""
    with imported_host(host_root):
        yield


@pytest.fixture
def group(host: None, tmp_path: Path) -> Iterator[None]:
    """A process group of one, and the tree's modules, on the CPU."""
    shims = [shim.apply() for shim in compat.SHIMS if shim.name == "cuda()"]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for undo in shims:
        undo()


def last_state(output: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """Network, head and momentum of a checkpoint as one flat dict."""
    stored = torch.load(output / f"checkpoint_gpu_{rank}.pt", weights_only=True)
    states = stored["state_optimizer"]["state"]
    momentum = {f"momentum {key}": value["momentum_buffer"] for key, value in states.items()}
    return {**stored["state_dict_backbone"], **stored["state_dict_softmax_fc"], **momentum}


class Trainings:
    """Trainings of a few steps, in processes forked off one."""

    def __init__(self, server: subprocess.Popen[str], root: Path, folder: Path, faces: Path) -> None:
        self._server, self.root, self._folder, self._faces = server, root, folder, faces
        self._count = 0

    def config(self, methods: dict[str, Any] | None, call: str = "", **keys: Any) -> Path:
        """A config file: three steps per epoch, one epoch, 16 numbers per embedding."""
        self._count += 1
        values = {
            "network": "mbf",
            "rec": str(self._faces),
            "num_classes": CLASSES,
            "num_image": IMAGES,
            "num_epoch": 1,
            "warmup_epoch": 0,
            "batch_size": 8,
            "lr": 0.02,
            "momentum": 0.9,
            "frequent": 1,
            "verbose": 1000,
            "num_workers": 0,
            "val_targets": ["lfw"],
            "embedding_size": 16,
            "optimizer": "sgd",
            "save_all_states": True,
            "output": str(self._folder / f"run{self._count}"),
            **keys,
        }
        lines = ["from configs.base import config as base", "config = type(base)()", f"values = {values!r}"]
        lines += ["for key, value in values.items():", "    setattr(config, key, value)"]
        if methods is not None:
            lines.append(f"config.qsd_plugin = {methods!r}")
        file = self._folder / f"config{self._count}.py"
        file.write_text("\n".join([*lines, call]) + "\n")
        return file

    def run(
        self, config: Path, *, processes: int = 1, plain: bool | str = False, root: Path | None = None
    ) -> tuple[list[int], str]:
        """Exit codes and output of the first process; ``plain`` as in ``forked_arcface.py``."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = config.with_suffix(".log")
        log.unlink(missing_ok=True)
        job = {"root": str(root or self.root), "config": str(config), "log": str(log), "port": port}
        job["folder"] = str(config.parent)
        self._server.stdin.write(json.dumps({**job, "processes": processes, "plain": plain}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline()), log.read_text()

    def train(
        self, methods: dict[str, Any] | None, *, processes: int = 1, root: Path | None = None, **keys: Any
    ) -> tuple[Path, str]:
        """Output folder and output of a training that succeeds."""
        config = self.config(methods, **keys)
        codes, text = self.run(config, processes=processes, root=root)
        assert codes == [0] * processes, text
        return Path(keys.get("output", self._folder / f"run{self._count}")), text

    def refused(self, methods: dict[str, Any] | None, **keys: Any) -> str:
        """The last paragraph of a training that a plugin error ends."""
        codes, text = self.run(self.config(methods, **keys))
        assert codes == [2], text
        return text.strip().rpartition("\n\n")[2]


@pytest.fixture(scope="session")
def trainings(host_root: Path, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    """See :class:`Trainings`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__).parent / "forked_arcface.py")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield Trainings(server, host_root, tmp_path_factory.mktemp("trainings"), faces)
    assert server.stdin is not None
    server.stdin.close()
    server.wait(60)


@pytest.fixture(scope="session")
def teacher(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a plain run, in a folder that is called after the network."""
    network = "r18" if trainings.root == FAKE else "mbf"
    output, _ = trainings.train(None, network=network, output=str(tmp_path_factory.mktemp("teacher") / network))
    return output / "model.pt"
