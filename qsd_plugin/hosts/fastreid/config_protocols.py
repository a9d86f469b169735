"""Where the face test sets lie, and the switches of their protocols."""

from __future__ import annotations

from typing import Any


def add_protocol_config(cfg: Any) -> None:
    """Add the keys of :mod:`qsd_plugin.hosts.fastreid.protocols` to ``cfg`` (a host ``CfgNode``) unless it has them."""
    if "VERIFICATION" in cfg.DATA:
        return
    # Test set VerificationBin: .bin files (lfw.bin, cfp_fp.bin, ...), evaluated one by one. Paths.
    cfg.DATA.VERIFICATION = []
    # Test set FacePairs: CSV file first,second,same[,identity][,quality] of 20 pairs or more, as tools/build_data.py
    # face-split writes it (pairs.csv). Quality: higher is better, any unit. Path.
    cfg.DATA.PAIRS = ""
    # Test set TinyFace: folder with Probe, Gallery_Match and Gallery_Distractor, aligned crops. Path.
    cfg.DATA.TINYFACE = ""
    # Test set SCface: folder with aligned crops named 001_frontal, 001_cam1_1, ... Path.
    cfg.DATA.SCFACE = ""
    # Test set IJB: folder of IJB-B or IJB-C with loose_crop and meta, as InsightFace packs it. Path.
    cfg.DATA.IJB = ""

    # IJB 1:1. The third switch of the protocol, F, is the host's TEST.FLIP.ENABLED.
    cfg.TEST.IJB = node = type(cfg)()
    # N: an image weighs as much as its embedding is long; False: embeddings are normalised before pooling.
    node.NORM = True
    # D: an image also weighs its detector score.
    node.DETECTOR_SCORE = True
    # How TAR at a FAR is read: nearest (the ROC's nearest point, as published numbers) | exact (FAR not exceeded).
    node.RULE = "nearest"
