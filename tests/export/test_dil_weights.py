"""DIL's published files: which one is taken, what becomes of its names, and what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from dil_outputs import write_outputs
from dil_small import small_stage

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.export.dil_weights import (
    STAGE1,
    STAGE2,
    dil_num_classes,
    find_dil_files,
    read_dil_weights,
    stages_in,
)
from qsd_plugin.methods.dil import Generator, Stage1


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Stage1]:
    for seed, iteration in ((1, "00010000"), (2, "00020000"), (3, "best")):
        stage = small_stage(seed=seed)
        write_outputs(tmp_path, stage, iteration)
    return tmp_path, stage


def test_the_last_files_fill_stage_1_exactly(published: tuple[Path, Stage1]) -> None:
    folder, stage = published
    weights, files = read_dil_weights(folder, STAGE1)
    assert {path.name for path in files.values()} == {f"{network}_best.pt" for network in STAGE1}
    fresh = small_stage(seed=9)
    result = fresh.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    assert all(name.startswith("adam.") for name in result.missing_keys)
    for name, value in fresh.state_dict().items():
        assert name.startswith("adam.") or torch.equal(value, stage.state_dict()[name]), name
    assert dil_num_classes(weights) == 5


def test_by_iteration_where_there_is_no_best_and_without_discriminators(published: tuple[Path, Stage1]) -> None:
    folder, _ = published
    for path in {*folder.glob("*_best.pt"), *folder.glob("D_*")}:
        path.unlink()
    weights, files = read_dil_weights(folder, STAGE1)
    assert {path.name for path in files.values()} == {f"{network}_00020000.pt" for network in ("E_con", "E_deg", "G")}
    assert not any("discriminator" in name for name in weights)


def test_the_authors_have_94_entries_of_a_generator() -> None:
    buffers = 16
    assert len(Generator().state_dict()) + buffers == 94


def test_refusals(published: tuple[Path, Stage1]) -> None:
    folder, _ = published
    with pytest.raises(CheckpointError, match=r"network E_id: got 'no file'; expected E_id_<iteration>\.pt"):
        read_dil_weights(folder, STAGE2)
    (folder / "G_best.pt").write_bytes((folder / "E_deg_best.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"expected the network G, with mlp_w1\.model\.0\.fc\.weight"):
        read_dil_weights(folder, STAGE1)


def test_files_of_the_two_stages_do_not_mix(published: tuple[Path, Stage1]) -> None:
    """Stage 2 writes its E_con beside stage 1's files; the last one by name is not stage 1's then."""
    folder, _ = published
    for network in ("E_con", "E_id", "C"):
        shutil.copy(folder / "E_con_00010000.pt", folder / f"{network}_net.pt")
    assert max(folder.glob("E_con_*.pt")).name == "E_con_net.pt"
    files = find_dil_files(folder, STAGE1)
    assert {path.name for path in files.values()} == {f"{network}_best.pt" for network in STAGE1}
    second = {path.name for path in find_dil_files(folder, STAGE2).values()}
    assert second == {"E_con_net.pt", "E_id_net.pt", "C_net.pt"}
    assert stages_in(folder) == [1, 2]
    for network in ("E_id", "C"):
        (folder / f"{network}_net.pt").rename(folder / f"{network}_best.pt")
    with pytest.raises(CheckpointError, match=r"stages have files of iteration best: got 'G_best.pt and E_id_best"):
        find_dil_files(folder, STAGE1)
    find_dil_files(folder, STAGE2)


def test_files_of_different_iterations_are_refused(published: tuple[Path, Stage1]) -> None:
    folder, _ = published
    for path in {*folder.glob("E_con_*"), *folder.glob("*_best.pt")} - {folder / "E_con_best.pt"}:
        path.unlink()
    message = r"different trainings: got 'E_con_best.pt, E_deg_00020000.pt, G_00020000.pt'; expected one iteration"
    with pytest.raises(CheckpointError, match=message):
        read_dil_weights(folder, STAGE1)
    with pytest.raises(CheckpointError, match=r"DIL weights: got '.*nowhere'; expected the authors' folder of outputs"):
        find_dil_files(folder / "nowhere", STAGE1)
