"""A host's own training script, run as it is by ``python -m qsd_plugin.run``: training, two processes, evaluation."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, TINY_RECIPE, environment, options, run
from toy import write_market

from qsd_plugin.quality.labels import QualityLabels

# The shape of fast-reid's tools/train_net.py; it knows nothing of the plugin.
SCRIPT = """
import sys
sys.path.append('.')
from fastreid.config import get_cfg
from fastreid.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from fastreid.utils.checkpoint import Checkpointer

def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        cfg.defrost()
        cfg.MODEL.BACKBONE.PRETRAIN = False
        model = DefaultTrainer.build_model(cfg)
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
        return DefaultTrainer.test(cfg, model)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, num_machines=args.num_machines, machine_rank=args.machine_rank,
           dist_url=args.dist_url, args=(args,))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=8, per_id=8)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = os.environ.get("QSD_TEST_FASTREID")
    if checkout:
        return Path(checkout) / "tools" / "train_net.py"
    path = tmp_path_factory.mktemp("script") / "train_net.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def labels(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = data / "Market-1501-v15.09.15"
    keys = tuple(
        f"Market1501/{path.relative_to(root).as_posix()}" for path in sorted(root.glob("bounding_box_train/*"))
    )
    score = np.linspace(0, 100, len(keys))
    path = tmp_path_factory.mktemp("labels") / "market.npz"
    QualityLabels(score, score, np.zeros(len(keys)), keys, {"dataset": "Market1501", "scale": "minmax"}).save(path)
    return path


def command(script: Path, output: Path, *flags: str, **overrides: object) -> list[str]:
    values = {**TINY_RECIPE, "RECIPE.NAME": "''", "OUTPUT_DIR": str(output), **overrides}
    config = str(ROOT / "projects" / "QSD" / "market.yml")
    runner = [sys.executable, "-m", "qsd_plugin.run", str(script)]
    return [*runner, "--config-file", config, *flags, *options(values)]


def test_qsd_trains_in_two_processes_and_evaluates(script: Path, data: Path, labels: Path, tmp_path: Path) -> None:
    files = {"QUALITY.FILES": f'("{labels}",)'}
    code, text = run(command(script, tmp_path, "--num-gpus", "2", **files), environment(data))
    assert code == 0, text
    assert "World size: 2" in text
    events = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any(event.get("loss_qsd", 0) > 0 for event in events)
    tests = {"TEST.FLIP.ENABLED": True, "TEST.AQE.ENABLED": True, "TEST.AQE.QE_K": 2, "TEST.ROC.ENABLED": True}
    rerank = {"TEST.RERANK.ENABLED": True, "TEST.RERANK.K1": 5, "TEST.RERANK.K2": 2}
    weights = {"MODEL.WEIGHTS": str(tmp_path / "model_final.pth")}
    code, text = run(command(script, tmp_path, "--eval-only", **weights, **tests, **rerank), environment(data))
    assert code == 0, text
    assert "mAP" in text
    assert "TPR@FPR=1e-02" in text


def test_host_config_trains_and_every_trainable_module_moves(script: Path, data: Path, tmp_path: Path) -> None:
    plain = {"MODEL.META_ARCHITECTURE": "Baseline", "SOLVER.MAX_EPOCH": 2}
    code, text = run(command(script, tmp_path, **plain), environment(data))
    assert code == 0, text
    first = torch.load(tmp_path / "model_0000.pth", weights_only=True)["model"]
    last = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    still = [name for name, value in last.items() if name.endswith("weight") and torch.equal(value, first[name])]
    assert still == []


def test_resume_continues_with_the_next_epoch(script: Path, data: Path, labels: Path, tmp_path: Path) -> None:
    files = {"QUALITY.FILES": f'("{labels}",)'}
    code, text = run(command(script, tmp_path, **files), environment(data))
    assert code == 0, text
    code, text = run(command(script, tmp_path, "--resume", **files, **{"SOLVER.MAX_EPOCH": 2}), environment(data))
    assert code == 0, text
    assert "Starting training from epoch 1" in text
