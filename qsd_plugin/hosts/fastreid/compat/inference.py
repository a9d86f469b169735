"""S13: normalising the input must not change the batch, or the flipped pass of TEST.FLIP is normalised twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together


def preprocess_image(model: Any, batched_inputs: Mapping[str, Any] | torch.Tensor) -> torch.Tensor:
    """Normalised images [B, C, H, W] of a batch, on the model's device; the batch stays as it is.

    Args:
        model: A host model with ``pixel_mean`` and ``pixel_std``.
        batched_inputs: The batch, or its images alone.

    Raises:
        HostError: The batch holds no images.
    """
    images = batched_inputs.get("images") if isinstance(batched_inputs, Mapping) else batched_inputs
    if not isinstance(images, torch.Tensor):
        raise HostError(
            "The model's input",
            value=type(batched_inputs).__name__,
            expected="a tensor of images, or a mapping with such a tensor under 'images'",
        )
    normalised: torch.Tensor = (images.to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std
    return normalised


def _out_of_place() -> Undo:
    from fastreid.modeling.meta_arch.baseline import Baseline
    from fastreid.modeling.meta_arch.mgn import MGN

    return together(
        replace(Baseline, "preprocess_image", preprocess_image), replace(MGN, "preprocess_image", preprocess_image)
    )


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S13",
        where="modeling/meta_arch/baseline.py:130, modeling/meta_arch/mgn.py:256",
        symptom="Images are normalised in place, so TEST.FLIP normalises the flipped pass twice.",
        action="Images are normalised out of place.",
        needed=always,
        apply=_out_of_place,
        proof="test_s13_flip_of_a_symmetric_image_changes_nothing",
    ),
)
