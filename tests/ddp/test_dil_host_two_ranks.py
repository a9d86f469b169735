"""DIL inside fast-reid on two gloo ranks, by the host's trainer, is one process on the whole batch.

Steps go through the host's ``DefaultTrainer`` with its own ``DistributedDataParallel``, which waits for all parameters,
in float64, with batch statistics kept and dropout off: those are each rank's. Controls: without the average of the
discriminators' gradients, and with triplets or replayed codes of each rank alone, the same comparison must fail.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gloo import run_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from qsd_plugin.methods.dil import adam, bank, losses

ROWS, CLASSES = 8, 5
#: Architecture and settings of a training, and its steps: in stage 1 both phases twice.
TRAININGS: dict[str, tuple[str, dict[str, Any], int]] = {
    "unsupervised": ("DIL", {"DIL.STAGE1_OPTIONS.R1_WEIGHT": 1.0}, 4),
    "unpaired": ("DIL", {"DIL.PAIRS.OTHER": "unpaired", "DIL.PAIRS.DEGRADED_CAMERAS": [1]}, 4),
    "stage 2": ("DILReID", {"DIL.REPLAY.SWAP": 0.5}, 3),
    # Only the sensitive branch learns: data-parallel training waits for the others all the same.
    "partly": ("DILReID", {f"DIL.STAGE2_OPTIONS.{name}_LOSS": "none" for name in ("FUSE", "INV")}, 2),
    "teacher": ("DILTeacher", {}, 2),
}
#: What a control takes away: the training, and (module, function, what stands in for it).
CONTROLS: dict[str, tuple[str, tuple[Any, str, Any]]] = {
    "discriminators": ("unsupervised", (adam, "all_reduce_sum", lambda tensor: 2 * tensor.detach())),
    "triplets": ("stage 2", (losses, "gather_equal_rows", lambda tensor: torch.cat([tensor.detach()] * 2))),
    "codes": ("stage 2", (bank, "_own", lambda images: slice(0, len(images)))),
}
#: Tensors that a control must change; other ones may follow.
CHANGED = {"discriminators": "stage.real_discriminator", "triplets": "reid.", "codes": "reid.content_encoder"}
#: Biases in front of an instance norm do nothing. Their gradients are rounding, of which Adam makes steps.
IDLE = ("head.aspp.", "head.content.4.conv.bias", "generator.dec.res.")


class Batches:
    """A train loader of made-up batches, of which a rank sees its half."""

    num_classes = CLASSES  # as of the host's data set, which it is at the same time

    def __init__(self, paired: bool, rank: int | None) -> None:
        self.dataset, self._paired = self, paired
        self._rows = slice(None) if rank is None else slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from dil_toy import pair_batch

        for iteration in range(1, 100):
            batch = pair_batch(iteration, ROWS)
            if not self._paired:
                batch["targets"] = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3])  # positives on the other rank, too
            own = {key: value[self._rows] for key, value in batch.items()}
            yield own | {key: own[key].double() for key in ("images", "worse_images")}


def training(folder: str, name: str, rank: int | None) -> dict[str, Any]:
    """The model after some steps of the host's trainer, and both optimizers' moments."""
    from dil_toy import dil_cfg
    from fastreid.engine import DefaultTrainer
    from fastreid.utils.events import EventStorage

    architecture, options, steps = TRAININGS[name]
    first = architecture == "DIL"
    common: dict[str, Any] = {"DIL.DROPOUT": 0.0, "SOLVER.IMS_PER_BATCH": ROWS}
    if architecture == "DILReID":
        common |= {"DIL.STAGE1": f"{folder}/stage1.pth", "DIL.BANK": f"{folder}/bank.npz"}
    cfg = dil_cfg(Path(folder), architecture, **common, **options)

    class Trainer(DefaultTrainer):  # type: ignore[misc]
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Batches:
            return Batches(first, rank)

        @classmethod
        def build_model(cls, cfg: Any) -> Any:
            # Ranks begin differently; data-parallel training brings them together.
            torch.manual_seed(rank or 0)
            return super().build_model(cfg).double()

        @classmethod
        def build_evaluator(cls, *args: Any) -> None:
            """There is nothing to evaluate on."""

        def build_hooks(self) -> list[Any]:
            return []

    trainer = Trainer(cfg)
    model = getattr(trainer.model, "module", trainer.model)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    curve = []
    with EventStorage(0) as storage:
        for trainer.iter in range(steps):
            trainer.run_step()
            shown = storage.latest() if rank in (None, 0) else {}
            curve.append({key: float(value) for key, (value, _) in shown.items() if "loss" in key})
    moments = trainer.optimizer.state_dict()["state"]
    return {"curve": curve, "model": dict(model.state_dict()), "moments": moments}


def make_files(folder: Path) -> None:
    """A stage 1 and a bank for stage 2 to start from."""
    from dil_toy import build, dil_cfg, stored

    from qsd_plugin.hosts.fastreid.dil_files import save_bank

    first = build(dil_cfg(folder), seed=1)
    stored(first, folder / "stage1.pth")
    codes = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    save_bank(folder / "bank.npz", codes, first.stage.degradation_encoder)


def worker(rank: int, folder: str) -> dict[str, Any]:
    import torch.distributed as dist
    from fastreid.utils import comm

    from qsd_plugin.hosts import fastreid as host

    host.activate()
    comm._LOCAL_PROCESS_GROUP = dist.group.WORLD
    result: dict[str, Any] = {name: training(folder, name, rank) for name in TRAININGS}
    for control, (name, patch) in CONTROLS.items():
        with mock.patch.object(*patch):
            result[control] = training(folder, name, rank)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    folder = tmp_path_factory.mktemp("dil")
    make_files(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ranks(folder: str) -> list[dict[str, Any]]:
    return run_ranks(worker, folder)


@pytest.fixture(scope="module")
def alone(folder: str) -> dict[str, dict[str, Any]]:
    return {name: training(folder, name, None) for name in TRAININGS}


def flat(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights, statistics and discriminators' moments by name, and the host optimizer's by the number of parameter."""
    moments = {
        f"moments.{number}.{key}": torch.as_tensor(value)
        for number, state in result["moments"].items()
        for key, value in state.items()
    }
    return {**result["model"], **moments}


