"""Class rows on two gloo ranks, and in the host: steps, interruption, ``--resume`` with any number of ranks.

One worker trains everything that needs two ranks; the tests look at what it left, and go on with one process.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

from sharded_case import assert_sampled, classifier_case, difference
from toy import write_market

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.streams import torch_stream

CONFIG = Path(__file__).parents[2] / "configs" / "Base-Face.yml"
CLASSES, DIM, STEPS = 7, 24, 3  # steps of an epoch
ROWS = "heads.weight"


def face_cfg(folder: Path, **overrides: Any) -> Any:
    """Two epochs of three steps; no random number outside the plugin's streams but the initial network."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "MODEL.BACKBONE.NAME": "build_mobilefacenet_backbone",
        "MODEL.BACKBONE.DEPTH": "mbf",
        "MODEL.BACKBONE.WIDTH": 0.0625,
        "MODEL.BACKBONE.FEAT_DIM": DIM,
        "MODEL.HEADS.NAME": "ShardedEmbeddingHead",
        "MODEL.HEADS.SAMPLE_RATE": 0.6,
        "MODEL.DEVICE": "cpu",
        "INPUT.SIZE_TRAIN": [48, 48],
        "INPUT.SIZE_TEST": [48, 48],
        "INPUT.FLIP.ENABLED": False,
        "DATASETS.NAMES": ("Market1501",),
        "DATASETS.TESTS": ("Market1501",),
        "DATA.ROOT": str(folder.parent),
        "DATALOADER.SAMPLER_TRAIN": "SetReWeightSampler",
        "DATALOADER.SET_WEIGHT": [1],
        "DATALOADER.NUM_INSTANCE": 4,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.AMP.ENABLED": False,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.MAX_EPOCH": 2,
        "SEED": 3,
        "OUTPUT_DIR": str(folder),
        **overrides,
    }
    cfg.merge_from_list([item for pair in options.items() for item in pair])
    return cfg


def trainer(folder: Path, **overrides: Any) -> Any:
    cfg = face_cfg(folder, **overrides)
    from fastreid.engine import DefaultTrainer

    torch.manual_seed(0)
    running = DefaultTrainer(cfg)
    running.test = lambda cfg, model: {"metric": 1.0}  # evaluation is not what is tested
    return running


class PowerCutError(Exception):
    """Ends a training in the middle of an epoch."""


def train(running: Any, *, resume: bool, cut_at: int = -1) -> Any:
    """Train to the end, or until every rank stops before a step."""
    step = running._trainer.run_step

    def cut() -> None:
        if running.iter == cut_at:
            raise PowerCutError
        step()

    running._trainer.run_step = cut
    running.resume_or_load(resume=resume)
    with contextlib.suppress(PowerCutError):
        running.train()
    return running


