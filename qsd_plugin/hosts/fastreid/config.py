"""The plugin's config keys: one ``add_<part>_config(cfg)`` each, added to the host's defaults on activation."""

from __future__ import annotations

from typing import Any

from qsd_plugin.hosts.fastreid.config_data import add_data_config
from qsd_plugin.hosts.fastreid.config_degrade import add_degrade_config
from qsd_plugin.hosts.fastreid.config_dil import add_dil_config, add_dil_recipe_config, add_severity_config
from qsd_plugin.hosts.fastreid.config_mixed import add_mixed_config
from qsd_plugin.hosts.fastreid.config_protocols import add_protocol_config
from qsd_plugin.hosts.fastreid.config_qgface import add_qgface_head_config
from qsd_plugin.hosts.fastreid.config_qgface_contrast import add_qgface_contrast_config
from qsd_plugin.hosts.fastreid.config_qgface_views import add_qgface_views_config
from qsd_plugin.hosts.fastreid.config_qud import add_qud_config
from qsd_plugin.hosts.fastreid.config_qud_cache import add_qud_cache_config


def add_all_config(cfg: Any) -> None:
    """Add every key of the plugin to ``cfg`` (a host ``CfgNode``); keys that are there already keep their value."""
    for add in (
        add_run_config,
        add_loss_config,
        add_data_config,
        add_degrade_config,
        add_protocol_config,
        add_mixed_config,
        add_quality_config,
        add_sampler_config,
        add_qsd_config,
        add_qud_config,
        add_recipe_config,
        add_face_config,
        add_qud_cache_config,
        add_qgface_head_config,
        add_qgface_views_config,
        add_qgface_contrast_config,
        add_dil_config,
        add_dil_recipe_config,
        add_severity_config,
    ):
        add(cfg)


def add_run_config(cfg: Any) -> None:
    """Keys of the run as a whole."""
    import torch

    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"  # the host's default, "cuda", cannot work here
    if "SEED" in cfg:
        return
    # Seed of every random stream of the run; -1: a new one each run, printed in the log. Integer >= -1.
    cfg.SEED = -1


def add_loss_config(cfg: Any) -> None:
    """Nodes of the losses that ``MODEL.LOSSES.NAME`` may list in addition to the host's."""
    if "WTRI" in cfg.MODEL.LOSSES:
        return
    node = type(cfg)
    # WeightedTripletLoss: AGW's weighted-regularised triplet (Ye et al., TPAMI 2021).
    cfg.MODEL.LOSSES.WTRI = node()
    # Factor of the loss. >= 0.
    cfg.MODEL.LOSSES.WTRI.SCALE = 1.0
    # False: the authors' arithmetic, whose negative weights underflow at distances above about 15.
    # True: the same formula evaluated stably.
    cfg.MODEL.LOSSES.WTRI.STABLE = False

    # CenterLoss (Wen et al., ECCV 2016) on the features that the triplet sees.
    cfg.MODEL.LOSSES.CENTER = node()
    # Factor of the loss. >= 0.
    cfg.MODEL.LOSSES.CENTER.SCALE = 0.0005
    # Learning rate of the class centres, independent of SOLVER.BASE_LR. > 0.
    cfg.MODEL.LOSSES.CENTER.LR = 0.5


