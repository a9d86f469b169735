"""Runs the command line the way a user does: a fresh process, one thread, small toy data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]

#: A tiny QSD recipe: ResNet-18 at 64x32, one epoch per training stage, in-batch pairs.
TINY_RECIPE: dict[str, Any] = {
    "MODEL.BACKBONE.DEPTH": "18x",
    "MODEL.BACKBONE.FEAT_DIM": 512,
    "MODEL.BACKBONE.WITH_NL": False,
    "MODEL.BACKBONE.PRETRAIN": False,
    "INPUT.SIZE_TRAIN": [64, 32],
    "INPUT.SIZE_TEST": [64, 32],
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.MAX_EPOCH": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.BASE_LR": 0.0001,
    "RECIPE.BASELINE.MAX_EPOCH": 2,
    "RECIPE.BASELINE.WARMUP_ITERS": 0,
    "RECIPE.CONTROL": True,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 1,
    "QSD.PAIRING": "inbatch",
    "QUALITY.ROUNDS": 2,
    "SEED": 1,
}


def environment(data: Path, **more: str) -> dict[str, str]:
    """The process environment, with ``data`` as the host's data folder."""
    return {**os.environ, "FASTREID_DATASETS": str(data), "OMP_NUM_THREADS": "1", **more}


def options(values: dict[str, Any]) -> list[str]:
    """``KEY VALUE`` pairs for the command line."""
    return [str(part) for pair in values.items() for part in pair]


def train_net_command(config: str, output: Path, *flags: str, **overrides: Any) -> list[str]:
    """``python tools/train_net.py`` on a shipped config with the tiny recipe's options."""
    values = {**TINY_RECIPE, "OUTPUT_DIR": str(output), **overrides}
    script = str(ROOT / "tools" / "train_net.py")
    return [sys.executable, script, "--config-file", str(ROOT / "projects" / config), *flags, *options(values)]


def run(command: list[str], env: dict[str, str], *, cwd: Path | None = None, timeout: float = 240) -> tuple[int, str]:
    """Exit code and combined output."""
    done = subprocess.run(
        command,
        env=env,
        cwd=cwd,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@contextmanager
def forked_trainings(data: Path) -> Iterator[Callable[[dict[str, Any]], int]]:
    """Runs jobs of ``forked_training.py`` one after the other, with ``data`` as the host's; how each process ended."""
    command = [sys.executable, str(Path(__file__).parent / "forked_training.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(data, PYTHONPATH=str(ROOT)), text=True, **pipes) as server:

        def train(job: dict[str, Any]) -> int:
            print(json.dumps(job), file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield train
        server.stdin.close()


def assert_same(one: Any, other: Any) -> None:
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for own, others in zip(one, other, strict=True):
            assert_same(own, others)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other
