"""One step of an embedding and a classifier whose class rows are spread over any number of ranks, also sampled."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.margins import ShardedClassifier, arcface_logits, class_range, sharded

ROWS, CLASSES, DIM = 8, 11, 6
RATES = (1.0, 0.5)
STEP = 3


class Step(nn.Module):
    """Embedding and classifier; the class rows are left out of data-parallel training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, DIM)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch_stream(7, name)))
        margin = functools.partial(arcface_logits, scale=8)
        self.classifier = ShardedClassifier(DIM, CLASSES, margin=margin, sample_rate=rate, seed=2)
        with torch.no_grad():
            self.classifier.weight.mul_(100)  # about unit variance, so that gradients are of the size of 1

    def forward(self, images: Tensor, labels: Tensor) -> Any:
        return self.classifier(self.embedding(images), labels, step=STEP)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 5, generator=torch_stream(8)), torch.tensor([0, 10, 4, 4, 9, 1, 6, 5])


def step(rank: int, world_size: int, rate: float) -> dict[str, Tensor]:
    """One step on this rank's part of the batch; with one rank on all of it."""
    model = Step(rate)
    own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    images, labels = (tensor[own] for tensor in data())
    network: nn.Module = model
    if world_size > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["classifier.weight"])
        network = DistributedDataParallel(model)
    result = network(images, labels)
    result.loss.backward()
    return {
        "loss": result.loss.detach(),
        "accuracy": result.accuracy,
        "rows": model.classifier.weight.grad,
        **{name: parameter.grad for name, parameter in model.embedding.named_parameters()},
    }


def classifier_case(rank: int, world_size: int) -> dict[str, Any]:
    """What a rank finds: a step for each sample rate, one without the gather as control, and a wrong label."""
    results: dict[str, Any] = {str(rate): step(rank, world_size, rate) for rate in RATES}
    apart = {name: lambda tensor: tensor for name in ("gather_equal_rows", "gather_with_gradient")}
    with mock.patch.multiple(sharded, **apart):
        results["control"] = step(rank, world_size, 1.0)
    try:  # the label of one rank is wrong, and all of them must say so
        Step(1.0)(data()[0][:2], torch.tensor([0, CLASSES if rank == 1 else 3]))
    except DataError as error:
        results["error"] = str(error)
    return results


def difference(ranks: list[dict[str, Any]], kind: str) -> float:
    """Of loss, accuracy and gradients to one process; every rank has its rows, and all the same of the rest."""
    whole = step(0, 1, 1.0)
    rows = torch.cat([rank[kind]["rows"] for rank in ranks]) - whole.pop("rows")
    others = [rank[kind][name] - value for rank in ranks for name, value in whole.items()]
    return max(tensor.abs().max().item() for tensor in [rows, *others])


def assert_sampled(ranks: list[dict[str, Any]]) -> None:
    """A plain softmax over what every rank draws, in loss and gradients; nothing for the other classes."""
    model, (images, labels) = Step(1.0), data()
    kept: list[int] = []
    for rank in range(len(ranks)):
        start, stop = class_range(CLASSES, rank, len(ranks))
        seed = torch_stream(2, "class sample", STEP, rank).initial_seed()
        number = torch.rand(stop - start, generator=torch.Generator().manual_seed(seed))
        true = sorted({int(label) - start for label in labels if start <= label < stop})
        others = [row for row in number.argsort(descending=True).tolist() if row not in true]
        count = int(0.5 * (stop - start))
        kept += sorted(start + row for row in [*true, *others[: max(0, count - len(true))]])
    assert len(kept) < CLASSES
    target = torch.tensor([kept.index(int(label)) for label in labels])
    cosine = F.linear(F.normalize(model.embedding(images)), F.normalize(model.classifier.weight[kept]))
    expected = F.cross_entropy(arcface_logits(cosine, target, scale=8), target)
    expected.backward()
    rows = torch.cat([rank["0.5"]["rows"] for rank in ranks])
    torch.testing.assert_close(rows, model.classifier.weight.grad, rtol=0, atol=1e-6)
    left_out = [row for row in range(CLASSES) if row not in kept]
    assert torch.equal(rows[left_out], torch.zeros(len(left_out), DIM))
    for rank in ranks:
        torch.testing.assert_close(rank["0.5"]["loss"], expected.detach())
        for name, parameter in model.embedding.named_parameters():
            torch.testing.assert_close(rank["0.5"][name], parameter.grad, rtol=0, atol=1e-6)
