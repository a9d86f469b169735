"""S01: the host's training trains; S01-CHECK: it says so when it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy import toy_cfg, use_market, write_market

from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.fastreid import compat
from qsd_plugin.hosts.fastreid.compat.learning_check import LearningCheck


class Tiny(nn.Module):
    """Enough of a model for the host's trainers: two children and a loss dict."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.heads = nn.Linear(4, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": self.heads(self.backbone(batch["x"])).square().mean()}


def tiny(seed: int = 0, device: str = "cpu") -> tuple[Tiny, list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    model = Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    batches = [{"x": torch.randn(8, 4, generator=generator).to(device)} for _ in range(8)]
    return model.to(device), batches


def tiny_cfg(**overrides: Any) -> Any:
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_list([item for pair in overrides.items() for item in pair])
    return cfg


def run_steps(trainer: Any, steps: int) -> None:
    from fastreid.utils.events import EventStorage

    with EventStorage(0):
        for trainer.iter in range(steps):
            trainer.run_step()


def simple_trainer(cfg: Any) -> tuple[Any, Tiny]:
    from fastreid.engine.train_loop import SimpleTrainer
    from fastreid.solver import build_optimizer

    model, batches = tiny()
    return SimpleTrainer(model, batches, *build_optimizer(cfg, model)), model


def changed_modules(model: nn.Module, train: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """Names of the modules with trainable parameters of their own, and of those in which one changed."""

    def state() -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}

    before = state()
    train()
    owner = {name: name.rpartition(".")[0] for name in before}
    return set(owner.values()), {owner[name] for name, value in state().items() if not value.equal(before[name])}


def train_one_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    from fastreid.engine import DefaultTrainer

    class Trainer(DefaultTrainer):
        @classmethod
        def test(cls, cfg: Any, model: nn.Module) -> dict[str, float]:
            return {"metric": 0.0}  # evaluation is not the matter here

    use_market(monkeypatch, write_market(tmp_path / "data", per_id=4))
    trainer = Trainer(toy_cfg(tmp_path / "out"))
    return changed_modules(trainer.model, trainer.train)


def test_s01_every_trainable_module_changes_in_one_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainable, changed = train_one_epoch(tmp_path, monkeypatch)
    assert len(trainable) > 40
    assert changed == trainable


def test_s01_without_the_repair_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compat.without("S01-CHECK"), compat.without("S01"):
        trainable, changed = train_one_epoch(tmp_path, monkeypatch)
    assert len(trainable) > 40
    assert changed == set()


@pytest.mark.parametrize("row", ["S01", "S01-CHECK", "S21"])
def test_s01_what_is_put_on_top_of_a_row_is_back_afterwards(row: str) -> None:
    import fastreid.engine.defaults
    import fastreid.evaluation
    import fastreid.solver
    from fastreid.engine import train_loop

    owners = [fastreid.solver, fastreid.solver.build, fastreid.engine.defaults]
    places = [(owner, "build_optimizer") for owner in owners]
    places += [(train_loop.SimpleTrainer, "run_step"), (train_loop.AMPTrainer, "run_step")]
    places += [(fastreid.evaluation.ReidEvaluator, "evaluate")]
    before = [vars(owner)[name] for owner, name in places]
    for _ in range(2):
        with compat.without(row):
            inside = [vars(owner)[name] for owner, name in places]
        assert any(one is not other for one, other in zip(inside, before, strict=True))
        assert all(vars(owner)[name] is value for (owner, name), value in zip(places, before, strict=True))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_s01_flat_buffers_train_like_plain_parameters(optimizer: str) -> None:
    cfg = tiny_cfg(**{"SOLVER.OPT": optimizer, "SOLVER.BASE_LR": 0.01})
    trainer, model = simple_trainer(cfg)
    run_steps(trainer, 5)

    plain, batches = tiny()
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": cfg.SOLVER.WEIGHT_DECAY}
    if optimizer == "SGD":
        options["momentum"] = cfg.SOLVER.MOMENTUM
    reference = getattr(torch.optim, optimizer)(plain.parameters(), **options)
    for batch in batches[:5]:
        reference.zero_grad()
        plain(batch)["loss"].backward()
        reference.step()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)


