"""Tensors out of ``torch.save`` files that hold whole modules, without running anything the files ask for.

A pickle names classes and functions and says what to call. Here every name becomes a class that is made on the spot,
has no behaviour and cannot be changed; the few that rebuild tensors and collections become classes that note their
arguments. Nothing is imported, and tensors are cut out of the stored numbers afterwards, with their bounds checked.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of torch.save's format before version 1.6


@dataclass(frozen=True)
class InertFile:
    """What was read.

    Args:
        content: The pickled object: :class:`Inert` for instances of unknown classes, :class:`StoredTensor` for
            tensors, otherwise plain Python data.
        calls: Names the file wanted to call, beyond tensors and collections; none was.
    """

    content: object
    calls: tuple[str, ...]


def read_inert(path: Path) -> InertFile:
    """Read a file of ``torch.save``, zip or older format.

    Raises:
        pickle.UnpicklingError: The file is not such a file, is damaged, or does not make sense.
    """
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a pickle can fail in as many ways as Python
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


class Sealed(type):
    """Class of every class handed to the unpickler: calls are noted, changes refused."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        calls = vars(cls).get("_calls")
        if calls is not None and cls.__name__ not in calls:
            calls.append(cls.__name__)
        return cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]  # mypy takes __new__ for type's own

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the file sets {name!r} of {cls.__name__}")


class Inert(metaclass=Sealed):
    """Stands for an instance of a class that was not loaded. ``state`` is what would have become its attributes."""

    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        """An instance without state; what the constructor would have got is dropped."""
        self = object.__new__(cls)
        object.__setattr__(self, "state", {})
        return self

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.state.update(part)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"the file sets {name!r} of a {type(self).__name__}")

    def __call__(self, *args: object) -> Inert:
        """What a pickle gets that calls what it got by calling something."""
        return Inert()

    # How a pickle fills subclasses of list, dict and set.
    def append(self, item: object) -> None:
        """Dropped."""

    def add(self, item: object) -> None:
        """Dropped."""

    def extend(self, items: object) -> None:
        """Dropped."""

    def __setitem__(self, key: object, value: object) -> None:
        """Dropped."""


class StoredTensor:
    """A tensor that still lies in its file.

    Args:
        storage: The numbers it is a view of.
        offset: Its first element.
        size: Its shape.
        stride: Elements to skip per dimension.
    """

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self._storage, self._offset, self._size, self._stride = storage, offset, size, stride

    def __setstate__(self, state: object) -> None:
        """Dropped: attributes of a tensor, such as hooks."""

    def load(self) -> torch.Tensor:
        """The tensor, contiguous and on the CPU.

        Raises:
            pickle.UnpicklingError: It does not lie within its storage.
        """
        geometry = (self._offset, *self._size, *self._stride)
        if len(self._size) != len(self._stride) or any(type(n) is not int or n < 0 for n in geometry):
            raise pickle.UnpicklingError(f"a tensor with offset, size and stride {geometry}")
        try:
            numbers = self._storage.numbers()
        except Exception as error:  # missing or cut off
            raise pickle.UnpicklingError(f"the numbers of a tensor cannot be read: {error}") from error
        if 0 in self._size:
            return numbers.new_empty(self._size)
        last = self._offset + sum((n - 1) * step for n, step in zip(self._size, self._stride, strict=True))
        if last >= len(numbers) or math.prod(self._size) > len(numbers):
            raise pickle.UnpicklingError(f"a tensor of shape {self._size} in a storage of {len(numbers)} numbers")
        return numbers.as_strided(self._size, self._stride, self._offset).clone()


class _Storage:
    """Numbers in the file; ``read`` fetches their bytes."""

    def __init__(self, kind: object, key: object, read: Callable[[str], bytes]) -> None:
        if not (isinstance(kind, type) and kind.__name__.rpartition(".")[2] in _DTYPES and isinstance(key, str)):
            raise pickle.UnpicklingError(f"a storage of type {getattr(kind, '__name__', kind)}")
        self.dtype = _DTYPES[kind.__name__.rpartition(".")[2]]
        self.key = key
        self._read = read

    def __setstate__(self, state: object) -> None:
        """Dropped."""

    def numbers(self) -> torch.Tensor:
        content = bytearray(self._read(self.key))
        return torch.frombuffer(content, dtype=self.dtype) if content else torch.empty(0, dtype=self.dtype)


