"""Stage 1: content and degradation are told apart by exchanging them between two images.

Shapes: B pairs, H x W pixels. Symbols: x_a the better, x_b the worse image; x_ab is x_a's content rendered with x_b's
degradation, and so on. Source: Huang et al., CVPR 2020 and IJCV 2022; terms, weights and order as in their program.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.methods.dil.adam import FlatAdam
from qsd_plugin.methods.dil.at_once import at_once
from qsd_plugin.methods.dil.checks import require_finite
from qsd_plugin.methods.dil.layers import in_float32, no_autocast
from qsd_plugin.methods.dil.losses import consistency_loss, ls_d, ls_g, pixel_loss, r1, rank_labels, rank_loss
from qsd_plugin.methods.dil.networks import Networks
from qsd_plugin.methods.dil.pairs import Pair
from qsd_plugin.methods.dil.stage1_options import Stage1Options


class Rendered(NamedTuple):
    """Both images taken apart and put together in all four ways; the first letter is the content's."""

    aa: Tensor
    """Detached, as ``bb``: its gradient is in ``reconstruction``."""
    bb: Tensor
    ab: Tensor
    ba: Tensor
    identity_a: Tensor
    identity_b: Tensor
    content_a: Tensor
    content_b: Tensor
    reconstruction: Tensor
    """0-d: how far ``aa`` and ``bb`` are from the images."""

    def fake(self, name: str) -> Tensor:
        """The exchanged image called ``"ab"`` or ``"ba"``, detached."""
        return (self.ab if name == "ab" else self.ba).detach()


class Stage1Result(NamedTuple):
    """What a step of stage 1 leaves to the generator's optimizer."""

    terms: dict[str, Tensor]
    """Weighted, 0-d each; their sum is to be back-propagated."""
    stats: dict[str, Tensor]
    """Of the discriminators' step, detached; empty where there was none."""


