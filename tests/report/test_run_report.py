"""The pieces of a run's report: groups by quality, sharpness, pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from qsd_plugin.evaluation.retrieval import RetrievalResult
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.report.pictures import RankList, draw_label_histogram, draw_rank_lists, draw_worst_and_best
from qsd_plugin.report.sharpness import sharpness

host.activate()

from qsd_plugin.hosts.fastreid.report import as_table, by_quality  # noqa: E402  (needs the activated host)


def photograph(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (128, 64, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))


def test_thirds_are_of_the_valid_queries_in_order_of_quality() -> None:
    # Seven queries, the fourth without a match; average precision equals quality, so each third is known.
    valid = np.array([1, 1, 1, 0, 1, 1, 1], dtype=bool)
    quality = np.array([0.6, 0.1, 0.5, 0.0, 0.2, 0.4, 0.3])
    ap = quality[valid]
    first_hit = np.array([1, 2, 1, 5, 1, 1])
    result = RetrievalResult(np.ones(1), ap, ap / 2, float(ap.mean()), float(ap.mean() / 2), 6, valid, first_hit)
    groups = by_quality(result, quality)
    assert groups["all"]["mAP"] == pytest.approx(35.0)
    assert groups["all"]["rank1"] == pytest.approx(100 * 4 / 6)
    assert groups["worst third"] == pytest.approx({"rank1": 0.0, "mAP": 15.0, "mINP": 7.5})
    assert groups["middle third"] == pytest.approx({"rank1": 100.0, "mAP": 35.0, "mINP": 17.5})
    assert groups["best third"]["mAP"] == pytest.approx(55.0)


def test_table_names_queries_seed_and_arms() -> None:
    row = {"all": {"rank1": 50.0, "mAP": 25.04, "mINP": 5.0}}
    arms = {"baseline": row, "qsd": row}
    tests = {"Market1501": {"quality": "sharpness", "queries": 7, "arms": arms}}
    text = as_table({"note": "one seed, no claim", "seed": 3, "tests": tests})
    assert "Market1501, 7 queries, one seed, no claim (seed 3)" in text
    assert "50.0 / 25.0 / 5.0" in text
    assert text.index("| baseline") < text.index("| qsd")


def test_sharpness_falls_with_blur_and_ignores_brightness_and_size(tmp_path: Path) -> None:
    sharp = photograph()
    pictures = {
        "sharp": sharp,
        "blurred": sharp.filter(ImageFilter.GaussianBlur(5)),
        "dark": sharp.point(lambda value: value // 2),
        "large": sharp.resize((256, 512), Image.Resampling.BILINEAR),
    }
    paths = []
    for name, picture in pictures.items():
        paths.append(str(tmp_path / f"{name}.png"))
        picture.save(paths[-1])
    clear, blurred, dark, large = sharpness(paths)
    assert blurred < clear / 10
    assert dark == pytest.approx(clear, rel=0.1)
    assert large == pytest.approx(clear, rel=0.35)


def test_pictures_show_what_they_were_given(tmp_path: Path) -> None:
    paths = []
    for index in range(5):
        paths.append(str(tmp_path / f"{index}.png"))
        photograph(index).save(paths[-1])
    target = tmp_path / "deep" / "rank.png"
    draw_rank_lists([RankList("qsd", paths[0], paths[1:], [True, False, True, False])], target)
    pixels = np.asarray(Image.open(target).convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((0x2A, 0x9D, 0x3A), (0xC8, 0x37, 0x2D)):
        assert (np.abs(pixels - colour).max(axis=1) <= 3).sum() > 50, "a frame is missing"
    draw_label_histogram({"Market1501": np.linspace(0, 100, 50)}, tmp_path / "histogram.png")
    draw_worst_and_best(paths, np.arange(5.0), tmp_path / "worst.png", count=2)
    for name in ("histogram.png", "worst.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5
