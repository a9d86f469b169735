"""Where the face test sets lie, and the switches of their protocols and of those of persons."""

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
    # Each of the following also takes the .rec file that tools/build_data.py pack-eval makes of it once.
    # Test set TinyFace: folder with Probe, Gallery_Match and Gallery_Distractor, aligned crops. Path.
    cfg.DATA.TINYFACE = ""
    # Test set SCface: folder with aligned crops named 001_frontal, 001_cam1_1, ... Path.
    cfg.DATA.SCFACE = ""
    # Test set IJB: folder of IJB-B or IJB-C with loose_crop and meta, as InsightFace packs it. Path.
    cfg.DATA.IJB = ""
    # Test sets IJBB and IJBC: the same, for runs that evaluate both; each takes its own set only. Paths.
    cfg.DATA.IJBB = ""
    cfg.DATA.IJBC = ""

    # With TEST.FLIP.ENABLED, how the embeddings of a face and its mirror image become one: pre_norm_vector_add (their
    # sum) | norm_weighted_avg (the same with the mean length) | average (of the unit ones) | concat (side by side).
    cfg.TEST.FUSION = "pre_norm_vector_add"
    # SCface: how many subjects, the first ones by number, the second result leaves out, as methods that fine-tune on
    # them do. 50 leaves 80 of 130. >= 0; 0: no second result.
    cfg.TEST.SCFACE = type(cfg)()
    cfg.TEST.SCFACE.FINE_TUNING = 50

    # What a query of a person set is compared with: auto (what papers on the set do: single for MLRCUHK03, MLRVIPeR and
    # CAVIAR, all for others) | all (every gallery image) | single (one drawn image of every person).
    cfg.TEST.GALLERY = "auto"
    # Gallery single. DRAWS: 0 (the exact expectation) or >= 1 (the mean over so many draws per query; papers take 100).
    # SEED of the draws, >= 0; the authors of DIL have 0.
    cfg.TEST.SINGLE_SHOT = type(cfg)()
    cfg.TEST.SINGLE_SHOT.DRAWS = 0
    cfg.TEST.SINGLE_SHOT.SEED = 0

    # IJB 1:1. The third switch of the protocol, F, is the host's TEST.FLIP.ENABLED.
    cfg.TEST.IJB = node = type(cfg)()
    # N, of the number that picks the best checkpoint; both are reported. True: an image weighs as much as its embedding
    # is long, as with AdaFace; False: embeddings are normalised before pooling.
    node.NORM = True
    # D: an image also weighs its detector score.
    node.DETECTOR_SCORE = True
    # How TAR at a FAR is read: nearest (the ROC's nearest point, as published numbers) | exact (FAR not exceeded).
    node.RULE = "nearest"
