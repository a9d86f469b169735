"""Face networks: names, sizes and outputs of the published ones, and what width and input size change.

The arrays: outputs of QUD's networks (see golden QUD) and of arcface_torch's MobileFaceNets, run by their own programs
with weights from a formula.
"""

from __future__ import annotations

import inspect
import pickle
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

DATA = Path(__file__).parents[1] / "data" / "face_networks.npz"
#: Function, gain of the weights' formula.
RECORDED = {
    "qud/mobilefacenet": ("mobilefacenet_qud", 1.1),
    "qud/resnet18": ("iresnet18", 1.0),
    "qud/resnet50": ("iresnet50", 0.8),
    "qud/resnet100": ("iresnet100", 0.7),
    "arcface_torch/mbf": ("mobilefacenet", 1.1),
    "arcface_torch/mbf_large": ("mobilefacenet_large", 1.1),
}
SMALL = [networks.iresnet18, networks.mobilefacenet, networks.mobilefacenet_large, networks.mobilefacenet_qud]


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = getattr(networks, name)()
    return network


def closed_form_images() -> torch.Tensor:
    k, c, h, w = np.ogrid[0:2, 0:3, 0:112, 0:112]
    images = 0.9 * np.sin(0.05 * (k + 1) * h + 0.11 * w * (1 + 0.3 * c) + 0.7 * c)
    return torch.tensor(images, dtype=torch.float32)


def fill(network: nn.Module, gain: float) -> None:
    """Weights from a generator per entry of the state dict."""
    activations = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.PReLU)}
    for index, (name, tensor) in enumerate(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        draw = np.random.default_rng([41, index]).standard_normal(tuple(tensor.shape))
        if name.endswith("running_var"):
            draw = 0.5 + np.abs(draw)
        elif name.endswith(("running_mean", ".bias")):
            draw = 0.01 * draw
        elif draw.ndim >= 2:
            draw = draw * gain / np.sqrt(np.prod(draw.shape[1:]))
        else:
            draw = 0.25 + 0.05 * draw if name in activations else 1 + 0.1 * draw
        tensor.copy_(torch.from_numpy(draw))


@pytest.mark.parametrize(
    ("name", "keys", "parameters"),
    [
        ("iresnet18", 187, 24_025_600),
        ("iresnet34", 331, 34_139_328),
        ("iresnet50", 475, 43_590_848),
        ("iresnet100", 925, 65_156_160),
        ("iresnet200", 1807, 118_833_920),
        ("mobilefacenet", 333, 2_059_520),
        ("mobilefacenet_large", 606, 6_314_880),
        ("mobilefacenet_qud", 331, 1_199_488),
    ],
)
def test_sizes_of_the_published_networks(name: str, keys: int, parameters: int) -> None:
    network = on_meta(name)
    assert len(network.state_dict()) == keys
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("recorded", RECORDED)
def test_names_shapes_and_outputs_of_the_published_networks(recorded: str) -> None:
    function, gain = RECORDED[recorded]
    network = on_meta(function)
    with np.load(DATA) as arrays:
        names, expected = arrays[f"{recorded}/names"].tolist(), torch.tensor(arrays[f"{recorded}/out"])
    assert [f"{name}:{'x'.join(map(str, t.shape))}" for name, t in network.state_dict().items()] == names
    network = network.to_empty(device="cpu").eval()
    fill(network, gain)
    with torch.no_grad():
        out = network(closed_form_images())
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("depth", [18, 34, 50, 100, 200])
def test_the_scale_of_the_embeddings_batch_norm_is_frozen_at_one(depth: int) -> None:
    network = on_meta(f"iresnet{depth}")
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"features.weight"}
    assert torch.equal(networks.iresnet18(8, width=1 / 16, input_size=16).features.weight, torch.ones(8))


