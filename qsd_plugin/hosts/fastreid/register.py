"""Everything activation adds to the host: config keys, networks, losses, data sets, loaders, the seed."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any

from qsd_plugin.hosts.fastreid import (
    backbones,
    baseline_losses,
    config,
    datasets,
    dil_optimizer,
    face_backbones,
    loaders,
    low_light,
    margins,
    mlr_datasets,
    protocols,
    qgface_epochs,
    quality_margin_heads,
    refresh,
    safety,
    sampler_state,
    sharded_checkpoints,
    sharded_head,
)
from qsd_plugin.hosts.fastreid.compat.patch import replace
from qsd_plugin.hosts.fastreid.compose import ComposedArchitecture
from qsd_plugin.hosts.fastreid.meta_arch.dil import DIL
from qsd_plugin.hosts.fastreid.meta_arch.dil_reid import DILReID
from qsd_plugin.hosts.fastreid.meta_arch.dil_teacher import DILTeacher
from qsd_plugin.hosts.fastreid.meta_arch.qgface import QGFaceMixin
from qsd_plugin.hosts.fastreid.meta_arch.qsd import QSDMixin
from qsd_plugin.hosts.fastreid.meta_arch.qud import QUDMixin

logger = logging.getLogger("fastreid.qsd_plugin")

_registered = False


def register_all() -> None:
    """Add the plugin to the activated host, once per process."""
    global _registered
    if _registered:
        return
    _registered = True
    from fastreid.config import defaults
    from fastreid.modeling.meta_arch.baseline import Baseline
    from fastreid.modeling.meta_arch.build import META_ARCH_REGISTRY

    config.add_all_config(defaults._C)
    baseline_losses.extend_baseline(Baseline)
    META_ARCH_REGISTRY.register(ComposedArchitecture("QSD", QSDMixin))
    META_ARCH_REGISTRY.register(ComposedArchitecture("QUD", QUDMixin))
    META_ARCH_REGISTRY.register(ComposedArchitecture("QGFace", QGFaceMixin))
    for architecture in (DIL, DILReID, DILTeacher):
        META_ARCH_REGISTRY.register(architecture)
    backbones.register_backbones()
    face_backbones.register_face_backbones()
    margins.register_margins()
    sharded_head.install()
    sharded_checkpoints.install()
    quality_margin_heads.install()
    datasets.register_datasets()
    mlr_datasets.register()
    low_light.install()
    loaders.install()
    safety.install()
    protocols.install()
    refresh.install()
    qgface_epochs.install()
    dil_optimizer.install()
    sampler_state.install()
    _seed_from_config()


def _seed_from_config() -> None:
    """Let ``SEED`` decide what the host's ``default_setup`` seeds; the host itself always takes a new seed."""
    from fastreid.utils import comm
    from fastreid.utils.env import seed_all_rng

    # The attribute of the package is what scripts import; the module's own name is what the package re-exports.
    engine = importlib.import_module("fastreid.engine")
    module = sys.modules["fastreid.engine.defaults"]
    host_setup = module.default_setup

    @functools.wraps(host_setup)
    def default_setup(cfg: Any, args: Any) -> None:
        host_setup(cfg, args)
        if cfg.SEED >= 0:
            seed_all_rng(cfg.SEED + comm.get_rank())

    replace(module, "default_setup", default_setup)
    replace(engine, "default_setup", default_setup)