def add_quality_config(cfg: Any) -> None:
    """``QUALITY``: where the quality of an image comes from. Higher is better, 0 to 100."""
    if "QUALITY" in cfg:
        return
    cfg.QUALITY = node = type(cfg)()
    # file (labels of QUALITY.FILES), dil_severity (labels by QUALITY.SEVERITY, made at the first step), embedding_norm,
    # network (QUALITY.NETWORK), or import:module:function.
    node.SOURCE = "file"
    # QUALITY.SOURCE network only. import:module:factory, a function without arguments that builds the network: RGB
    # images [B, 3, H, W], 0 to 255, to scores [B], 0 to 100.
    node.NETWORK = ""
    # QUALITY.SOURCE network only. File with its state dict.
    node.NETWORK_WEIGHTS = ""
    # Label files, aligned with DATASETS.NAMES. Empty: OUTPUT_DIR/labels/<data set>.npz, where the recipe writes them.
    node.FILES = ()
    # none | minmax | rank: scale to [0, 100] within each data set (scores are not comparable across data sets). On the
    # rank scale the spread of a label is unknown.
    node.SCALE = "minmax"
    # Scientific controls. none | shuffle (labels permuted among images) | random_direction (a coin decides who
    # teaches) | reverse (the worse image teaches).
    node.CONTROL = "none"
    # Smallest fraction of training images that must have a label. 0 to 1.
    node.MIN_COVERAGE = 0.99
    # How images are labelled: sdd_fiqa | norm (length of the feature before the BN neck).
    node.METHOD = "sdd_fiqa"
    # Cross-fitting: every one of K folds of the training identities is labelled by a baseline trained on the other
    # folds, which never saw them. 0 (one baseline labels the images it was trained on) or K >= 2.
    node.FOLDS = 0
    # Label the training images again with the current network every N epochs, as OUTPUT_DIR/labels_epoch_XXX.npz.
    # 0 (never) or N >= 1.
    node.REFRESH_EPOCHS = 0
    # SDD-FIQA labelling (Ou et al., CVPR 2021): images of the same identity drawn per image and round (n+). >= 1.
    node.POSITIVES = 24
    # The same for images of other identities (n-). >= 1.
    node.NEGATIVES = 24
    # Rounds of drawing, whose labels are averaged. >= 1.
    node.ROUNDS = 12
    # True: an image less similar to its own identity than to others gets a low label, not a high one.
    node.SIGNED = False


def add_sampler_config(cfg: Any) -> None:
    """``QUALITY.BALANCE``: the bins of ``DATALOADER.SAMPLER_TRAIN: QualityBalancedSampler``."""
    if "BALANCE" in cfg.QUALITY:
        return
    cfg.QUALITY.BALANCE = node = type(cfg)()
    # Bins that each training set's labels are divided into; a batch holds all of them equally often. Integer >= 2.
    node.BINS = 8
    # quantile: bins of equal numbers of images (a batch is spread like the training set) | width: intervals of equal
    # length between the lowest and the highest label (rare qualities come as often as frequent ones).
    node.EDGES = "quantile"


def add_qsd_config(cfg: Any) -> None:
    """``QSD``: quality self-distillation (Ou et al., TMM 2024)."""
    if "QSD" in cfg:
        return
    cfg.QSD = node = type(cfg)()
    # Meta-architecture that QSD extends: Baseline, MGN, MoCo, Distiller or any other registered one.
    node.BASE = "Baseline"
    # official | legacy | author_demo: level weights and options of the authors' releases. recommended: ours for new
    # work (detached map scale, normalised maps, missing labels left out; reasons in methods/qsd/presets.py).
    node.PRESET = "official"
    # Levels to distil, as "module.path", "module.path:output_key", either with "=weight" behind it.
    # Empty: the default levels of the backbone family with the preset's weights (tools/doctor.py --taps lists them).
    node.TAPS = []
    # Factor of the whole QSD term. 0 computes and logs it without training on it. >= 0.
    node.WEIGHT = 1.0
    # inbatch: all same-identity pairs of the batch. partner: one other image of the identity per anchor (official),
    # with a second forward.
    node.PAIRING = "inbatch"
    # Partner pairing only. separate: a forward of its own (official, own batch statistics); joint: one forward of 2B.
    node.PARTNER_FORWARD = "separate"
    # Gate width (tau): pairs whose label gap is below tau x mean gap, or above 100 - tau x (100 - mean gap), are
    # dropped. 0 <= tau < 1.
    node.TAU = 0.3
    # Distance between energy maps: l2 | l1.
    node.MAP_DISTANCE = "l2"
    # Gradient through the map scale 2/R: attached (official) | detached. Empty: the preset's.
    node.SCALE_GRAD = ""
    # Per-image normalisation of energy maps: none (official) | l2 | rms (root mean square 1). Empty: the preset's.
    node.MAP_NORM = ""
    # Pairs with an unlabelled image: exclude | tie (official: both count as 50). Empty: the preset's.
    node.MISSING = ""
    # Kept pairs weigh (label gap)^GAP_POWER, mean 1 over the batch. 0: all alike (official). >= 0.
    node.GAP_POWER = 0.0
    # Pairs whose label gap is below CONFIDENCE standard deviations of the difference of their labels (from the rounds
    # of labelling) are dropped. 0: none (official). >= 0.
    node.CONFIDENCE = 0.0
    # Partner pairing only: which images the host's losses see. anchor (official) | teacher (of each pair the one with
    # the higher label, the anchor of a tie) | both (twice the batch). With in-batch pairing every image is an anchor.
    node.CLS_ON = "anchor"
    # Horizontal flips. independent (official) | shared: the images of a pair are mirrored together, with in-batch
    # pairing all images of an identity in the batch. Probability: INPUT.FLIP.PROB.
    node.PAIR_FLIP = "independent"
    # False: no random erasing (INPUT.REA) on an image that teaches; of an identity's images in a batch (in-batch
    # pairing) that leaves the one with the lowest label. With QSD.EMA the moving average sees every image without it,
    # the student every image with it. True: erasing hits teachers too (official).
    node.TEACHER_ERASE = True

    # Teach with an exponential moving average of the network instead of the network itself.
    node.EMA = type(cfg)()
    # False (official) | True. Its tensors lie in the checkpoint under qsd_teacher.
    node.EMA.ENABLED = False
    # Share of the average that is kept at each step. 0 to 1; 0: the network as it is, in eval mode.
    node.EMA.MOMENTUM = 0.999


