"""What QSD's loss costs: no transfer from the device (that nothing reads a value is in ``test_qsd_loss.py``, with the
backward pass), and the energy map's own backward pass, which is the right one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qsd_plugin.methods.qsd import QSDLoss, energy_map, inbatch_pairs


class NoTransfers(TorchDispatchMode):
    """Raises when a result leaves the device of an operand: on a GPU such a copy waits for all that was queued."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _on_device(args) and any(tensor.device.type == "cpu" for tensor in _tensors(result)):
            raise AssertionError(f"{func} brings a result to the CPU")
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _on_device(value: Any) -> bool:
    return any(tensor.device.type != "cpu" for tensor in _tensors(value))


def _fakes_cuda() -> bool:
    try:
        with FakeTensorMode():
            labels = torch.rand(4, device="cuda")
            inbatch_pairs(torch.zeros_like(labels), labels, num_instances=4)
    except RuntimeError as error:
        if "driver" not in str(error):
            raise
        return False
    return True


needs_fake_cuda = pytest.mark.skipif(
    not _fakes_cuda(), reason="this torch cannot fake CUDA tensors without a CUDA driver (2.6 cannot)"
)


def batch(device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Taps, identities and labels of two identities with four images each; inside a fake mode nothing has values."""
    taps = {"map": torch.rand(8, 4, 3, 2, device=device), "vector": torch.rand(8, 5, device=device)}
    taps = {name: tap.requires_grad_() for name, tap in taps.items()}
    return taps, torch.arange(2, device=device).repeat_interleave(4), torch.rand(8, device=device)


@needs_fake_cuda
@pytest.mark.parametrize("options", [{}, {"map_distance": "l1", "map_norm": "l2", "missing": "tie"}], ids=str)
def test_no_result_leaves_the_device_and_no_value_is_read(options: dict[str, Any]) -> None:
    """On fake CUDA tensors, which have no values: reading one, or a shape that depends on one, is an error."""
    loss = QSDLoss({"map": 1.0, "vector": 0.5}, **options)
    with FakeTensorMode(), NoTransfers():
        taps, identities, quality = batch("cuda")
        valid = quality > 0.1
        pairs = inbatch_pairs(identities, quality, num_instances=4)
        loss.in_batch(taps, quality, pairs, valid)
        result = loss(taps, taps, quality, quality.flip(0), valid, valid.flip(0))
        everything = [result.total, *result.levels.values(), *result.stats.values()]
        assert {tensor.device.type for tensor in everything} == {"cuda"}


@needs_fake_cuda
def test_the_guards_above_see_what_they_are_there_for() -> None:
    with FakeTensorMode(), NoTransfers():
        _, identities, quality = batch("cuda")
        with pytest.raises(DynamicOutputShapeException):
            inbatch_pairs(identities, quality)  # pairs of unknown number: documented to wait
        with pytest.raises(AssertionError, match="brings a result to the CPU"):
            quality.cpu()


@pytest.mark.parametrize("norm", [None, "l2"])
def test_gradient_of_the_energy_map_is_that_of_the_formula(norm: str | None) -> None:
    features = torch.randn(3, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = features.transpose(2, 3).requires_grad_()  # not contiguous, as in channels-last training
    plain = (features**2).sum(dim=1) / 4
    if norm == "l2":
        plain = plain / plain.flatten(1).norm(dim=1)[:, None, None]
    upstream = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = energy_map(features, norm)
    torch.testing.assert_close(ours, plain)
    (got,) = torch.autograd.grad(ours, features, upstream)
    (expected,) = torch.autograd.grad(plain, features, upstream)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradgradcheck(lambda x: energy_map(x, norm), features)
