"""Loads and evaluates a deploy folder with fast-reid alone; run as ``python plain_host.py DEPLOY OUT.npz``.

Nothing of the plugin is imported. What current stacks miss is lent to the host by hand: the two names it cannot be
imported without, NumPy's old ``bool``, and a compiler for its ranking, for which it has a Python version.
"""

from __future__ import annotations

import collections
import collections.abc
import json
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch

warnings.simplefilter("ignore")
six = types.ModuleType("torch._six")
six.string_classes = (str, bytes)
sys.modules["torch._six"] = six
collections.Mapping = collections.abc.Mapping
if not hasattr(np, "bool"):
    np.bool = bool

from fastreid.config import get_cfg  # noqa: E402
from fastreid.data.build import _test_loader_from_config, fast_batch_collator  # noqa: E402
from fastreid.evaluation import ReidEvaluator, inference_on_dataset  # noqa: E402
from fastreid.modeling.meta_arch import build_model  # noqa: E402

ReidEvaluator._compile_dependencies = lambda self: None

deploy, output = map(Path, sys.argv[1:])
cfg = get_cfg()
cfg.merge_from_file(str(deploy / "config.yaml"))
model = build_model(cfg)
model.load_state_dict(torch.load(deploy / "model.pth", weights_only=True)["model"], strict=True)
model.eval()

settings = _test_loader_from_config(cfg, dataset_name=cfg.DATASETS.TESTS[0])
loader = torch.utils.data.DataLoader(settings["test_set"], batch_size=16, collate_fn=fast_batch_collator)
metrics = inference_on_dataset(model, loader, ReidEvaluator(cfg, settings["num_query"]))

batch = next(iter(loader))
images = batch["images"].numpy().copy()  # the host normalises the batch in place
with torch.no_grad():
    embedding = model(batch).numpy()
np.savez(output, images=images, embedding=embedding)
counts = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "keys": list(model.state_dict())}
plugin = sorted(name for name in sys.modules if name.startswith("qsd_plugin"))
print(json.dumps({"metrics": {name: float(value) for name, value in metrics.items()}, "plugin": plugin, **counts}))
