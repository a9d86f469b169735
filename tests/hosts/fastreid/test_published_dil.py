"""``convert_weights.py --from dil``: the authors' folder fills stage 1 or stage 2 exactly, or is refused in words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dil_outputs import write_outputs
from dil_toy import build, dil_cfg

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.published_dil import convert_folder
from tools import convert_weights

host.activate()


def stage1(tmp_path: Path) -> tuple[Any, Path]:
    """A trained stage 1 and its folder; the host would have found 5 people."""
    model = build(dil_cfg(tmp_path / "one"), seed=5)
    return model, write_outputs(tmp_path / "outputs", model.stage, "00030000")


def stage2(tmp_path: Path, **options: Any) -> tuple[Any, Path]:
    model = build(dil_cfg(tmp_path / "two", "DILReID", **{"DIL.REPLAY.MODE": "none", **options}), seed=6)
    return model, write_outputs(tmp_path / "outputs", model.reid, "00013200", stage=2)


def run_tool(monkeypatch: pytest.MonkeyPatch, config: Path, folder: Path, output: Path, *more: str) -> None:
    arguments = ["--from", "dil", "--config-file", config, "--weights", folder, "--output", output, *more]
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    convert_weights.main()


def config_file(tmp_path: Path, cfg: Any) -> Path:
    file = tmp_path / "config.yml"
    file.write_text(cfg.dump())
    return file


def test_stage_1_becomes_what_stage_2_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = stage1(tmp_path)
    output, second = tmp_path / "stage1.pth", dil_cfg(tmp_path / "cfg", "DILReID")
    run_tool(monkeypatch, config_file(tmp_path, second), folder, output)
    said = capsys.readouterr().out
    assert "0 missing, 0 unexpected, 0 of another shape" in said
    assert "G: G_00030000.pt" in said
    assert "DIL.LN_SCOPE batch" in said
    assert f"stage 1. Use it as DIL.STAGE1 {output}" in said
    state = torch.load(output, weights_only=True)["model"]
    for name, value in model.state_dict().items():
        assert name not in state or value.equal(state[name]), name
    assert {name.split(".")[1] for name in state} == {
        "content_encoder",
        "degradation_encoder",
        "generator",
        "real_discriminator",
        "degradation_discriminator",
    }
    started = build(dil_cfg(tmp_path / "cfg", "DILReID", **{"DIL.STAGE1": str(output), "DIL.REPLAY.MODE": "none"}))
    for name, value in model.stage.content_encoder.state_dict().items():
        assert value.equal(started.reid.content_encoder.state_dict()[name]), name


def test_stage_1_without_discriminators(tmp_path: Path) -> None:
    _, folder = stage1(tmp_path)
    for path in folder.glob("D_*"):
        path.unlink()
    done = convert_folder(dil_cfg(tmp_path / "cfg", "DILReID"), folder)
    assert (done.stage, done.fit.missing) == (1, [])
    assert any("No file of the real discriminator" in note for note in done.notes)


@pytest.mark.parametrize("attention", [False, True])
def test_stage_2_computes_what_it_did(
    tmp_path: Path, attention: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = stage2(tmp_path, **{"DIL.STAGE2_OPTIONS.ATTENTION": attention})
    cfg = dil_cfg(tmp_path / "cfg", "DILReID", **{"DIL.STAGE2_OPTIONS.ATTENTION": attention, "DIL.REPLAY.MODE": "none"})
    run_tool(monkeypatch, config_file(tmp_path, cfg), folder, tmp_path / "stage2.pth")
    assert "stage 2. Use it as MODEL.WEIGHTS" in capsys.readouterr().out
    other = build(cfg, seed=9).eval()
    result = other.load_state_dict(torch.load(tmp_path / "stage2.pth", weights_only=True)["model"], strict=False)
    assert result.unexpected_keys == []
    batch = {"images": torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255}
    with torch.no_grad():
        assert other(batch).equal(model.eval()(batch))


def test_a_folder_with_both_stages(tmp_path: Path) -> None:
    stage2(tmp_path)
    first, folder = stage1(tmp_path)
    cfg = dil_cfg(tmp_path / "cfg", "DILReID")
    with pytest.raises(CheckpointError, match=r"got 'files of both stages'.*Pass --stage 1 or --stage 2"):
        convert_folder(cfg, folder)
    done = convert_folder(cfg, folder, 1)
    name = "content_encoder.head.aspp.fuse.conv.weight"
    assert done.state[f"stage.{name}"].equal(first.stage.state_dict()[name]), "stage 2's E_con beside stage 1's G"
    assert {path.stem.rpartition("_")[2] for path in done.files.values()} == {"00030000"}
    assert {path.stem.rpartition("_")[2] for path in convert_folder(cfg, folder, 2).files.values()} == {"00013200"}
    for path in folder.glob("E_con_00030000.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"different trainings: got 'E_con_00013200.pt, E_deg_00030000.pt"):
        convert_folder(cfg, folder, 1)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = stage1(tmp_path)
    cfg = dil_cfg(tmp_path / "cfg", "DILReID")
    with pytest.raises(CheckpointError, match=r"do not fill stage 1: got '.* of another shape.*DIL.WIDTH 1.0"):
        convert_folder(dil_cfg(tmp_path / "wide", "DILReID", **{"DIL.WIDTH": 0.125}), folder)
    with pytest.raises(CheckpointError, match=r"do not fill stage 1: got '\d+ missing \(first stage.content_enc"):
        convert_folder(dil_cfg(tmp_path / "deep", "DILReID", **{"DIL.BLOCKS": [1, 2, 1, 1]}), folder)
    state = torch.load(folder / "E_deg_00030000.pt", weights_only=True)
    torch.save({**state, "own.weight": torch.zeros(1)}, folder / "E_deg_00030000.pt")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(first stage.degradation_encoder.own.weight\)"):
        convert_folder(cfg, folder)
    (folder / "G_00030000.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no stage whose networks are all there.*Pass --stage to see"):
        convert_folder(cfg, folder)
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, config_file(tmp_path, cfg), folder, tmp_path / "out.pth", "--stage", "1")
    assert "network G: got 'no file'; expected G_<iteration>.pt" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, config_file(tmp_path, cfg), folder, tmp_path / "out.pth", "--drop-classifier")
    assert "--drop-classifier; expected other sources than dil" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
