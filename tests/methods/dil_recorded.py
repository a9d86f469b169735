"""The recorded runs of DIL's authors' program, by the recipe of their weights and inputs, which needs no download.

Every tensor is drawn from ``RandomState(crc32(name))``, whose stream NumPy has frozen.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from convert_dil_recorded import arrays, load
from torch import Tensor, nn

from qsd_plugin.methods import dil

DATA = Path(__file__).parents[1] / "data"
Golden = dict[str, np.ndarray]
NUM_CLASSES = 10
#: Of the small twins of the recorded runs.
SMALL = (64, 32)


def recorded(name: str) -> Golden:
    with np.load(DATA / f"dil_{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def recorded_at_full_size(folder: Path, name: str) -> Golden:
    """A run at 256 x 128, as the recording holds it."""
    return arrays(load(folder / f"{name}.pt"))


def fill(module: nn.Module, name: str) -> nn.Module:
    """Give every entry of the state dict its recorded start, and the module float64."""
    module.double()
    with torch.no_grad():
        for key, value in module.state_dict().items():
            value.copy_(torch.from_numpy(np.asarray(_entry(f"{name}/{key}", tuple(value.shape)))))
    return module


def _entry(key: str, shape: tuple[int, ...]) -> np.ndarray:
    leaf = key.rsplit(".", 1)[-1]
    stream = _stream(key)
    if leaf == "num_batches_tracked":
        return np.zeros(shape)
    if leaf == "running_mean":
        return 0.1 * stream.standard_normal(shape)
    if leaf == "running_var":
        return 1 + 0.5 * stream.random_sample(shape)
    if leaf in ("bias", "beta"):
        return 0.05 * stream.standard_normal(shape)
    if leaf == "gamma" or (leaf == "weight" and len(shape) == 1):
        return 0.6 + 0.1 * stream.standard_normal(shape)
    return stream.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))


def image(tag: str, count: int, size: tuple[int, int] = SMALL) -> Tensor:
    """A coarse field of colours with noise, [count, 3, H, W]."""
    stream = _stream(f"image/{tag}")
    coarse = torch.from_numpy(stream.standard_normal((count, 3, 8, 4)))
    smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    return smooth + 0.3 * torch.from_numpy(stream.standard_normal((count, 3, *size)))


def normal(tag: str, *shape: int) -> Tensor:
    return torch.from_numpy(_stream(f"normal/{tag}").standard_normal(shape))


def digest(tensor: Tensor) -> np.ndarray:
    """Sum, absolute sum, length and the first four values, with zeros for those that are missing."""
    flat = tensor.detach().double().flatten()
    first = F.pad(flat[:4], (0, max(4 - len(flat), 0)))
    return torch.cat([torch.stack([flat.sum(), flat.abs().sum(), flat.norm()]), first]).numpy()


def close(found: Tensor, expected: np.ndarray, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=1e-10)


def same_digest(found: Tensor, expected: np.ndarray, name: str = "", rtol: float = 1e-9) -> None:
    """Equal up to rounding; a sum may cancel, which its absolute sum bounds, and a value be small beside the others."""
    own, size = digest(found), max(found.numel(), 1)
    scale = np.maximum(np.abs(expected), expected[2] / np.sqrt(size))
    scale[0] = max(expected[1], np.abs(expected[0]))
    # A bias in front of a norm has a gradient of zero, of which only the sum of the rounding is left: some 1e-12.
    worst = np.abs(own - expected) - (rtol * scale + 1e-11)
    assert (worst <= 0).all(), f"{name}: {own} is not {expected}"


def same_digests(
    found: dict[str, Tensor | None], golden: Golden, name: str, rtol: float = 1e-9, *, skip: str = " "
) -> None:
    """Every recorded tensor of a group, but for the names that hold ``skip``; ``None`` stands for no gradient.

    The buffers of the authors' AdaIN layers, which nothing reads, do not exist here.
    """
    found = {key: value for key, value in found.items() if skip not in key}
    names, digests = golden[f"{name}/names"], golden[f"{name}/digests"]
    compared = 0
    for key, expected in zip(names.tolist(), digests, strict=True):
        if ("dec.res" in key and "running" in key) or skip in key:
            continue
        tensor = found[key]
        compared += 1
        if np.isnan(expected).all():
            assert tensor is None, f"{name}/{key} has a gradient"
        else:
            assert tensor is not None, f"{name}/{key} has no gradient"
            same_digest(tensor, expected, f"{name}/{key}", rtol)
    assert compared == len(found), set(found) - set(names.tolist())


def _stream(tag: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(tag.encode()))


def networks(*, dropout: float = 0.5, degradation_scales: int = 1) -> dict[str, nn.Module]:
    """The networks of stage 1 at the paper's size, under the names of the recording."""
    return {
        "E_con": fill(dil.ContentEncoder(NUM_CLASSES, dropout=dropout), "E_con"),
        "E_deg": fill(dil.DegradationEncoder(), "E_deg"),
        "G": fill(dil.Generator(), "G"),
        "D_deg": fill(dil.MultiScaleDiscriminator(degradation_scales), "D_deg"),
        "D_real": fill(dil.MultiScaleDiscriminator(3), "D_real"),
    }
