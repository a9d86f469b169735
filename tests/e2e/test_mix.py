"""The mix table: every file in ``mixes`` builds, trains three steps, resumes for three more and evaluates.

A row is a YAML file and nothing else; a new one needs no change here. Rows run in this process on toy data.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import write_market

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.quality.labels import QualityLabels

host.activate()

MIXES = Path(__file__).parent / "mixes"
#: What an architecture adds to the losses of its base.
TERMS = {"QSD": "loss_qsd", "QUD": "loss_qud", "QGFace": "loss_qgface"}
ROWS = sorted(path.stem for path in MIXES.glob("*.yml") if not path.stem.startswith("Base-"))
STEPS = 3  # of an epoch


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the rows' relative paths name: two data sets, a plain folder, and a teacher with its config."""
    folder = tmp_path_factory.mktemp("mixes")
    write_market(folder / "data", num_ids=6, per_id=4, test_ids=3)
    market = folder / "data" / "Market-1501-v15.09.15"
    write_market(folder / "other", num_ids=6, per_id=4, test_ids=3, seed=1)
    shutil.move(folder / "other" / market.name, folder / "data" / "DukeMTMC-reID")
    shutil.copytree(market, folder / "folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_teacher(Path("teacher"))
    return folder


@pytest.fixture(autouse=True)
def in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(workspace)
    yield
    shutil.rmtree(workspace / "out", ignore_errors=True)


def write_teacher(folder: Path) -> None:
    cfg = load("baseline")
    cfg.MODEL.META_ARCHITECTURE = "Baseline"
    cfg.MODEL.HEADS.NUM_CLASSES = 6
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build(cfg).state_dict()}, folder / "model.pth")


def load(row: str, **overrides: Any) -> Any:
    """The row's config; ``A__B=value`` overrides ``A.B``."""
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(str(MIXES / f"{row}.yml"))
    cfg.merge_from_list([part for key, value in overrides.items() for part in (key.replace("__", "."), value)])
    return cfg


def build(cfg: Any) -> Any:
    from fastreid.modeling.meta_arch.build import build_model

    torch.manual_seed(0)
    return build_model(cfg)


def write_labels(cfg: Any) -> None:
    """Labels for every training set of ``cfg``, where its recipe would write them."""
    from qsd_plugin.hosts.fastreid import datasets
    from qsd_plugin.quality.labels import label_key

    for name in cfg.DATASETS.NAMES:
        items = datasets.training_set(cfg, name)[1]
        root = datasets.dataset_folder(cfg, name)
        keys = tuple(label_key(path, root=root, dataset=name) for path, _, _ in items)
        score = np.random.default_rng(0).permutation(np.linspace(0, 100, len(keys)))
        path = Path(cfg.OUTPUT_DIR) / "labels" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        QualityLabels(score, score, np.zeros(len(keys)), keys, {"dataset": name, "scale": "minmax"}).save(path)


class Watched:
    """A trainer whose training steps are written down.

    Args:
        cfg: The run's config.
        resume: Whether to go on where the run in its folder stopped.
        epochs: Stop after so many epochs, as a killed run would; default: the config's.
    """

    def __init__(self, cfg: Any, *, resume: bool = False, epochs: int | None = None) -> None:
        from fastreid.engine import DefaultTrainer
        from fastreid.utils.env import seed_all_rng

        seed_all_rng(cfg.SEED)
        self.losses: list[dict[str, float]] = []
        self.term = TERMS.get(cfg.MODEL.META_ARCHITECTURE, "")
        self.gradient = 0.0
        self.trainer = DefaultTrainer(cfg)
        self.trainer.resume_or_load(resume=resume)
        self.trainer.max_epoch = epochs or self.trainer.max_epoch
        self.model = self.trainer.model

    def train(self) -> dict[str, Any]:
        """Metrics of the evaluation at the end."""
        with_hook = self.model.register_forward_hook(self._note)
        metrics = dict(self.trainer.train())
        with_hook.remove()
        return metrics

    def _note(self, model: Any, _inputs: Any, output: Any) -> None:
        if model.training and not torch.is_grad_enabled():  # precise batch norm
            assert not set(TERMS.values()) & set(output)
            return
        if not model.training:
            assert isinstance(output, torch.Tensor)
            assert output.dim() == 2
            return
        if not self.losses and self.term in output:
            (gradient,) = torch.autograd.grad(output[self.term], first_kernel(model), retain_graph=True)
            self.gradient = float(gradient.norm())
        self.losses.append(numbers(output))


