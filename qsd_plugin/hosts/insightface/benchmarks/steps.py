"""What the plugin costs a step of arcface_torch's own training when no method is switched on.

Two processes train with the same config over the same record file: one runs the checkout's script by itself, with the
repairs without which it would not start on this machine, the other the launcher with ``methods=[]``. Both wait after
every step (:mod:`.paced`), so that steps can be timed in turn; a step is everything from one update to the next, the
loading of images included. As in :mod:`qsd_plugin.hosts.fastreid.benchmarks.qsd_step`, both are started anew for each
round, either first in turn.
"""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qsd_plugin.core.errors import HostError
from qsd_plugin.data.recordio import RecordWriter
from qsd_plugin.hosts.insightface.checkout import find_checkout
from qsd_plugin.report.benchmarks.paired import pooled_ratio

Step = Callable[[], None]

#: Largest allowed ratio of the step with the plugin to that of the script by itself.
LIMIT = 1.02
#: Steps before the first timing, and steps' worth of images that are loaded ahead.
WARM_UP, AHEAD = 3, 10
ROUNDS = 4
#: Pictures in the record file; they come again and again.
_PICTURES = 16


@dataclass(frozen=True)
class Size:
    """One training problem: network, batch B, C classes, embedding size D; images are 112 x 112.

    ``workers`` load images.
    """

    network: str
    batch: int
    classes: int
    dim: int = 512
    device: str = "cpu"
    workers: int = 0

    def __str__(self) -> str:
        return f"{self.network} B={self.batch} C={self.classes} {self.device}"


#: The sizes that the limit is stated for.
SIZES = (Size("mbf", 16, 1000), Size("r50", 128, 93431, device="cuda", workers=4))


def run(
    host_root: Path | None, chosen: tuple[Size, ...] = SIZES, *, pairs: int = 30, only: str = ""
) -> dict[str, dict[str, Any]]:
    """Time steps of both trainings at every size.

    Args:
        host_root: The checkout; ``None``: nothing can be timed.
        chosen: Sizes; those on a GPU are skipped where there is none.
        pairs: Interleaved pairs of steps after the warm-up, over all rounds.
        only: Items whose name contains this.

    Returns:
        By name what :func:`pooled_ratio` gives, plugin over script, and ``limit``.

    Raises:
        HostError: The checkout is none, or a training stopped.
    """
    items: dict[str, dict[str, Any]] = {}
    for size in chosen:
        name = f"arcface_torch step, no method, {size}"
        if only not in name:
            continue
        if host_root is None:
            items[name] = {"skipped": "--host-root names no arcface_torch checkout"}
        elif size.device == "cuda" and not torch.cuda.is_available():
            items[name] = {"skipped": "not shown, no GPU"}
        else:
            items[name] = _timed(find_checkout(host_root), size, pairs)
    return items


def _timed(root: Path, size: Size, pairs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        config = write_config(folder, size, steps=WARM_UP + pairs + AHEAD)

        def build(plain_first: bool) -> tuple[Step, Step]:
            running.close()  # the trainings of the round before
            sides = ("plain", "plugin") if plain_first else ("plugin", "plain")
            steps = {side: running.enter_context(paced_training(side, root, config)) for side in sides}
            for _ in range(WARM_UP):
                for step in steps.values():
                    step()
            return steps["plugin"], steps["plain"]

        return pooled_ratio(build, pairs, rounds=ROUNDS) | {"limit": LIMIT}


def write_config(folder: Path, size: Size, *, steps: int) -> Path:
    """A config of a training that does not end within ``steps``, and its record file."""
    images = steps * size.batch
    pictures = [_picture(number) for number in range(_PICTURES)]
    with RecordWriter(folder / "train.rec") as writer:
        writer.append(b"", [images + 1, images + 1])
        for number in range(images):
            writer.append(pictures[number % _PICTURES], float(number % size.classes))
    values = {
        "network": size.network,
        "rec": str(folder),
        "num_classes": size.classes,
        "embedding_size": size.dim,
        "num_image": images,
        "num_epoch": 1,
        "warmup_epoch": 0,
        "batch_size": size.batch,
        "optimizer": "sgd",
        "lr": 1e-3,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "margin_list": (1.0, 0.5, 0.0),
        "sample_rate": 1.0,
        "fp16": size.device == "cuda",
        "dali": False,
        "num_workers": size.workers,
        "val_targets": [],
        "frequent": 10,
        "verbose": 10**9,
        "output": str(folder / "out"),
        "qsd_plugin": {"methods": []},
    }
    lines = [
        "from configs.base import config as base",
        "from qsd_plugin.hosts.insightface.benchmarks import paced",
        "import os",
        "config = type(base)()",
        f"for key, value in {values!r}.items():",
        "    setattr(config, key, value)",
        'paced.install(int(os.environ["QSD_BENCHMARK_DESCRIPTOR"]))',
    ]
    config = folder / "qsd_benchmark_config.py"
    config.write_text("\n".join(lines) + "\n")
    return config


@contextmanager
def paced_training(side: str, root: Path, config: Path) -> Iterator[Step]:
    """A training in a process of its own, after its first step; what is yielded lets it take one more.

    Raises:
        HostError: It stopped; the end of what it printed is in the message.
    """
    reading, writing = os.pipe()
    module = "qsd_plugin.hosts.insightface.benchmarks.paced"
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
    environment = {
        **os.environ,
        **group,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "QSD_BENCHMARK_DESCRIPTOR": str(writing),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    log = config.with_name(f"{side}.log")
    with log.open("wb") as printed, open(reading, encoding="utf-8") as answers:
        process = subprocess.Popen(
            [sys.executable, "-m", module, side, str(root), str(config)],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(writing,),
            text=True,
        )
        os.close(writing)
        assert process.stdin is not None
        go = process.stdin

        def finished() -> None:
            if not answers.readline():
                printed.flush()
                text = log.read_text(encoding="utf-8", errors="replace").strip()
                raise HostError(f"arcface_torch stopped ({side})", value="\n".join(text.splitlines()[-5:]))

        def step() -> None:
            go.write("go\n")
            go.flush()
            finished()

        try:
            finished()
            yield step
        finally:
            process.kill()
            process.wait()
            go.close()


def _port() -> str:
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def _picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=95)
    return encoded.getvalue()