class _Dict(dict[Any, Any]):
    """An ``OrderedDict`` whose attributes are dropped."""

    def __setstate__(self, state: object) -> None:
        """Dropped."""


# What the unpickler gets for the names it may "call". ``__new__`` answers both ways a pickle makes an object.


class _RebuiltTensor(metaclass=Sealed):
    def __new__(cls, storage: object, offset: Any, size: Any, stride: Any, *_rest: object) -> StoredTensor:  # type: ignore[misc]
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without storage")
        return StoredTensor(storage, offset, tuple(size), tuple(stride))


class _RebuiltParameter(metaclass=Sealed):
    def __new__(cls, data: object, *_rest: object) -> object:  # type: ignore[misc]
        return data


class _RebuiltDict(metaclass=Sealed):
    def __new__(cls, items: object = ()) -> _Dict:  # type: ignore[misc]
        return _Dict(items) if isinstance(items, list | dict) else _Dict()


class _RebuiltSet(metaclass=Sealed):
    def __new__(cls, items: object = ()) -> set[object]:  # type: ignore[misc]
        return set(items) if isinstance(items, list | tuple) else set()


class _RebuiltObject(metaclass=Sealed):
    def __new__(cls, kind: object, *_rest: object) -> object:  # type: ignore[misc]
        return Inert.__new__(kind) if isinstance(kind, type) and issubclass(kind, Inert) else Inert()


_REBUILT: Mapping[tuple[str, str], type] = {
    ("torch._utils", "_rebuild_tensor"): _RebuiltTensor,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuiltTensor,
    ("torch._utils", "_rebuild_parameter"): _RebuiltParameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuiltParameter,
    ("collections", "OrderedDict"): _RebuiltDict,
    ("builtins", "set"): _RebuiltSet,
    ("__builtin__", "set"): _RebuiltSet,
    ("copyreg", "_reconstructor"): _RebuiltObject,
    ("copy_reg", "_reconstructor"): _RebuiltObject,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, read: Callable[[str], bytes], calls: list[str]) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote byte strings
        self._read = read
        self._calls = calls
        self._classes: dict[str, type] = {}
        self.element_sizes: dict[str, int] = {}  # by storage key, in bytes

    def find_class(self, module: str, name: str) -> Any:
        """A class that does nothing, whatever ``module`` and ``name`` are; nothing is imported."""
        if (module, name) in _REBUILT:
            return _REBUILT[module, name]
        path = f"{module}.{name}"
        if path not in self._classes:
            self._classes[path] = Sealed(path, (Inert,), {"__slots__": (), "_calls": self._calls})
        return self._classes[path]

    def persistent_load(self, pid: Any) -> object:
        """Storages, and in the older format classes with their source text, which is dropped."""
        kind, *rest = pid
        if kind == "module":
            return rest[0]
        if kind != "storage":
            raise pickle.UnpicklingError(f"an object of kind {kind!r}")
        # type, key, device, length and, in the older format, the part of a larger storage it is a view of
        if len(rest) > 4 and rest[4] is not None:
            raise pickle.UnpicklingError("a storage that is a view of another one")
        storage = _Storage(rest[0], rest[1], self._read)
        self.element_sizes[storage.key] = storage.dtype.itemsize
        return storage


def _read_zip(path: Path) -> InertFile:
    archive = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1 or any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise pickle.UnpicklingError("a zip archive that torch.save did not write (TorchScript, perhaps)")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise pickle.UnpicklingError("numbers in big-endian order")
    calls: list[str] = []
    with archive.open(names[0]) as file:
        content = _Unpickler(file, lambda key: archive.read(f"{folder}data/{key}"), calls).load()
    return InertFile(content, tuple(calls))


def _read_legacy(path: Path) -> InertFile:
    calls: list[str] = []
    storages: dict[str, bytes] = {}
    with path.open("rb") as file:

        def load() -> tuple[Any, dict[str, int]]:
            unpickler = _Unpickler(file, storages.__getitem__, calls)
            return unpickler.load(), unpickler.element_sizes

        if load()[0] != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("not written by torch.save")
        load()  # version of the format
        if load()[0].get("little_endian") is False:
            raise pickle.UnpicklingError("numbers in big-endian order")
        content, sizes = load()
        for key in load()[0]:
            length = int.from_bytes(file.read(8), "little") * sizes[key]
            storages[key] = file.read(length)
            if len(storages[key]) != length:
                raise pickle.UnpicklingError("the file is cut off")
    return InertFile(content, tuple(calls))
