"""User mistakes the host answers with a bare KeyError, an AttributeError or nothing at all, answered in words."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qsd_plugin.core.errors import ConfigError, RegistryError, did_you_mean, nearest
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together

#: Optimizers of torch that exist but cannot serve the host, with the reason.
UNUSABLE_OPTIMIZERS = {
    "LBFGS": "it needs a closure and a single parameter group",
    "SparseAdam": "it needs sparse gradients",
    "Muon": "it needs matrices, and the host flattens all parameters into vectors",
    "Optimizer": "it is the base class",
}

_SCHEDULES = ("CosineAnnealingLR", "MultiStepLR")  # the two the host has arguments for
_REGISTRY_KEYS = {
    "META_ARCH": "MODEL.META_ARCHITECTURE",
    "BACKBONE": "MODEL.BACKBONE.NAME",
    "HEADS": "MODEL.HEADS.NAME",
    "DATASET": "DATASETS.NAMES or DATASETS.TESTS",
}


def _explain_config_keys() -> Undo:
    from fastreid.config.config import CfgNode

    def explained(merge: Callable[..., None], origin: Callable[[Any], str]) -> Callable[..., None]:
        @functools.wraps(merge)
        def merged(self: Any, source: Any, *args: Any, **kwargs: Any) -> None:
            try:
                merge(self, source, *args, **kwargs)
            except (KeyError, AssertionError) as error:
                found = re.match(r"Non-existent (?:config )?key: (.+)", str(error.args[0]) if error.args else "")
                if found is None:
                    raise
                raise ConfigError(
                    f"Unknown config key{origin(source)}",
                    value=found[1],
                    remedy=_suggest_key(found[1], list(_keys(self))),
                ) from None

        return merged

    origins: dict[str, Callable[[Any], str]] = {
        "merge_from_file": lambda filename: f" in {filename}",
        "merge_from_list": lambda _: " on the command line",
    }
    return together(*(replace(CfgNode, name, explained(getattr(CfgNode, name), origins[name])) for name in origins))


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _suggest_key(key: str, known: list[str]) -> str:
    """The key in another section, or else the most similar full key."""
    last = key.rpartition(".")[2]
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    close = elsewhere[:3] or nearest(key, known)
    if close:
        return f"Did you mean {' or '.join(repr(name) for name in close)}?"
    return "Keys and defaults are listed in the host's config/defaults.py."


def _explain_registry_names() -> Undo:
    from fastreid.utils.registry import Registry

    host_get = Registry.get

    @functools.wraps(host_get)
    def get(self: Any, name: str) -> Any:
        if self._obj_map.get(name) is None:
            key = _REGISTRY_KEYS.get(self._name)
            raise RegistryError(
                f"Unknown name for {key}" if key else f"Unknown name in registry {self._name}",
                value=name,
                remedy=did_you_mean(str(name), self._obj_map),
            )
        return host_get(self, name)

    return replace(Registry, "get", get)


def _explain_solver_names() -> Undo:
    import fastreid.engine.defaults
    import fastreid.solver
    import fastreid.solver.build as host

    host_optimizer, host_scheduler = host.build_optimizer, host.build_lr_scheduler

    @functools.wraps(host_optimizer)
    def build_optimizer(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        name = cfg.SOLVER.OPT
        if name in UNUSABLE_OPTIMIZERS:
            raise ConfigError(
                f"SOLVER.OPT: torch.optim.{name} cannot be used here, because {UNUSABLE_OPTIMIZERS[name]}",
                remedy=f"Known names: {', '.join(_optimizers())}.",
            )
        try:
            return host_optimizer(cfg, *args, **kwargs)
        except AttributeError as error:
            if error.name != name:
                raise
            raise ConfigError(
                "SOLVER.OPT",
                value=name,
                expected="an optimizer of torch.optim",
                remedy=did_you_mean(name, _optimizers()),
            ) from error

    @functools.wraps(host_scheduler)
    def build_lr_scheduler(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return host_scheduler(cfg, *args, **kwargs)
        except (AttributeError, KeyError) as error:
            if cfg.SOLVER.SCHED in _SCHEDULES:
                raise
            raise ConfigError(
                "SOLVER.SCHED",
                value=cfg.SOLVER.SCHED,
                expected="a schedule the host has settings for",
                remedy=did_you_mean(cfg.SOLVER.SCHED, _SCHEDULES),
            ) from error

    owners = (host, fastreid.solver, fastreid.engine.defaults)
    return together(
        *(replace(owner, "build_optimizer", build_optimizer) for owner in owners),
        *(replace(owner, "build_lr_scheduler", build_lr_scheduler) for owner in owners),
    )


def _optimizers() -> list[str]:
    import torch

    return [
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name not in UNUSABLE_OPTIMIZERS
    ]


def _refuse_unknown_losses() -> Undo:
    from fastreid.modeling.meta_arch import MGN, Baseline

    def checked(host_from_config: Callable[..., dict[str, Any]]) -> Any:
        @functools.wraps(host_from_config)
        def from_config(cls: type, cfg: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            require_known_losses(cls, cfg.MODEL.LOSSES.NAME)
            return host_from_config(cls, cfg, *args, **kwargs)

        return classmethod(from_config)

    return together(*(replace(owner, "from_config", checked(owner.from_config.__func__)) for owner in (Baseline, MGN)))


def require_known_losses(architecture: type, names: Iterable[str]) -> None:
    """Refuse a loss name that the architecture never looks for; the host would leave the loss out without a word.

    There is no registry of losses: an architecture asks for each by name in its ``losses`` method (and in those of the
    classes it extends), so the names it knows are the capitalised identifiers among the constants of that code.

    Args:
        architecture: Class of the meta-architecture.
        names: ``MODEL.LOSSES.NAME``.

    Raises:
        ConfigError: A name is unknown.
    """
    known = sorted({name for owner in architecture.__mro__ for name in _loss_names(vars(owner).get("losses"))})
    for name in names if known else ():
        if name not in known:
            raise ConfigError(
                "MODEL.LOSSES.NAME",
                value=name,
                expected=f"losses of {architecture.__name__}: {', '.join(known)}",
                remedy=did_you_mean(name, known),
            )


def _loss_names(function: Any) -> Iterator[str]:
    while function is not None:
        for constant in getattr(getattr(function, "__code__", None), "co_consts", ()):
            if isinstance(constant, str) and constant.isidentifier() and constant[0].isupper():
                yield constant
        function = getattr(function, "__wrapped__", None)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="CONFIG",
        where="config/config.py:100,127 (yacs)",
        symptom="A misspelt config key ends in KeyError or AssertionError 'Non-existent key', without the right one.",
        action="The error names the file, the key and the most similar keys with their full path.",
        needed=always,
        apply=_explain_config_keys,
        proof="test_config_a_misspelt_key_suggests_the_right_one",
    ),
    Patch(
        row="REGISTRY",
        where="utils/registry.py:58",
        symptom="An unknown name ends in KeyError without the names that exist.",
        action="The error names the config key and the most similar registered names.",
        needed=always,
        apply=_explain_registry_names,
        proof="test_registry_an_unknown_name_lists_the_nearest",
    ),
    Patch(
        row="OPT",
        where="solver/build.py:207,318",
        symptom="Unknown SOLVER.OPT or SOLVER.SCHED: AttributeError or KeyError; unusable optimizers fail in training.",
        action="Refused with the reason and the names that work.",
        needed=always,
        apply=_explain_solver_names,
        proof="test_opt_unknown_and_unusable_solvers_are_refused",
    ),
    Patch(
        row="LOSSES",
        where="modeling/meta_arch/baseline.py:149-187, mgn.py:291",
        symptom="A misspelt loss name is left out silently; the only one: 'int' object has no attribute 'backward'.",
        action="Refused with the names that the architecture knows.",
        needed=always,
        apply=_refuse_unknown_losses,
        proof="test_losses_a_misspelt_name_is_refused",
    ),
)