def first_kernel(model: Any) -> torch.Tensor:
    """The first layer's weights, below every level."""
    return next(parameter for parameter in model.parameters() if parameter.dim() == 4)


def numbers(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(loss.detach()) for name, loss in losses.items()}


def one_step(model: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Losses of a training forward, the same random numbers whenever it is called."""
    from fastreid.utils.events import EventStorage

    torch.manual_seed(2)
    with EventStorage(0):
        return numbers(model.train()(batch))


def base_of(cfg: Any, model: Any) -> Any:
    """The plain architecture under a mix, with the mix's weights."""
    plain = cfg.clone()
    plain.MODEL.META_ARCHITECTURE = cfg[cfg.MODEL.META_ARCHITECTURE.upper()].BASE
    plain.MODEL.HEADS.NUM_CLASSES = model_classes(model)
    base = build(plain)
    own = {"QSD": (), "QUD": ("qud_queue.", "qud_projector."), "QGFace": ("qgface_",)}[cfg.MODEL.META_ARCHITECTURE]
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    assert list(base.state_dict()) == list(state)
    base.load_state_dict(state)
    for own, other in zip(getattr(base, "model_ts", ()), getattr(model, "model_ts", ()), strict=True):
        own.load_state_dict(other.state_dict())
    return base


def shown_to_base(cfg: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What a mix makes its base learn: QGFace both views of an image, unless the keys come from a momentum encoder."""
    if cfg.MODEL.META_ARCHITECTURE != "QGFace" or cfg.QGFACE.CONTRAST.QUEUE == "moco":
        return batch
    views = torch.cat([batch["images"], batch["degraded_images"]])
    return {**batch, "images": views, "targets": batch["targets"].repeat(2)}


def model_classes(model: Any) -> int:
    if hasattr(model, "reid"):
        return len(model.reid.fuse_classifier.classifier[0].weight)
    return len(model.get_submodule("b1_head" if hasattr(model, "b1_head") else "heads").weight)


def assert_same(left: Any, right: Any) -> None:
    """Two nested states hold the same keys, tensors and numbers."""
    if isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def finite(metrics: dict[str, Any]) -> bool:
    values = [value for value in metrics.values() if not isinstance(value, str)]
    return all(finite(value) if isinstance(value, dict) else math.isfinite(value) for value in values)


@pytest.mark.parametrize("row", ROWS)
def test_mix_trains_resumes_and_evaluates(row: str) -> None:
    from fastreid.engine import DefaultTrainer
    from fastreid.utils.checkpoint import Checkpointer

    cfg = load(row)
    write_labels(cfg)
    first = Watched(cfg, epochs=1)
    batch = next(iter(first.trainer.data_loader))
    base = base_of(cfg, first.model)
    # A QUD that reads no labels has no use for its base's losses, nor the classes they need.
    expected = (
        {}
        if cfg.MODEL.META_ARCHITECTURE == "QUD" and not cfg.QUD.HOST_LOSSES
        else one_step(base, shown_to_base(cfg, batch))
    )
    got = one_step(first.model, batch)
    assert set(got) == {*expected, first.term}
    if cfg.QSD.PAIRING == "inbatch" or cfg.QSD.PARTNER_FORWARD == "separate":  # else batch norm sees partners, too
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)

    first.train()
    assert first.gradient > 0
    stored = torch.load("out/model_final.pth", weights_only=True)
    second = Watched(cfg, resume=True)
    assert second.trainer.start_epoch == 1
    assert_same(dict(second.model.state_dict()), dict(stored["model"]))
    assert_same(second.trainer.optimizer.state_dict(), stored["optimizer"])
    assert_same(second.trainer.scheduler["lr_sched"].state_dict(), stored["lr_sched"])
    trained = second.train()
    assert second.trainer.iter == 2 * STEPS
    for losses in (*first.losses, *second.losses):
        assert set(losses) == set(got)
        assert all(map(math.isfinite, losses.values()))

    cfg.MODEL.HEADS.NUM_CLASSES = 0  # as under the host's --eval-only
    model = build(cfg)
    Checkpointer(model).load("out/model_final.pth")
    evaluated = dict(DefaultTrainer.test(cfg, model))
    assert finite(evaluated)
    assert evaluated == trained


def test_weight_zero_trains_the_base_and_weight_one_moves_what_lies_below_the_levels() -> None:
    finals = []
    for overrides in ({"MODEL__META_ARCHITECTURE": "Baseline"}, {"QSD__WEIGHT": 0.0}, {"QSD__WEIGHT": 1.0}):
        cfg = load("baseline", **overrides)
        write_labels(cfg)
        run = Watched(cfg, epochs=1)
        run.train()
        assert len(run.losses) == STEPS
        finals.append(dict(run.model.state_dict()))
    base, zero, one = finals
    assert_same(zero, base)
    difference = (one["backbone.conv1.weight"] - base["backbone.conv1.weight"]).abs().max()
    assert difference > 1e-6


def test_frozen_backbone_keeps_still_and_is_released_on_time_after_a_resume() -> None:
    cfg = load("frozen")
    write_labels(cfg)
    first = Watched(cfg, epochs=1)
    start = {name: value.clone() for name, value in first.model.state_dict().items()}
    first.train()
    stored = torch.load("out/model_final.pth", weights_only=True)["model"]
    parts = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    assert_same(parts, {name: start[name] for name in parts})
    assert not torch.equal(stored["heads.weight"], start["heads.weight"])
    second = Watched(cfg, resume=True)
    second.train()
    assert not torch.equal(second.model.state_dict()["backbone.conv1.weight"], start["backbone.conv1.weight"])


def test_partners_never_enter_moco_s_memory_bank() -> None:
    cfg = load("moco_partner")
    write_labels(cfg)
    run = Watched(cfg, epochs=1)
    batch = next(iter(run.trainer.data_loader))
    one_step(run.model, batch)
    assert run.model.memory.queue_ptr.item() == len(batch["targets"])
    assert torch.equal(run.model.memory.queue_label[0, : len(batch["targets"])], batch["targets"])


def test_moving_average_teacher_moves_once_per_step_and_survives_a_resume() -> None:
    cfg = load("distiller_ema")
    write_labels(cfg)
    run = Watched(cfg, epochs=1)
    student, teacher = run.model.backbone.conv1.weight, run.model.model_ts[0].backbone.conv1.weight
    teacher.data.copy_(student.detach() + 1)
    batch = next(iter(run.trainer.data_loader))
    one_step(run.model, batch)
    torch.testing.assert_close(run.model.model_ts[0].backbone.conv1.weight, student.detach() + 0.9)
    run.train()
    expected = run.model.model_ts[0].state_dict()
    resumed = Watched(cfg, resume=True)
    assert_same(dict(resumed.model.model_ts[0].state_dict()), dict(expected))


def test_shuffled_identities_leave_a_distilled_student_bit_identical(workspace: Path) -> None:
    """Also under the host's trainer: same images, other identities, another number of them."""
    parts = ("bounding_box_train", "query", "bounding_box_test")
    images, query, others = (sorted((workspace / "folder" / part).glob("*.jpg")) for part in parts)
    tests = [f"{path},{path.name[:4]},1,query" for path in query]
    tests += [f"{path},{path.name[:4]},2,gallery" for path in others]
    curves, students = [], []
    for identities in (range(len(images)), [number * 7 % 5 for number in range(len(images))]):
        training = [f"{path},{identity},1,train" for path, identity in zip(images, identities, strict=True)]
        Path("list.csv").write_text("\n".join(["path,pid,camid,split", *training, *tests]))
        Path("out").mkdir(exist_ok=True)
        cfg = load("qud", DATASETS__NAMES=("ReIDList",), DATASETS__TESTS=("ReIDList",), DATA__LIST="list.csv")
        run = Watched(cfg, epochs=1)
        run.train()
        curves.append(run.losses)
        students.append(dict(run.model.state_dict()))
    assert len(curves[0]) == STEPS
    assert curves[0] == curves[1]
    assert_same(*students)


def test_two_training_sets_with_one_label_file_are_refused() -> None:
    cfg = load("two_sets")
    write_labels(cfg)
    cfg.QUALITY.FILES = ("out/labels/Market1501.npz",)
    with pytest.raises(ConfigError, match=r"QUALITY.FILES: got .*expected one label file per training set.*DukeMTMC"):
        Watched(cfg)


def test_teacher_is_among_the_keys_that_a_recipe_s_stages_depend_on() -> None:
    from qsd_plugin.hosts.fastreid.recipes import build_recipe

    cfg = load("distiller", RECIPE__NAME="qsd", MODEL__HEADS__NUM_CLASSES=6)
    stages = {stage.name: stage for stage in build_recipe(cfg, None)}
    for name in ("baseline", "qsd"):
        assert stages[name].keys["KD.MODEL_WEIGHTS"] == ["teacher/model.pth"]
