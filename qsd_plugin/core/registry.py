"""A name-to-object registry in the manner of fvcore's, whose failed look-up suggests the right name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from qsd_plugin.core.errors import RegistryError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects of one kind.

    Args:
        kind: What is registered, in the singular, as it should read in messages ("quality source").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str | None = None) -> Callable[[T], T]:
        """Decorator that registers an object under ``name`` (default: its ``__name__``).

        Raises:
            RegistryError: The name is taken by another object.
        """

        def decorate(entry: T) -> T:
            self.add(name or str(getattr(entry, "__name__", "")), entry)
            return entry

        return decorate

    def add(self, name: str, entry: T) -> None:
        """Register ``entry`` under ``name``; adding the same object again changes nothing."""
        if not name:
            raise RegistryError(f"A {self.kind} without a name", remedy="Pass a name to register().")
        if name in self._entries and self._entries[name] is not entry:
            raise RegistryError(
                f"{self.kind} {name!r} is registered already",
                value=self._entries[name],
                expected="a free name",
                remedy="Register it under another name.",
            )
        self._entries[name] = entry

    def get(self, name: str) -> T:
        """The object registered as ``name``.

        Raises:
            RegistryError: No such name; the message suggests the nearest ones.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise RegistryError(f"Unknown {self.kind}", value=name, remedy=did_you_mean(name, self._entries)) from None

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._entries)
