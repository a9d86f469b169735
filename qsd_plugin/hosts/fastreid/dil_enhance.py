"""Images enhanced by a finished stage 1 of DIL: their content, rendered with the code of clean images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.panels import Picture, draw_panels, save_png
from qsd_plugin.hosts.fastreid.dil_pictures import CLEAN_SHARE, degraded, write_json
from qsd_plugin.hosts.fastreid.dil_run import Stage1Run, draw_items, image_paths, read_pictures
from qsd_plugin.methods.dil.clean_codes import CleanCodes
from qsd_plugin.report.dil import enhancement
from qsd_plugin.report.dil.renderer import Renderer

#: Of the enhanced images, below the output folder.
FOLDER = "enhanced"
_SHEET_ROWS = 8


@dataclass(frozen=True)
class EnhanceOptions:
    """How images are enhanced.

    Args:
        output: Folder for the files.
        mode: Of the clean code: ``mean`` or ``nearest``.
        centres: Mode ``nearest``: number of clusters of the clean codes.
        clean_images: Files and folders of clean images; empty: clean training images of the run.
        clean_count: How many of the run's.
        size: Height and width of the result; ``None``: the run's ``INPUT.SIZE_TEST``.
        own_size: Keep each image's own size instead.
        mix: Darkness of :func:`enhance_synthetic`; empty: the run's ``DIL.PAIRS.MIX``.
        seed: Of everything random.
    """

    output: Path
    mode: str = "mean"
    centres: int = 128
    clean_images: Sequence[Path] = ()
    clean_count: int = 500
    size: tuple[int, int] | None = None
    own_size: bool = False
    mix: str = ""
    seed: int = 0


@dataclass(frozen=True)
class _Clean:
    """What is known of clean images: their codes, and their mean level from 0 to 255."""

    codes: CleanCodes
    brightness: float


def enhance_files(
    run: Stage1Run, options: EnhanceOptions, images: Sequence[Path], reference: Path | None = None
) -> dict[str, Any]:
    """Enhance images: a PNG for each in the folder ``enhanced``, ``enhance.png`` and ``enhance.json``.

    Args:
        run: The stage 1.
        options: How.
        images: Files, and folders with images below them.
        reference: Folder that holds the true image of each under the same name, whatever its ending.

    Returns:
        What ``enhance.json`` holds; ``table`` is to be shown.

    Raises:
        DataError: No images, one without a reference, or of a size that the generator cannot hold.
    """
    if not images:
        raise DataError(
            "Images to enhance",
            value=0,
            expected="files or folders",
            remedy="Or measure on darkened images: --synthetic.",
        )
    paths = image_paths(images)
    known = _by_stem(reference) if reference is not None else {}
    truths = [_reference(known, path, reference) for path in paths] if reference is not None else []
    clean = _clean(run, options)
    pictures = read_pictures([str(path) for path in paths])
    before, after = _enhanced(run, options, pictures, clean)
    for name, picture in zip(_names(paths), after, strict=True):
        save_png(picture, options.output / FOLDER / name)
    references = None
    if truths:
        true = read_pictures([str(path) for path in truths])
        references = [_resize(picture, like) for picture, like in zip(true, before, strict=True)]
    arms = {"enhanced": after, "brightness scaled": enhancement.scaled_to(before, clean.brightness)}
    return _report(run, options, before, arms, references, [str(path) for path in paths])


def enhance_synthetic(run: Stage1Run, options: EnhanceOptions, count: int) -> dict[str, Any]:
    """Darken images of the run that it was not trained on, enhance them and compare with the true ones.

    Writes ``enhance.png`` and ``enhance.json``. Besides the enhanced images there are two yardsticks: the darkened
    images scaled to the mean brightness of clean ones, and the true images taken apart and put together again, which
    is the most that the networks can do.

    Args:
        run: The stage 1.
        options: How.
        count: Of images.

    Returns:
        As :func:`enhance_files`.
    """
    if options.own_size:
        raise ConfigError("--size own with --synthetic", expected="a height and width, or the run's own size")
    clean = _clean(run, options)
    items = draw_items(run, count, seed=options.seed)
    originals = read_pictures([path for path, _, _ in items])
    mix = options.mix or run.cfg.DIL.PAIRS.MIX
    before, after = _enhanced(run, options, degraded(run, mix, originals, options.seed), clean)
    renderer = run.renderer(options.size)
    arms = {
        "enhanced": after,
        "brightness scaled": enhancement.scaled_to(before, clean.brightness),
        "true, reconstructed": renderer.render(renderer.contents(originals), renderer.codes(originals)),
    }
    people = [str(identity) for _, identity, _ in items]
    return _report(run, options, before, arms, renderer.resized(originals), people) | {"mix": mix}


def _clean(run: Stage1Run, options: EnhanceOptions) -> _Clean:
    if options.clean_images:
        paths = [str(path) for path in image_paths(options.clean_images)]
    else:
        items = draw_items(run, options.clean_count, seed=options.seed, best=CLEAN_SHARE, trained_on=True)
        paths = [path for path, _, _ in items]
    pictures, renderer = read_pictures(paths), run.renderer()
    codes = CleanCodes(renderer.codes(pictures), mode=options.mode, centres=options.centres, seed=options.seed)
    return _Clean(codes, float(sum(float(picture.mean()) for picture in pictures) / len(pictures)))


def _enhanced(
    run: Stage1Run, options: EnhanceOptions, pictures: Sequence[Picture], clean: _Clean
) -> tuple[list[Picture], list[Picture]]:
    """Pictures at the size of the result, and enhanced."""
    if not options.own_size:
        renderer = run.renderer(options.size)
        return renderer.resized(pictures), _rendered(renderer, pictures, clean)
    after = []
    for picture in pictures:
        after += _rendered(run.renderer((picture.shape[0], picture.shape[1])), [picture], clean)
    return list(pictures), after


def _rendered(renderer: Renderer, pictures: Sequence[Picture], clean: _Clean) -> list[Picture]:
    return renderer.render(renderer.contents(pictures), clean.codes.of(renderer.codes(pictures)))


def _report(
    run: Stage1Run,
    options: EnhanceOptions,
    before: Sequence[Picture],
    arms: dict[str, list[Picture]],
    references: Sequence[Picture] | None,
    identities: Sequence[str],
) -> dict[str, Any]:
    found = enhancement.summary(before, arms, references, identities, seed=options.seed)
    columns = {"before": before, **arms, **({} if references is None else {"true": references})}
    size = run.renderer()
    pictures = {
        (row, column): size.resized([shown[row]])[0]
        for column, shown in enumerate(columns.values())
        for row in range(min(_SHEET_ROWS, len(before)))
    }
    rows = [""] * min(_SHEET_ROWS, len(before))
    draw_panels(pictures, rows=rows, columns=list(columns)).save(options.output / "enhance.png")
    result = {
        "checkpoint": str(run.checkpoint),
        "images": len(before),
        "clean_code": options.mode,
        "seed": options.seed,
        "measures": found,
        "table": enhancement.as_table(found),
    }
    write_json(options.output / "enhance.json", result)
    return result


def _by_stem(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in image_paths([folder])}


def _reference(known: dict[str, Path], path: Path, folder: Path | None) -> Path:
    if path.stem not in known:
        raise DataError(
            "Reference of an image to enhance",
            value=str(path),
            expected=f"a file named {path.stem}.* in {folder}",
        )
    return known[path.stem]


def _resize(picture: Picture, like: Picture) -> Picture:
    height, width = like.shape[:2]
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def _names(paths: Sequence[Path]) -> list[str]:
    """File names that differ, from the stems."""
    names: dict[str, None] = {}
    for path in paths:
        name, number = f"{path.stem}.png", 2
        while name in names:
            name, number = f"{path.stem}_{number}.png", number + 1
        names[name] = None
    return list(names)
