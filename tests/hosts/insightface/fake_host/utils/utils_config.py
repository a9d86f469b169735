"""As the host's: base first, then the job's."""

import importlib
import os.path as osp


def get_config(config_file):
    assert config_file.startswith("configs/"), "config file setting must start with configs/"
    name = osp.splitext(osp.basename(config_file))[0]
    cfg = importlib.import_module("configs.base").config
    cfg.update(importlib.import_module(f"configs.{name}").config)
    return cfg
