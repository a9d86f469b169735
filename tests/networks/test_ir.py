"""AdaFace's IR networks: names, sizes and outputs of the published ones, what width and input size change.

The numbers were recorded from the authors' program with weights from a formula, see the golden file of QGFace.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qsd_plugin import networks
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream

DATA = Path(__file__).parents[1] / "data" / "qgface.npz"
RECORDED = {"ir18": "ir_18", "ir34": "ir_34", "ir50": "ir_50", "ir100": "ir_101", "ir_se_50": "ir_se_50"}
SMALL = [networks.ir_18, networks.ir_se_50]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name.startswith("F_net/")}


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = getattr(networks, name)()
    return network


def fill(network: nn.Module) -> None:
    """Weights from a formula per entry of the state dict."""
    activations = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.PReLU)}
    for index, (name, tensor) in enumerate(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        wave = np.sin(0.37 * np.arange(tensor.numel()) + index).reshape(tuple(tensor.shape))
        if name.endswith("running_var"):
            wave = 1 + 0.3 * wave
        elif name.endswith("running_mean"):
            wave = 0.1 * wave
        elif name.endswith(".bias"):
            wave = 0.05 * wave
        elif wave.ndim >= 2:
            wave = 1.5 * wave / np.sqrt(np.prod(wave.shape[1:]))
        else:
            wave = 0.25 + 0.1 * wave if name in activations else 1 + 0.1 * wave
        tensor.copy_(torch.from_numpy(wave))


@pytest.mark.parametrize("recorded", RECORDED)
def test_sizes_of_the_published_networks(golden: dict[str, np.ndarray], recorded: str) -> None:
    network = on_meta(RECORDED[recorded])
    assert len(network.state_dict()) == golden[f"F_net/{recorded}_keys"]
    assert sum(parameter.numel() for parameter in network.parameters()) == golden[f"F_net/{recorded}_params"]


def test_names_and_output_of_the_published_network(golden: dict[str, np.ndarray]) -> None:
    network = on_meta("ir_18")
    assert list(network.state_dict()) == golden["F_net/ir18_key_order"].tolist()
    network = network.double().to_empty(device="cpu").eval()
    fill(network)
    images = np.sin(0.013 * np.arange(2 * 3 * 112 * 112)).reshape(2, 3, 112, 112)
    with torch.no_grad():
        embedding = network(torch.from_numpy(images))
    norm = embedding.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(norm.numpy(), golden["F_net/ir18_norm"], rtol=1e-9)
    np.testing.assert_allclose((embedding / norm).numpy(), golden["F_net/ir18_out"], rtol=0, atol=1e-9)


def test_groups_of_the_weight_decay(golden: dict[str, np.ndarray]) -> None:
    """Everything decays, biases and PReLU included, but batch norms."""
    network = on_meta("ir_18")
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    spared = {id(parameter) for module in norms for parameter in module.parameters()}
    groups: tuple[list[int], list[int]] = ([], [])
    for parameter in network.parameters():
        groups[id(parameter) in spared].append(parameter.numel())
    assert [len(group) for group in groups] == golden["F_net/ir18_decay_nodecay_tensors"].tolist()
    assert [sum(group) for group in groups] == golden["F_net/ir18_decay_nodecay_numel"].tolist()


@pytest.mark.parametrize("size", [48, (33, 64)])
@pytest.mark.parametrize("build", SMALL)
def test_small_networks_train_at_any_size(build: Callable[..., Any], size: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = build(24, width=1 / 16, input_size=size, dropout=0.0)
    height, width = (size, size) if isinstance(size, int) else size
    out = network(torch.randn(3, 3, height, width, generator=torch_stream(1)))
    assert out.shape == (3, 24)
    (out * torch.randn(3, 24, generator=torch_stream(2))).sum().backward()
    still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= {"output_layer.3.bias"}  # in front of a batch norm


def test_squeeze_excite_weighs_channels_by_their_means() -> None:
    unit = networks.ir_se_50(8, width=1 / 4, input_size=16).body[0].res_layer[6]
    x = torch.randn(2, 16, 3, 4, generator=torch_stream(3))
    hidden = torch.relu(x.mean((2, 3)) @ unit.fc1.weight[:, :, 0, 0].T)
    expected = x * torch.sigmoid(hidden @ unit.fc2.weight[:, :, 0, 0].T)[:, :, None, None]
    torch.testing.assert_close(unit(x), expected)


def test_dropout_is_in_front_of_the_linear_layer_and_off_in_evaluation() -> None:
    network = networks.ir_18(8, width=1 / 16, input_size=32)
    assert network.output_layer[1].p == 0.4
    images = torch.randn(2, 3, 32, 32, generator=torch_stream(4))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_the_embedding_is_computed_in_full_precision_under_autocast() -> None:
    network = networks.ir_18(8, width=1 / 16, input_size=32).eval()
    seen: list[torch.dtype] = []
    network.body.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 3, 32, 32, generator=torch_stream(5)))
    assert (out.dtype, seen) == (torch.float32, [torch.bfloat16])


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_traced_network_takes_batches_of_any_size() -> None:
    network = networks.ir_18(8, width=1 / 16, input_size=32).eval()
    traced = torch.jit.trace(network, torch.zeros(1, 3, 32, 32), check_trace=False)
    images = torch.randn(3, 3, 32, 32, generator=torch_stream(6))
    torch.testing.assert_close(traced(images), network(images))


def test_images_of_another_size_are_refused() -> None:
    network = networks.ir_18(8, width=1 / 16, input_size=(32, 48))
    with pytest.raises(ConfigError, match=r"got \(2, 3, 48, 32\); expected \[B, 3, 32, 48\]"):
        network(torch.zeros(2, 3, 48, 32))
    with pytest.raises(ConfigError, match=r"Width: got 16; expected a factor"):
        networks.ir_18(8, width=16)
