"""The part of mxnet that arcface_torch uses, on the plugin's record reader: records, decoding, transposing, flipping.

mxnet is no longer maintained and does not install beside current NumPy versions. Decoded pixels are the same bit for
bit; what ``resize_short`` makes of verification images that are not 112 pixels wide differs from mxnet's by one level.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.face_images import decode_face
from qsd_plugin.data.record_frames import pack, unpack
from qsd_plugin.data.recordio import RecordReader

#: Set on the stand-in, so that a probe can tell it from mxnet.
MARK = "__qsd_standin__"


class Header(NamedTuple):
    """What mxnet calls ``IRHeader``: number of labels behind the header, label (or labels), two numbers."""

    flag: int
    label: Any
    id: int
    id2: int


class NDArrayLike:
    """An array with the few members of mxnet's that the host calls. Immutable by habit."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy's."""
        return self._array.shape

    def asnumpy(self) -> NDArray[Any]:
        """The array itself."""
        return self._array


class MXIndexedRecordIO:
    """``mxnet.recordio.MXIndexedRecordIO`` for reading: :class:`~qsd_plugin.data.recordio.RecordReader` underneath.

    Args:
        idx_path: The ``.idx`` file.
        uri: The ``.rec`` file.
        flag: ``"r"``.

    Raises:
        ConfigError: Another flag; ``tools/build_data.py`` writes records.
        DataError: The files are missing or damaged.
    """

    def __init__(self, idx_path: str, uri: str, flag: str) -> None:
        if flag != "r":
            raise ConfigError(
                "MXIndexedRecordIO flag", value=flag, expected="'r'", remedy="tools/build_data.py writes records."
            )
        self._reader = RecordReader(uri, idx_path)

    @property
    def keys(self) -> list[int]:
        """All keys in the order of the index."""
        keys: list[int] = self._reader.index.keys.tolist()
        return keys

    def read_idx(self, idx: int) -> bytes:
        """The payload of the record with that key, for :func:`recordio_unpack`."""
        record = self._reader.read(int(idx))
        return pack(record.content, record.label if record.flag else float(record.label[0]), record.ids)

    def close(self) -> None:
        """Close the file; reading opens it again."""
        self._reader.close()


def recordio_unpack(payload: bytes) -> tuple[Header, bytes]:
    """``mxnet.recordio.unpack``: the header, its label a number with ``flag`` 0 and else an array, and the rest."""
    record = unpack(payload)
    return Header(record.flag, record.label if record.flag else float(record.label[0]), *record.ids), record.content


def imdecode(content: bytes, flag: int = 1, to_rgb: int = 1) -> NDArrayLike:
    """``mxnet.image.imdecode`` with its defaults, colour and RGB: uint8 [H, W, 3].

    Raises:
        ConfigError: Other options than the defaults.
        DataError: Not an image.
    """
    if not (flag and to_rgb):
        raise ConfigError("mxnet stand-in: imdecode", value=(flag, to_rgb), expected="colour images as RGB")
    return NDArrayLike(decode_face(bytes(content), name="image of a record or verification set"))


def resize_short(image: NDArrayLike, size: int, interp: int = 2) -> NDArrayLike:
    """``mxnet.image.resize_short``: the shorter side becomes ``size`` (bicubic, code 2)."""
    height, width = image.shape[:2]
    new = (size, size * height // width) if height > width else (size * width // height, size)
    return NDArrayLike(cv2.resize(image.asnumpy(), new, interpolation=interp))


def transpose(image: NDArrayLike, axes: Sequence[int]) -> NDArrayLike:
    """``mxnet.nd.transpose``."""
    return NDArrayLike(np.ascontiguousarray(image.asnumpy().transpose(axes)))


def flip(data: NDArrayLike, axis: int) -> NDArrayLike:
    """``mxnet.nd.flip``."""
    return NDArrayLike(np.ascontiguousarray(np.flip(data.asnumpy(), axis)))


def modules() -> dict[str, ModuleType]:
    """The stand-in as it has to be in ``sys.modules``: ``mxnet`` and its submodules."""
    contents: dict[str, dict[str, Any]] = {
        "mxnet.recordio": {"MXIndexedRecordIO": MXIndexedRecordIO, "unpack": recordio_unpack, "IRHeader": Header},
        "mxnet.image": {"imdecode": imdecode, "resize_short": resize_short},
        "mxnet.ndarray": {"transpose": transpose, "flip": flip, "NDArray": NDArrayLike},
    }
    found = {}
    package = ModuleType("mxnet", __doc__)
    package.__path__ = []
    setattr(package, MARK, True)
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        setattr(package, name.partition(".")[2], module)
        found[name] = module
    vars(package)["nd"] = found["mxnet.nd"] = found["mxnet.ndarray"]
    return {"mxnet": package, **found}
