"""The yardstick of DIL's benchmark: its steps module by module, as the papers write them, on the same networks.

Every network runs once for each image it is applied to, each operation is torch's own, everything that a loss needs is
kept until one backward pass, and the optimizers are torch's. Parameters and buffers are those of the networks of
:mod:`qsd_plugin.methods.dil`; of their code only the containers and the plain blocks of the ResNet are used.

Source: Huang et al., CVPR 2020 and IJCV 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qsd_plugin.methods.dil import DualBranchReID, MultiScaleDiscriminator, Networks, Pair, ReplayAugmenter
from qsd_plugin.report.benchmarks.dil_plain_networks import content, degradation, read_head, render, scores

_RECONSTRUCTION, _CONTENT, _IDENTITY, _R1 = 10.0, 5.0, 0.5, 0.01


class PlainStage1:
    """Stage 1 with the authors' weights and optimizers.

    Args:
        networks: Trained; the trunk gets no gradient.
        shown: Which fake a paired step shows to D_real: ``"ab"`` or ``"ba"``.
        lr: Of both optimizers.
    """

    def __init__(self, networks: Networks, *, shown: str = "ab", lr: float = 1e-4) -> None:
        self.networks, self.shown = networks, shown
        networks.content_encoder.model.requires_grad_(False)
        ours = [networks.content_encoder, networks.degradation_encoder, networks.generator]
        judges = [networks.real_discriminator, networks.degradation_discriminator]
        self.optimizers = [
            torch.optim.Adam(
                [part for module in side for part in module.parameters() if part.requires_grad],
                lr=lr,
                betas=(0.0, 0.999),
                weight_decay=5e-4,
            )
            for side in (judges, ours)
        ]

    def step(self, pair: Pair) -> dict[str, Tensor]:
        """One iteration; returns the weighted terms of both sides under the names of ours, detached."""
        net, a, b = self.networks, pair.better, pair.worse
        f_a, c_a = content(net.content_encoder, a)
        f_b, c_b = content(net.content_encoder, b)
        d_a = degradation(net.degradation_encoder, a, "real")
        d_b = degradation(net.degradation_encoder, b, "syn" if pair.paired else "real")
        rendered = {
            name: render(net.generator, *parts)
            for name, parts in {"aa": (c_a, d_a), "bb": (c_b, d_b), "ab": (c_a, d_b), "ba": (c_b, d_a)}.items()
        }
        judged = self._judge_terms(pair, {name: rendered[name].detach() for name in ("ab", "ba")})
        _update(self.optimizers[0], judged)
        terms = self._adversarial_terms(pair, rendered)
        terms["self"] = _RECONSTRUCTION * (F.l1_loss(rendered["aa"], a) + F.l1_loss(rendered["bb"], b))
        if pair.paired:
            cross = F.l1_loss(rendered["ab"], b) + F.l1_loss(rendered["ba"], a)
            terms["content"] = _CONTENT * F.l1_loss(c_a, c_b)
        else:
            contents = [content(net.content_encoder, rendered[name])[1] for name in ("ab", "ba")]
            codes = [degradation(net.degradation_encoder, rendered[name], "real") for name in ("ba", "ab")]
            backs = [render(net.generator, *parts) for parts in zip(contents, codes, strict=True)]
            cross = F.l1_loss(backs[0], a) + F.l1_loss(backs[1], b)
            logits = [net.content_encoder.classifier(features) for features in (f_a, f_b)]
            labels = (pair.better_labels, pair.worse_labels)
            ce = [F.cross_entropy(part, own) for part, own in zip(logits, labels, strict=True) if own is not None]
            terms["identity"] = _IDENTITY * torch.stack(ce).sum()
        terms["cross"] = _RECONSTRUCTION * cross
        _update(self.optimizers[1], terms)
        return {name: term.detach() for name, term in (terms | judged).items()}

    def _judge_terms(self, pair: Pair, fakes: dict[str, Tensor]) -> dict[str, Tensor]:
        real, clean = self.networks.real_discriminator, self.networks.degradation_discriminator
        a, b = (images.detach().clone().requires_grad_() for images in (pair.better, pair.worse))
        if pair.paired:
            realness = _judge(real, fakes[self.shown], a)
            cleanness = _judge_rank(clean, b, a, torch.tensor(-1.0))
        else:
            realness = _judge(real, fakes["ab"], a) + _judge(real, fakes["ba"], b)
            order = self._order(pair) if pair.phase == "unsupervised" else None
            cleanness = 2 * _judge(clean, b, a) if order is None else _judge_rank(clean, b, a, order)
        return {"discriminator_realness": realness, "discriminator_degradation": cleanness}

    def _adversarial_terms(self, pair: Pair, rendered: dict[str, Tensor]) -> dict[str, Tensor]:
        real, clean = self.networks.real_discriminator, self.networks.degradation_discriminator
        realness = sum(_squares(scores(real, rendered[name]), 1) * 2 for name in ("ab", "ba"))
        maps = [scores(clean, rendered[name]) for name in ("ab", "ba")]
        if pair.phase == "unpaired":
            cleanness = 2 * (_squares(maps[0], 0) + _squares(maps[1], 1))
        else:
            cleanness = _hinge(maps[0], maps[1], torch.tensor(-1.0) if pair.paired else self._order(pair))
        return {"realness": torch.as_tensor(realness), "degradation": cleanness}

    @torch.no_grad()
    def _order(self, pair: Pair) -> Tensor:
        clean = self.networks.degradation_discriminator
        sums = [
            torch.stack([part.mean(dim=(2, 3)) for part in scores(clean, images)]).sum(dim=0)
            for images in (pair.worse, pair.better)
        ]
        return torch.where(sums[0] >= sums[1], 1.0, -1.0)


class PlainStage2:
    """Stage 2 with the authors' weights: one rendering of each image by codes of the bank, and two forwards.

    Args:
        augmenter: Its frozen networks and its bank are used.
        model: Trained.
        lr: Of Adam.
    """

    def __init__(self, augmenter: ReplayAugmenter, model: DualBranchReID, *, lr: float = 3.5e-4) -> None:
        self.augmenter, self.model = augmenter, model
        trained = [part for part in model.parameters() if part.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=lr, weight_decay=5e-4)

    def step(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One iteration; returns the weighted terms under the names of ours, detached."""
        frozen, encoder = self.augmenter, self.model.content_encoder
        assert frozen.bank is not None
        with torch.no_grad():
            codes = frozen.bank.sample(len(images), generator)
            rendered = render(frozen.generator, content(frozen.content_encoder, images, want_identity=False)[1], codes)
        maps = encoder.model(images)
        f_inv = read_head(encoder.head, maps, want_content=False)[0]
        layer4, classifier = self.model.sensitive.model["layer4"], self.model.sensitive.classifier
        f_sen = F.adaptive_max_pool2d(layer4(maps[-1]), 1).flatten(1)
        features = {"fuse": torch.cat([f_sen, f_inv], dim=1), "inv": f_inv, "sen": f_sen}
        heads = {"fuse": self.model.fuse_classifier, "inv": encoder.classifier, "sen": classifier}
        logits = {name: head(features[name]) for name, head in heads.items()}
        replayed = encoder.classifier(read_head(encoder.head, encoder.model(rendered), want_content=False)[0])
        terms = {
            name: weight * (F.cross_entropy(logits[name], labels) + _triplet(features[name], labels))
            for name, weight in {"fuse": 1.0, "inv": 0.5, "sen": 0.5}.items()
        }
        target = logits["inv"].detach().softmax(dim=1)
        terms["replay"] = 5.0 * F.kl_div(replayed.log_softmax(dim=1), target, reduction="batchmean")
        _update(self.optimizer, terms)
        return {name: term.detach() for name, term in terms.items()}