def add_recipe_config(cfg: Any) -> None:
    """``RECIPE``: the stages that ``tools/train_net.py`` runs before the final training."""
    if "RECIPE" in cfg:
        return
    cfg.RECIPE = node = type(cfg)()
    # "" (train this config only) | qsd (baseline -> labels -> qsd) | qud (teacher -> student; the teacher is trained
    # where KD.MODEL_CONFIG names its config and KD.MODEL_WEIGHTS no checkpoint) | qgface (this config in a stage of its
    # own; the arms of an experiment then share none) | dil ([teacher] -> stage 1 -> bank -> stage 2; this config is the
    # last one's, RECIPE.DIL has what the others differ in).
    node.NAME = ""
    # True: also the control, the same fine-tuning from the same baseline without QSD.
    node.CONTROL = False
    # The baseline stage: this config with QSD.BASE as meta-architecture and these solver settings instead of SOLVER's.
    node.BASELINE = type(cfg)()
    # Use this checkpoint instead of training a baseline. Path; empty: train one.
    node.BASELINE.WEIGHTS = ""
    # Epochs, as SOLVER.MAX_EPOCH. >= 1.
    node.BASELINE.MAX_EPOCH = 120
    # Learning rate, as SOLVER.BASE_LR. > 0.
    node.BASELINE.BASE_LR = 3.5e-4
    # Epochs after the warm-up at which the rate falls by SOLVER.GAMMA, as SOLVER.STEPS.
    node.BASELINE.STEPS = [29, 59]
    # Warm-up in iterations, as SOLVER.WARMUP_ITERS. >= 0.
    node.BASELINE.WARMUP_ITERS = 2000


def add_face_config(cfg: Any) -> None:
    """Keys of the face backbones, of the margins that have three numbers, and of the sharded head."""
    if "WIDTH" in cfg.MODEL.BACKBONE:
        return
    # build_iresnet_backbone, build_ir_backbone, build_mobilefacenet_backbone: factor on all channels but those of the
    # embedding (FEAT_DIM). 1.0: the published network. Above 0, up to 8.
    cfg.MODEL.BACKBONE.WIDTH = 1.0
    # CLS_LAYER CombinedMarginStraightThrough and CombinedMarginExact: m1 (factor on the angle, > 0), m2 (added to it,
    # radians, >= 0) and m3 (taken from the cosine, >= 0) of ArcFace's Equation 4. The others read MARGIN.
    cfg.MODEL.HEADS.COMBINED_MARGIN = [1.0, 0.3, 0.2]
    # NAME ShardedEmbeddingHead: share of the classes that a step compares with (r of Partial FC). A process keeps
    # int(SAMPLE_RATE x its classes): the true classes of the batch, always all of them, and others at random. 1.0: all
    # classes. Above 0, up to 1.
    cfg.MODEL.HEADS.SAMPLE_RATE = 1.0