def state(running: Any) -> dict[str, Tensor]:
    """Every parameter, the class rows of this rank, and their momentum."""
    model = getattr(running.model, "module", running.model)
    momentum = running.optimizer.state[model.heads.weight].get("momentum_buffer")
    return {
        **{name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "momentum": torch.zeros(0) if momentum is None else momentum.clone(),
    }


def one_step(rank: int, world_size: int, folder: Path) -> dict[str, Tensor]:
    """Gradients of all parameters for one step without batch statistics, on this rank's half or on everything."""
    cfg = face_cfg(folder, **{"MODEL.HEADS.NUM_CLASSES": CLASSES, "MODEL.HEADS.SAMPLE_RATE": 1.0})
    from fastreid.modeling.meta_arch import build_model
    from fastreid.utils.events import EventStorage

    from qsd_plugin.hosts.fastreid.sharded_head import leave_out_of_data_parallel

    torch.manual_seed(0)
    model = build_model(cfg).double().train()  # gradients of 1e5 in so small a network with so large a scale
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    images = torch.rand(8, 3, 48, 48, generator=torch_stream(5)).double() * 255
    own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    batch = {"images": images[own], "targets": torch.tensor([0, 6, 3, 3, 1, 2, 4, 5])[own]}
    network: nn.Module = model
    if world_size > 1:
        leave_out_of_data_parallel(model)
        network = DistributedDataParallel(model, broadcast_buffers=False)
    with EventStorage(0):
        network(batch)["loss_cls"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def worker(rank: int, root: str) -> dict[str, Any]:
    import torch.distributed as dist

    folder = Path(root)
    gradients = one_step(rank, 2, folder / "step")
    from fastreid.utils import comm

    comm._LOCAL_PROCESS_GROUP = dist.new_group([0, 1])
    results: dict[str, Any] = {"gradients": gradients, "classifier": classifier_case(rank, 2)}
    results["whole"] = state(train(trainer(folder / "whole"), resume=False))
    cut = train(trainer(folder / "cut"), resume=False, cut_at=STEPS + 1)
    results["cut"] = state(cut)
    results["files"] = sorted(file.name for file in (folder / "cut").glob("model_*")) if rank == 0 else []
    results["last"] = (folder / "cut" / "last_checkpoint").read_text()
    results["resumed"] = state(train(trainer(folder / "cut"), resume=True))
    widened = trainer(folder / "one")
    widened.resume_or_load(resume=True)
    results["widened"] = state(widened)
    buffer = widened.optimizer.state[widened.model.module.heads.weight]["momentum_buffer"]
    results["bytes"] = buffer.untyped_storage().nbytes()
    try:
        trainer(folder / "few", **{"MODEL.HEADS.NUM_CLASSES": 1})
    except ConfigError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_market(tmp_path_factory.mktemp("data"), num_ids=CLASSES, per_id=7, test_ids=1)


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Tensor]:
    """One process, one epoch."""
    return state(train(trainer(root / "one", **{"SOLVER.MAX_EPOCH": 1}), resume=False))


@pytest.fixture(scope="module")
def ranks(root: Path, single: dict[str, Tensor]) -> list[dict[str, Any]]:
    return run_ranks(worker, str(root))


def joined(ranks: list[dict[str, Any]], kind: str, name: str) -> Tensor:
    return torch.cat([rank[kind][name] for rank in ranks])


def test_classifier_without_a_host_equals_one_process(ranks: list[dict[str, Any]]) -> None:
    found = [rank["classifier"] for rank in ranks]
    assert difference(found, "1.0") < 1e-6
    assert difference(found, "control") > 1e-2
    assert_sampled(found)


def test_gradients_of_a_step_equal_one_process(root: Path, ranks: list[dict[str, Any]]) -> None:
    whole = one_step(0, 1, root / "step")
    rows = whole.pop(ROWS)
    torch.testing.assert_close(joined(ranks, "gradients", ROWS), rows, rtol=1e-9, atol=1e-6)
    for rank in ranks:
        assert rank["gradients"].keys() == {*whole, ROWS}
        for name, gradient in whole.items():
            torch.testing.assert_close(rank["gradients"][name], gradient, rtol=1e-9, atol=1e-6, msg=name)


def test_interrupted_training_goes_on_as_if_nothing_had_happened(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert not torch.equal(rank["cut"][ROWS], rank["whole"][ROWS])
        for name, value in rank["whole"].items():
            assert torch.equal(rank["resumed"][name], value), name
    assert [rank["whole"][ROWS].shape for rank in ranks] == [(4, DIM), (3, DIM)]
    assert joined(ranks, "whole", "momentum").abs().amin(1).min() > 0
    for name in ranks[0]["whole"].keys() - {ROWS, "momentum"}:
        assert torch.equal(ranks[0]["whole"][name], ranks[1]["whole"][name]), name


def test_files_of_an_interrupted_training(ranks: list[dict[str, Any]]) -> None:
    """No checkpoint of the interruption, in which the rows of one rank would lie; the last epoch's is complete."""
    assert {rank["last"] for rank in ranks} == {"model_0000.pth"}
    assert [re.sub(r"-[0-9a-f]{8}-", "-", name) for name in ranks[0]["files"]] == [
        *("model_0000.classes-0-of-2.pt", "model_0000.classes-1-of-2.pt", "model_0000.pth"),
        *("model_best.classes-0-of-2.pt", "model_best.classes-1-of-2.pt", "model_best.pth"),
    ]


def test_two_ranks_take_up_the_training_of_one(single: dict[str, Tensor], ranks: list[dict[str, Any]]) -> None:
    for name in (ROWS, "momentum"):
        assert torch.equal(joined(ranks, "widened", name), single[name])
    assert ranks[0]["bytes"] == 4 * DIM * 4  # four of seven rows of float32, not a view of the tensor of all classes


def test_one_rank_takes_up_the_training_of_two(root: Path, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = shutil.copytree(root / "whole", tmp_path / "whole")
    stored = torch.load(folder / "model_final.pth", weights_only=True)
    assert tuple(stored["model"][ROWS].shape) == (0, DIM)
    running = trainer(folder, **{"DATA.ROOT": str(root), "SOLVER.MAX_EPOCH": 3})
    running.resume_or_load(resume=True)
    found = state(running)
    for name in (ROWS, "momentum"):
        assert torch.equal(found[name], joined(ranks, "whole", name))
    name = "backbone.conv_sep.layers.0.weight"
    assert torch.equal(found[name], ranks[0]["whole"][name])
    assert len(list(folder.glob("model_final.classes-*"))) == 2
    train(running, resume=True)
    assert tuple(torch.load(folder / "model_final.pth", weights_only=True)["model"][ROWS].shape) == (CLASSES, DIM)
    assert not list(folder.glob("model_final.classes-*"))  # those of the file that was replaced


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def from_another_save(file: Path) -> None:
    torch.save({**torch.load(file, weights_only=True), "token": "00000000"}, file)


def of_another_size(file: Path) -> None:
    torch.save({**torch.load(file, weights_only=True), "rows": torch.zeros(2, DIM)}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            Path.unlink,
            r"Class rows of checkpoint .*model_final\.pth: got 'no .*1-of-2\.pt'; expected 2 files beside it",
        ),
        (damaged, r"Class rows .*1-of-2\.pt: got '300 bytes that cannot be read"),
        (
            from_another_save,
            r"Class rows .*1-of-2\.pt: got 'those of the save 00000000'; expected those that model_final",
        ),
        (of_another_size, r"Class rows .*1-of-2\.pt: got 'rows \(2, 24\)'; expected those that model_final\.pth was"),
    ],
)
def test_class_rows_that_cannot_be_used_are_named(
    root: Path, ranks: list[dict[str, Any]], tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    from qsd_plugin.hosts.fastreid.sharded_checkpoints import take_rows
    from qsd_plugin.methods.margins import ClassShard

    for file in (root / "whole").glob("model_final.*"):
        shutil.copy(file, tmp_path / file.name)
    path = tmp_path / "model_final.pth"
    (second,) = tmp_path.glob("*1-of-2.pt")
    spoil(second)
    with pytest.raises(CheckpointError, match=message):
        take_rows(torch.load(path, weights_only=True), ClassShard(CLASSES), DIM, path, resuming=True)


def test_network_of_a_checkpoint_copied_alone_serves_a_new_training(
    root: Path, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    from qsd_plugin.hosts.fastreid.sharded_checkpoints import take_rows
    from qsd_plugin.methods.margins import ClassShard

    path = Path(shutil.copy(root / "whole" / "model_final.pth", tmp_path))
    content = torch.load(path, weights_only=True)
    take_rows(content, ClassShard(CLASSES), DIM, path, resuming=False)
    assert len(content["model"][ROWS]) == 0
    with pytest.raises(CheckpointError, match=r"0-of-2\.pt'; expected 2 files beside it, one of each process"):
        take_rows(content, ClassShard(CLASSES), DIM, path, resuming=True)


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_rows_are_divided_anew_for_any_number_of_ranks(
    root: Path, ranks: list[dict[str, Any]], world_size: int
) -> None:
    from qsd_plugin.hosts.fastreid.sharded_checkpoints import take_rows
    from qsd_plugin.methods.margins import ClassShard

    path = root / "whole" / "model_final.pth"
    rows, momentum = [], []
    for rank in range(world_size):
        content = torch.load(path, weights_only=True)
        take_rows(content, ClassShard(CLASSES, rank, world_size), DIM, path, resuming=True)
        (own,) = (group["params"][0] for group in content["optimizer"]["param_groups"] if group.get("class_rows"))
        rows.append(content["model"][ROWS])
        momentum.append(content["optimizer"]["state"][own]["momentum_buffer"])
    assert torch.equal(torch.cat(rows), joined(ranks, "whole", ROWS))
    assert torch.equal(torch.cat(momentum), joined(ranks, "whole", "momentum"))


def test_fewer_classes_than_ranks_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["error"].startswith("Number of classes: got 1; expected at least 2, one for each process")
