"""A patch is data: what is wrong in the host, where, how to see that it is wrong here, and how to repair it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Undo = Callable[[], None]

_ABSENT = object()


@dataclass(frozen=True)
class Patch:
    """One row of the host's breakage table.

    Args:
        row: Row name, ``S01`` ... ``S25`` or a word for a usability patch.
        where: Host file and line, relative to the ``fastreid`` package.
        symptom: What a user of the unpatched host sees.
        action: What the patch does, or the refusal it turns the symptom into.
        needed: Probe of this environment (never a version comparison); ``False`` leaves the host untouched.
        apply: Changes the host and returns the function that changes it back.
        proof: Name of the test that fails without the patch.
        phase: ``import`` patches are in force only while the host's modules are imported and leave nothing behind;
            ``runtime`` patches stay until undone.
    """

    row: str
    where: str
    symptom: str
    action: str
    needed: Callable[[], bool]
    apply: Callable[[], Undo]
    proof: str
    phase: Literal["import", "runtime"] = "runtime"


def always() -> bool:
    """Guard of a patch that repairs the host's own logic, whatever the environment."""
    return True


def replace(owner: Any, name: str, value: Any) -> Undo:
    """Set ``owner.name = value`` and return the function that restores what was there before.

    A second call of that function restores what the first one found, with all that others had put on top of ``value``.
    Class attributes are read from the class's own dictionary, so that static and class methods survive the round trip.
    """
    kept = vars(owner).get(name, _ABSENT)

    def swap() -> None:
        nonlocal kept
        found, wanted = vars(owner).get(name, _ABSENT), kept
        if wanted is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, wanted)
        kept = found

    setattr(owner, name, value)
    return swap


def together(*undos: Undo) -> Undo:
    """One function that runs all ``undos``, last change first; when it is called again, first change first."""
    steps = list(undos)

    def undo() -> None:
        steps.reverse()
        for step in steps:
            step()

    return undo
