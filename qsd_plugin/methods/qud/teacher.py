"""The frozen network that is distilled: a module with its weights, or an ONNX file.

Shapes: B images, H x W image size, D embedding size.
"""

from __future__ import annotations

import glob
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.onnx_model import OnnxModel, check_pixels
from qsd_plugin.core.stages import file_digest

#: Names shown in a message about weights that do not fit.
SHOWN = 4

_COUNTER = "num_batches_tracked"  # not in old checkpoints, and of no effect in eval mode


class Teacher(nn.Module, ABC):
    """What both kinds of teacher share: it gets the student's images as they are before any normalisation.

    The images are resized to the teacher's size (bicubic with antialiasing, as PIL does it, in float32), their channels
    put in its order, and ``(value - mean) / std`` is taken. It stays in eval mode whatever ``train`` is called with,
    and gives no gradients. Across ranks: each embeds its own images.

    Args:
        size: (H, W) the teacher was trained with; ``None`` takes the images as they come.
        mean: Per channel, in the teacher's channel order, for pixel values 0 to 255.
        std: The same, above 0.
        colour: Channel order the teacher wants, ``RGB`` or ``BGR``.

    Raises:
        ConfigError: An option is impossible.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, *, size: tuple[int, int] | None, mean: Sequence[float], std: Sequence[float], colour: str
    ) -> None:
        super().__init__()
        check_pixels("QUD teacher", colour, mean, std)
        if size is not None and min(size) < 1:
            raise ConfigError("QUD teacher: size (H, W)", value=size, expected="two positive numbers, or None")
        self.size = size
        self.colour = colour
        # Configuration, not state: a checkpoint must not bring back another normalisation.
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.eval()

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of prepared images [B, 3, H, W]."""

    def train(self, mode: bool = True) -> Teacher:
        """Ignored: running statistics and dropout of a teacher stay as they are."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The teacher's embeddings, not normalised.

        Args:
            images: [B, 3, H, W], RGB, pixel values 0 to 255.

        Returns:
            [B, D] float32, without a graph.

        Raises:
            ConfigError: Not such a batch, or the network does not return one tensor.
        """
        return self.embed(self.prepare(images)).float()

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB 0 to 255, in the teacher's size, channel order and range of values.

        Raises:
            ConfigError: Not such a batch.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ConfigError("QUD teacher: images", value=tuple(images.shape), expected="[B, 3, H, W]")
        images = images.float()
        if self.size is not None and tuple(images.shape[2:]) != tuple(self.size):
            # Bicubic curves overshoot at edges.
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 255)
        if self.colour == "BGR":
            images = images.flip(1)
        return (images - self.mean) / self.std

    @abstractmethod
    def weights_digest(self) -> str:
        """SHA-256 of what the network computes with, in hexadecimal; the preprocessing is :meth:`extra_repr`'s."""

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return f"size={self.size}, mean={mean}, std={std}, colour={self.colour!r}"


class ModuleTeacher(Teacher):
    """A torch module with trained weights.

    Args:
        network: Images [B, 3, H, W] -> one tensor, flattened to [B, D]; filled with the weights and frozen in place.
        weights: Its state dict. Every entry must be there with the right shape (batch counters aside) and none may be
            left over, since a smaller network finds all its names among a larger one's.
        size: (H, W) the teacher was trained with; ``None`` takes the images as they come.
        mean: Per channel, in the teacher's channel order, for pixel values 0 to 255; (127.5, 127.5, 127.5) for most
            face networks.
        std: The same, above 0.
        colour: Channel order the teacher wants, ``RGB`` or ``BGR``.
        unused: Entries of ``weights`` that start like this may be left over, e.g. a classifier.

    Raises:
        ConfigError: An option is impossible.
        CheckpointError: The weights are missing, or are not the network's.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: Mapping[str, Tensor],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        colour: str = "RGB",
        unused: Sequence[str] = (),
    ) -> None:
        super().__init__(size=size, mean=mean, std=std, colour=colour)
        _fill(network, weights, tuple(unused))
        self.network = network.requires_grad_(False)
        self.eval()

    def embed(self, images: Tensor) -> Tensor:
        """See :class:`Teacher`; under autocast in its precision."""
        output = self.network(images)
        if not isinstance(output, Tensor):
            raise ConfigError(
                "QUD teacher: its network returned", value=type(output).__name__, expected="one tensor [B, D]"
            )
        return output.flatten(1)

    def weights_digest(self) -> str:
        """See :class:`Teacher`. Buffers that no checkpoint holds count too, since a network may normalise by them."""
        digest = hashlib.sha256()
        for name, tensor in (*self.network.named_parameters(), *self.network.named_buffers()):
            if name.endswith(_COUNTER):
                continue
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class OnnxTeacher(Teacher):
    """An ONNX model, run by ONNX Runtime on the GPU if it can; the images pass through the CPU's memory.

    Its weights are in the file: nothing of it is in the state dict.

    Args:
        path: The model, with one input [B, 3, H, W] of floats; of its outputs the first is used.
        size: (H, W); ``None`` takes the model's own, which must be fixed then.
        mean: Per channel, in the model's channel order, for pixel values 0 to 255; (127.5, 127.5, 127.5) for most face
            networks, zeros if the model normalises by itself.
        std: The same, above 0.
        colour: Channel order the model wants, ``RGB`` or ``BGR``.

    Raises:
        ConfigError: ONNX Runtime is not installed, or an option does not fit the model.
        CheckpointError: The file is missing or no model that takes images.
    """

    def __init__(
        self,
        path: Path,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        colour: str = "RGB",
    ) -> None:
        super().__init__(size=size, mean=mean, std=std, colour=colour)
        self._model = OnnxModel(path)
        self.size = self._model.image_size(size, remedy="Say which one it was trained with: size=(H, W).")

    def embed(self, images: Tensor) -> Tensor:
        """See :class:`Teacher`."""
        return torch.from_numpy(self._model.run(images.cpu().numpy())).to(images.device)

    def weights_digest(self) -> str:
        """See :class:`Teacher`: of the file and those beside it that begin with its name: some hold the weights."""
        path = self._model.path
        digest = hashlib.sha256()
        for part in sorted(path.parent.glob(f"{glob.escape(path.name)}*")):
            digest.update(f"{part.name}:{file_digest(part)}:".encode())
        return digest.hexdigest()


def _fill(network: nn.Module, weights: Mapping[str, Tensor], unused: tuple[str, ...]) -> None:
    if not weights:
        raise CheckpointError(
            "QUD teacher has no weights",
            expected="the state dict of a trained network",
            remedy="An untrained teacher would teach noise. Name its checkpoint.",
        )
    own = network.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith(_COUNTER)]
    left_over = [name for name in weights if name not in own and not name.startswith(unused)]
    reshaped = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    groups = {"missing": missing, "left over": left_over, "of another shape": reshaped}
    if any(groups.values()):
        found = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for kind, names in groups.items()
            if names
        )
        raise CheckpointError(
            "QUD teacher: the weights are not this network's",
            value=found,
            expected="all of its entries and no others",
            remedy="A teacher that is random in part would teach noise. Build the network the weights come from; a "
            "classifier that is not needed is named in unused.",
        )
    network.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