def plain_copy(networks: Networks) -> Networks:
    """The same weights for the other side of a comparison."""
    return Networks._make(copy.deepcopy(part) for part in networks)


def _squares(maps: Sequence[Tensor], target: float) -> Tensor:
    return torch.stack([(part - target).square().mean() for part in maps]).mean()


def _penalty(maps: Sequence[Tensor], images: Tensor) -> Tensor:
    terms = []
    for part in maps:
        (gradient,) = torch.autograd.grad(part.sum(), images, create_graph=True)
        terms.append(gradient.square().sum(dim=(1, 2, 3)).mean())
    return torch.stack(terms).mean()


def _judge(network: MultiScaleDiscriminator, fake: Tensor, real: Tensor) -> Tensor:
    fakes, reals = scores(network, fake.detach()), scores(network, real)
    return _squares(fakes, 0) + _squares(reals, 1) + _R1 * _penalty(reals, real)


def _judge_rank(network: MultiScaleDiscriminator, lower: Tensor, higher: Tensor, order: Tensor) -> Tensor:
    low, high = scores(network, lower.detach()), scores(network, higher)
    return _hinge(low, high, order) + _R1 * _penalty([part.mean(dim=(2, 3)) for part in high], higher)


def _hinge(lower: Sequence[Tensor], higher: Sequence[Tensor], order: Tensor) -> Tensor:
    differences = [(low.mean(dim=(2, 3)) - high.mean(dim=(2, 3))) for low, high in zip(lower, higher, strict=True)]
    return torch.stack([F.relu(1 - order * part).mean() for part in differences]).mean()


def _triplet(features: Tensor, labels: Tensor) -> Tensor:
    distances = (features[:, None] - features[None]).square().sum(dim=2).clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels[None]
    furthest = distances.masked_fill(~same, -torch.inf).amax(dim=1)
    nearest = distances.masked_fill(same, torch.inf).amin(dim=1)
    return F.relu(furthest - nearest + 0.3).mean()


def _update(optimizer: torch.optim.Optimizer, terms: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
