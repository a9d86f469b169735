"""The network that arcface_torch trains, wrapped: a student that gives its head more than an embedding.

Shapes: B images on this rank, V views of each (1 or 2), D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.qud import Teacher
from qsd_plugin.networks.taps import TapRecorder

#: The level that is the network's own output.
EMBEDDING = "embedding"


class TrainingOutput(NamedTuple):
    """What the head gets; rows are the first views of all images, then the second ones."""

    embedding: Tensor
    """[V B, D], not normalised."""
    taps: dict[str, Tensor]
    """Maps and vectors by level, [V B, ...]."""
    teacher: Tensor | None
    """[V B, D] of the teacher, without a graph."""


class MethodModel(nn.Module):
    """A host network in training, with taps and a frozen teacher.

    In training it returns a :class:`TrainingOutput` of images [B, 3, H, W] or pairs of them [B, 2, 3, H, W], in one
    forward pass; in eval mode the student's embedding [B, D]. Its state dict is the student's, so that ``model.pt``
    loads strictly into the plain network. Across ranks: plain; every part is used in every step.

    Args:
        student: The host's network.
        levels: Module paths to record; ``embedding`` is the output.
        teacher: Embeds the student's images.
    """

    def __init__(self, student: nn.Module, *, levels: Sequence[str] = (), teacher: Teacher | None = None) -> None:
        super().__init__()
        self.student = student
        self.levels = tuple(levels)
        self.teacher = teacher
        TapRecorder(student, [name for name in self.levels if name != EMBEDDING])  # refuses unknown paths at once

    def forward(self, images: Tensor) -> TrainingOutput | Tensor:
        """Images, -1 to 1, RGB. See the class."""
        if not self.training:
            embedding: Tensor = self.student(images)
            return embedding
        rows = images.transpose(0, 1).flatten(0, 1) if images.dim() == 5 else images
        with TapRecorder(self.student, [name for name in self.levels if name != EMBEDDING]) as taps:
            embedding = self.student(rows)
        if EMBEDDING in self.levels:
            taps[EMBEDDING] = embedding
        # A teacher takes 8-bit pixel values: it has a normalisation of its own.
        target = None if self.teacher is None else self.teacher(rows * 127.5 + 127.5)
        return TrainingOutput(embedding, {name: taps[name] for name in self.levels if name in taps}, target)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Into the student."""
        return self.student.load_state_dict(state_dict, strict, assign)


def default_levels(student: nn.Module) -> dict[str, str]:
    """Levels of a host network and their roles (``map`` or ``vector``): the last map of each resolution, the embedding.

    Raises:
        ConfigError: A network of no known family.
    """
    modules = dict(student.named_modules())
    for names in (("layer1", "layer2", "layer3", "layer4"), ("layers.1", "layers.3", "layers.5", "conv_sep")):
        if all(name in modules for name in names):
            return {**dict.fromkeys(names, "map"), EMBEDDING: "vector"}
    raise ConfigError(
        "config.qsd_plugin qsd levels",
        value={},
        expected=f"levels for a {type(student).__name__}, whose stages are not known here",
        remedy=f"Name modules that return maps [B, C, H, W]: levels={{'stage3': 1.0, {EMBEDDING!r}: 1.0}}. Its modules "
        f"are: {', '.join(name for name, _ in student.named_children())}.",
    )


def student_weights(path: str) -> Mapping[str, Tensor]:
    """A state dict from ``model.pt``, a checkpoint of all states, or a published backbone.

    Raises:
        ConfigError: There is no such file.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError("config.qsd_plugin qud teacher weights", value=path, expected="an existing file") from error
    weights: Mapping[str, Tensor] = found.get("state_dict_backbone", found)
    return weights
