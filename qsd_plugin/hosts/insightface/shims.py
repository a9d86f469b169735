"""What a shim of the host is, and how names are changed so that they can be changed back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Undo = Callable[[], None]


@dataclass(frozen=True)
class Shim:
    """One failure and its repair.

    Args:
        name: What it is about.
        where: The host's file and what is in it.
        symptom: What happens without it.
        needed: Probe of this environment.
        apply: Changes names and returns the function that changes them back.
        phase: ``import``: before the host's modules are imported; ``run``: afterwards.
    """

    name: str
    where: str
    symptom: str
    needed: Callable[[], bool]
    apply: Callable[[], Undo]
    phase: Literal["import", "run"] = "run"


def together(undos: list[Undo]) -> Undo:
    """One function for all of them, the last change first."""

    def undo() -> None:
        for step in reversed(undos):
            step()

    return undo


def replace(owner: Any, **values: Any) -> Undo:
    """Set attributes of a module or class; the function that brings its own ones back."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    for name, value in values.items():
        setattr(owner, name, value)

    def undo() -> None:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)

    return undo
