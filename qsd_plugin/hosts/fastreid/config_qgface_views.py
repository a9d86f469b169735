"""``QGFACE.VIEWS``: what the train loader makes of an image, one view or a degraded and a clean one."""

from __future__ import annotations

from typing import Any


def add_qgface_views_config(cfg: Any) -> None:
    """``QGFACE.VIEWS``: the training views of QGFace and AdaFace (:mod:`qsd_plugin.degradations.views`)."""
    if "QGFACE" not in cfg:
        cfg.QGFACE = type(cfg)()
    if "VIEWS" in cfg.QGFACE:
        return
    cfg.QGFACE.VIEWS = node = type(cfg)()
    # none (the host's transforms alone) | pair (a degraded view and a clean one, for MODEL.META_ARCHITECTURE QGFace) |
    # single (the degraded view alone, for any architecture). Views are made of the image at INPUT.SIZE_TRAIN; each is
    # mirrored by itself with INPUT.FLIP's probability; INPUT's other augmentations follow, drawn anew for each view.
    node.MODE = "none"
    # How the degraded view is made. qgface (always rescaled, with a JPEG) | adaface (AdaFace's augmentation: in most
    # images nothing) | adaface_qgface (what the authors' program has under that name: the crop is enlarged).
    node.DEGRADED = "qgface"
    # MODE pair only. True: the other view is clean. False: it is a degraded one, too (the program's LH_align).
    node.ALIGNED = True
    # DEGRADED qgface only. Smallest and largest share of each side that the rescaling leaves, uniform. Above 0, up to
    # 1; the paper's are 11 to 55 of 112 pixels.
    node.SIDES = [0.1, 0.5]
    # DEGRADED qgface only. Filters of which one shrinks and another, drawn by itself, enlarges. pillow_ or opencv_ and
    # the filter's name, see degradations/resampling.py.
    node.FILTERS = ["pillow_bicubic", "pillow_bilinear", "pillow_nearest", "pillow_box", "pillow_lanczos"]
    # DEGRADED qgface only. Quality of the JPEG at the small size. 1 to 100; 0: no JPEG.
    node.JPEG_QUALITY = 75
    # DEGRADED qgface only. Probability of a random crop (area 0.8 to 1), enlarged again. 0 to 1; theirs is unknown.
    node.CROP_PROB = 0.2
    # DEGRADED qgface only. Probability of changed brightness, contrast and saturation (factors 0.8 to 1.2). 0 to 1.
    node.PHOTOMETRIC_PROB = 0.2
    # DEGRADED qgface only. Probability of a rotation by up to 45 degrees. 0 to 1.
    node.ROTATION_PROB = 0.0
    # DEGRADED adaface and adaface_qgface only. Probability of each of their three steps. 0 to 1.
    node.ADAFACE_PROB = 0.2
    # Order of the channels in which JPEG and jitter see the image: rgb | bgr (as the authors' program, which decodes to
    # BGR). What the network gets is OUTPUT_ORDER either way.
    node.COLOUR_ORDER = "rgb"
    # Order of the channels that the network is trained on. rgb, which is what the host evaluates with; another one is
    # refused.
    node.OUTPUT_ORDER = "rgb"
