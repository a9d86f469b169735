"""From a stored run back to the host's objects: config, training items, network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from qsd_plugin.hosts.fastreid.compose import base_architecture
from qsd_plugin.report.run_doctor import StageFolder

_opts: ContextVar[tuple[str, ...]] = ContextVar("config options of the diagnosis", default=())


@contextmanager
def overriding(opts: Sequence[str]) -> Iterator[None]:
    """Inside, stored configs are read with these ``KEY VALUE`` pairs on top."""
    token = _opts.set(tuple(opts))
    try:
        yield
    finally:
        _opts.reset(token)


def stored_config(stage: StageFolder) -> Any:
    """The host's config of a stage, for its deployed network on the CPU.

    Raises:
        ConfigError: The file holds keys that this version does not know.
    """
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(stage.path / "config.yaml"))
    cfg.merge_from_list(list(_opts.get()))
    cfg.MODEL.META_ARCHITECTURE = base_architecture(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.PRETRAIN = False
    return cfg


def build_network(cfg: Any) -> nn.Module:
    """The network of a config, in eval mode, not yet loaded."""
    from fastreid.modeling.meta_arch import build_model

    model: nn.Module = build_model(cfg)
    return model.eval()
