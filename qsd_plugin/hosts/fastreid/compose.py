"""Meta-architectures that extend another one, which the config names and the build subclasses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qsd_plugin.core.errors import ConfigError, did_you_mean

#: Host architectures that train differently and evaluate as another one does, with fewer tensors and no teacher.
_EVALUATED_AS = {"MoCo": "Baseline", "Distiller": "Baseline"}


def node(name: str) -> str:
    """Config node of the composed architecture ``name``."""
    return name.upper()


class ComposedArchitecture:
    """A registered meta-architecture whose class is made at build time from a mix-in and the configured base.

    Args:
        name: Registered name; in capitals it is the config node that holds ``BASE``.
        mixin: Class put in front of the base. Its ``__init__(cfg)`` calls ``super().__init__(cfg)`` first.
    """

    def __init__(self, name: str, mixin: type) -> None:
        self.__name__ = name
        self.mixin = mixin

    def __call__(self, cfg: Any) -> nn.Module:
        """Build the model for ``cfg``."""
        model: nn.Module = self.build_class(cfg)(cfg)
        return model

    def build_class(self, cfg: Any) -> type:
        """The class for ``cfg``: this mix-in over the base named by ``cfg.<name>.BASE``, through any number of links.

        Raises:
            ConfigError: The base is unknown, or the chain of bases comes back to where it started.
        """
        return self._build_class(cfg, ())

    def network_class(self, cfg: Any) -> Any:
        """The architecture at the end of the chain of bases: the one that holds the network, without mix-ins."""
        base = _lookup(f"{node(self.__name__)}.BASE", str(cfg[node(self.__name__)].BASE))
        return base.network_class(cfg) if isinstance(base, ComposedArchitecture) else base

    def _build_class(self, cfg: Any, chain: tuple[str, ...]) -> type:
        chain = (*chain, self.__name__)
        base_name = str(cfg[node(self.__name__)].BASE)
        if base_name in chain:
            raise ConfigError(
                f"{node(self.__name__)}.BASE",
                value=" -> ".join((*chain, base_name)),
                expected="a chain that ends in a host model",
            )
        base = _lookup(f"{node(self.__name__)}.BASE", base_name)
        base_class = base._build_class(cfg, chain) if isinstance(base, ComposedArchitecture) else base
        if not isinstance(base_class, type):
            raise ConfigError(
                f"{node(self.__name__)}.BASE", value=base_name, expected="a meta-architecture that is a class"
            )
        return type(f"{self.__name__}{base_class.__name__}", (self.mixin, base_class), {"__module__": __name__})


def in_chain(cfg: Any, name: str) -> bool:
    """Whether ``MODEL.META_ARCHITECTURE`` is the composed architecture ``name`` or extends it."""
    seen: list[str] = []
    link = str(cfg.MODEL.META_ARCHITECTURE)
    while link != name and link not in seen and "BASE" in cfg.get(node(link), {}):
        seen.append(link)
        link = str(cfg[node(link)].BASE)
    return link == name


def base_architecture(cfg: Any) -> str:
    """Name of the architecture at the end of the chain that starts at ``MODEL.META_ARCHITECTURE``.

    Raises:
        ConfigError: A name in the chain is unknown, or the chain comes back to where it started.
    """
    key, name = "MODEL.META_ARCHITECTURE", str(cfg.MODEL.META_ARCHITECTURE)
    entry = _lookup(key, name)
    if isinstance(entry, ComposedArchitecture):
        entry.build_class(cfg)
    while isinstance(entry, ComposedArchitecture):
        key, name = f"{node(name)}.BASE", str(cfg[node(name)].BASE)
        entry = _lookup(key, name)
    return name


def evaluated_architecture(cfg: Any) -> str:
    """The plain architecture that evaluates as that of ``cfg``: its base, without what it adds to train.

    Raises:
        ConfigError: As :func:`base_architecture`.
    """
    name = base_architecture(cfg)
    return _EVALUATED_AS.get(name, name)


def _lookup(key: str, name: str) -> Callable[[Any], nn.Module]:
    from fastreid.modeling.meta_arch.build import META_ARCH_REGISTRY

    known: dict[str, Callable[[Any], nn.Module]] = META_ARCH_REGISTRY._obj_map
    if name not in known:
        raise ConfigError(key, value=name, expected="a registered meta-architecture", remedy=did_you_mean(name, known))
    return known[name]
