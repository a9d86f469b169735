"""Pictures of a stage 1 inside fast-reid: the run that is loaded, what is drawn and measured, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dil_toy import build, dil_cfg, pair_batch, step, stored
from PIL import Image
from toy import use_market, write_market

from qsd_plugin.core.errors import DataError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.dil_files import save_bank
from qsd_plugin.hosts.fastreid.dil_pictures import Options, measure_swap, plot_codes, slider, swap
from qsd_plugin.hosts.fastreid.dil_run import Stage1Run, draw_items, load_run
from tools.visualize import main

host.activate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's folder with stage 1, as if trained: ``out/stage1``; beside it the data."""
    folder = tmp_path_factory.mktemp("dil_pictures")
    write_market(folder / "data", num_ids=4, per_id=4, test_ids=8)
    cfg = dil_cfg(folder, **{"MODEL.DEVICE": "cuda", "DIL.PAIRS.MIX": "ill", "MODEL.HEADS.NUM_CLASSES": 0})
    model = build(dil_cfg(folder, **{"DIL.PAIRS.MIX": "ill"}))
    (folder / "out" / "stage1").mkdir()
    (folder / "out" / "stage1" / "config.yaml").write_text(cfg.dump())
    stored(model, folder / "out" / "stage1" / "model_final.pth")
    return folder


@pytest.fixture(autouse=True)
def data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_market(monkeypatch, folder / "data")


@pytest.fixture
def run(folder: Path) -> Stage1Run:
    return load_run(folder / "out")


def test_the_run_s_networks_are_those_of_its_checkpoint(folder: Path, run: Stage1Run) -> None:
    model = build(dil_cfg(folder, **{"DIL.PAIRS.MIX": "ill"})).eval()
    path = draw_items(run, 1, seed=0)[0][0]
    picture = np.asarray(Image.open(path).convert("RGB"))
    renderer = run.renderer()
    from fastreid.data.transforms import build_transforms

    images = model.normalised(build_transforms(run.cfg, is_train=False)(Image.open(path))[None])
    torch.testing.assert_close(renderer.normalised([picture]), images)
    stage = model.stage
    with torch.no_grad():
        content = stage.content_encoder(images).content
        code = (stage.degradation_encoder(images) + stage.degradation_encoder(images.flip(3))) / 2
        rendered = stage.generator(content, code) * model.pixel_std + model.pixel_mean
    torch.testing.assert_close(renderer.codes([picture]), code, rtol=1e-4, atol=1e-5)
    found = renderer.render(renderer.contents([picture]), renderer.codes([picture]))[0]
    expected = rendered[0].permute(1, 2, 0).clamp(0, 255).numpy()
    assert np.abs(found - expected).max() < 0.51
    assert expected.std() > 1
    assert run.networks.content_encoder.classifier.classifier[0].out_features == 5
    for named in (folder / "out" / "stage1", folder / "out" / "stage1" / "model_final.pth"):
        assert load_run(named).checkpoint == run.checkpoint


def test_the_swap_has_contents_in_rows_and_degradations_in_columns(run: Stage1Run, tmp_path: Path) -> None:
    paths = [path for path, _, _ in draw_items(run, 2, seed=5)]
    result = swap(run, Options(tmp_path, paths, mix="ill", seed=4), rows=9, pairs=3, mixes=["ill"])
    from qsd_plugin.hosts.fastreid.dil_pictures import degraded
    from qsd_plugin.hosts.fastreid.dil_run import read_pictures

    shown = read_pictures(paths)
    worse = degraded(run, "ill", shown, 4)
    assert all(dark.mean() < picture.mean() - 10 for dark, picture in zip(worse, shown, strict=True))
    renderer = run.renderer()
    contents = renderer.contents(shown)
    codes = torch.cat([renderer.codes(shown, "real"), renderer.codes(worse, "syn")])
    with Image.open(tmp_path / "swap.png") as picture:
        sheet = np.asarray(picture)
    for row in range(2):
        for column in range(4):
            cell = renderer.render(contents[row : row + 1], codes[column : column + 1])[0]
            assert contains(sheet, cell), (row, column)
    assert all(contains(sheet, picture) for picture in renderer.resized([*shown, *worse]))
    written = json.loads((tmp_path / "swap.json").read_text())
    assert list(written["effects"]["ill"]) == ["sharpness", "brightness"]
    brightness = written["effects"]["ill"]["brightness"]
    assert brightness["input"]["high"] < -10
    assert brightness["degrading"]["low"] <= brightness["degrading"]["value"] <= brightness["degrading"]["high"]
    assert result["table"] == written["table"]


