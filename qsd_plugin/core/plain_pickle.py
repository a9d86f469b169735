"""Bytes, numbers, lists and NumPy arrays out of a pickle of any Python, and nothing else.

A pickle names functions and says what to call with what. Here the few names that bytes and arrays are pickled with are
answered by the classes below, which import nothing, hand nothing from the file to NumPy's own reconstruction, and
cannot be changed; every other name is an error.
"""

from __future__ import annotations

import pickle
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.inert_pickle import Sealed

_DTYPES = {"b1": np.bool_, "u1": np.uint8, "i4": np.int32, "i8": np.int64}


def load_plain(file: IO[bytes]) -> object:
    """Read a pickle; byte strings of Python 2 become ``bytes``, arrays :class:`PickledArray`.

    Raises:
        pickle.UnpicklingError: It names something else.
        Exception: It is damaged; a pickle can fail in as many ways as Python.
    """
    return _Unpickler(file, encoding="bytes").load()


class PickledArray(metaclass=Sealed):
    """An array of the file, flat: ``array`` is bool, uint8, int32, int64 or object, [n], once it has been read."""

    array: NDArray[Any]

    def __new__(cls, *_: object) -> PickledArray:  # the file's shape and type come with its state
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        match state:
            case (_, tuple(), _DType() as dtype, _, content):
                object.__setattr__(self, "array", dtype.numbers(content))
            case _:
                raise pickle.UnpicklingError("an array in an unknown form")


class _DType(metaclass=Sealed):
    _code: str

    def __new__(cls, code: object, *_flags: object) -> _DType:
        self = super().__new__(cls)
        text = code.decode("latin1") if isinstance(code, bytes) else str(code)
        object.__setattr__(self, "_code", text.lstrip("|<="))
        return self

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in (">", b">"):
            raise pickle.UnpicklingError("numbers in big-endian order")

    def numbers(self, content: object) -> NDArray[Any]:
        if self._code in ("O", "O8") and isinstance(content, list):
            array = np.empty(len(content), dtype=object)
            for place, item in enumerate(content):
                array[place] = item
            return array
        if self._code not in _DTYPES or not isinstance(content, bytes | bytearray):
            raise pickle.UnpicklingError(f"an array of type {self._code}")
        return np.frombuffer(content, dtype=_DTYPES[self._code])


class _Bytes(metaclass=Sealed):
    def __new__(cls, content: object = b"", encoding: object = "latin1") -> bytes:  # type: ignore[misc]
        if isinstance(content, str) and encoding in ("latin1", b"latin1"):
            return content.encode("latin1")
        if isinstance(content, bytes | bytearray):
            return bytes(content)
        raise pickle.UnpicklingError(f"bytes made of {type(content).__name__}")


class _FromBuffer(metaclass=Sealed):
    def __new__(cls, content: object, dtype: object, *_: object) -> PickledArray:  # type: ignore[misc]
        array = PickledArray.__new__(PickledArray)
        array.__setstate__((1, (), dtype, False, content))
        return array


class _Scalar(metaclass=Sealed):
    def __new__(cls, dtype: object, content: object) -> Any:
        if not isinstance(dtype, _DType):
            raise pickle.UnpicklingError("a number without a type")
        return dtype.numbers(content)[0]


class _ArrayClass(metaclass=Sealed):
    """Stands for the class of arrays, which is named and never called."""

    def __new__(cls, *_: object) -> _ArrayClass:
        raise pickle.UnpicklingError("an array in an unknown form")


_KNOWN: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _Bytes,
    **{(module, name): _Bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): PickledArray for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _KNOWN[module, name]
