"""Published settings of QSD and ours, by the role a tap plays in its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from qsd_plugin.core.errors import ConfigError, did_you_mean

ROLES = ("map", "vector", "logits")


class LossOptions(TypedDict):
    """Keyword arguments of :class:`~.loss.QSDLoss` that a preset fixes."""

    tau: float
    map_distance: str
    scale_grad: str
    map_norm: str | None
    missing: str


@dataclass(frozen=True)
class Preset:
    """Level weights by role, and the options of the loss, of one setting."""

    name: str
    map: float
    vector: float
    logits: float
    host: float = 1.0
    """Weight of the host's own losses beside those of the levels."""
    last: float | None = None
    """Weight of the last level, whatever its role."""
    tau: float = 0.3
    map_distance: str = "l2"
    scale_grad: str = "attached"
    map_norm: str | None = None
    missing: str = "tie"

    def options(self) -> LossOptions:
        """Keyword arguments for :class:`~.loss.QSDLoss`."""
        return LossOptions(
            tau=self.tau,
            map_distance=self.map_distance,
            scale_grad=self.scale_grad,
            map_norm=self.map_norm,
            missing=self.missing,
        )


_PRESETS = {
    preset.name: preset
    for preset in (
        # The released ReID training program.
        Preset("official", map=1.0, vector=1.0, logits=0.1),
        # Their earlier program: 1.5/4, 10 * 0.6/4, 0.2 * 0.6/4 and the same for the logits.
        Preset("legacy", host=0.375, map=1.5, vector=0.03, logits=0.03),
        # The self-test beside the authors' loss: five levels of which the last weighs 0.1.
        Preset("author_demo", map=1.0, vector=1.0, logits=0.1, last=0.1),
        # Ours for new work: the released weights and gate, without what is wrong by construction. Not tuned on results.
        # detached: gradient through the range R sits on the two extreme pixels of a batch, always pushes the maximum
        #   up, and is 2 to 7 times the rest of the map gradient.
        # rms: maps that are not normalised leave the balance of the levels to the scale of the stages (features times
        #   c: level times c^2) and ask the student for the teacher's contrast. "l2" would shrink the level as maps grow
        #   (see energy_map); with "rms" it starts at the size of the embedding's, so the weights 1 : 1 mean what they
        #   say.
        # exclude: a missing label says nothing about the gaps of the others, and a tie would lower their mean.
        Preset(
            "recommended",
            map=1.0,
            vector=1.0,
            logits=0.1,
            scale_grad="detached",
            map_norm="rms",
            missing="exclude",
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        ConfigError: No such preset; the message suggests the nearest ones.
    """
    if name not in _PRESETS:
        raise ConfigError("QSD preset", value=name, remedy=did_you_mean(name, _PRESETS))
    return _PRESETS[name]


def level_weights(preset: Preset, taps: Mapping[str, str]) -> dict[str, float]:
    """Weights for :class:`~.loss.QSDLoss`, relative to host losses of weight 1 (which thus stay as they are).

    Args:
        preset: Where the weights come from.
        taps: Role of each tap, ``"map"`` (a stage), ``"vector"`` (the embedding) or ``"logits"``; the order counts
            for presets that single out the last level.

    Raises:
        ConfigError: An unknown role.
    """
    for name, role in taps.items():
        if role not in ROLES:
            raise ConfigError(f"Role of tap {name!r}", value=role, remedy=did_you_mean(role, ROLES))
    by_role = {"map": preset.map, "vector": preset.vector, "logits": preset.logits}
    weights = {name: by_role[role] / preset.host for name, role in taps.items()}
    if preset.last is not None and weights:
        weights[list(taps)[-1]] = preset.last / preset.host
    return weights
