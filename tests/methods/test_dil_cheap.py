"""DIL's cheaper operations against torch's chains, values and gradients, and losses back-propagated at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil.at_once import at_once
from qsd_plugin.methods.dil.cheap import (
    channels_last,
    enlarged_conv,
    normalise,
    padded_depthwise_norm,
    reflect_pad,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch_stream(seed, "cheap")).requires_grad_()


def chain(x: Tensor, scale: Tensor | None, shift: Tensor | None, over: str, slope: float) -> Tensor:
    if over == "positions":
        normal = F.instance_norm(x, eps=1e-3)
    else:
        deviation, mean = torch.std_mean(x, dim=(1, 2, 3) if over == "sample" else (0, 1, 2, 3), keepdim=True)
        normal = (x - mean) / (deviation + 1e-3)
    if scale is not None and shift is not None:
        normal = normal * scale[..., None, None] + shift[..., None, None]
    return F.leaky_relu(normal, slope)


@pytest.mark.parametrize("slope", [1.0, 0.2])
@pytest.mark.parametrize(
    ("over", "affine"),
    [("positions", (3, 4)), ("positions", (4,)), ("positions", None), ("sample", (4,)), ("batch", (4,))],
)
def test_norms(over: str, affine: tuple[int, ...] | None, slope: float) -> None:
    x = draw(3, 4, 5, 3)
    parts = [None, None] if affine is None else [draw(*affine, seed=1), draw(*affine, seed=2)]
    inputs = [x, *(part for part in parts if part is not None)]
    weights = draw(3, 4, 5, 3, seed=3).detach()
    both = (
        normalise(channels_last(x), *parts, over=over, eps=1e-3, slope=slope),
        chain(x, *parts, over=over, slope=slope),
    )
    results = [(found, *torch.autograd.grad((found * weights).sum(), inputs)) for found in both]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_padding_can_be_differentiated_twice() -> None:
    x = draw(2, 3, 6, 5)
    torch.testing.assert_close(reflect_pad(x, 2), F.pad(x, (2, 2, 2, 2), mode="reflect"), rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda maps: reflect_pad(maps, 2), (x,))
    assert torch.autograd.gradgradcheck(lambda maps: reflect_pad(maps, 2), (x,))


@pytest.mark.parametrize("relu", [True, False])
def test_depthwise_convolution_with_its_norm(relu: bool) -> None:
    """Running statistics, too."""
    x = draw(3, 4, 6, 5)
    results, states = [], []
    for cheap in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4).double()
            norm = nn.BatchNorm2d(4).double()
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        if cheap:
            found = padded_depthwise_norm(channels_last(x), conv, norm, relu=relu)
        else:
            found = norm(conv(x)).relu() if relu else norm(conv(x))
        leaves = (x, *conv.parameters(), *norm.parameters())
        results.append((found, *torch.autograd.grad(found.square().sum() + found.sum(), leaves)))
        states.append(norm.state_dict())
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value)


@pytest.mark.parametrize("factor", [2, 4])
def test_convolution_of_an_enlarged_map(factor: int) -> None:
    x, weight, bias = draw(2, 3, 4, 3), draw(5, 3, 3, 3, seed=1), draw(5, seed=2)
    enlarged = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)
    both = enlarged_conv(x, weight, bias, factor), F.conv2d(enlarged, weight, bias, padding=1)
    results = [(found, *torch.autograd.grad(found.square().sum(), (x, weight, bias))) for found in both]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


class TestAtOnce:
    def parts(self) -> tuple[nn.Linear, Tensor, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Linear(4, 2).double()
        return network, draw(3, 4), draw(3, 4, seed=1)

    def test_gradients_are_those_of_one_pass(self) -> None:
        """Times what is multiplied later, added where a tensor is in several losses, ``None`` where there is none."""
        network, x, other = self.parts()
        inner = x * 2

        def loss(source: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            out = network(source)
            return scale * out.square().sum(), out

        results = []
        for run in (at_once, lambda function, inputs, _: function(*inputs)):
            first, out = run(lambda source: loss(source, 1.0), (inner,), network.parameters())
            second, _ = run(lambda source, _unused: loss(source, 0.3), (inner + 1, other), network.parameters())
            total = 5 * first + second
            leaves = (x, other, *network.parameters())
            results.append((first, out, *torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)))
        for ours, expected in zip(*results, strict=True):
            assert (ours is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(ours, expected)
        assert not results[0][1].requires_grad
        assert results[0][3] is None  # ``other`` is not reached

    def test_what_a_loss_was_computed_from_is_gone(self) -> None:
        network, x, _ = self.parts()
        kept: list[Any] = []

        def loss(source: Tensor) -> tuple[Tensor]:
            out = network(source).square()
            kept.append(out.grad_fn)
            return (out.sum(),)

        at_once(loss, (x,), network.parameters())[0]
        with pytest.raises(RuntimeError, match="freed"):
            kept[0](torch.ones(3, 2, dtype=torch.float64))

    def test_without_gradients_nothing_is_differentiated(self) -> None:
        network, x, _ = self.parts()
        with torch.no_grad():
            value = at_once(lambda source: (network(source).sum(),), (x,), network.parameters())[0]
        assert not value.requires_grad

    def test_under_float16_the_loss_scale_comes_first(self) -> None:
        x = draw(3, 4)
        with torch.autocast("cpu", dtype=torch.float16):
            value = at_once(lambda source: (source.square().sum(),), (x,), ())[0]
        assert "Known" not in type(value.grad_fn).__name__
        value = at_once(lambda source: (source.square().sum(),), (x,), ())[0]
        assert "Known" in type(value.grad_fn).__name__
