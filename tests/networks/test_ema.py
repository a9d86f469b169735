"""The moving average of a network in one process; several ranks are in tests/ddp."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qsd_plugin.networks import ema_update, quality_regressor


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net(torch.randn(2, 3, 4, 4))  # moves the running statistics
    return net


def test_average_follows_parameters_and_statistics_and_copies_counters():
    average, trained = network(0), network(1)
    trained[1].num_batches_tracked.fill_(7)
    before, target = {k: v.clone() for k, v in average.state_dict().items()}, trained.state_dict()
    ema_update(average, trained, 0.9)
    for name, value in average.state_dict().items():
        if name == "1.num_batches_tracked":
            assert value == 7
        else:
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * target[name])
    assert not average[0].weight.grad_fn


def test_momentum_zero_copies_and_one_keeps():
    average, trained = network(0), network(1)
    before = {k: v.clone() for k, v in average.state_dict().items()}
    ema_update(average, trained, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in average.named_parameters())
    ema_update(average, trained, 0.0)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in average.state_dict().items())


def test_network_may_hold_more_than_its_average():
    average = network(0)
    trained = nn.Sequential(*network(1), nn.Linear(4, 4))
    ema_update(average, trained, 0.0)
    assert torch.equal(average[0].weight, trained[0].weight)


def test_update_does_not_wait_for_the_device():
    with FakeTensorMode():
        ema_update(nn.BatchNorm2d(4), nn.BatchNorm2d(4), 0.5)


def test_quality_regressor_is_flatten_prelu_linear_behind_the_backbone():
    backbone = nn.Conv2d(3, 2, 1)
    net = quality_regressor(backbone, 2 * 4 * 4).eval()
    images = torch.randn(5, 3, 4, 4)
    flat = backbone(images).flatten(1)
    expected = torch.where(flat > 0, flat, 0.25 * flat) @ net[4].weight[0] + net[4].bias
    torch.testing.assert_close(net(images), expected)
