"""``QUD``: the student's and the teacher's settings; the teacher's network is the first of ``KD.MODEL_CONFIG``."""

from __future__ import annotations

from typing import Any


def add_qud_config(cfg: Any) -> None:
    """``QUD``: unsupervised distillation with a queue of teacher embeddings (Kolf et al., BMVC 2024)."""
    if "QUD" in cfg:
        return
    cfg.QUD = node = type(cfg)()
    # Meta-architecture of the student that QUD extends: Baseline, MGN or any other registered one. QSD goes on top:
    # QSD.BASE QUD.
    node.BASE = "Baseline"
    # qud (one teacher embedding against the queue's) | soft (SEED: the teacher's own similarities are the targets) |
    # mse | cosine (plain regression of the unit vectors; the queue then serves the monitors only).
    node.LOSS = "qud"
    # Factor of the term loss_qud. 0 computes and logs it without training on it. >= 0.
    node.WEIGHT = 1.0
    # Temperature (tau) of LOSS qud and soft, and of the monitors. > 0; the paper's is 0.1, SEED's 0.2.
    node.TEMPERATURE = 0.1
    # Entries of the queue (n), embeddings of earlier steps on all GPUs. At least SOLVER.IMS_PER_BATCH, of which it need
    # not be a multiple; the paper's is 1024.
    node.QUEUE_SIZE = 1024
    # LOSS qud only. A queue entry whose cosine with the teacher's embedding of an image is above this, likely the same
    # identity, is no negative for that image. Above -1; 1: all entries are negatives (the paper's).
    node.MASK_ABOVE = 1.0
    # LOSS soft only. Temperature (tau_T) of the targets. > 0; SEED's is 0.01, towards 0 they become those of qud.
    node.SOFT_TEMPERATURE = 0.01
    # LOSS mse only. mean (over images and dimensions, as in the authors' program: so small that weight decay outweighs
    # it at first) | sum_dim (sum over dimensions, mean over images).
    node.MSE_REDUCTION = "mean"
    # Layer between the student's embedding and the loss. auto (a linear one if the teacher's embedding has another
    # length) | linear (always) | none (lengths must be equal). It is trained, and not part of the deployed network.
    node.PROJECTOR = "auto"
    # False: no labels are read and no classifier is built, loss_qud is the only term. True: the losses of
    # MODEL.LOSSES.NAME are added, with their own factors, and need identities.
    node.HOST_LOSSES = False

    node.TEACHER = type(cfg)()
    # network (KD.MODEL_CONFIG and KD.MODEL_WEIGHTS, the first of each) | onnx (QUD.TEACHER.ONNX) | cache (embeddings
    # come with the batch, as teacher_features [B, D], and no teacher is loaded).
    node.TEACHER.SOURCE = "network"
    # SOURCE onnx only. Path of the model file.
    node.TEACHER.ONNX = ""
    # SOURCE onnx only. [height, width] in pixels that the model was trained with; [] takes the model's own. A teacher
    # network has the INPUT.SIZE_TEST of its config.
    node.TEACHER.SIZE = []
    # SOURCE onnx only. Subtracted from pixel values 0 to 255, per channel in the order of COLOUR; zeros if the model
    # normalises by itself. A teacher network has the MODEL.PIXEL_MEAN of its config.
    node.TEACHER.MEAN = [127.5, 127.5, 127.5]
    # SOURCE onnx only. Divides what is left, per channel. > 0; ones if the model normalises by itself.
    node.TEACHER.STD = [127.5, 127.5, 127.5]
    # Channel order that the teacher was trained with: RGB (whatever fast-reid trained) | BGR.
    node.TEACHER.COLOUR = "RGB"
    # SOURCE cache only. Length (D) of the teacher's embeddings. 0: as long as the student's; else >= 1.
    node.TEACHER.DIM = 0
