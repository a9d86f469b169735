"""``EVALUATION.MIXED``: face test sets with degraded images on one side or on both, persons with degraded queries."""

from __future__ import annotations

from typing import Any

from qsd_plugin.degradations.levels import LOWRES_LEVELS


def add_mixed_config(cfg: Any) -> None:
    """Add the keys of :mod:`qsd_plugin.hosts.fastreid.face_mixed` to ``cfg`` (a host ``CfgNode``), once."""
    if "EVALUATION" in cfg:
        return
    cfg.EVALUATION = type(cfg)()
    # Test sets SyntheticFacesMixed, VerificationBinMixed, FacePairsMixed, TinyFaceMixed and SCfaceMixed; of persons
    # Market1501Mixed, DukeMTMCMixed, MSMT17Mixed, CUHK03DetectedMixed, CUHK03LabeledMixed, ReIDFolderMixed,
    # ReIDListMixed and SyntheticPedestriansMixed, which degrade the queries and nothing else.
    cfg.EVALUATION.MIXED = node = type(cfg)()
    # Levels, as DEGRADATION-NUMBER; results carry these names. lowres-S: QGFace's degraded view at the share S of each
    # side, above 0, up to 1 (the paper trains on 0.1 to 0.5). px-N: both sides N pixels and back, bilinear. Any other
    # registered degradation (blur, darkness, noise, compression, which is JPEG, ...) at a severity from 0 to 1.
    node.LEVELS = LOWRES_LEVELS
    # Faces only. one: the first image of each pair or the probes are degraded, the others clean. both: all are.
    node.SIDES = ("one", "both")
    # What is random in a degradation depends on this and on the image's number in its test set only. >= 0.
    node.SEED = 0

    # Test set CRLFW, cross-resolution LFW: .bin file of LFW or of another set of pairs, whose first images are reduced
    # to 8, 12, 16 and 20 pixels and enlarged again. EVALUATION.MIXED does not matter to it. Path.
    cfg.DATA.CRLFW = ""