class Stage1(nn.Module):
    """Renders a pair, lets the discriminators take a step, and returns the generator's losses against them.

    Use: ``result = stage(pair)``, back-propagate the sum of ``result.terms`` and step an optimizer over those of its
    parameters that require gradient: encoders and generator, without the trunk. The discriminators never require
    gradient outside a forward and have an Adam of their own in buffers, so that neither an optimizer nor a reducer
    of a host sees them, and a state dict is the whole state: nothing random is drawn but from ``(seed, iteration)``
    and, for dropout, from torch's global generator.

    A step of the discriminators needs training mode and gradients enabled; otherwise nothing changes. In a phase some
    parameters get no gradient (paired: identity branch and classifier; otherwise: the synthetic degradation head);
    under ``DistributedDataParallel`` set ``find_unused_parameters=True``. Across ranks: local means; the
    discriminators' gradients are averaged here; batch statistics are the rank's.

    Precision: the discriminators' step runs outside autocast, in float32.

    Args:
        networks: What is trained. The trunk's parameters are frozen here.
        options: The authors' by default.
        lr: Of the discriminators.
        betas: Of their Adam.
        weight_decay: Of their Adam.
        milestones: Numbers of iterations behind which their learning rate falls to a tenth.
        seed: Decides which of the two fakes a paired step shows to D_real; the same on every rank.

    Raises:
        TrainingError: On call, a term is not finite; it is named.
        ConfigError: On call, labels are missing for the identity term.
    """

    def __init__(
        self,
        networks: Networks,
        *,
        options: Stage1Options | None = None,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 5e-4,
        milestones: Sequence[int] = (20_000, 30_000, 35_000),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.options = Stage1Options() if options is None else options
        self.seed = seed
        self.content_encoder = networks.content_encoder
        self.degradation_encoder = networks.degradation_encoder
        self.generator = networks.generator
        self.real_discriminator = networks.real_discriminator
        self.degradation_discriminator = networks.degradation_discriminator
        self.content_encoder.model.requires_grad_(False)
        for parameter in self._judges():
            parameter.requires_grad_(False)
        size = sum(parameter.numel() for parameter in self._judges())
        self.adam = FlatAdam(size, lr=lr, betas=betas, weight_decay=weight_decay, milestones=milestones)

    @property
    def iteration(self) -> int:
        """Completed iterations; reads a buffer, i.e. waits for the device."""
        return int(self.adam.steps)

    def train(self, mode: bool = True) -> Stage1:
        """As of any module; a trunk whose batch statistics are frozen stays in eval mode."""
        super().train(mode)
        if self.options.freeze_trunk_norm:
            self.content_encoder.model.eval()
        return self

    def forward(self, pair: Pair, iteration: int | None = None) -> Stage1Result:
        """Losses of one batch, after a step of the discriminators in training.

        Args:
            pair: The batch.
            iteration: Its number, from 1, on which draws and the turns of the penalty depend; ``None`` for the one
                behind those completed.
        """
        rendered = self.render(pair)
        stats: dict[str, Tensor] = {}
        if self.training and torch.is_grad_enabled():
            stats = self._discriminator_step(pair, rendered, self.iteration + 1 if iteration is None else iteration)
        terms = self.generator_terms(pair, rendered)
        require_finite(f"DIL stage 1, {pair.phase} phase, generator", terms)
        return Stage1Result(terms, stats)

    def render(self, pair: Pair) -> Rendered:
        """Take both images apart, each in a pass of its own, and render all four combinations."""
        # Without a loss on it, the identity branch only moves its batch statistics.
        learns = bool(self.options.weights.identity) and (self.options.predictions_agree or not pair.paired)
        identity_a, content_a = self.content_encoder(pair.better, identity_grad=learns)
        identity_b, content_b = self.content_encoder(pair.worse, identity_grad=learns)
        code_a = self.degradation_encoder(pair.better)
        code_b = self.degradation_encoder(pair.worse, "syn" if pair.paired else "real")

        def reconstructed(content: Tensor, code: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            image = self.generator(content, code)
            return self._pixel(image, target), image

        weights = list(self.generator.parameters())
        loss_a, aa = at_once(reconstructed, (content_a, code_a, pair.better), weights)
        loss_b, bb = at_once(reconstructed, (content_b, code_b, pair.worse), weights)
        return Rendered(
            aa,
            bb,
            self.generator(content_a, code_b),
            self.generator(content_b, code_a),
            identity_a,
            identity_b,
            content_a,
            content_b,
            loss_a + loss_b,
        )

    def shown_fake(self, iteration: int) -> str:
        """Which exchanged image a paired step shows to D_real: ``"ab"`` or ``"ba"``, a fair coin."""
        return "ab" if numpy_stream(self.seed, "dil fake", iteration).random() < 0.5 else "ba"

    def discriminator_terms(
        self, pair: Pair, rendered: Rendered, *, fake: str = "ab", penalty: float = 1.0
    ) -> dict[str, Tensor]:
        """Weighted losses of the discriminators; their parameters must require gradient.

        Args:
            fake: What :meth:`shown_fake` says; used in the paired phase.
            penalty: Factor on the weights of the gradient penalty; 0 leaves it out.
        """
        with no_autocast(pair.better):
            better, worse = (
                in_float32(images).detach().requires_grad_(penalty > 0) for images in (pair.better, pair.worse)
            )
            shown = {name: in_float32(rendered.fake(name)) for name in ("ab", "ba")}
            if pair.paired:
                realness = self._ls_d(self.real_discriminator, shown[fake], better, penalty)
                degradation = self._rank_d(worse, better, -1.0, penalty)
            else:
                realness = self._ls_d(self.real_discriminator, shown["ab"], better, penalty)
                realness = realness + self._ls_d(self.real_discriminator, shown["ba"], worse, penalty)
                if pair.phase == "unpaired":
                    degradation = 2 * self._ls_d(self.degradation_discriminator, worse.detach(), better, penalty)
                else:
                    degradation = self._rank_d(worse, better, self.believed_order(pair), penalty)
        weights = self.options.weights
        return {
            "discriminator_realness": weights.realness * realness,
            "discriminator_degradation": weights.degradation * degradation,
        }

    def generator_terms(self, pair: Pair, rendered: Rendered) -> dict[str, Tensor]:
        """Weighted losses of encoders and generator against the discriminators as they are now."""
        weights = self.options.weights
        real = partial(self._looks, self.real_discriminator, target=1)
        terms = {
            "self": weights.reconstruction * rendered.reconstruction,
            "cross": weights.reconstruction * self._cross(pair, rendered),
            "degradation": weights.degradation * self._degradation(pair, rendered),
            "realness": weights.realness * (real(rendered.ab) + real(rendered.ba)),
        }
        if pair.paired:
            terms["content"] = weights.content * self._pixel(rendered.content_a, rendered.content_b)
        if weights.identity and (self.options.predictions_agree or not pair.paired):
            terms["identity"] = weights.identity * self._identity(pair, rendered)
        phase = "paired" if pair.paired else "unpaired"
        return {name: term for name, term in terms.items() if f"{phase}.{name}" not in self.options.ablate}

    @torch.no_grad()
    def believed_order(self, pair: Pair) -> Tensor:
        """What D_deg thinks of an unsupervised pair now, [B, 1]: -1 where the first image is the better one."""
        with no_autocast(pair.better):
            worse, better = (self.degradation_discriminator(in_float32(images)) for images in (pair.worse, pair.better))
            return rank_labels(worse, better)

    def _discriminator_step(self, pair: Pair, rendered: Rendered, iteration: int) -> dict[str, Tensor]:
        judges = self._judges()
        # Counted in pairs of iterations: with alternating phases each of them gets its penalties.
        due = (iteration + 1) // 2 % self.options.r1_every == 0
        for parameter in judges:
            parameter.requires_grad_(True)
        try:
            terms = self.discriminator_terms(
                pair, rendered, fake=self.shown_fake(iteration), penalty=float(self.options.r1_every * due)
            )
            # Not backward(): the hooks of a data-parallel wrapper and the generator's graph stay untouched.
            gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), judges)
        finally:
            for parameter in judges:
                parameter.requires_grad_(False)
        stats = {name: term.detach() for name, term in terms.items()}
        norm = torch.stack([in_float32(gradient).norm() for gradient in gradients]).norm()
        require_finite(f"DIL stage 1, {pair.phase} phase, discriminators", {**stats, "discriminator_gradient": norm})
        self.adam.step(judges, gradients)
        return {**stats, "discriminator_gradient": norm}

    def _judges(self) -> list[nn.Parameter]:
        return [*self.real_discriminator.parameters(), *self.degradation_discriminator.parameters()]

    def _ls_d(self, network: nn.Module, fake: Tensor, real: Tensor, penalty: float) -> Tensor:
        def loss() -> tuple[Tensor]:
            maps = network(real)
            value = ls_d(network(fake), maps)
            return (value + penalty * self.options.r1_weight * r1(maps, real) if penalty else value,)

        return at_once(loss, (), network.parameters())[0]

    def _rank_d(self, worse: Tensor, better: Tensor, order: Tensor | float, penalty: float) -> Tensor:
        network = self.degradation_discriminator

        def loss() -> tuple[Tensor]:
            maps = network(better)
            value = rank_loss(network(worse), maps, order)
            return (
                value + penalty * self.options.rank_r1_weight * r1(maps, better, pooled=True) if penalty else value,
            )

        return at_once(loss, (), network.parameters())[0]

    def _looks(self, network: nn.Module, images: Tensor, target: float) -> Tensor:
        """How far a discriminator, which does not learn here, is from taking the images for ``target``."""
        return at_once(lambda shown: (ls_g(network(shown), target),), (images,), ())[0]

    def _pixel(self, images: Tensor, target: Tensor) -> Tensor:
        return pixel_loss(images, target, self.options.pixel)

    def _cross(self, pair: Pair, rendered: Rendered) -> Tensor:
        """To the partner, which is known of a synthetic pair; otherwise back to the image by a second exchange."""
        if pair.paired:
            return self._pixel(rendered.ab, pair.worse) + self._pixel(rendered.ba, pair.better)
        encoder = self.content_encoder
        seen = self.options.rendered_identity and self.training

        def back(content_of: Tensor, code_of: Tensor, target: Tensor) -> tuple[Tensor]:
            content = encoder(
                content_of,
                trunk_grad=self.options.cycle_through_trunk,
                want_identity=seen,
                identity_grad=False,
            ).content
            return (self._pixel(self.generator(content, self.degradation_encoder(code_of)), target),)

        networks = (encoder.head, self.degradation_encoder, self.generator)
        weights = [parameter for network in networks for parameter in network.parameters()]
        back_a = at_once(back, (rendered.ab, rendered.ba, pair.better), weights)[0]
        back_b = at_once(back, (rendered.ba, rendered.ab, pair.worse), weights)[0]
        return back_a + back_b

    def _degradation(self, pair: Pair, rendered: Rendered) -> Tensor:
        network = self.degradation_discriminator
        if pair.phase == "unpaired":
            return self._looks(network, rendered.ab, 0) + self._looks(network, rendered.ba, 1)
        order: Tensor | float = -1.0 if pair.paired else self.believed_order(pair)
        ranked = at_once(
            lambda worse, better: (rank_loss(network(worse), network(better), order),), (rendered.ab, rendered.ba), ()
        )
        return ranked[0]

    def _identity(self, pair: Pair, rendered: Rendered) -> Tensor:
        logits_a, logits_b = (
            in_float32(self.content_encoder.classifier(features))
            for features in (rendered.identity_a, rendered.identity_b)
        )
        if pair.paired:
            return consistency_loss(logits_a, logits_b, "kl")
        if pair.better_labels is None:
            raise ConfigError(
                f"DIL stage 1: identities of the better images of an {pair.phase} batch are missing",
                expected="labels [B] for the identity term",
                remedy="Give labels, or set the weight of the identity term to 0.",
            )
        loss = F.cross_entropy(logits_a, pair.better_labels)
        if pair.worse_labels is None:
            return 2 * loss
        return loss + F.cross_entropy(logits_b, pair.worse_labels)
