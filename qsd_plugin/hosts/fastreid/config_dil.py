"""``DIL``: networks, pairs, losses and files of degradation-invariance learning (Huang et al., CVPR 2020)."""

from __future__ import annotations

from typing import Any


def add_dil_config(cfg: Any) -> None:
    """``DIL``: what both stages and the teacher share, and a node for each stage."""
    if "DIL" in cfg:
        return
    cfg.DIL = node = type(cfg)()
    # Factor on all channels of DIL's networks, the trunk's and the teacher's included. > 0; 1.0 is the paper's size.
    node.WIDTH = 1.0
    # Residual blocks of the four stages of the ResNet; the first three are the trunk, the fourth makes the sensitive
    # feature. Four integers >= 1; the paper's are ResNet-50's.
    node.BLOCKS = [3, 4, 6, 3]
    # Kind of residual blocks: bottleneck (ResNet-50, the paper's) | basic (ResNet-18 and 34).
    node.BLOCK = "bottleneck"
    # Probability of dropout in front of every classifier. 0 to below 1; the authors' is 0.5.
    node.DROPOUT = 0.5
    # What the generator's layer norm averages over: sample (float32 of the authors) | batch (their float16 training).
    node.LN_SCOPE = "sample"
    # Checkpoint of a DILTeacher, or net_last.pth of the authors' layout. Stage 1 takes its trunk from it, stage 2 the
    # last stage and its classifier. Path; empty: MODEL.BACKBONE.PRETRAIN_PATH (torchvision's ResNet) or random numbers.
    node.TEACHER = ""
    # MODEL.META_ARCHITECTURE DILReID only. Checkpoint of stage 1 (MODEL.META_ARCHITECTURE DIL), or a folder with the
    # authors' files E_con_*.pt, E_deg_*.pt, G_*.pt. Path; empty: without stage 1, and then without replay.
    node.STAGE1 = ""
    # MODEL.META_ARCHITECTURE DILReID with DIL.REPLAY.MODE bank only. The codes of the training images, which the
    # recipe's stage "bank" writes. Path of an .npz file.
    node.BANK = ""

    node.PAIRS = type(cfg)()
    # Stage 1: what makes the worse image of a paired iteration, as a+b_q or a+b_q_clear (degradations/mixing.py): res,
    # ill, jpg, motion, blur, noise, poisson, dark or the toolkit's own. A single name is always applied.
    node.PAIRS.MIX = "res"
    # MIX res alone only. Range of the factor by which both sides shrink, uniform. 1 <= first <= second.
    node.PAIRS.RATIO = [3.0, 5.0]
    # The iterations beside the paired ones: unpaired (images of other people from the degraded domain against those of
    # the other cameras) | unsupervised (two images of different cameras; the discriminator ranks them itself) | auto
    # (unpaired where DEGRADED_CAMERAS or the data set names a degraded domain, else unsupervised; the authors').
    node.PAIRS.OTHER = "auto"
    # Probability that an iteration is paired. 0 to 1 (1: paired only); -1: they alternate, the authors' default.
    node.PAIRS.PAIRED_PROB = -1.0
    # OTHER unpaired only. Cameras whose images are the degraded domain, by the data set's own numbers (from 0 for
    # Market-1501's first). Not all; empty: those that the data set names (MLRMarket1501, MLRCUHK03, MLRVIPeR, CAVIAR).
    node.PAIRS.DEGRADED_CAMERAS = []
    # OTHER unpaired only. True: the worse image of a paired iteration is the data set's own of the same identity, from
    # DEGRADED_CAMERAS, as in paired low-light folders. False: a degradation by MIX.
    node.PAIRS.STORED = False

    _add_stage1(node)
    _add_stage2(node)


def add_dil_recipe_config(cfg: Any) -> None:
    """``RECIPE.DIL``: the trainings before stage 2, which is the config's own; on top of :func:`add_dil_config`."""
    if "DIL" in cfg.RECIPE:
        return
    kind = type(cfg)
    cfg.RECIPE.DIL = node = kind()
    # True: the teacher's weights are the first ones of stage 1's trunk, too. False: as the authors' commands, where
    # stage 1 starts from MODEL.BACKBONE.PRETRAIN_PATH.
    node.TEACHER_IN_STAGE1 = True
    # The stage "teacher": stage 2's solver with these settings. Epochs, as SOLVER.MAX_EPOCH; 0: no teacher is trained.
    node.TEACHER = kind()
    node.TEACHER.MAX_EPOCH = 60
    # Learning rate, as SOLVER.BASE_LR. > 0.
    node.TEACHER.BASE_LR = 3.5e-4
    # Epochs at which the rate falls by SOLVER.GAMMA, as SOLVER.STEPS.
    node.TEACHER.STEPS = [40]
    # The stage "stage1". Pairs per step over all processes, as SOLVER.IMS_PER_BATCH. >= 1; the authors' is 8.
    node.STAGE1 = kind()
    node.STAGE1.IMS_PER_BATCH = 8
    # Epochs over the training images, of which an iteration takes IMS_PER_BATCH. >= 1; theirs is 30,000 iterations.
    node.STAGE1.MAX_EPOCH = 18
    # Learning rate of encoders and generator, as SOLVER.BASE_LR. > 0.
    node.STAGE1.BASE_LR = 1e-4
    # Epochs at which it falls by SOLVER.GAMMA; theirs is after two thirds.
    node.STAGE1.STEPS = [12]


