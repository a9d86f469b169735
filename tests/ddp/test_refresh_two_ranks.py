"""Labels refreshed in training on two ranks: one network makes them, and both ranks use them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from gloo import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from toy import toy_cfg, write_market


def refreshed_on(rank: int, root: str) -> list[float]:
    """The labels a rank uses after a refresh; the ranks' networks differ, so labels of their own would too."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.modeling.meta_arch import build_model

    from qsd_plugin.hosts.fastreid.datasets import training_set
    from qsd_plugin.hosts.fastreid.refresh import RefreshHook

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
    paths = [path for path, _, _ in training_set(cfg, "Market1501")[1]]
    labels: list[float] = model._qsd_quality(paths, None, torch.device("cpu"))[0].tolist()
    return labels


def test_both_ranks_use_the_labels_of_the_first(tmp_path: Path) -> None:
    write_market(tmp_path, num_ids=3, per_id=4, test_ids=1)
    first, second = run_ranks(refreshed_on, str(tmp_path))
    assert first == second
    assert len(set(first)) > 6
    alone = refreshed_on(0, str(tmp_path))
    assert alone == first  # rank 0 labelled, and a single process does the same
    assert refreshed_on(1, str(tmp_path)) != first  # the other rank's network would have labelled otherwise