def test_s01_the_repair_survives_a_resume_and_a_gradient_scaler() -> None:
    from fastreid.solver import build_optimizer

    model, batches = tiny()
    optimizer, _ = build_optimizer(tiny_cfg(**{"SOLVER.BASE_LR": 0.01}), model)
    optimizer.load_state_dict(optimizer.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for batch in batches[:2]:
        optimizer.zero_grad()
        scaler.scale(model(batch)["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(not now.equal(then) for now, then in zip(model.parameters(), before, strict=True))


def test_s01_leaves_plain_optimizers_alone() -> None:
    from fastreid.solver import build_optimizer

    model, batches = tiny()
    optimizer, _ = build_optimizer(tiny_cfg(), model, contiguous=False)
    model(batches[0])["loss"].backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_s01_check_stops_a_training_that_learns_nothing() -> None:
    with compat.without("S01"):
        trainer, _ = simple_trainer(tiny_cfg())
        run_steps(trainer, 1)
        with pytest.raises(HostError, match=r"silently learn nothing.*zero_grad\(\) dropped.*QSD_PLUGIN_DISABLE"):
            run_steps(trainer, 1)


def test_s01_check_stops_an_optimizer_that_does_not_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = simple_trainer(tiny_cfg())
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    with pytest.raises(HostError, match="2 updates left every parameter as it was"):
        run_steps(trainer, 2)


def test_s01_check_ends_after_the_second_update() -> None:
    trainer, _ = simple_trainer(tiny_cfg())
    run_steps(trainer, 1)
    assert isinstance(trainer._learning_check, LearningCheck)
    run_steps(trainer, 1)
    assert trainer._learning_check is None


def test_s01_check_respects_frozen_layers() -> None:
    cfg = tiny_cfg(**{"MODEL.FREEZE_LAYERS": ["backbone"], "SOLVER.FREEZE_ITERS": 10})
    trainer, model = simple_trainer(cfg)
    _, changed = changed_modules(model, lambda: run_steps(trainer, 3))
    assert changed == {"heads"}
    assert trainer._learning_check is None


def test_s01_check_expects_nothing_of_a_model_that_is_all_frozen() -> None:
    cfg = tiny_cfg(**{"MODEL.FREEZE_LAYERS": ["backbone", "heads"], "SOLVER.FREEZE_ITERS": 10})
    trainer, model = simple_trainer(cfg)
    _, changed = changed_modules(model, lambda: run_steps(trainer, 3))
    assert changed == set()


def test_s01_check_waits_for_a_learning_rate() -> None:
    trainer, _ = simple_trainer(tiny_cfg())
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    run_steps(trainer, 3)
    assert trainer._learning_check is not None
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    run_steps(trainer, 2)
    assert trainer._learning_check is None


class Scaler:
    """Scales of a gradient scaler: read before and after each step."""

    def __init__(self, *scales: float) -> None:
        self.scales = list(scales)

    def get_scale(self) -> float:
        return self.scales.pop(0)


def test_s01_check_does_not_count_skipped_updates() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    check = LearningCheck(optimizer)
    for _ in range(3):  # overflow: the scaler halves its scale instead of stepping
        assert not check.run(lambda: None, Scaler(4.0, 2.0))
    assert not check.run(optimizer.step, Scaler(2.0, 2.0))
    assert check.run(optimizer.step, Scaler(2.0, 4.0))


def test_s01_check_accepts_gradients_that_are_zero() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.zeros(3)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    check = LearningCheck(optimizer)
    assert not check.run(optimizer.step)
    assert check.run(optimizer.step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="S01 under the host's AMP trainer needs CUDA")
def test_s01_the_amp_trainer_learns() -> None:
    from fastreid.engine.train_loop import AMPTrainer
    from fastreid.solver import build_optimizer

    model, batches = tiny(device="cuda")
    trainer = AMPTrainer(model, batches, *build_optimizer(tiny_cfg(**{"SOLVER.BASE_LR": 0.01}), model))
    trainable, changed = changed_modules(model, lambda: run_steps(trainer, 8))
    assert changed == trainable
