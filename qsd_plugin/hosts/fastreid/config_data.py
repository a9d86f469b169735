"""``DATA``: where the plugin's data sets lie, how a test set is held out, what happens to damaged images."""

from __future__ import annotations

import dataclasses
from typing import Any

from qsd_plugin.data.synthetic import SyntheticFaces, SyntheticPedestrians


def add_data_config(cfg: Any) -> None:
    """Add the ``DATA`` node to ``cfg`` (a host ``CfgNode``) unless it has one."""
    if "DATA" in cfg:
        return
    cfg.DATA = node = type(cfg)()
    # Folder that holds the data sets' folders. Path; empty: environment variable FASTREID_DATASETS, else "datasets".
    node.ROOT = ""
    # Folder read by the data set ReIDFolder: train/<id>/*.jpg with query/ and gallery/, Market-1501's layout and names,
    # or <id>/*.jpg alone. FaceFolder reads it too: <id>/*.jpg, all of them for training; and LowLightFolder: dark and
    # normal images in LOL's or EnlightenGAN's layout (data/low_light.py). Path.
    node.FOLDER = ""
    # CSV file read by the data set ReIDList: a header path,pid,camid[,split], paths relative to its folder. FaceList
    # reads path,identity, all of them for training, as tools/build_data.py face-split writes it (train.csv). Path.
    node.LIST = ""
    # RecordIO file read by the data set FaceRecord, with its .idx beside it: aligned face crops. Path of the .rec file.
    node.RECORD = ""
    # ReIDFolder and ReIDList without queries: share of the identities held out for testing. Between 0 and 1.
    node.TEST_FRACTION = 0.5
    # Which identities those are; the split is stored beside the data, or in OUTPUT_DIR where that is read-only. >= 0.
    node.SPLIT_SEED = 0
    # A training image that cannot be decoded is replaced by another one of its identity. More than this share of the
    # training images damaged: the run stops with the list. 0 to 1.
    node.MAX_CORRUPT = 0.01
    # Cross-fitting (the recipe sets both, see QUALITY.FOLDS): number of folds that the training identities are divided
    # into. 0 (none) or >= 2.
    node.FOLDS = 0
    # The fold whose identities are left out of training. 0 (none) to DATA.FOLDS.
    node.FOLD = 0
    # Folder where generated data is kept. Path; empty: environment variable QSD_PLUGIN_CACHE, else
    # ~/.cache/qsd_plugin.
    node.CACHE = ""

    # What the data set SyntheticPedestrians contains; other values make another set in the cache.
    node.SYNTHETIC = type(cfg)()
    # People trained on, people searched for and people in the gallery only; together at most 1501.
    # Cameras (2 to 6), cameras that each person passes (2 to NUM_CAMERAS), images per person and camera (>= 2).
    # DEGRADATION: strength of blur, low resolution, noise, ... 0 (none) to 1. SEED: of everything random, >= 0.
    for field in dataclasses.fields(SyntheticPedestrians):
        node.SYNTHETIC[field.name.upper()] = field.default

    # What SyntheticFaces and its test sets contain; other values make another set in the cache.
    node.FACES = type(cfg)()
    # People trained on, people searched for and people in the gallery only (the latter two together at least 20).
    # IMAGES_PER_IDENTITY (>= 2). NUM_PAIRS: pairs to verify, a multiple of 20. SIZE: side of the images, pixels.
    # DEGRADATION: strength of blur, low resolution, noise, ... 0 (none) to 1. SEED: of everything random, >= 0.
    for field in dataclasses.fields(SyntheticFaces):
        node.FACES[field.name.upper()] = field.default
