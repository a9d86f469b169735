"""The recorded runs of the authors' program, by the recipe of their inputs: a linear student, a linear teacher."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsd_plugin.methods.qud import FeatureQueue, qud_loss

DATA = Path(__file__).parents[1] / "data" / "qud.npz"
Golden = dict[str, np.ndarray]


def recorded() -> Golden:
    with np.load(DATA, allow_pickle=False) as arrays:
        return dict(arrays)


def normal(*seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.default_rng(list(seed)).standard_normal(shape).astype(np.float32))


class Distillation:
    """A student that is trained on the teacher embeddings of a recorded run, [steps, B, 16].

    Args:
        parallel: Average gradients over the ranks.
    """

    def __init__(self, golden: Golden, run: str, temperature: float, *, parallel: bool = False, **options: Any) -> None:
        self.keys = torch.from_numpy(golden[f"{run}/teacher_raw"])
        self.temperature, self.options = temperature, options
        self.student = nn.Linear(20, 16, bias=False)
        with torch.no_grad():
            self.student.weight.copy_(torch.from_numpy(0.3 * np.random.default_rng([7, 1]).standard_normal((16, 20))))
        self.network = nn.parallel.DistributedDataParallel(self.student) if parallel else self.student
        self.queue = FeatureQueue(
            *golden[f"{run}/queue_init"].T.shape, initial=torch.tensor(golden[f"{run}/queue_init"].T)
        )
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(self, index: int, rows: slice = slice(None), *, train: bool = True) -> dict[str, Tensor]:
        """One step on some rows of the batch, and what it left behind."""
        keys = self.keys[index]
        raw = self.network(normal(11, index, shape=(len(keys), 20))[rows])
        raw.retain_grad()
        loss = qud_loss(raw, keys[rows], self.queue.features, self.temperature, **self.options)
        self.queue.enqueue(keys[rows])
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5.0)
        if train:
            self.optimizer.step()
        return {
            "loss": loss.detach(),
            "gradient": raw.grad,
            "norm": norm,
            "weight": self.student.weight.detach().clone(),
            "queue": self.queue.features.clone(),
            "pointer": self.queue.pointer.clone(),
        }

    def saved(self) -> bytes:
        state = {part: getattr(self, part).state_dict() for part in ("student", "queue", "optimizer")}
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        for part, state in torch.load(io.BytesIO(content), weights_only=True).items():
            getattr(self, part).load_state_dict(state)


def same_queue(features: Tensor, recorded_columns: np.ndarray) -> None:
    """The recorded queue in its order; older torch rounds a vector's length differently, by the last bit or two."""
    np.testing.assert_array_max_ulp(features.T.numpy(), recorded_columns, maxulp=3)
