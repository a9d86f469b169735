"""Stage 2: re-identification with a robust and a sensitive feature on one trunk, kept robust by replay.

Shapes: B images, H x W pixels, C classes, D_inv and D_sen sizes of the features. Source: Huang et al., IJCV 2022; terms
and weights as in their program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.dil.encoders import ContentEncoder
from qsd_plugin.methods.dil.identity import ClassBlock, DegradationAttention
from qsd_plugin.methods.dil.layers import largest
from qsd_plugin.methods.dil.losses import CONSISTENCIES, IDENTITY_LOSSES, consistency_loss, identity_loss

#: Branches, which are also the features that can be asked for.
BRANCHES = ("fuse", "inv", "sen")


class BranchOutputs(NamedTuple):
    """Of :class:`DualBranchReID` in training, by the names in :data:`BRANCHES`."""

    logits: dict[str, Tensor]
    """[B, C] each."""
    features: dict[str, Tensor]
    """Before the bottlenecks: ``inv`` [B, D_inv], ``sen`` [B, D_sen], ``fuse`` the two joined, the sensitive first."""


class SensitiveBranch(nn.Module):
    """The last stage of the teacher and its classifier; names as in the authors' E_id.

    Args:
        layer4: The stage behind the trunk's last map.
        classifier: For what it returns, pooled.
    """

    def __init__(self, layer4: nn.Module, classifier: ClassBlock) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layer4": layer4})
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """The trunk's last map [B, C', H / 16, W / 16] to f_sen [B, D_sen], the maximum over each map."""
        return largest(self.model["layer4"](x))


class DualBranchReID(nn.Module):
    """Two features on one trunk: f_inv of stage 1's head, and f_sen of an ordinary last stage.

    The head's content branch is not run. Across ranks: plain.

    Args:
        content_encoder: Trunk, head and classifier as stage 1 left them. Its trunk is made trainable.
        sensitive: Last stage and classifier of the teacher.
        fuse_classifier: For the joined feature; new.
        attention: Factors on f_sen, from f_sen itself; ``None``, the authors' default, for none.
    """

    def __init__(
        self,
        content_encoder: ContentEncoder,
        sensitive: SensitiveBranch,
        fuse_classifier: ClassBlock,
        *,
        attention: DegradationAttention | None = None,
    ) -> None:
        super().__init__()
        self.content_encoder = content_encoder
        self.sensitive = sensitive
        self.fuse_classifier = fuse_classifier
        self.attention = attention
        content_encoder.model.requires_grad_(True)
        # No loss of this stage reaches the content branch.
        for block in content_encoder.head.content:
            block.requires_grad_(False)

    def forward(self, images: Tensor) -> BranchOutputs:
        """Logits and features of images [B, 3, H, W] in training."""
        features = self._features(images, ("inv", "sen"))
        features["fuse"] = torch.cat([features["sen"], features["inv"]], dim=1)
        logits = {
            "fuse": self.fuse_classifier(features["fuse"]),
            "inv": self.content_encoder.classifier(features["inv"]),
            "sen": self.sensitive.classifier(features["sen"]),
        }
        return BranchOutputs(logits, features)

    def robust_logits(self, images: Tensor) -> Tensor:
        """Of the robust branch alone, [B, C]: all that replay needs, without moving the others' batch statistics."""
        logits: Tensor = self.content_encoder.classifier(self._features(images, ("inv",))["inv"])
        return logits

    def embed(self, images: Tensor, kind: str = "fuse") -> Tensor:
        """What inference compares: bottlenecks, not normalised.

        Args:
            images: [B, 3, H, W].
            kind: ``"fuse"`` for those of f_sen and f_inv joined, [B, 1024] at the paper's size, or one of them:
                ``"inv"``, ``"sen"``. The classifier of the joined feature is not used.

        Raises:
            ConfigError: Unknown kind.
        """
        if kind not in BRANCHES:
            raise ConfigError(
                "DIL feature",
                value=kind,
                expected=" or ".join(map(repr, BRANCHES)),
                remedy=did_you_mean(str(kind), BRANCHES),
            )
        wanted = ("sen", "inv") if kind == "fuse" else (kind,)
        bottlenecks = {"inv": self.content_encoder.classifier, "sen": self.sensitive.classifier}
        features = self._features(images, wanted)
        return torch.cat([bottlenecks[name].embed(features[name]) for name in wanted], dim=1)

    def _features(self, images: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        maps = self.content_encoder.maps(images, trunk_grad=True)
        if "inv" in wanted:
            identity = self.content_encoder.read(maps, want_content=False).identity
            assert identity is not None  # it was asked for
            features["inv"] = identity
        if "sen" in wanted:
            features["sen"] = self.sensitive(maps[-1])
            if self.attention is not None:
                features["sen"] = features["sen"] * self.attention(features["sen"].detach())
        return features


@dataclass(frozen=True)
class Stage2Options:
    """Losses of stage 2; the defaults are the authors'.

    Args:
        fuse_weight: Of the identity loss of the joined feature, >= 0.
        inv_weight: Of that of the robust feature.
        sen_weight: Of that of the sensitive feature.
        replay_weight: Of the agreement of the robust predictions on an image and on its rendering.
        fuse_loss: ``"ce_tri"``, ``"ce"``, ``"tri"`` or ``"none"``.
        inv_loss: Likewise.
        sen_loss: Likewise.
        replay_loss: ``"kl_detach"``, ``"kl"``, ``"js_detach"`` or ``"js"``.
        replay_identity: Weight of a cross entropy of the robust predictions on the renderings; 0 in the paper.

    Raises:
        ConfigError: A weight is negative or a loss unknown.
    """

    fuse_weight: float = 1.0
    inv_weight: float = 0.5
    sen_weight: float = 0.5
    replay_weight: float = 5.0
    fuse_loss: str = "ce_tri"
    inv_loss: str = "ce_tri"
    sen_loss: str = "ce_tri"
    replay_loss: str = "kl_detach"
    replay_identity: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.fuse_weight, self.inv_weight, self.sen_weight, self.replay_weight, self.replay_identity)
        if min(weights) < 0:
            raise ConfigError("DIL stage 2 weights", value=weights, expected="numbers >= 0")
        for name, known in (
            *((f"{branch}_loss", IDENTITY_LOSSES) for branch in BRANCHES),
            ("replay_loss", CONSISTENCIES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"DIL stage 2 {name}",
                    value=value,
                    expected=" or ".join(map(repr, known)),
                    remedy=did_you_mean(str(value), known),
                )


def stage2_terms(
    outputs: BranchOutputs, replayed: Tensor | None, labels: Tensor, options: Stage2Options | None = None
) -> dict[str, Tensor]:
    """Weighted losses of a batch; identities on the images themselves only.

    Args:
        outputs: Of the images.
        replayed: Logits of the robust branch on their renderings, [B, C], from a forward of its own; ``None`` without
            replay, whose terms are then left out. With several renderings of an image, the images must be repeated.
        labels: [B] int64.
        options: The authors' by default.

    Returns:
        0-d terms: ``fuse``, ``inv``, ``sen``, and ``replay`` and ``replay_identity`` where there are any.
    """
    options = Stage2Options() if options is None else options
    terms = {
        branch: getattr(options, f"{branch}_weight")
        * identity_loss(outputs.logits[branch], outputs.features[branch], labels, getattr(options, f"{branch}_loss"))
        for branch in BRANCHES
    }
    if replayed is not None and options.replay_weight:
        terms["replay"] = options.replay_weight * consistency_loss(outputs.logits["inv"], replayed, options.replay_loss)
    if replayed is not None and options.replay_identity:
        terms["replay_identity"] = options.replay_identity * identity_loss(replayed, replayed, labels, "ce")
    return terms
