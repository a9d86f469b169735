"""Class-sharded cross entropy in one process; tests/ddp has it on two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.sharded_cross_entropy import sharded_cross_entropy
from qsd_plugin.core.streams import torch_stream

DATA = Path(__file__).parents[1] / "data" / "agw_parts.npz"


def test_recorded_loss_and_gradient() -> None:
    with np.load(DATA) as golden:
        logits = torch.tensor(golden["dist_ce/logits"], requires_grad=True)
        loss = sharded_cross_entropy(logits, torch.tensor(golden["dist_ce/labels"]))
        loss.backward()
        assert loss.item() == pytest.approx(golden["dist_ce/ws1/loss"].item(), rel=1e-6)
        np.testing.assert_allclose(logits.grad, golden["dist_ce/ws1/grad"], atol=1e-7)


def test_is_plain_cross_entropy() -> None:
    logits = torch.randn(5, 9, generator=torch_stream(0), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, 3, 3, 5])
    torch.testing.assert_close(sharded_cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    assert torch.autograd.gradcheck(lambda x: 3 * sharded_cross_entropy(x, labels), logits)


def test_rows_without_a_class_are_left_out() -> None:
    logits = torch.randn(4, 6, generator=torch_stream(1), requires_grad=True)
    plain = logits.detach().clone().requires_grad_()
    labels = torch.tensor([2, -1, 0, -1])
    ours, expected = sharded_cross_entropy(logits, labels), F.cross_entropy(plain, labels, ignore_index=-1)
    (ours + expected).backward()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(logits.grad, plain.grad)
    assert sharded_cross_entropy(logits, torch.full((4,), -1)).item() == 0


def test_large_logits_and_half_precision() -> None:
    logits, labels = torch.tensor([[3000.0, -3000.0, 2999.0]]), torch.tensor([2])
    torch.testing.assert_close(sharded_cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    small = torch.randn(4, 6, generator=torch_stream(2)).half().requires_grad_()
    loss = sharded_cross_entropy(small, torch.arange(4))
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(small.float(), torch.arange(4)))
    assert loss.dtype == torch.float32
    assert small.grad.dtype == torch.float16


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"Sharded cross entropy: got \(\(2, 3\), \(4,\)\); expected \[B, C_r\]"):
        sharded_cross_entropy(torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64))