@pytest.mark.parametrize("size", [48, (33, 64)])
@pytest.mark.parametrize("build", SMALL)
def test_small_networks_train_at_any_size(build: Callable[..., Any], size: int | tuple[int, int]) -> None:
    """Every parameter is reached, and the embedding has one value per dimension at sizes that 16 does not divide."""
    torch.manual_seed(0)
    network = build(24, width=1 / 16, input_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    out = network(torch.randn(3, 3, height, width, generator=torch_stream(1)))
    assert out.shape == (3, 24)
    (out * torch.randn(3, 24, generator=torch_stream(2))).sum().backward()
    moved = {name: p.grad is not None and bool(p.grad.any()) for name, p in network.named_parameters()}
    # A bias in front of a batch norm has no effect; the frozen scale gets no gradient.
    assert {name for name, reached in moved.items() if not reached} <= {"fc.bias", "features.weight"}


def test_width_is_a_factor_on_all_channels_but_the_embedding() -> None:
    with torch.device("meta"):
        full, half = networks.iresnet18(32), networks.iresnet18(32, width=0.5)
    assert half.conv1.weight.shape == (32, 3, 3, 3)
    assert half.layer4[1].conv2.weight.shape == (256, 256, 3, 3)
    assert full.fc.weight.shape == (32, 512 * 49)
    assert half.fc.weight.shape == (32, 256 * 49)


def test_input_size_changes_the_last_layer_only() -> None:
    with torch.device("meta"):
        for build, last in ((networks.iresnet18, "fc.weight"), (networks.mobilefacenet_qud, "conv_6_dw.conv.weight")):
            full, other = build().state_dict(), build(input_size=(96, 80)).state_dict()
            changed = [name for name in full if full[name].shape != other[name].shape]
            assert [name.endswith(last) for name in changed] == [True]
        assert networks.iresnet18(input_size=(96, 80)).fc.in_features == 512 * 6 * 5


@pytest.mark.parametrize("build", SMALL)
def test_the_embedding_is_computed_in_full_precision_under_autocast(build: Callable[..., Any]) -> None:
    network = build(8, width=1 / 16, input_size=32).eval()
    seen: dict[str, torch.dtype] = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 3, 32, 32, generator=torch_stream(3)))
    assert out.dtype == torch.float32
    assert [dtype for name, dtype in seen.items() if name in ("fc", "features.layers.2", "output_layer.linear")] == [
        torch.float32
    ]
    assert torch.bfloat16 in seen.values()


@pytest.mark.parametrize("build", SMALL)
def test_images_of_another_size_are_refused(build: Callable[..., Any]) -> None:
    network = build(8, width=1 / 16, input_size=(32, 48))
    with pytest.raises(
        ConfigError, match=r"got \(2, 3, 48, 32\); expected \[B, 3, 32, 48\]\. .*build the network with input_size"
    ):
        network(torch.zeros(2, 3, 48, 32))


@pytest.mark.parametrize("build", SMALL)
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_traced_network_takes_batches_of_any_size(build: Callable[..., Any]) -> None:
    """What exporters rely on; comparing sizes in a trace would warn."""
    network = build(8, width=1 / 16, input_size=32).eval()
    traced = torch.jit.trace(network, torch.zeros(1, 3, 32, 32), check_trace=False)
    images = torch.randn(3, 3, 32, 32, generator=torch_stream(6))
    torch.testing.assert_close(traced(images), network(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 16}, r"Width: got 16; expected a factor on all channels, above 0 and up to 8"),
        ({"width": 0.001}, r"Width: got 0\.001"),
        ({"input_size": 0}, r"Input size: got 0; expected pixels, or \(height, width\)"),
        ({"input_size": (1, 2, 3)}, r"Input size: got \(1, 2, 3\)"),
    ],
)
@pytest.mark.parametrize("build", SMALL)
def test_impossible_sizes_are_named(build: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(8, **options)


def test_each_depth_is_a_function_with_a_name_a_signature_and_a_text_of_its_own() -> None:
    for depth in (18, 34, 50, 100, 200):
        build = getattr(networks, f"iresnet{depth}")
        assert build.__name__ == f"iresnet{depth}"
        assert f"``r{depth}``" in build.__doc__
        assert list(inspect.signature(build).parameters) == ["embedding_dim", "width", "input_size", "dropout"]
        assert pickle.loads(pickle.dumps(build)) is build
    with pytest.raises(TypeError, match="depth"):
        networks.iresnet18(depth=50)
    assert networks.iresnet34(8, width=1 / 64, dropout=0.25).dropout.p == 0.25
