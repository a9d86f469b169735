"""The folder of outputs of DIL's authors, made up: a file per network and iteration under their names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from qsd_plugin.export.dil_weights import STAGE1, STAGE2


def authors_state(module: nn.Module, network: str) -> dict[str, Tensor]:
    """As the authors' file of a network names it; their AdaIN layers have buffers that nothing reads."""
    state = dict(module.state_dict())
    if network == "G":
        for block in range(4):
            for half in range(2):
                for kind in ("mean", "var"):
                    state[f"dec.res.model.{block}.model.{half}.norm.running_{kind}"] = torch.zeros(8)
    return state


def write_outputs(folder: Path, parts: nn.Module, iteration: str, stage: int = 1) -> Path:
    """Write the networks of a stage: ``parts`` is a ``Stage1`` or a ``DualBranchReID``."""
    folder.mkdir(parents=True, exist_ok=True)
    for network, ours in (STAGE1 if stage == 1 else STAGE2).items():
        module = getattr(parts, ours)
        if module is not None:
            torch.save(authors_state(module, network), folder / f"{network}_{iteration}.pt")
    return folder
