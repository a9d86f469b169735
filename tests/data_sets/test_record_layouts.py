"""Both layouts of face records against files that mxnet wrote; mxnet itself is not needed.

``tests/data/records.npz`` was made with mxnet 1.9.1 (NumPy 1.23.5, Python 3.11): ``MXIndexedRecordIO.write_idx`` with
``recordio.pack(IRHeader(...), jpeg)`` over six synthetic crops of three identities, one of which holds RecordIO's
magic word seven times in its comment. ``header_*`` is arcface_torch's layout (record 0 with flag 2 and ``[7, 10]``,
images 1 to 6, ranges 7 to 9), ``plain_*`` that of ``im2rec``. ``rgb_means`` are the channel means of
``mx.image.imdecode``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qsd_plugin.data.face_check import check_faces
from qsd_plugin.data.face_images import decode_face
from qsd_plugin.data.face_records import folder_to_records
from qsd_plugin.data.record_frames import MAGIC
from qsd_plugin.data.recordio import RecordReader

LAYOUTS = {"header": True, "plain": False}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "records.npz", allow_pickle=False) as file:
        return dict(file)


def images(recorded: dict[str, np.ndarray]) -> list[bytes]:
    return [part.tobytes() for part in np.split(recorded["images"], np.cumsum(recorded["sizes"])[:-1])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_byte_for_byte_as_by_mxnet(recorded: dict[str, np.ndarray], tmp_path: Path, layout: str) -> None:
    for number, (image, label) in enumerate(zip(images(recorded), recorded["labels"].tolist(), strict=True)):
        file = tmp_path / "faces" / f"person {label}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    folder_to_records(tmp_path / "faces", tmp_path / "train.rec", header=LAYOUTS[layout])
    assert (tmp_path / "train.rec").read_bytes() == recorded[f"{layout}_rec"].tobytes()
    assert (tmp_path / "train.idx").read_bytes() == recorded[f"{layout}_idx"].tobytes()
    assert "mxnet" not in sys.modules


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_exactly(recorded: dict[str, np.ndarray], tmp_path: Path, layout: str) -> None:
    for ending in ("rec", "idx"):
        (tmp_path / f"train.{ending}").write_bytes(recorded[f"{layout}_{ending}"].tobytes())
    expected, labels = images(recorded), recorded["labels"].tolist()
    assert sum(image.count(MAGIC) for image in expected) == 7
    first = int(LAYOUTS[layout])
    with RecordReader(tmp_path / "train.rec") as reader:
        assert reader.has_header is LAYOUTS[layout]
        assert reader.image_keys.tolist() == list(range(first, first + 6))
        assert reader.image_labels.tolist() == labels
        keys = reader.image_keys.tolist()
        records = [reader.read(key) for key in keys]
        assert [record.content for record in records] == expected
        assert [(record.flag, record.ids) for record in records] == [
            (0, (key, 0)) for key in reader.image_keys.tolist()
        ]
        batch = reader.read_many(reader.image_keys)
        assert (batch.contents, batch.labels.tolist()) == (expected, labels)
        if LAYOUTS[layout]:
            # As arcface_torch goes about it: the header's first label ends the range of the images' keys.
            header = reader.read(0)
            assert (header.flag, header.label.tolist(), header.content) == (2, [7.0, 10.0], b"")
            assert list(range(1, int(header.label[0]))) == reader.image_keys.tolist()
            ranges = [reader.read(key).label.tolist() for key in reader.identity_keys.tolist()]
            assert ranges == [[1.0, 4.0], [4.0, 5.0], [5.0, 7.0]]
    means = [decode_face(image, name="face", size=112).mean((0, 1)) for image in expected]
    np.testing.assert_allclose(means, recorded["rgb_means"], atol=0.5)  # decoders may round differently
    assert np.abs(recorded["rgb_means"][:, 0] - recorded["rgb_means"][:, 2]).max() > 20  # BGR would be seen
    assert check_faces(tmp_path / "train.rec").problems == []
