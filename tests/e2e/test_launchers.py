"""``tools/train_net.py`` on two machines, which are one here: two launchers, or the variables that torchrun sets.

Every launcher has one process; both ways train the same network from the same seed, bit for bit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, environment, options
from toy import write_market

from qsd_plugin.hosts.fastreid import processes

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="two gloo processes are for machines without CUDA"),
    pytest.mark.timeout(600),
]

FEW_STEPS: dict[str, Any] = {
    "INPUT.SIZE_TRAIN": [32, 16],
    "INPUT.SIZE_TEST": [32, 16],
    "MODEL.META_ARCHITECTURE": "Baseline",
    "SOLVER.MAX_EPOCH": 1,
    "SEED": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=4, per_id=8, test_ids=2)


def train(output: Path, data: Path, flags: list[list[str]], variables: list[dict[str, str]]) -> list[str]:
    """Run one command per machine, all writing to ``output``; what each printed."""
    config = str(ROOT / "tests" / "e2e" / "mixes" / "baseline.yml")
    script = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", config]
    running = [
        subprocess.Popen(
            [*script, *own, *options({**FEW_STEPS, "DATA.ROOT": str(data), "OUTPUT_DIR": str(output)})],
            env=environment(data, CUDA_VISIBLE_DEVICES="", **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own, more in zip(flags, variables, strict=True)
    ]
    try:
        texts = [process.communicate(timeout=280)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(texts)
    return texts


def weights(output: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(output / "model_final.pth", weights_only=True)["model"]
    return state


@pytest.fixture(scope="module")
def launched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    output = tmp_path_factory.mktemp("launched")
    url = f"tcp://127.0.0.1:{processes.free_port()}"
    shared = ["--num-gpus", "1", "--num-machines", "2", "--dist-url", url]
    return output, train(output, data, [[*shared, "--machine-rank", str(rank)] for rank in range(2)], [{}, {}])


def test_two_launchers_train_one_network(launched: tuple[Path, list[str]]) -> None:
    output, texts = launched
    assert "World size: 2" in texts[0]
    assert "Evaluation results" in texts[0]
    assert (output / "deploy" / "model.pth").is_file()
    assert weights(output)


def test_variables_of_torchrun_do_the_same(launched: tuple[Path, list[str]], data: Path, tmp_path: Path) -> None:
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}
    texts = train(tmp_path, data, [[], []], [{**group, "RANK": str(rank)} for rank in range(2)])
    assert "World size: 2" in texts[0]
    expected = weights(launched[0])
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, expected[name]), name
