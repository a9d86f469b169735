"""AGW's backbone: its non-local block against recorded numbers, its structure, small versions of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.networks.agw_resnet import AGWResNet, NonLocal
from qsd_plugin.networks.taps import TapRecorder

DATA = Path(__file__).parents[1] / "data" / "agw_parts.npz"


def test_non_local_block_in_training_and_evaluation() -> None:
    with np.load(DATA) as arrays:
        golden = {name.removeprefix("nonlocal/"): torch.tensor(arrays[name]) for name in arrays if "nonlocal" in name}
    block = NonLocal(8)
    parameters = {name.removeprefix("param/"): value for name, value in golden.items() if name.startswith("param/")}
    assert parameters.keys() == dict(block.named_parameters()).keys()
    block.load_state_dict(parameters, strict=False)
    torch.testing.assert_close(block(golden["x"]), golden["out_train"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block.W[1].running_mean, golden["running_mean"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(block.W[1].running_var, golden["running_var"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(block.eval()(golden["x"]), golden["out_eval_after"], rtol=1e-5, atol=1e-6)


def test_non_local_block_is_attention_over_all_positions() -> None:
    """The definition with its N x N matrix."""
    block = NonLocal(6).eval()
    nn.init.normal_(block.W[1].weight, generator=torch_stream(0))
    x = torch.randn(2, 6, 3, 5, generator=torch_stream(1))
    theta, phi, g = (layer(x).flatten(2) for layer in (block.theta, block.phi, block.g))
    attention = theta.transpose(1, 2) @ phi / 15
    gathered = (attention @ g.transpose(1, 2)).transpose(1, 2).reshape(2, 1, 3, 5)
    torch.testing.assert_close(block(x), block.W(gathered) + x)
    assert not torch.allclose(block(x), x, atol=1e-3)


def test_a_new_non_local_block_changes_nothing() -> None:
    x = torch.randn(2, 6, 3, 5, generator=torch_stream(2))
    assert torch.equal(NonLocal(6)(x), x)


def test_stages_and_their_maps() -> None:
    network = AGWResNet(width=2, blocks=(1, 2, 3, 1), non_local=(0, 1, 2, 0))
    assert network.num_features == 64
    with TapRecorder(network, ["layer1.0", "NL_2.0", "NL_3.1", "layer4.0"]) as taps:
        out = network(torch.zeros(2, 3, 64, 32))
    assert [tuple(tap.shape[1:]) for tap in taps.values()] == [(8, 16, 8), (16, 8, 4), (32, 4, 2), (64, 4, 2)]
    assert torch.equal(out, taps["layer4.0"])
    assert AGWResNet(width=2, last_stride=2)(torch.zeros(2, 3, 64, 32)).shape == (2, 64, 2, 1)


def test_non_local_blocks_follow_the_last_blocks_of_a_stage() -> None:
    network = AGWResNet(width=2, blocks=(1, 3, 1, 1), non_local=(0, 2, 0, 0))
    order: list[str] = []
    for name in ("layer2.0", "layer2.1", "layer2.2", "NL_2.0", "NL_2.1"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    network(torch.zeros(2, 3, 32, 32))
    assert order == ["layer2.0", "layer2.1", "NL_2.0", "layer2.2", "NL_2.1"]


def test_negative_values_pass_the_stem() -> None:
    """Unlike in a ResNet, where a ReLU follows; the published weights were trained without."""
    network = AGWResNet(width=2).eval()
    nn.init.constant_(network.bn1.bias, -10.0)  # the stem's values are negative, whatever its weights are
    seen: list[torch.Tensor] = []
    network.layer1[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.randn(1, 3, 32, 32, generator=torch_stream(3)))
    assert seen[0].min() < 0


def test_norm_is_chosen_by_the_caller() -> None:
    network = AGWResNet(width=2, norm=lambda channels: nn.GroupNorm(2, channels))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(("blocks", "non_local"), [((1, 2, 1, 1), (0, 3, 0, 0)), ((1, 1, 1), (0, 0, 0))])
def test_impossible_stages_are_named(blocks: tuple[int, ...], non_local: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"AGWResNet blocks and non-local blocks: got .* four numbers each"):
        AGWResNet(width=2, blocks=blocks, non_local=non_local)
