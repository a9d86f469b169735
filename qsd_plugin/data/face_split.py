"""A folder of faces to a training list and pairs to verify, with nobody in both."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.files import new_folder
from qsd_plugin.data.face_lists import FACE_COLUMNS, PAIR_COLUMNS
from qsd_plugin.data.face_records import face_folder
from qsd_plugin.data.identity_split import draw_held_out
from qsd_plugin.data.pair_drawing import draw_pairs

TRAIN_FILE, PAIRS_FILE, SUMMARY_FILE = "train.csv", "pairs.csv", "split.json"


@dataclass(frozen=True)
class FaceSplit:
    """What :func:`split_faces` wrote, also kept as ``split.json``.

    Attributes:
        seed: Of the draws.
        test_fraction: Share of the people that was asked for.
        quality_from_name: The pattern, or ``None``.
        train_identities: People to train on.
        train_images: Their images.
        test_identities: People held out.
        test_images: Their images that occur in a pair.
        pairs: P, half of them genuine.
        own_people: Whether every fold has people of its own.
        digest: SHA-256 of both lists with paths relative to the folder of faces: the same on every machine.
    """

    seed: int
    test_fraction: float
    quality_from_name: str | None
    train_identities: int
    train_images: int
    test_identities: int
    test_images: int
    pairs: int
    own_people: bool
    digest: str


def split_faces(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    test_fraction: float = 0.5,
    seed: int = 0,
    pairs: int = 3000,
    quality_from_name: str | None = None,
) -> FaceSplit:
    """Write ``train.csv``, ``pairs.csv`` and ``split.json``; all of them or none.

    Only people with two images or more are held out.

    Args:
        folder: ``<identity>/*.jpg`` or other images.
        out: Folder for the lists; empty or not there yet. Paths in them are absolute.
        test_fraction: Share of the people to hold out, between 0 and 1.
        seed: Of who is held out and which pairs are drawn; >= 0.
        pairs: P, a multiple of 20.
        quality_from_name: See :func:`quality_of_name`; a pair has its worse image's. Default: no qualities.

    Raises:
        ConfigError: An argument out of range, or a pattern that is none.
        DataError: Too few people or images, a name that the pattern does not match, or ``out`` is not empty.
    """
    if seed < 0:
        raise ConfigError("Seed of a split", value=seed, expected="0 or more")
    root, target = (Path(path).expanduser().absolute() for path in (folder, out))
    people = face_folder(root)
    quality = None
    if quality_from_name is not None:
        pattern = _pattern(quality_from_name)
        quality = {path: quality_of_name(path, pattern) for paths in people.values() for path in paths}
    testable = [name for name, paths in people.items() if len(paths) > 1]
    held_out = draw_held_out(testable, total=len(people), test_fraction=test_fraction, seed=seed)
    if len(held_out) < 2 or len(people) - len(held_out) < 2:
        raise DataError(
            f"{root}: too few people",
            value=f"{len(people)} people, {len(testable)} of them with two images; {len(held_out)} held out",
            expected="two people or more to train on, and two or more with two images each to test on",
            remedy="Add people, or change --test-fraction.",
        )
    tested = set(held_out)
    train = {name: paths for name, paths in people.items() if name not in tested}
    drawn, own_people = draw_pairs({name: len(people[name]) for name in held_out}, pairs, seed=seed)
    rows = [((people[a][i], a), (people[b][j], b)) for (a, i), (b, j) in drawn]

    def below(path: Path) -> str:
        return path.relative_to(root).as_posix()

    reproducible = _train_table(train, below) + _pair_table(rows, quality, below)
    split = FaceSplit(
        seed=seed,
        test_fraction=test_fraction,
        quality_from_name=quality_from_name,
        train_identities=len(train),
        train_images=sum(map(len, train.values())),
        test_identities=len(held_out),
        test_images=len({path for row in rows for path, _ in row}),
        pairs=pairs,
        own_people=own_people,
        digest=hashlib.sha256(reproducible).hexdigest(),
    )
    with new_folder(target) as partial:
        (partial / TRAIN_FILE).write_bytes(_train_table(train, str))
        (partial / PAIRS_FILE).write_bytes(_pair_table(rows, quality, str))
        (partial / SUMMARY_FILE).write_text(json.dumps(asdict(split), indent=1) + "\n", encoding="utf-8")
    return split


def quality_of_name(path: Path, pattern: re.Pattern[str]) -> float:
    """Minus the largest absolute value of the pattern's groups in a file's name: angles away from the front, say.

    Raises:
        DataError: The name does not match, or a group is no number.
    """
    found = pattern.search(path.name)
    try:
        if found is None:
            raise ValueError
        worst = max(abs(float(group)) for group in found.groups() if group is not None)
        if not math.isfinite(worst):
            raise ValueError
    except ValueError:
        raise DataError(
            "Quality from a file's name",
            value=str(path),
            expected=f"a name in which {pattern.pattern!r} finds numbers",
            remedy="Change --quality-from-name, or leave it out: pairs then have no quality.",
        ) from None
    return 0.0 - worst


def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ConfigError(
            "Pattern for qualities", value=text, expected="a regular expression", remedy=f"{error}."
        ) from None
    if not pattern.groups:
        raise ConfigError("Pattern for qualities", value=text, expected="groups that find numbers, such as E([+-]\\d+)")
    return pattern


def _train_table(train: Mapping[str, Sequence[Path]], shown: Callable[[Path], str]) -> bytes:
    rows = [[shown(path), name] for name, paths in train.items() for path in paths]
    return _csv(FACE_COLUMNS, rows)


def _pair_table(
    rows: Sequence[tuple[tuple[Path, str], tuple[Path, str]]],
    quality: Mapping[Path, float] | None,
    shown: Callable[[Path], str],
) -> bytes:
    table = []
    for (first, who), (second, other) in rows:
        row: list[object] = [shown(first), shown(second), int(who == other), who]
        table.append(row if quality is None else [*row, min(quality[first], quality[second])])
    return _csv((*PAIR_COLUMNS, "identity", *([] if quality is None else ["quality"])), table)


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()
