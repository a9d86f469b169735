"""Pictures of a finished stage 1 of DIL: swap matrix with its measurement, replay, severity slider, plot of codes."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.streams import numpy_stream, torch_stream
from qsd_plugin.hosts.fastreid.datasets import Item
from qsd_plugin.hosts.fastreid.dil_files import read_bank
from qsd_plugin.hosts.fastreid.dil_run import Stage1Run, draw_items, read_pictures
from qsd_plugin.methods.dil import DegradationBank
from qsd_plugin.methods.dil.exchange import DegradationAxis, degradation_axis
from qsd_plugin.report.dil import sheets, swap_effect
from qsd_plugin.report.dil.code_plot import axis_correlation, draw_codes, principal_plane
from qsd_plugin.report.dil.measures import measured
from qsd_plugin.report.dil.renderer import Picture, Renderer

logger = logging.getLogger("fastreid.qsd_plugin.dil")

#: Of the images that are drawn, the share that counts as clean: the better half.
CLEAN_SHARE = 0.5
#: What the swap is measured on besides the run's own mix: one degradation for each measure.
MIXES = ("res", "ill")


@dataclasses.dataclass(frozen=True)
class Options:
    """What all commands take.

    Args:
        output: Folder for the files.
        images: Paths of pictures to show; empty: drawn from the run's data.
        mix: Degradation that makes a picture worse; empty: the run's ``DIL.PAIRS.MIX``.
        head: Of the degradation encoder, for pictures degraded here: real or syn.
        seed: Of everything random.
    """

    output: Path
    images: Sequence[str] = ()
    mix: str = ""
    head: str = "syn"
    seed: int = 0


def swap(run: Stage1Run, options: Options, *, rows: int, pairs: int, mixes: Sequence[str]) -> dict[str, Any]:
    """``swap.png``: contents against degradations, and ``swap.json``: what swapped codes do over ``pairs`` pairs.

    Args:
        run: The stage 1.
        options: Where to, and the pictures that rows and columns show.
        rows: Pictures to draw where none are named.
        pairs: To measure; 0: none are.
        mixes: To measure; empty: the run's own and :data:`MIXES`.

    Returns:
        What ``swap.json`` holds; empty without pairs.
    """
    renderer = run.renderer()
    mix = options.mix or run.cfg.DIL.PAIRS.MIX
    shown = _shown(run, options, rows)
    worse = degraded(run, mix, shown, options.seed)
    headings = [*(f"clean {n}" for n in range(1, 1 + len(shown))), *(f"{mix} {n}" for n in range(1, 1 + len(worse)))]
    codes = torch.cat([renderer.codes(shown), renderer.codes(worse, options.head)])
    sheets.swap_matrix(renderer, shown, [*shown, *worse], codes, headings).save(options.output / "swap.png")
    if not pairs:
        return {}
    own = [run.cfg.DIL.PAIRS.MIX, *MIXES]
    found = {
        chosen: measure_swap(run, renderer, chosen, pairs, head=options.head, seed=options.seed)
        for chosen in mixes or list(dict.fromkeys(own))
    }
    table = swap_effect.as_table(found)
    result = {
        "checkpoint": str(run.checkpoint),
        "pairs": min(effect.pairs for effects in found.values() for effect in effects.values()),
        "head": options.head,
        "seed": options.seed,
        "effects": {chosen: swap_effect.as_json(effects) for chosen, effects in found.items()},
        "table": table,
    }
    write_json(options.output / "swap.json", result)
    return result


def measure_swap(
    run: Stage1Run, renderer: Renderer, mix: str, pairs: int, *, head: str = "syn", seed: int = 0
) -> dict[str, swap_effect.Effect]:
    """The effects of a mix over pairs of the run's images: a clean one, and another one that is degraded.

    Raises:
        ConfigError: Fewer than two pairs.
    """
    if pairs < 2:
        raise ConfigError("Pairs to measure", value=pairs, expected="at least 2, or 0 for none")
    items = draw_items(run, 2 * pairs, seed=seed, best=CLEAN_SHARE)
    count = len(items) // 2
    if count < pairs:
        logger.warning("The run's data has clean images for %d pairs only.", count)
    clean, sources = (
        read_pictures([path for path, _, _ in part]) for part in (items[:count], items[count : 2 * count])
    )
    return swap_effect.swap_effect(
        renderer,
        clean,
        degraded(run, mix, sources, seed),
        sources,
        [str(identity) for _, identity, _ in items[:count]],
        head=head,
        seed=seed,
    )


def replay(run: Stage1Run, options: Options, *, rows: int, codes: int, bank_size: int) -> DegradationBank:
    """``replay.png``: pictures rendered with codes of the bank.

    Args:
        run: The stage 1.
        options: Where to, and the pictures.
        rows: Pictures to draw where none are named.
        codes: Renderings of each.
        bank_size: Without a bank of the recipe: images whose codes make one.

    Returns:
        The bank.
    """
    renderer = run.renderer()
    bank = bank_of(run, renderer, bank_size, seed=options.seed)
    drawn = bank.sample(codes, torch_stream(options.seed, "replay sheet"))
    shown = _shown(run, options, rows)
    sheets.replay_sheet(renderer, shown, drawn.to(renderer.codes(shown[:1]).device)).save(options.output / "replay.png")
    return bank


def bank_of(run: Stage1Run, renderer: Renderer, size: int, *, seed: int) -> DegradationBank:
    """The recipe's bank, or one of ``size`` images of the run where the recipe has made none."""
    if run.bank is not None:
        return read_bank(run.bank, run.networks.degradation_encoder)
    return DegradationBank(renderer.codes(_read(draw_items(run, size, seed=seed))))