def add_severity_config(cfg: Any) -> None:
    """``QUALITY.SEVERITY``: labels by the degradation codes of DIL's stage 1; needs the nodes QUALITY and DIL."""
    if "SEVERITY" in cfg.QUALITY:
        return
    cfg.QUALITY.SEVERITY = node = type(cfg)()
    # QUALITY.SOURCE dil_severity only. Checkpoint of stage 1 (MODEL.META_ARCHITECTURE DIL) at DIL.WIDTH, or a folder
    # with the authors' files. Path; empty: DIL.STAGE1.
    node.STAGE1 = ""
    # Training images whose degraded copies (DIL.PAIRS.MIX and RATIO) show in which direction codes get worse. >= 10.
    node.IMAGES = 1000


def _add_stage1(node: Any) -> None:
    """``DIL.STAGE1_OPTIONS``: factors and choices of stage 1."""
    kind = type(node)
    node.STAGE1_OPTIONS = options = kind()
    # Factors of the terms, >= 0: is it a real image; how clean does it look; images against renderings; content maps of
    # a pair against each other; identities.
    options.REALNESS = 1.0
    options.DEGRADATION = 1.0
    options.RECONSTRUCTION = 10.0
    options.CONTENT = 5.0
    options.IDENTITY = 0.5
    # Distance between images and between content maps: l1 | l2 | smooth_l1.
    options.PIXEL = "l1"
    # True: paired iterations tie the identity predictions on both images by KL. False: the authors' default.
    options.PREDICTIONS_AGREE = False
    # Terms of encoders and generator that are left out: paired. or unpaired. and self, cross, content, identity,
    # degradation or realness, as in "paired.content".
    options.ABLATE = []
    # True: the cycle's gradient passes the trunk to the rendered images. False: cut there, the authors'.
    options.CYCLE_THROUGH_TRUNK = False
    # True: the identity branch also runs on rendered images, only to move its batch statistics (the authors').
    options.RENDERED_IDENTITY = True
    # True: the trunk's batch statistics stay as they are. False: they move (the authors').
    options.FREEZE_TRUNK_NORM = False
    # Weight of the gradient penalty beside least squares, and of the one beside ranking. >= 0.
    options.R1_WEIGHT = 0.01
    options.RANK_R1_WEIGHT = 0.01
    # The penalty is taken in every k-th pair of iterations, with k times the weight. >= 1; 1: always (the authors').
    options.R1_EVERY = 1
    # Scales of the discriminator that tells how clean an image looks. >= 1; 0: 1 for MIX res, else 3 (the authors').
    options.DEGRADATION_SCALES = 0
    # Every so many iterations the pair and its renderings are drawn, with those of the next one: PNG files in
    # OUTPUT_DIR/sheets, and TensorBoard. >= 0; 0: never; 5000 is the authors'.
    options.SHEET_EVERY = 5000
    # Decay of the two moments of both Adams: encoders with generator, and discriminators. [0, 1) each.
    options.BETAS = [0.0, 0.999]
    # Learning rate of the discriminators as a factor on that of SOLVER, whose warm-up and steps they follow. > 0.
    options.DISCRIMINATOR_LR_FACTOR = 1.0
    # Weight decay of the discriminators. >= 0.
    options.DISCRIMINATOR_WEIGHT_DECAY = 0.0005


def _add_stage2(node: Any) -> None:
    """``DIL.REPLAY`` and ``DIL.STAGE2_OPTIONS``: replay, factors and choices of stage 2."""
    kind = type(node)
    node.REPLAY = replay = kind()
    # Where the codes come from: bank (all training images, the paper's) | shuffle (the other images of the batch) |
    # none (no replay).
    replay.MODE = "bank"
    # Renderings of each image. >= 1.
    replay.REPEATS = 1
    # Probability that an image and its rendering change places. 0 to 1; the authors' is 0.5 for haze, else 0.
    replay.SWAP = 0.0

    node.STAGE2_OPTIONS = options = kind()
    # Factors, >= 0: identities by the joined, the robust and the sensitive feature; agreement of the robust predictions
    # on an image and its rendering; identities by the robust predictions on renderings (ours).
    options.FUSE_WEIGHT = 1.0
    options.INV_WEIGHT = 0.5
    options.SEN_WEIGHT = 0.5
    options.REPLAY_WEIGHT = 5.0
    options.REPLAY_IDENTITY = 0.0
    # Loss of each feature: ce_tri (cross entropy and batch-hard triplet, margin 0.3) | ce | tri | none.
    options.FUSE_LOSS = "ce_tri"
    options.INV_LOSS = "ce_tri"
    options.SEN_LOSS = "ce_tri"
    # How the agreement is measured: kl_detach (the authors') | kl | js_detach | js.
    options.REPLAY_LOSS = "kl_detach"
    # Feature that evaluation compares: fuse (both joined) | inv (robust) | sen (sensitive).
    options.FEATURE = "fuse"
    # True: the sensitive feature is weighed by factors made of itself. False: the authors' default.
    options.ATTENTION = False