def idle(name: str) -> bool:
    return name.endswith(".bias") and any(part in name for part in IDLE)


def worst(own: dict[str, Any], other: dict[str, Any], prefix: str = "") -> float:
    """Largest difference, relative to the largest number of a tensor."""
    found, expected = flat(own), flat(other)
    assert found.keys() == expected.keys()
    names = [name for name in expected if name.startswith(prefix) and not idle(name)]
    pairs = [(found[name].double(), expected[name].double()) for name in names]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_ranks_are_one_process(ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert worst(rank[name], alone[name]) < 1e-8
        assert all(value.abs().max() < 1e-5 for key, value in rank[name]["model"].items() if idle(key))
    for found, expected in zip(ranks[0][name]["curve"], alone[name]["curve"], strict=True):
        assert found == pytest.approx(expected, rel=1e-9)
    for key, value in flat(ranks[0][name]).items():
        assert torch.equal(value, flat(ranks[1][name])[key]), key
    assert any(value.abs().max() > 0 for key, value in flat(alone[name]).items() if key.endswith("exp_avg_sq"))


def test_both_phases_and_both_optimizers_were_at_work(alone: dict[str, dict[str, Any]]) -> None:
    for name in ("unsupervised", "unpaired"):
        curve, state = alone[name]["curve"], alone[name]["model"]
        assert "loss_dil_content" in curve[0]
        assert "loss_dil_identity" in curve[1]
        assert int(state["stage.adam.steps"]) == 4
        assert state["stage.adam.square"].abs().max() > 0


@pytest.mark.parametrize("control", CONTROLS)
def test_ranks_by_themselves_are_not(
    ranks: list[dict[str, Any]], alone: dict[str, dict[str, Any]], control: str
) -> None:
    for rank in ranks:
        assert worst(rank[control], alone[CONTROLS[control][0]], CHANGED[control]) > 1e-5
