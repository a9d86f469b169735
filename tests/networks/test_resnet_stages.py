"""A ResNet that returns the map of every stage: its shapes, torchvision's names and values, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.networks.resnet_stages import ResNetStages


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {"blocks": (2, 2, 2, 2), "block": "basic"}), ("resnet50", {})]
)
def test_values_and_names_are_torchvision_s(name: str, options: dict[str, object]) -> None:
    models = pytest.importorskip("torchvision.models")
    reference: nn.Module = models.get_model(name, weights=None)
    own = ResNetStages(**options)
    names = {key for key in reference.state_dict() if not key.startswith("fc.")}
    assert set(own.state_dict()) == names
    own.load_state_dict({key: value for key, value in reference.state_dict().items() if key in names})
    images = torch.randn(2, 3, 64, 32, generator=torch_stream(0))
    maps = own.eval()(images)
    reference.eval()
    x = reference.relu(reference.bn1(reference.conv1(images)))
    torch.testing.assert_close(maps[0], x)
    x = reference.maxpool(x)
    for stage in range(1, 5):
        x = getattr(reference, f"layer{stage}")(x)
        torch.testing.assert_close(maps[stage], x)
    assert tuple(part.shape[1] for part in maps) == own.channels


def test_fewer_stages_smaller_width_and_last_stride() -> None:
    images = torch.zeros(1, 3, 64, 32)
    maps = ResNetStages(blocks=(1, 1, 1), width=8)(images)
    assert [tuple(part.shape[1:]) for part in maps] == [(8, 32, 16), (32, 16, 8), (64, 8, 4), (128, 4, 2)]
    assert ResNetStages(blocks=(1,) * 4, block="basic", width=4, last_stride=1)(images)[-1].shape == (1, 32, 4, 2)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"ResNetStages blocks: got \(3, 0\); expected one to four numbers"):
        ResNetStages(blocks=(3, 0))
    with pytest.raises(ConfigError, match=r"block: got 'bottlenek'.*Did you mean 'bottleneck'"):
        ResNetStages(block="bottlenek")
