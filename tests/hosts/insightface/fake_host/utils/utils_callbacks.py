"""Logging and verification of rank 0."""

import logging
import os
import sys

from eval import verification
from torch import distributed


def init_logging(rank, folder):
    if rank:
        return lambda text: None
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in (logging.FileHandler(os.path.join(folder, "training.log")), logging.StreamHandler(sys.stdout)):
        handler.setFormatter(logging.Formatter("Training: %(asctime)s-%(message)s"))
        root.addHandler(handler)
    return logging.info


class CallBackVerification:
    def __init__(self, val_targets, rec_prefix):
        self.sets = {}
        if distributed.get_rank() == 0:
            paths = {name: os.path.join(rec_prefix, name + ".bin") for name in val_targets}
            self.sets = {n: verification.load_bin(p, (112, 112)) for n, p in paths.items() if os.path.exists(p)}

    def __call__(self, step, backbone, log):
        if distributed.get_rank() == 0:
            backbone.eval()
            for name, data in self.sets.items():
                log(f"[{name}][{step}]Accuracy-Flip: {verification.test(data, backbone, 10)[2]:.5f}")
            backbone.train()
