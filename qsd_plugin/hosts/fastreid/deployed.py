"""Reading ``deploy/``: the network of a finished run, built and loaded as the plain host would."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core import streams
from qsd_plugin.core.errors import CheckpointError, ExportError, HostError
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import read_checkpoint

#: Methods that normalise images: of the host's architectures, and of DIL's.
_NORMALISERS = ("preprocess_image", "normalised")

FOLDER = "deploy"
CONFIG, WEIGHTS, CONTRACT, RESULTS = "config.yaml", "model.pth", "contract.json", "results.json"


@dataclass(frozen=True)
class Deployed:
    """A finished run as it is deployed.

    Args:
        cfg: The host's config.
        model: In eval mode, on the CPU; takes images of 0 to 255 and normalises them itself.
        contract: What goes in and what comes out, see :func:`qsd_plugin.hosts.fastreid.deploy.contract`.
        results: Metrics of the last evaluation, and where they come from.
    """

    cfg: Any
    model: nn.Module
    contract: dict[str, Any]
    results: dict[str, Any]


def find(folder: Path) -> Path:
    """The deploy folder that ``folder`` is or holds.

    Raises:
        HostError: Neither.
    """
    for candidate in (folder, folder / FOLDER):
        if all((candidate / name).is_file() for name in (CONFIG, WEIGHTS, CONTRACT, RESULTS)):
            return candidate
    raise HostError(
        "There is no finished run in this folder",
        value=str(folder),
        expected=f"{FOLDER}/ with {CONFIG}, {WEIGHTS}, {CONTRACT} and {RESULTS}, or that folder itself",
        remedy="tools/train_net.py writes it at the end of a run; called again with --resume it finishes one that was "
        "cut off, and adds the folder to one that was trained without it."
        if folder.is_dir()
        else f"{folder} is not a folder.",
    )


def load(folder: Path) -> Deployed:
    """The network in ``folder`` or ``folder/deploy``.

    Raises:
        HostError: There is none.
        CheckpointError: The weights are damaged or do not belong to the config.
    """
    from fastreid.config import get_cfg

    folder = find(folder)
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / CONFIG))
    model = build(cfg)
    load_strictly(model, read_checkpoint(folder / WEIGHTS)["model"], source=str(folder / WEIGHTS))
    contract, results = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONTRACT, RESULTS))
    return Deployed(cfg, model, contract, results)


def build(cfg: Any) -> nn.Module:
    """The model of ``cfg`` on the CPU in eval mode, with initial weights."""
    from fastreid.modeling.meta_arch import build_model

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model: nn.Module = build_model(cfg)
    return model.eval()


def load_strictly(model: nn.Module, state: dict[str, Any], *, source: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        CheckpointError: A name or a shape differs.
    """
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        _, _, first = str(error).partition("\n")
        raise CheckpointError(
            f"Weights {source} do not belong to this network", value=first.strip().splitlines()[0]
        ) from error


@torch.no_grad()
def without_normalisation(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A copy of a host model whose forward takes images that are normalised already.

    Args:
        model: In eval mode, on the CPU.
        size: Height and width of its images in pixels.

    Raises:
        ExportError: The architecture has no normalisation of its own that could be left out, or does not return one
            tensor.
    """
    name = type(model).__name__
    mean, std = (getattr(model, buffer, None) for buffer in ("pixel_mean", "pixel_std"))
    normaliser = next((method for method in _NORMALISERS if hasattr(model, method)), None)
    if mean is None or std is None or normaliser is None:
        raise ExportError(
            "This architecture cannot be exported",
            value=name,
            expected="the host's preprocess_image with pixel_mean and pixel_std, which Baseline and MGN have",
        )
    network = copy.deepcopy(model)
    # An attribute of the instance is found before the class's method, whatever the class's forward looks like.
    vars(network)[normaliser] = lambda images: images
    images = noise(mean.numel(), size)
    expected = model(images.clone())  # the unpatched host normalises in place
    found = network((images - mean) / std)
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        raise ExportError(
            "This architecture cannot be exported",
            value=name,
            expected="one tensor as output in eval mode",
        )
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ExportError(
            "This architecture cannot be exported",
            value=name,
            expected=f"a forward that normalises its images with {normaliser} and nowhere else",
        )
    return network


def metadata(contract: dict[str, Any]) -> dict[str, str]:
    """What a file without ``contract.json`` beside it has to carry: size, colour order, mean, std, feature, metric.

    Numbers are JSON, as in ``"mean": "[123.675, 116.28, 103.53]"``.
    """
    images, embedding = contract["input"], contract["embedding"]
    return {
        **{key: json.dumps(images[key]) for key in ("height", "width", "mean", "std", "range")},
        **{key: str(images[key]) for key in ("colour_order", "resize")},
        "normalisation": "outside this file: (pixel - mean) / std",
        "feature": str(embedding["tensor"]),
        "feature_dimension": str(embedding["dimension"]),
        "feature_normalised": json.dumps(embedding["normalised"]),
        "metric": str(contract["metric"]),
    }


def noise(channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Two images [2, C, H, W] of noise from 0 to 255, always the same."""
    return 255 * torch.rand(2, channels, *size, generator=streams.torch_stream(0, "deploy"))
