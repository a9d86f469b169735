"""``QGFACE``: the heads whose margin follows the norm of the embedding, AdaFace's and QGFace's."""

from __future__ import annotations

from typing import Any


def add_qgface_head_config(cfg: Any) -> None:
    """Keys of ``MODEL.HEADS.NAME: AdaFaceHead`` and ``QGFaceHead``, beside the host's ``HEADS.SCALE`` and ``MARGIN``.

    AdaFace: Kim et al., CVPR 2022; QGFace: Song and Wang, arXiv 2312.17494. Both papers use SCALE 64 and MARGIN 0.4.
    """
    if "QGFACE" not in cfg:
        cfg.QGFACE = type(cfg)()
    if "NORM_FROM" in cfg.QGFACE:
        return
    node = cfg.QGFACE
    # Whose length tells how good an image is. neck_in: the feature in front of the head's BN neck, behind the reduction
    # to EMBEDDING_DIM | neck_out: the one behind it, whose length hardly tells quality any more. Without a BN neck both
    # are the same.
    node.NORM_FROM = "neck_in"
    # Concentration of the margin (h): it is largest and smallest for norms 1 / H deviations from the mean. > 0.
    node.H = 0.333
    # Weight of the new batch in the moving mean and deviation of the norms (t_alpha). Above 0, up to 1.
    node.MOMENTUM = 0.01
    # Where these statistics start. debiased: from the first batch | adaface: mean 20, deviation 100 | zeros (QGFace's
    # program; for about the first hundred steps every image counts as perfect). Empty: adaface for AdaFaceHead,
    # debiased for QGFaceHead.
    node.START = ""
    # QGFaceHead only. Images of lower quality (b) are not classified; quality is 0 to 1, of an average norm 0.5.
    # 0 switches this off; 1 classifies no image.
    node.THRESHOLD = 0.2
    # QGFaceHead only. The classification loss is the mean over all images (authors': one that is not classified counts
    # with ln C, which has no gradient) | active (over those that are).
    node.REDUCTION = "all"
