"""Everything we change in the host so that it works on current stacks: one file per family, one table of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.hosts.fastreid.compat import (
    architectures,
    backbones,
    checkpoints,
    cpu,
    evaluation,
    hooks,
    images,
    imports,
    inference,
    launching,
    loading,
    messages,
    optimizer,
    resuming,
    samplers,
    transforms,
)
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo

#: Environment variable naming rows to leave unpatched, separated by commas: ``QSD_PLUGIN_DISABLE=S13,S21``.
DISABLE_VARIABLE = "QSD_PLUGIN_DISABLE"

_FAMILIES = (
    imports,
    optimizer,
    loading,
    cpu,
    launching,
    hooks,
    checkpoints,
    backbones,
    transforms,
    evaluation,
    inference,
    samplers,
    images,
    resuming,
    architectures,
    messages,
)

#: All patches, sorted by row.
TABLE: tuple[Patch, ...] = tuple(
    sorted((patch for family in _FAMILIES for patch in family.PATCHES), key=lambda patch: patch.row)
)

State = Literal["applied", "not needed", "disabled"]


@dataclass
class _Installed:
    state: State
    undo: Undo | None = None


_installed: dict[str, _Installed] = {}


def disabled_rows() -> frozenset[str]:
    """Rows switched off by :data:`DISABLE_VARIABLE`.

    Raises:
        ConfigError: The variable names a row that does not exist.
    """
    rows = frozenset(filter(None, os.environ.get(DISABLE_VARIABLE, "").replace(" ", "").split(",")))
    known = {patch.row for patch in TABLE}
    for row in sorted(rows - known):
        raise ConfigError(f"Environment variable {DISABLE_VARIABLE}", value=row, remedy=did_you_mean(row, known))
    return rows


def install(import_host: Callable[[], None]) -> None:
    """Import the host with the import-time patches in force, then apply the others. A second call does nothing.

    Args:
        import_host: Imports every host module that breaks without the import-time patches.
    """
    if _installed:
        return
    off = disabled_rows()
    with ExitStack() as scope:
        for patch in TABLE:
            if patch.phase == "import":
                undo = _apply(patch, off)
                if undo is not None:
                    scope.callback(undo)
        import_host()
    for patch in TABLE:
        if patch.phase == "runtime":
            _apply(patch, off)


def status() -> Iterator[tuple[Patch, State]]:
    """Every patch with what was done about it in this process."""
    for patch in TABLE:
        yield patch, _installed[patch.row].state if patch.row in _installed else "not needed"


@contextmanager
def without(row: str) -> Iterator[None]:
    """Run the host without one runtime patch, to show what the patch is for.

    What was put on top of the row is off, too, and back afterwards. Only for rows that consist of
    :func:`~.patch.replace`, whose undoing can be undone.
    """
    patch = next(patch for patch in TABLE if patch.row == row)
    entry = _installed[row]
    if patch.phase != "runtime" or entry.undo is None:
        raise ConfigError(f"Patch {row}", value=entry.state, expected="an applied runtime patch")
    entry.undo()
    try:
        yield
    finally:
        entry.undo()


def _apply(patch: Patch, off: frozenset[str]) -> Undo | None:
    if patch.row in off:
        _installed[patch.row] = _Installed("disabled")
    elif not patch.needed():
        _installed[patch.row] = _Installed("not needed")
    else:
        _installed[patch.row] = _Installed("applied", patch.apply())
    return _installed[patch.row].undo
