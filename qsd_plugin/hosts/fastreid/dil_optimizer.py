"""The host's optimizer for DIL: a fused Adam; in stage 1 with the authors' betas, and only on what a phase reaches.

The host joins parameters to flat buffers, in which a parameter without gradient still decays and moves. In stage 1 they
stay apart, which its trainers support. Fused, Adam passes once over parameters and moments instead of a dozen times.
"""

from __future__ import annotations

import functools
from typing import Any

import fastreid.engine.defaults
import fastreid.solver
import fastreid.solver.build
import torch

from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace, together
from qsd_plugin.hosts.fastreid.meta_arch.dil import DIL
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import is_dil


def install() -> Undo:
    """Put the optimizer behind the host's names; for other architectures nothing changes."""
    host_build = fastreid.solver.build.build_optimizer

    @functools.wraps(host_build)
    def build_optimizer(cfg: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not isinstance(model, DIL):
            built: tuple[Any, Any] = host_build(cfg, model, *args, **kwargs)
            if is_dil(cfg):
                _fuse(built[0])
            return built
        optimizer, parameters = host_build(cfg, model, contiguous=False)
        _fuse(optimizer)
        betas = tuple(float(beta) for beta in cfg.DIL.STAGE1_OPTIONS.BETAS)
        for group in optimizer.param_groups:
            group["betas"] = betas
        model.follow(optimizer)
        optimizer.register_step_pre_hook(functools.partial(_drop_untouched, model))
        return optimizer, parameters

    owners = (fastreid.solver.build, fastreid.solver, fastreid.engine.defaults)
    return together(*(replace(owner, "build_optimizer", build_optimizer) for owner in owners))


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Before its first step; other optimizers than Adam stay as they are."""
    if isinstance(optimizer, torch.optim.Adam):
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def _drop_untouched(model: DIL, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
    """Before a step: gradients of zero that only data-parallel training needs, else weight decay would move these."""
    for parameter in model.untouched():
        parameter.grad = None
