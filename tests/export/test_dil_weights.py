"""DIL's published files: which one is taken, what becomes of its names, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))

from dil_small import small_stage

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.export.dil_weights import STAGE1, STAGE2, dil_num_classes, read_dil_weights
from qsd_plugin.methods.dil import Generator, Stage1


def authors_state(stage: Stage1, network: str) -> dict[str, Tensor]:
    """As the authors' file of a network names it; their AdaIN layers have buffers that nothing reads."""
    state = dict(stage.get_submodule(STAGE1[network]).state_dict())
    if network == "G":
        for block in range(4):
            for half in range(2):
                for kind in ("mean", "var"):
                    state[f"dec.res.model.{block}.model.{half}.norm.running_{kind}"] = torch.zeros(8)
    return state


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Stage1]:
    for seed, iteration in ((1, "00010000"), (2, "00020000"), (3, "best")):
        stage = small_stage(seed=seed)
        for network in STAGE1:
            torch.save(authors_state(stage, network), tmp_path / f"{network}_{iteration}.pt")
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
