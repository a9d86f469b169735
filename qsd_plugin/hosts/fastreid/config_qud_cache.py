"""``QUD.CACHE``: the teacher's embeddings, kept on disk for ``QUD.TEACHER.SOURCE: cache``."""

from __future__ import annotations

from typing import Any


def add_qud_cache_config(cfg: Any) -> None:
    """Add the node ``QUD.CACHE`` to ``cfg`` (a host ``CfgNode``); comes after the function that fills ``QUD``."""
    if "QUD" not in cfg:
        cfg.QUD = type(cfg)()
    if "CACHE" in cfg.QUD:
        return
    cfg.QUD.CACHE = node = type(cfg)()
    # Folder with the embeddings of every training image and its mirror image. Path; empty: OUTPUT_DIR/cache, where the
    # recipe's stage "cache" makes it. A recipe that is given one makes none.
    node.FOLDER = ""
    # What the embeddings are stored in: float16 (N x 2 x D x 2 bytes; rounding error of an embedding at most 0.1 % of
    # its length) | float32 (as the teacher gives them, twice as large).
    node.DTYPE = "float16"
