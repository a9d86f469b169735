"""S11: INPUT.AFFINE works with torchvision's present argument names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))


def test_s11_random_affine_takes_the_hosts_arguments(tmp_path: Path) -> None:
    from fastreid.data.transforms import build_transforms

    transforms = build_transforms(toy_cfg(tmp_path, **{"INPUT.AFFINE.ENABLED": True}))
    torch.manual_seed(3)
    result = transforms(picture())

    # The same by torchvision alone: nearest neighbour and black corners, as the host asks for in the old words.
    affine = torchvision.transforms.RandomAffine(10, scale=(0.9, 1.1), shear=0.1)
    torch.manual_seed(3)
    resized = torchvision.transforms.Resize((64, 32), interpolation=torchvision.transforms.InterpolationMode.BICUBIC)
    expected = torch.from_numpy(np.array(affine(resized(picture())), dtype=np.float32)).permute(2, 0, 1)
    assert result.equal(expected)
    assert not result.equal(torch.from_numpy(np.array(picture(), dtype=np.float32)).permute(2, 0, 1))


def test_s11_torchvision_itself_is_untouched() -> None:
    import fastreid.data.transforms.build as host

    assert torchvision.transforms.RandomAffine is not host.T.RandomAffine
    assert torchvision.transforms.Resize is host.T.Resize
