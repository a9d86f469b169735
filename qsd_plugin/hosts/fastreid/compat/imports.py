"""Names that left torch and the standard library, lent to the host while it is imported (S02, S03)."""

from __future__ import annotations

import collections
import collections.abc
import importlib.util
import sys
import types

from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, replace


def _torch_six_is_gone() -> bool:
    return importlib.util.find_spec("torch._six") is None


def _lend_torch_six() -> Undo:
    stub = types.ModuleType("torch._six")
    vars(stub)["string_classes"] = (str, bytes)
    sys.modules["torch._six"] = stub

    def undo() -> None:
        sys.modules.pop("torch._six", None)

    return undo


def _mapping_is_gone() -> bool:
    return not hasattr(collections, "Mapping")


def _lend_mapping() -> Undo:
    return replace(collections, "Mapping", collections.abc.Mapping)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S02",
        where="data/build.py:11",
        symptom="ModuleNotFoundError: No module named 'torch._six' in 34 of the host's 128 modules.",
        action="A stub module with string_classes stands in while the host is imported and is removed afterwards.",
        needed=_torch_six_is_gone,
        apply=_lend_torch_six,
        proof="test_s02_every_host_module_imports_and_no_stub_stays",
        phase="import",
    ),
    Patch(
        row="S03",
        where="data/build.py:12, evaluation/testing.py:5",
        symptom="ImportError: cannot import name 'Mapping' from 'collections' (Python 3.10 and later).",
        action="collections.Mapping exists while the host is imported and is removed afterwards.",
        needed=_mapping_is_gone,
        apply=_lend_mapping,
        proof="test_s03_collections_is_left_as_it_was",
        phase="import",
    ),
)