def contains(sheet: Any, cell: Any) -> bool:
    """Whether a panel lies in a sheet, anywhere (up to a level: another batch size may round differently)."""
    height, width = cell.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (height, width, 3))[:, :, 0]
    middle = np.abs(windows[:, :, height // 2, width // 2].astype(int) - cell[height // 2, width // 2]).max(axis=2)
    return any(
        np.abs(windows[top, left].astype(int) - cell).max() <= 1
        for top, left in zip(*np.nonzero(middle <= 1), strict=True)
    )


def test_pairs_are_clean_against_other_degraded_images(run: Stage1Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from qsd_plugin.report.dil import swap_effect as module

    seen: dict[str, Any] = {}

    def kept(renderer: Any, clean: Any, degraded: Any, sources: Any, identities: Any, **options: Any) -> None:
        seen.update(clean=clean, degraded=degraded, sources=sources, identities=identities, **options)

    monkeypatch.setattr(module, "swap_effect", kept)
    measure_swap(run, run.renderer(), "res", 2, head="syn", seed=1)
    assert len(seen["clean"]) == len(seen["degraded"]) == 2
    everything = [picture.tobytes() for picture in [*seen["clean"], *seen["sources"]]]
    assert len(set(everything)) == 4
    for degraded, source in zip(seen["degraded"], seen["sources"], strict=True):
        assert degraded.shape[0] < source.shape[0] / 2.5
    assert seen["head"] == "syn"


def test_the_slider_moves_along_the_axis_and_the_plot_tells_severities(run: Stage1Run, tmp_path: Path) -> None:
    steps = slider(run, Options(tmp_path, mix="ill"), rows=2, positions=[0.0, 0.5, 1.0], images=4)
    assert [step["position"] for step in steps] == [0.0, 0.5, 1.0]
    assert steps[0]["sharpness"] == 1.0
    assert json.loads((tmp_path / "slider.json").read_text())["steps"] == steps
    found = plot_codes(run, Options(tmp_path, mix="ill"), images=8, severities=[0.0, 0.5, 1.0])
    assert found["images"] == 8
    assert 0.3 < sum(found["explained"]) <= 1.000001
    assert -1 <= found["axis_correlation"] <= 1
    assert (tmp_path / "codes.png").stat().st_size > 1000


def test_replay_draws_from_the_recipe_s_bank(folder: Path, run: Stage1Run, tmp_path: Path, capsys: Any) -> None:
    out = folder / "out"
    assert main(["replay", str(out), "--output", str(tmp_path), "--codes", "2", "--rows", "1", "--bank", "3"]) == 0
    assert "from 3 codes of 8 numbers" in capsys.readouterr().out
    bank = out / "bank" / "codes.npz"
    codes = torch.randn(1, 8)
    save_bank(bank, codes, run.networks.degradation_encoder)
    try:
        assert main(["replay", str(out), "--output", str(tmp_path), "--codes", "2", "--rows", "1"]) == 0
        assert "from 1 codes" in capsys.readouterr().out
        renderer = run.renderer()
        from qsd_plugin.hosts.fastreid.dil_run import read_pictures

        shown = read_pictures([draw_items(run, 1, seed=0, best=0.5)[0][0]])
        with Image.open(tmp_path / "replay.png") as picture:
            assert contains(np.asarray(picture), renderer.render(renderer.contents(shown), codes)[0])
        with torch.no_grad():
            run.networks.degradation_encoder.conv3_real.bias.add_(1)
        save_bank(bank, codes, run.networks.degradation_encoder)
        assert main(["replay", str(out), "--output", str(tmp_path)]) == 2
        assert "holds codes of another degradation encoder" in capsys.readouterr().err
    finally:
        bank.unlink()


def test_enhanced_images_are_written_and_measured(folder: Path, run: Stage1Run, tmp_path: Path, capsys: Any) -> None:
    true = tmp_path / "true"
    true.mkdir()
    dark = tmp_path / "dark"
    dark.mkdir()
    for place, (path, _, _) in enumerate(draw_items(run, 3, seed=0)):
        picture = Image.open(path).convert("RGB")
        picture.save(true / f"{place}.png")
        picture.point(lambda level: level // 3).save(dark / f"{place}.jpg")
    out = tmp_path / "enhanced"
    command = ["enhance", str(folder / "out"), str(dark), "--reference", str(true), "--output", str(out)]
    assert main([*command, "--clean-images", str(true)]) == 0
    found = json.loads((out / "enhance.json").read_text())
    assert list(found["measures"]) == ["before", "enhanced", "brightness scaled"]
    assert found["measures"]["brightness scaled"]["psnr"]["gain"]["low"] > 3
    from qsd_plugin.hosts.fastreid.dil_run import read_pictures

    renderer = run.renderer()
    clean = renderer.codes(read_pictures([str(true / f"{n}.png") for n in range(3)])).mean(dim=0, keepdim=True)
    shown = read_pictures([str(dark / "1.jpg")])
    written = np.asarray(Image.open(out / "enhanced" / "1.png"))
    expected = renderer.render(renderer.contents(shown), clean)[0]
    assert np.abs(written.astype(int) - expected).max() <= 1
    assert found["table"] in capsys.readouterr().out
    own = [*command[:2], str(dark / "1.jpg"), "--output", str(out), "--size", "own", "--clean", "nearest"]
    assert main([*own, "--clean-count", "4"]) == 0
    assert Image.open(out / "enhanced" / "1.png").size == (32, 64)


def test_synthetic_darkness_is_measured_against_the_true_images(folder: Path, tmp_path: Path) -> None:
    command = ["enhance", str(folder / "out"), "--synthetic", "4", "--clean-count", "4", "--output", str(tmp_path)]
    assert main([*command, "--size", "48x32"]) == 0
    found = json.loads((tmp_path / "enhance.json").read_text())
    assert list(found["measures"]) == ["before", "enhanced", "brightness scaled", "true, reconstructed"]
    assert found["images"] == 4
    assert found["measures"]["before"]["psnr"]["mean"] < 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["swap", "{tmp}"],
            "Run of DIL's stage 1: got '{tmp}'; expected the folder of a recipe with stage1/model_final",
        ),
        (["swap", "{out}", "{tmp}"], "Images: got .'{tmp}'.; expected image files, or folders with images"),
        (["swap", "{out}", "{tmp}/none.png"], "Images: got '{tmp}/none.png'"),
        (["swap", "{out}", "--pairs", "1"], "Pairs to measure: got 1; expected at least 2"),
        (["swap", "{out}", "--measure", "rse"], "Unknown degradation: got 'rse'"),
        (["slider", "{out}", "--positions", "1"], "Positions of the slider: got .1.0.; expected at least two"),
        (["codes", "{out}", "--severities", "0.5"], "Severities of the plot"),
        (["enhance", "{out}"], "Images to enhance: got 0; expected files or folders"),
        (
            ["enhance", "{out}", "{image}", "--clean", "median"],
            "Clean code: got 'median'; expected 'mean' or 'nearest'",
        ),
        (
            ["enhance", "{out}", "{image}", "--size", "40x32"],
            "got '40 x 32 pixels .height x width.'; expected multiples",
        ),
        (["enhance", "{out}", "{image}", "--size", "64"], "--size: got '64'; expected HEIGHTxWIDTH"),
        (["enhance", "{out}", "{image}", "--size", "own"], "got '30 x 33 pixels .height x width.'"),
        (["enhance", "{out}", "{image}", "--reference", "{out}/.."], "Reference of an image to enhance: .*odd"),
        (["enhance", "{out}", "--synthetic", "2", "--size", "own"], "--size own with --synthetic"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: Any
) -> None:
    image = tmp_path / "odd.png"
    out = tmp_path / "files"
    names = {"tmp": str(tmp_path / "empty"), "out": str(folder / "out"), "image": str(image)}
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (33, 30)).save(image)
    assert main([part.format(**names) for part in arguments] + ["--output", str(out)]) == 2
    error = capsys.readouterr().err
    import re

    assert re.search(message.format(**names), error), error


def test_checkpoints_of_other_stages_are_no_stage_1(folder: Path, tmp_path: Path) -> None:
    cfg = dil_cfg(tmp_path, "DILTeacher")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    stored(build(cfg), tmp_path / "model_final.pth")
    with pytest.raises(Exception, match=r"got 'a checkpoint of the teacher .*expected a trained stage 1"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"model_final.pth and config.yaml"):
        load_run(tmp_path / "model_final.pth")


def test_sheets_of_two_iterations_are_drawn_and_training_is_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastreid.utils.events import EventStorage

    shown: list[tuple[str, Any]] = []
    monkeypatch.setattr(EventStorage, "put_image", lambda self, name, image: shown.append((name, image)))
    options = {"DIL.STAGE1_OPTIONS.SHEET_EVERY": 2}
    watched, plain = build(dil_cfg(tmp_path / "a", **options)), build(dil_cfg(tmp_path / "b"))
    for iteration in range(1, 4):
        losses = [step(model, pair_batch(iteration)) for model in (watched, plain)]
        for name, value in losses[1].items():
            assert losses[0][name].equal(value), name
    for name, value in plain.state_dict().items():
        assert watched.state_dict()[name].equal(value), name
    sheets = sorted(path.name for path in (tmp_path / "a" / "out" / "sheets").iterdir())
    assert sheets == ["000002_unsupervised.png", "000003_paired.png"]
    assert not (tmp_path / "b" / "out" / "sheets").exists()
    assert [name for name, _ in shown] == ["dil/unsupervised", "dil/paired"]
    with Image.open(tmp_path / "a" / "out" / "sheets" / "000003_paired.png") as picture:
        pixels = np.asarray(picture)
    assert np.array_equal(shown[1][1], pixels.transpose(2, 0, 1))
    batch = pair_batch(3)
    for key in ("images", "worse_images"):
        for image in batch[key]:
            assert contains(pixels, image.round().permute(1, 2, 0).numpy().astype(np.uint8))
