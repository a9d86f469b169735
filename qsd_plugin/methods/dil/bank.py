"""Degradation memory replay: images rendered anew with the degradations of other images.

Shapes: B images, H x W pixels, N codes in the bank, K numbers of a code. Source: Huang et al., IJCV 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.methods.dil.encoders import ContentEncoder, DegradationEncoder
from qsd_plugin.methods.dil.generator import Generator

#: Where the codes of a replay come from: the bank, the other images of the batch, or no replay.
REPLAY_MODES = ("bank", "shuffle", "none")


@torch.no_grad()
def flip_averaged_codes(encoder: DegradationEncoder, images: Tensor) -> Tensor:
    """Codes of images [B, 3, H, W], each the mean of those of the image and of its mirror image, [B, K]."""
    codes: Tensor = (encoder(images) + encoder(images.flip(3))) / 2
    return codes


class DegradationBank(nn.Module):
    """The degradation codes of the training images.

    A checkpoint of any number of codes can be loaded. Across ranks: build it from all images on every rank (see
    :func:`~qsd_plugin.core.distributed.gather_rows`), in the same order.

    Args:
        codes: [N, K], N >= 1.

    Raises:
        DataError: No codes, or codes that are not finite.
    """

    codes: Tensor
    """[N, K]."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        if codes.dim() != 2 or not len(codes):
            raise DataError("DIL bank: codes", value=tuple(codes.shape), expected="[N, K] with at least one code")
        broken = ~torch.isfinite(codes).all(dim=1)
        if broken.any():
            raise DataError(
                "DIL bank: codes that are not finite",
                value=f"{int(broken.sum())} of {len(codes)}",
                remedy="Check the weights of stage 1 and the images.",
            )
        self.register_buffer("codes", codes.detach().clone())

    @classmethod
    def build(cls, encoder: DegradationEncoder, batches: Iterable[Tensor]) -> DegradationBank:
        """The bank of the images of ``batches``, [B, 3, H, W] each, under the test transform, in their order.

        Raises:
            DataError: There is no image.
        """
        codes = [flip_averaged_codes(encoder, images) for images in batches]
        if not codes:
            raise DataError("DIL bank: there is no image to build it from")
        return cls(torch.cat(codes))

    def sample(self, count: int, generator: torch.Generator, *, where: Tensor | None = None) -> Tensor:
        """Codes drawn uniformly with replacement, [count, K].

        Args:
            count: How many.
            generator: Of the CPU; of its own on every rank.
            where: Draw from these codes only, [N] bool, e.g. those of low-resolution images.

        Raises:
            DataError: ``where`` is True nowhere.
        """
        if where is None:
            index = torch.randint(len(self.codes), (count,), generator=generator)
            return self.codes[index.to(self.codes.device)]
        chosen = torch.nonzero(where.to(self.codes.device)).flatten()
        if not len(chosen):
            raise DataError("DIL bank: no code is left to draw from", expected="at least one True in where")
        index = torch.randint(len(chosen), (count,), generator=generator)
        return self.codes[chosen[index.to(chosen.device)]]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}codes")
        if stored is not None and stored.dim() == 2 and len(stored):
            self.codes = self.codes.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The size, for ``print(model)``."""
        return f"{len(self.codes)} codes of {self.codes.shape[1]} numbers"


class ReplayAugmenter(nn.Module):
    """Renders training images with other degradations, by frozen copies of what stage 1 learnt.

    The copies stay in eval mode and carry no gradient. Across ranks: each renders its own images; what is drawn from
    the bank, and swaps, are those of one process on the images of all ranks, if every rank gives an equal generator and
    has the same number of images. Mode ``"shuffle"`` takes the codes of the rank's own images.

    Args:
        content_encoder: E_con of stage 1; copied.
        degradation_encoder: E_deg; copied.
        generator: G; copied.
        bank: What mode ``"bank"`` draws from; ``None`` for the other modes.
        mode: ``"bank"``, ``"shuffle"`` (codes of the batch, permuted) or ``"none"``.
        repeats: Renderings of each image, >= 1.
        swap: Probability that an image and its rendering change places, [0, 1]; the authors' is 0.5 for haze, 0
            otherwise.

    Raises:
        ConfigError: An argument is out of range, or the bank is missing.
    """

    def __init__(
        self,
        content_encoder: ContentEncoder,
        degradation_encoder: DegradationEncoder,
        generator: Generator,
        bank: DegradationBank | None,
        *,
        mode: str = "bank",
        repeats: int = 1,
        swap: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in REPLAY_MODES:
            raise ConfigError(
                "DIL replay mode",
                value=mode,
                expected=" or ".join(map(repr, REPLAY_MODES)),
                remedy=did_you_mean(mode, REPLAY_MODES),
            )
        if mode == "bank" and bank is None:
            raise ConfigError("DIL replay from the bank needs a bank", remedy="Build one, or use mode 'shuffle'.")
        if repeats < 1 or not 0 <= swap <= 1 or (swap and repeats > 1):
            raise ConfigError(
                "DIL replay: repeats and swap",
                value=(repeats, swap),
                expected="repeats >= 1, swap in [0, 1], and no swap of several renderings",
            )
        self.mode, self.repeats, self.swap = mode, repeats, swap
        self.content_encoder = copy.deepcopy(content_encoder)
        self.degradation_encoder = copy.deepcopy(degradation_encoder)
        self.generator = copy.deepcopy(generator)
        self.bank = bank
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> ReplayAugmenter:
        """Stays in eval mode, whatever is asked for."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """What to train on, and its counterpart of other degradation.

        Args:
            images: [B, 3, H, W], augmented training images.
            generator: Of the CPU, equal on every rank; the draws are its only random numbers.

        Returns:
            The images, [repeats x B, 3, H, W], and their renderings of the same shape, or ``None`` in mode ``"none"``.
            Each image's repeats lie together.
        """
        if self.mode == "none":
            return images, None
        if self.repeats > 1:
            images = images.repeat_interleave(self.repeats, dim=0)
        content = self.content_encoder(images, want_identity=False).content
        rendered: Tensor = self.generator(content, self._codes(images, generator).to(content.dtype))
        if self.swap:
            drawn = torch.rand(world_size() * len(images), generator=generator)[_own(images)]
            swapped = (drawn < self.swap).to(images.device)[:, None, None, None]
            images, rendered = torch.where(swapped, rendered, images), torch.where(swapped, images, rendered)
        return images, rendered

    def _codes(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.mode == "bank" and self.bank is not None:
            return self.bank.sample(world_size() * len(images), generator)[_own(images)]
        order = torch.randperm(len(images), generator=generator).to(images.device)
        codes: Tensor = self.degradation_encoder(images)
        return codes[order]


def _own(images: Tensor) -> slice:
    """The places of this rank's images among those of all."""
    return slice(rank() * len(images), (rank() + 1) * len(images))
