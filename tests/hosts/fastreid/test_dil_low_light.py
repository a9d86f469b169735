"""Low-light folders: layouts, pairs of the same scene in the loader, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dil_toy import ROWS, dil_cfg
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.data.low_light import read_low_light
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.dil_pairs import PairDraws
from qsd_plugin.model_zoo import get_config_file, list_configs

host.activate()

STORED = {"DIL.PAIRS.OTHER": "unpaired", "DIL.PAIRS.DEGRADED_CAMERAS": [1], "DIL.PAIRS.STORED": True}


def write(folder: Path, names: list[str], level: int, size: tuple[int, int] = (32, 32)) -> None:
    """Images of one level each, which rises by one from name to name."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        Image.new("RGB", size, (level + place,) * 3).save(folder / f"{name}.png")


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    names = [f"scene{n}" for n in range(8)]
    write(tmp_path / "our485" / "high", names, 200)
    write(tmp_path / "our485" / "low", names, 20)
    return tmp_path


def test_layouts_and_pairs_are_told(scenes: Path, tmp_path: Path) -> None:
    found = read_low_light(scenes)
    assert found.paired
    assert [path.name for path in found.low] == [path.name for path in found.normal]
    assert found.low[0].parent.name == "low"
    write(tmp_path / "gan" / "trainA", ["a", "b"], 10)
    write(tmp_path / "gan" / "trainB", ["x"], 200, (16, 48))
    other = read_low_light(tmp_path / "gan")
    assert (len(other.low), len(other.normal), other.paired) == (2, 1, False)


def test_paired_iterations_show_both_images_of_a_scene(scenes: Path, tmp_path: Path) -> None:
    from fastreid.data import build_reid_train_loader

    options = {"DATASETS.NAMES": ("LowLightFolder",), "DATA.FOLDER": str(scenes), **STORED}
    batches = iter(build_reid_train_loader(dil_cfg(tmp_path, **options)))
    paired, other = next(batches), next(batches)
    levels = [batch[key][:, 0, 0, 0].round().int() for batch in (paired, other) for key in ("images", "worse_images")]
    assert (levels[0] - levels[1]).tolist() == [180] * ROWS
    assert paired["targets"].equal(paired["worse_targets"])
    assert bool((levels[2] >= 200).all())
    assert bool((levels[3] < 30).all())
    assert levels[2].sub(levels[3]).unique().numel() > 1


def test_stored_pairs_are_of_one_identity_whichever_image_is_drawn(tmp_path: Path) -> None:
    cameras, identities = [0, 0, 1, 1, 1], ["a", "b", "a", "b", "b"]
    draws = PairDraws(cameras, dil_cfg(tmp_path, **STORED), identities)
    paired = [draw for draw in range(40 * ROWS) if draws.iteration(draw) % 2]
    assert {draws.pair(0, draw) for draw in paired} == {(0, 2)} == {draws.pair(2, draw) for draw in paired}
    assert {draws.pair(1, draw) for draw in paired} == {(1, 3), (1, 4)}
    assert {draws.pair(4, draw) for draw in paired} == {(1, 4)}
    with pytest.raises(DataError, match=r"without a clean or without a degraded image: got '1 of 2: b'"):
        PairDraws(cameras, dil_cfg(tmp_path, **STORED), ["a", "b", "a", "a", "a"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"low": [], "high": ["a"]}, "No degraded images: got '.*low'"),
        ({"low": ["a"], "high": []}, "No clean images: got '.*high'"),
        ({"low": ["a"]}, "expected folders our485/low and our485/high, or "),
        ({"low": ["a"], "high": ["a"], "size": (32, 40)}, "different sizes: got .*a.png 32 x 40, .*a.png 32 x 32"),
    ],
)
def test_folders_without_pairs_of_use_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name in ("low", "high"):
        if name in files:
            write(tmp_path / name, files[name], 9, files.get("size", (32, 32)) if name == "low" else (32, 32))
    with pytest.raises(DataError, match=message):
        read_low_light(tmp_path)


def test_an_image_that_is_there_twice_or_broken_is_named(scenes: Path) -> None:
    Image.new("RGB", (32, 32)).save(scenes / "our485" / "low" / "scene3.bmp")
    with pytest.raises(DataError, match=r"there twice: got .*scene3"):
        read_low_light(scenes)
    (scenes / "our485" / "low" / "scene3.bmp").unlink()
    (scenes / "our485" / "low" / "scene3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot be read: got .*scene3.png"):
        read_low_light(scenes)


def test_settings_without_two_domains_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"DIL.PAIRS.OTHER: got 'unsupervised'; expected unpaired with DIL.PAIRS.STORED"
    ):
        PairDraws([0, 1], dil_cfg(tmp_path, **{**STORED, "DIL.PAIRS.OTHER": "unsupervised"}), ["a", "a"])
    with pytest.raises(ConfigError, match="SHEET_EVERY: got -1"):
        PairDraws([0, 1], dil_cfg(tmp_path, **{"DIL.STAGE1_OPTIONS.SHEET_EVERY": -1}))


@pytest.mark.parametrize("name", [name for name in list_configs() if "DIL/enhance" in name])
def test_shipped_configs_train_stage_1_alone(name: str, scenes: Path) -> None:
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(name))
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.RECIPE.NAME, cfg.DIL.STAGE1_OPTIONS.IDENTITY) == ("DIL", "", 0.0)
    draws = PairDraws([0, 1], cfg, ["a", "a"])
    image = Image.fromarray(np.full((32, 32, 3), 128, dtype=np.uint8))
    assert np.asarray(draws.degrade(image, draws.generator(0))).mean() < 70
