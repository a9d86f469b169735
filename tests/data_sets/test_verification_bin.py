"""Verification sets: a file of the host's protocol, Python 2's form, and every way in which one can be wrong."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.verification_bin import (
    VerificationPairs,
    bin_from_pairs,
    check_folds,
    interleaved,
    load_bin,
    one_kind_folds,
    save_bin,
)

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "verification_bin.npz")


def encoded(
    colour: tuple[int, int, int] = (200, 40, 90), size: tuple[int, int] = (112, 112), kind: str = "png"
) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def written(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


ALTERNATING = [True, False] * 20
IMAGES = [f"image {number}".encode() for number in range(80)]


def test_decoding_equals_the_hosts(tmp_path: Path) -> None:
    path = tmp_path / "golden.bin"
    path.write_bytes(GOLDEN["E_bin_pickle"].tobytes())
    pairs = load_bin(path)
    assert (len(pairs.images), len(pairs.issame)) == (120, 60)
    pixels = np.stack(list(pairs.pixels()))
    assert (pixels.shape, pixels.dtype) == ((120, 112, 112, 3), np.uint8)
    # The host's tensors: all plain images and all mirrored ones, channels first. Their sums are stored in float32.
    plain = pixels.transpose(0, 3, 1, 2).astype(np.float64)
    assert np.float32(plain.sum()) == GOLDEN["E_pixels_sum_plain_flip"][0]
    assert np.array_equal(plain[0, :, 50, 40:44], GOLDEN["E_pixel_probe"][0])
    mirrored = plain[..., ::-1]
    assert np.float32(mirrored.sum()) == GOLDEN["E_pixels_sum_plain_flip"][1]
    assert np.array_equal(mirrored[0, :, 50, 40:44], GOLDEN["E_pixel_probe"][1])


def test_saved_file_is_the_hosts_pickle_and_comes_back(tmp_path: Path) -> None:
    save_bin(tmp_path / "a.bin", IMAGES, np.array(ALTERNATING))
    with (tmp_path / "a.bin").open("rb") as file:
        bins, issame = pickle.load(file, encoding="bytes")  # as arcface_torch does it
    assert (bins, issame) == (IMAGES, ALTERNATING)
    assert {type(same) for same in issame} == {bool}
    images, same = load_bin(tmp_path / "a.bin")
    assert images == IMAGES
    assert same.tolist() == ALTERNATING


def python_2(images: list[bytes], issame: list[bool]) -> bytes:
    """Protocol 2 as Python 2 wrote it: byte strings as strings."""
    strings = b"".join(b"T" + len(image).to_bytes(4, "little") + image for image in images)
    booleans = b"".join(b"\x88" if same else b"\x89" for same in issame)
    return b"\x80\x02](" + strings + b"e](" + booleans + b"e\x86."


def test_file_of_python_2(tmp_path: Path) -> None:
    images = [b"\xff\xd8" + image for image in IMAGES]
    path = tmp_path / "a.bin"
    path.write_bytes(python_2(images, ALTERNATING))
    with path.open("rb") as file, pytest.raises(UnicodeDecodeError):
        pickle.load(file)
    pairs = load_bin(path)
    assert pairs.images == images
    assert pairs.issame.tolist() == ALTERNATING


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_instead_of_bytes_and_booleans(tmp_path: Path, protocol: int) -> None:
    arrays = [np.frombuffer(image, np.uint8) for image in IMAGES]
    for content in (
        (arrays, np.array(ALTERNATING)),
        [list(map(bytearray, IMAGES)), [np.bool_(same) for same in ALTERNATING]],
        (np.array(IMAGES, dtype=object), [int(same) for same in ALTERNATING]),
    ):
        pairs = load_bin(written(tmp_path / "a.bin", content, protocol))
        assert pairs.images == IMAGES
        assert pairs.issame.tolist() == ALTERNATING


class _Runs:
    def __init__(self, file: Path) -> None:
        self.command = f"touch {file}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_file_that_wants_to_run_something(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", (IMAGES, [_Runs(tmp_path / "touched")]))
    with pytest.raises(DataError, match=r"a\.bin cannot be read: got 'it asks for posix\.system'; .*may run code"):
        load_bin(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((IMAGES[:-1], ALTERNATING), "got '79 images, 40 pairs'; expected two images per pair"),
        ((IMAGES, ALTERNATING[:-1]), "got '80 images, 39 pairs'"),
        (([], []), "got '0 images, 0 pairs'"),
        ((IMAGES, [2, *ALTERNATING[1:]]), r"list of pairs: got \[2, False"),
        ((IMAGES, ["yes", *ALTERNATING[1:]]), "list of pairs"),
        (([None, *IMAGES[1:]], ALTERNATING), "image 0: got 'NoneType'"),
        ((IMAGES, ALTERNATING, None), r"content: got 'tuple'; expected \(list of images, list of booleans\)"),
        ({"images": IMAGES}, "content: got 'dict'"),
        ((1, 2), "content: got 'tuple'"),
    ],
)
def test_content_that_is_no_pairs(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.bin: .*{message}"):
        load_bin(written(tmp_path / "a.bin", content))


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps((IMAGES, ALTERNATING))[:500]])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.bin cannot be read: .*expected a pickle of images and booleans"):
        load_bin(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"absent\.bin'; expected an existing \.bin file\. No such file"):
        load_bin(tmp_path / "absent.bin")


def test_folds_with_one_kind(tmp_path: Path) -> None:
    sorted_pairs = [True] * 20 + [False] * 20
    path = written(tmp_path / "a.bin", (IMAGES, sorted_pairs))
    with pytest.raises(DataError, match=r"10 of 10 folds lack .*folds 1, 2, .* of 40 pairs, 20 of them .*--interleave"):
        load_bin(path)
    assert load_bin(path, folds=None).issame.tolist() == sorted_pairs
    with pytest.raises(DataError, match="10 of 10 folds"):
        save_bin(tmp_path / "b.bin", IMAGES, sorted_pairs)
    assert not (tmp_path / "b.bin").exists()


def test_folds_are_those_of_scikit_learn() -> None:
    from sklearn.model_selection import KFold

    draw = np.random.default_rng(0)
    for count in (10, 23, 60, 207):
        same = draw.random(count) < 0.3
        tests = [part for _, part in KFold(10).split(same)]
        assert one_kind_folds(same) == [n for n, part in enumerate(tests, 1) if len(set(same[part])) < 2]
    assert one_kind_folds(np.array([True, False])) == list(range(1, 11))
    with pytest.raises(DataError, match=r"3 of 3 folds .*folds 1, 2, 3 of 3 pairs"):
        check_folds(np.array([True, False, True]), 3)


@pytest.mark.parametrize(("matching", "others"), [(20, 20), (20, 35), (90, 10), (10, 90), (3, 0)])
def test_interleaving_spreads_both_kinds_and_keeps_their_order(matching: int, others: int) -> None:
    same = np.array([True] * matching + [False] * others)
    order = interleaved(same)
    assert sorted(order.tolist()) == list(range(len(same)))
    for kind in (True, False):
        own = order[same[order] == kind]
        assert (np.diff(own) > 0).all()
    if others >= 10:
        assert one_kind_folds(same[order]) == []


def test_other_sizes_are_resized_and_others_than_squares_refused() -> None:
    pairs = VerificationPairs([encoded(size=(96, 96)), encoded(size=(112, 112))], np.array([True]))
    shapes = {image.shape for image in pairs.pixels()}
    assert shapes == {(112, 112, 3)}
    assert {tuple(image.reshape(-1, 3).mean(axis=0)) for image in pairs.pixels()} == {(200.0, 40.0, 90.0)}
    with pytest.raises(DataError, match="image 1: got '90x112 pixels'; expected a square crop"):
        list(VerificationPairs([encoded(), encoded(size=(90, 112))], np.array([True])).pixels())
    with pytest.raises(DataError, match="Image without content: got 'lfw 0'"):
        list(VerificationPairs([b"", encoded()], np.array([True])).pixels(name="lfw"))


def pair_list(folder: Path, same: list[int]) -> Path:
    rows = ["first,second,same"]
    for number, kind in enumerate(same):
        (folder / f"{number}a.png").write_bytes(encoded((number, 0, 0)))
        (folder / f"{number}b.png").write_bytes(encoded((number, 255, 0)))
        rows.append(f"{number}a.png, {number}b.png, {kind}")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return folder / "pairs.csv"


def test_pairs_from_a_list(tmp_path: Path) -> None:
    file = pair_list(tmp_path, [1, 0] * 10)
    assert bin_from_pairs(file, tmp_path / "a.bin").issame.tolist() == [True, False] * 10
    pairs = load_bin(tmp_path / "a.bin")
    assert [tuple(image[0, 0, :2]) for image in pairs.pixels()] == [(n // 2, 255 * (n % 2)) for n in range(40)]
    assert pairs.images[0] == (tmp_path / "0a.png").read_bytes()


def test_pairs_are_interleaved_on_request(tmp_path: Path) -> None:
    file = pair_list(tmp_path, [1] * 10 + [0] * 10)
    with pytest.raises(DataError, match="10 of 10 folds"):
        bin_from_pairs(file, tmp_path / "a.bin")
    bin_from_pairs(file, tmp_path / "a.bin", interleave=True)
    pairs = load_bin(tmp_path / "a.bin")
    first_red = [int(image[0, 0, 0]) for image in pairs.pixels()][::2]
    assert first_red == [number for both in zip(range(10), range(10, 20), strict=True) for number in both]
    assert pairs.issame.tolist() == [number < 10 for number in first_red]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0a.png,0b.png,2", "line 22: .*expected two images and 0 or 1"),
        (",0b.png,1", "line 22"),
        ("0a.png,absent.png,1", r"Image of a pair: got '.*absent\.png'"),
        ("0a.png,small.png,1", r"small\.png: got '64x64 pixels'; expected 112x112 pixels"),
        ("0a.png,empty.png,1", r"Image without content: got '.*empty\.png'"),
        ("grey.png,0b.png,1", r"grey\.png: got 'mode L'; expected an upright RGB image.*--convert"),
        ("0a.png,alpha.png,1", r"alpha\.png: got 'mode RGBA'; expected an upright RGB image"),
        ("0a.png,text.png,1", r"cannot be read: got '.*text\.png'"),
    ],
)
def test_wrong_list(tmp_path: Path, line: str, message: str) -> None:
    file = pair_list(tmp_path, [1, 0] * 10)
    (tmp_path / "small.png").write_bytes(encoded(size=(64, 64)))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (112, 112)).save(tmp_path / "grey.png")
    Image.new("RGBA", (112, 112)).save(tmp_path / "alpha.png")
    file.write_text(f"{file.read_text()}\n{line}\n")
    with pytest.raises(DataError, match=message):
        bin_from_pairs(file, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    file.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"header line: got \['first', 'second', 'same'\]"):
        bin_from_pairs(file, tmp_path / "a.bin")
