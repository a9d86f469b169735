"""The recorded runs of the authors' program: a linear encoder, its head and the contrastive branch, eight steps.

In tests/data/qgface.npz the steps of a run are stacked; queues and logits of a queue that is still filling are padded.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsd_plugin.methods.qgface import (
    HeadResult,
    NormStatistics,
    ProxyQueue,
    QGContrast,
    QGFaceHead,
    contrast_options,
    unit_and_norm,
)
from qsd_plugin.networks import ema_update

DATA = Path(__file__).parents[1] / "data" / "qgface.npz"
Golden = dict[str, np.ndarray]
STEPS = range(8)

#: What differs from the profile ``figure`` with b = 0.2 and statistics from 16 and 4.
RUNS: dict[str, dict[str, Any]] = {
    "C_proxy_paperfig": {},
    "C_proxy_paperfig_f32": {"dtype": torch.float32},
    "C_proxy_codedefault": {"contrast": contrast_options("code_default")},
    "C_proxy_dyn_cos": {
        "contrast": {
            "coupling": "double",
            "weighting": "cos",
            "weight_range": "whole",
            "select": "mean",
            "margin_method": "dynamic",
            "threshold": 0.3,
        },
        "threshold": 0.3,
    },
    "C_fifo_paperfig": {"queue": {"compensate": False}},
    "C_proxy_zeroinit": {"start": "zeros"},
    "C_proxy_w0": {"weight": 0.0},
    "C_moco": {"queue": {"compensate": False}, "contrast": {"mask": "instance", "threshold": 0.5}, "momentum": 0.9},
}


def recorded() -> Golden:
    with np.load(DATA, allow_pickle=False) as arrays:
        return dict(arrays)


class Network(nn.Module):
    """Encoder and head in one forward pass, as data-parallel training wants it."""

    def __init__(self, golden: Golden, head: QGFaceHead, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 16)
        self.head = head
        self.to(dtype)  # before the recorded numbers go in
        with torch.no_grad():
            self.fc.weight.copy_(torch.from_numpy(golden["C/fc_w"]))
            self.fc.bias.copy_(torch.from_numpy(golden["C/fc_b"]))
            self.head.weight.copy_(torch.from_numpy(golden["C/kernel"].T))

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, HeadResult]:
        unit, norm = unit_and_norm(self.fc(images.flatten(1)))
        return unit, self.head(unit, norm, labels)


class JointRun:
    """QGFace's training step, put together from its parts.

    Args:
        parallel: Average gradients over the ranks.
    """

    def __init__(self, golden: Golden, run: str, *, parallel: bool = False) -> None:
        options = RUNS[run]
        self.dtype = options.get("dtype", torch.float64)
        self.images = torch.from_numpy(golden["C/images"]).to(self.dtype)
        self.labels = torch.from_numpy(golden["C/labels"])
        self.weight = options.get("weight", 1.0)
        head = QGFaceHead(16, 10, threshold=options.get("threshold", 0.2), start=options.get("start", (16.0, 4.0)))
        self.network = Network(golden, head, self.dtype)
        self.model = nn.parallel.DistributedDataParallel(self.network) if parallel else self.network
        self.queue = ProxyQueue(int(golden["C/queue_size"]), 16, **options.get("queue", {})).to(self.dtype)
        self.contrast = QGContrast(**options.get("contrast", {})).to(self.dtype)
        self.momentum = options.get("momentum")
        if self.momentum is not None:
            self.follower = copy.deepcopy(self.network.fc)
            self.key_statistics = NormStatistics(mean_init=16.0, std_init=4.0).to(self.dtype)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    @property
    def parts(self) -> dict[str, Any]:
        return {part: getattr(self, part) for part in ("network", "queue", "contrast", "optimizer")}

    def step(self, index: int, rows: slice = slice(None)) -> dict[str, Tensor]:
        """One step on some images of the batch, and what it left behind, under the names of the recording."""
        poor, clean = self.images[index, rows].unbind(1)
        labels = self.labels[index, rows]
        run = self._momentum_views if self.momentum is not None else self._joint_views
        head, contrast, negatives = run(poor, clean, labels)
        loss = head.loss + self.weight * contrast.loss
        self.optimizer.zero_grad()
        loss.backward()
        newest = (self.queue.pointer - 1 - torch.arange(self.queue.size)) % self.queue.size
        newest = newest[: int(self.queue.filled)]
        left = {
            "loss_cla": head.loss.detach(),
            "loss_con": contrast.loss.detach(),
            "loss": loss.detach(),
            "cls_logits": head.logits.detach(),
            "con_logits": contrast.logits.detach()[:, [0, *(newest + 1).tolist()]],
            "batch_mean": self.network.head.statistics.mean.clone(),
            "batch_std": self.network.head.statistics.std.clone(),
            "margin_ema": self.contrast.gap.clone(),
            "queue_embeds": self.queue.embeddings[newest],
            "queue_labels": self.queue.labels[newest],
            "queue_corrected": negatives.embeddings[newest].clone(),
            "g_fc_w": self.network.fc.weight.grad.clone(),
            "g_fc_b": self.network.fc.bias.grad.clone(),
            "g_kernel": self.network.head.weight.grad.T.clone(),
        }
        if self.queue.compensate:
            left["queue_proxies"] = self.queue.snapshots[newest]
        if self.momentum is not None:
            left["moco_fc_w"] = self.follower.weight.detach().clone()
            left["moco_batch_mean"] = self.key_statistics.mean.clone()
            left["moco_batch_std"] = self.key_statistics.std.clone()
        self.optimizer.step()
        left["fc_w"] = self.network.fc.weight.detach().clone()
        left["kernel"] = self.network.head.weight.detach().T.clone()
        return left

    def _joint_views(self, poor: Tensor, clean: Tensor, labels: Tensor) -> tuple[Any, ...]:
        """Both views through the network; the poor one is the anchor."""
        images = len(labels)
        unit, head = self.model(torch.cat([clean, poor]), labels.repeat(2))
        own = self.queue.enqueue(unit.view(2, images, -1), labels, self.network.head.weight)
        negatives = self.queue.negatives(self.network.head.weight)
        clean_scaler, poor_scaler = head.scaler.split(images)
        clean_unit, poor_unit = unit.split(images)
        contrast = self.contrast(poor_unit, clean_unit, negatives, labels, poor_scaler, clean_scaler, own)
        return head, contrast, negatives

    def _momentum_views(self, poor: Tensor, clean: Tensor, labels: Tensor) -> tuple[Any, ...]:
        """The clean view through the network is the anchor, the poor one through its moving average the key."""
        unit, head = self.model(clean, labels)
        with torch.no_grad():
            key, key_norm = unit_and_norm(self.follower(poor.flatten(1)))
            self.key_statistics.update(key_norm)
            key_scaler = self.key_statistics.scaler(key_norm)
            ema_update(self.follower, self.network.fc, self.momentum)
        own = self.queue.enqueue(key[None], labels)
        negatives = self.queue.negatives()
        return head, self.contrast(unit, key, negatives, labels, head.scaler, key_scaler, own), negatives

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        for name, state in torch.load(io.BytesIO(content), weights_only=True).items():
            self.parts[name].load_state_dict(state)
