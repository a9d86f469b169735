"""Labels refreshed in training on two ranks: one network makes them, and both ranks use them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from gloo import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from toy import toy_cfg, write_market


def refreshed_on(rank: int, root: str) -> tuple[list[float], list[float]]:
    """The labels a rank uses after a refresh, and those that its own network would give; the networks differ."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.modeling.meta_arch import build_model

    from qsd_plugin.hosts.fastreid.datasets import training_set
    from qsd_plugin.hosts.fastreid.labelling import label_with
    from qsd_plugin.hosts.fastreid.refresh import RefreshHook, evaluating

    options = {
        "MODEL.META_ARCHITECTURE": "QSD",
        "MODEL.HEADS.NUM_CLASSES": 3,
        "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
        "QUALITY.REFRESH_EPOCHS": 1,
        "QUALITY.NEGATIVES": 4,
        "DATA.ROOT": root,
        "SEED": 0,
    }
    cfg = toy_cfg(Path(root) / "out", **options)
    torch.manual_seed(rank)
    model = build_model(cfg)
    hook = RefreshHook(cfg, model, [model._qsd_quality])
    hook.trainer = SimpleNamespace(epoch=0, start_epoch=0, max_epoch=3)
    hook.after_epoch()
    items = training_set(cfg, "Market1501")[1]
    used = model._qsd_quality([path for path, _, _ in items], None, torch.device("cpu"))[0].tolist()
    with evaluating(model):
        own = label_with(cfg, model, "Market1501", items, extractor="")
    return used, torch.from_numpy(own.score).float().tolist()


def test_both_ranks_use_the_labels_of_the_first(tmp_path: Path) -> None:
    write_market(tmp_path, num_ids=3, per_id=4, test_ids=1)
    (first, first_own), (second, second_own) = run_ranks(refreshed_on, str(tmp_path))
    assert first == second == first_own
    assert second_own != first_own
