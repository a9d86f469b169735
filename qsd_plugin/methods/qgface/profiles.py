"""The two published readings of QGFace's contrastive branch.

The authors' configuration files were never published: the figure of their README and the defaults of their program
differ.
"""

from __future__ import annotations

from typing import TypedDict

from qsd_plugin.methods.qgface.gates import check_choice


class ContrastOptions(TypedDict):
    """Keyword arguments of :class:`~.contrast.QGContrast` that a profile fixes."""

    coupling: str
    detach_positive: bool
    mask: str
    weighting: str
    weight_range: str
    select: str
    margin_method: str
    rescale: bool


_COMMON = ContrastOptions(
    coupling="single",
    detach_positive=True,
    # The program's default masks instances and crashes with the proxy queue; masking identities is what runs.
    mask="identity",
    weighting="sgn",
    weight_range="half",
    select="low",
    margin_method="none",
    rescale=True,
)
_PROFILES = {
    # As drawn: the clean view is the positive with its gradient cut, only the degraded view learns.
    "figure": _COMMON,
    "code_default": ContrastOptions(**{**_COMMON, "coupling": "double", "detach_positive": False}),
}
PROFILES = tuple(_PROFILES)


def contrast_options(profile: str) -> ContrastOptions:
    """The settings of ``"figure"`` (recommended) or ``"code_default"``, as keyword arguments of ``QGContrast``.

    Raises:
        ConfigError: No such profile; the message suggests the nearest.
    """
    return ContrastOptions(**_PROFILES[check_choice("profile", profile, PROFILES)])