def slider(
    run: Stage1Run, options: Options, *, rows: int, positions: Sequence[float], images: int
) -> list[dict[str, float]]:
    """``slider.png``: pictures rendered along the degradation axis, and ``slider.json``.

    Args:
        run: The stage 1.
        options: Where to, the pictures, and the degradation.
        rows: Pictures to draw where none are named.
        positions: On the axis: 0 is the centre of clean, 1 of degraded codes.
        images: Whose codes, clean and degraded, make the axis and whose renderings are measured.

    Returns:
        For each position the median sharpness, as a ratio to the first, and the mean brightness in grey levels.
    """
    if len(positions) < 2:
        raise ConfigError("Positions of the slider", value=list(positions), expected="at least two numbers")
    renderer = run.renderer()
    clean = _read(draw_items(run, images, seed=options.seed, best=CLEAN_SHARE))
    axis = _axis(run, renderer, options, clean)
    panels, _ = sheets.slider_sheet(renderer, _shown(run, options, rows), axis, positions)
    panels.save(options.output / "slider.png")
    _, rendered = sheets.slider_sheet(renderer, clean, axis, positions)
    levels = [measured(pictures) for pictures in rendered]
    found = [
        {
            "position": float(position),
            "sharpness": float(np.exp(np.median(level[:, 0] - levels[0][:, 0]))),
            "brightness": float(level[:, 1].mean()),
        }
        for position, level in zip(positions, levels, strict=True)
    ]
    write_json(options.output / "slider.json", {"checkpoint": str(run.checkpoint), "images": images, "steps": found})
    return found


def plot_codes(run: Stage1Run, options: Options, *, images: int, severities: Sequence[float]) -> dict[str, Any]:
    """``codes.png``: two principal components of the codes of images and their degradations, and ``codes.json``.

    Args:
        run: The stage 1.
        options: Where to, and the degradation.
        images: How many of the run's images.
        severities: Of their degradations, each in [0, 1]; 0 is the image as it is.

    Returns:
        ``explained``: shares of the variance; ``axis_correlation``: rank correlation of severity with the position on
        the axis from clean to strongest codes, over images that did not make the axis.
    """
    from qsd_plugin.degradations.mixing import parse_mix

    levels = sorted({float(severity) for severity in severities})
    if len(levels) < 2:
        raise ConfigError("Severities of the plot", value=list(severities), expected="at least two numbers in [0, 1]")
    mix_text = options.mix or run.cfg.DIL.PAIRS.MIX
    mix, renderer = parse_mix(mix_text), run.renderer()
    items = draw_items(run, images, seed=options.seed)
    shown = _read(items)
    by_level = np.stack(
        [
            renderer.codes(
                [
                    mix.apply(picture, numpy_stream(options.seed, "dil codes", place), level)[0] if level else picture
                    for place, picture in enumerate(shown)
                ]
            )
            .cpu()
            .double()
            .numpy()
            for level in levels
        ]
    )  # [S, N, K]
    flat, count = by_level.reshape(-1, by_level.shape[2]), len(shown)
    plane = principal_plane(flat)
    severity = np.repeat(levels, count)
    cameras = np.array([f"camera {camera}" for _, _, camera in items])
    domains = np.concatenate([cameras if level == levels[0] else np.full(count, "") for level in levels])
    draw_codes(
        plane,
        {f"severity of {mix_text}": severity, "cameras, images as they are": domains},
        options.output / "codes.png",
    )
    held_out = np.tile(np.arange(count) % 2 == 1, len(levels))
    found = {
        "checkpoint": str(run.checkpoint),
        "images": count,
        "mix": mix_text,
        "explained": list(plane.explained),
        "axis_correlation": axis_correlation(flat, severity, held_out) if count > 1 else None,
    }
    write_json(options.output / "codes.json", found)
    return found


def slider_table(steps: Sequence[dict[str, float]]) -> str:
    """Markdown table of what :func:`slider` measured."""
    rows = [[f"{step['position']:g}", f"x{step['sharpness']:.2f}", f"{step['brightness']:.1f}"] for step in steps]
    return tabulate(rows, headers=["position", "sharpness", "brightness"], tablefmt="github", disable_numparse=True)


def _axis(run: Stage1Run, renderer: Renderer, options: Options, clean: Sequence[Picture]) -> DegradationAxis:
    mix = options.mix or run.cfg.DIL.PAIRS.MIX
    worse = renderer.codes(degraded(run, mix, clean, options.seed), options.head)
    return degradation_axis(renderer.codes(clean), worse)


def _shown(run: Stage1Run, options: Options, rows: int) -> list[Picture]:
    if options.images:
        return read_pictures(options.images)
    return _read(draw_items(run, rows, seed=options.seed, best=CLEAN_SHARE))


def _read(items: Sequence[Item]) -> list[Picture]:
    return read_pictures([path for path, _, _ in items])


def degraded(run: Stage1Run, mix: str, pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """Pictures made worse by ``mix``; some degradations leave them small."""
    from PIL import Image

    degrade = run.degradation(mix)
    return [
        np.asarray(degrade(Image.fromarray(picture), numpy_stream(seed, "dil pictures degradation", place)))
        for place, picture in enumerate(pictures)
    ]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; dataclasses become objects."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return float(value)

    write_atomically(path, json.dumps(content, indent=1, default=plain).encode())
