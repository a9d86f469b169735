"""Pickles of bytes and arrays against pickle itself; pickles that ask for more are refused, and nothing is run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsd_plugin.core.plain_pickle import PickledArray, load_plain


def load(content: bytes) -> Any:
    return load_plain(io.BytesIO(content))


@pytest.mark.parametrize("protocol", range(6))
def test_same_as_pickle_for_plain_data(protocol: int) -> None:
    content = ([b"", b"\xff\xd8jpeg", b"x" * 300], [True, False], {"a": 1.5}, "text", None, 10**30, bytearray(b"ab"))
    assert load(pickle.dumps(content, protocol)) == content


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        np.array([True, False, True]),
        np.arange(5),
        np.arange(5, dtype=np.uint8),
        np.array([b"a", 7, None], dtype=object),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays(protocol: int, array: np.ndarray) -> None:
    read = load(pickle.dumps(array, protocol))
    assert isinstance(read, PickledArray)
    assert read.array.dtype == array.dtype
    assert read.array.tolist() == array.tolist()


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_booleans_in_a_list(protocol: int) -> None:
    read = load(pickle.dumps([np.True_, np.False_], protocol))
    assert read == [True, False]


def test_python_2_array_and_scalar() -> None:
    # What cPickle of Python 2.7 with NumPy 1 writes for (array([True, False]), [np.bool_(True)]), protocol 2.
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\n"
        b"dtype\nU\x02b1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x00tb"
        b"]cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02b1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ"
        b"\xff\xff\xff\xffK\x00tbU\x01\x01\x86Ra\x86."
    )
    pickletools.dis(content, out=io.StringIO())  # well-formed
    array, scalars = load(content)
    assert array.array.tolist() == [True, False]
    assert scalars == [True]


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, open, getattr, np.load, np.frombuffer, Path, bytes.join])
def test_other_names_are_refused_and_not_run(tmp_path: Path, function: Any) -> None:
    content = pickle.dumps(([b"jpeg"], _Runs(function, str(tmp_path / "touched"), "w")), 4)
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for [a-z_.]+"):
        load(content)
    assert list(tmp_path.iterdir()) == []


def test_command_is_not_run(tmp_path: Path) -> None:
    for protocol in range(6):
        content = pickle.dumps(_Runs(os.system, f"touch {tmp_path}/touched"), protocol)
        with pytest.raises(pickle.UnpicklingError, match=r"it asks for posix\.system"):
            load(content)
    assert list(tmp_path.iterdir()) == []


STATE = (
    b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02%sK\x00K\x01\x87R(K\x03U\x01%sNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89%stb."
)
ARRAY = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R" + STATE

REFUSED = {
    "type": (ARRAY % (b"f8", b"<", b"U\x08" + bytes(8)), "an array of type f8"),
    "byte order": (ARRAY % (b"i8", b">", b"U\x08" + bytes(8)), "numbers in big-endian order"),
    "objects without a list": (ARRAY % (b"O8", b"|", b"U\x02ab"), "an array of type O8"),
    "no state of an array": (ARRAY[: -len(STATE)] + b"K\x01b.", "an array in an unknown form"),
    "class of arrays": (b"cnumpy\nndarray\nK\x05\x85R.", "an array in an unknown form"),
    "a billion bytes": (b"c__builtin__\nbytes\nJ\x00\xca\x9a;\x85R.", "bytes made of int"),
    "attribute of a class": (b"\x80\x02cnumpy\nndarray\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "sets 'a' of _ArrayClass"),
    "number without a type": (b"cnumpy.core.multiarray\nscalar\nNU\x01a\x86R.", "a number without a type"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_make_sense(content: bytes, reason: str) -> None:
    with pytest.raises((pickle.UnpicklingError, TypeError, AttributeError), match=reason):
        load(content)
