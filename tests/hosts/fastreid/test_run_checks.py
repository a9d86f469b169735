"""The run doctor's preprocessing check on a network whose input can be looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qsd_plugin.hosts import fastreid as host

host.activate()

from qsd_plugin.hosts.fastreid.run_checks.preprocessing import accuracies, candidates  # noqa: E402  (needs the host)

MEAN, STD = (100.0, 50.0, 25.0), (10.0, 5.0, 2.5)


class Spy(nn.Module):
    """Normalises as the host does, keeps what it sees, and answers with the channels' means."""

    def __init__(self, cls_layer: type[nn.Module]) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.ones(1, 3, 1, 1))
        self.heads: Any = SimpleNamespace(weight=torch.eye(3), cls_layer=cls_layer())
        self.seen: list[torch.Tensor] = []

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # In place, as the host's own architectures do it where row S13 is switched off.
        images = batch["images"].sub_(self.pixel_mean).div_(self.pixel_std)
        self.seen.append(images)
        return images.mean(dim=(2, 3))


class Linear(nn.Identity):
    """Named as the host's plain softmax layer."""


class ArcSoftmax(nn.Identity):
    """Named as one of the host's layers that compare directions."""


def test_every_way_feeds_what_its_name_says_and_leaves_the_images_alone() -> None:
    images = torch.rand(4, 3, 6, 2, generator=torch.Generator().manual_seed(0)) * 255
    given = images.clone()
    model, ways = Spy(Linear), candidates(MEAN, STD)
    accuracies(model, images, torch.zeros(4, dtype=torch.int64), ways)
    torch.testing.assert_close(images, given)
    seen = {way.name: image for way, image in zip(ways, model.seen, strict=True)}
    configured = (given - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(seen["as configured"], configured)
    torch.testing.assert_close(seen["BGR channels"], configured.flip(1))
    torch.testing.assert_close(seen["range 0 to 1"], given / 255)
    torch.testing.assert_close(seen["BGR channels and no normalisation"], given.flip(1))
    assert len(seen) == 10  # two channel orders of the configured normalisation and of the four common ones


def test_a_common_normalisation_that_is_configured_is_not_tried_twice() -> None:
    names = [way.name for way in candidates((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))]
    assert "ImageNet mean and std" not in names
    assert len(names) == 8


@pytest.mark.parametrize(("cls_layer", "accuracy"), [(Linear, 0.0), (ArcSoftmax, 1.0)])
def test_classifier_compares_as_the_host_s_layer_does(cls_layer: type[nn.Module], accuracy: float) -> None:
    # The image is reddest, but its blue kernel is five times as long: only directions say red.
    model = Spy(cls_layer)
    model.heads.weight = torch.diag(torch.tensor([1.0, 1.0, 5.0]))
    images = torch.tensor([200.0, 10.0, 100.0]).view(1, 3, 1, 1).expand(40, 3, 2, 2).clone()
    way = [way for way in candidates((0.0,) * 3, (255.0,) * 3) if way.name == "as configured"]
    assert accuracies(model, images, torch.zeros(40, dtype=torch.int64), way) == {"as configured": accuracy}
