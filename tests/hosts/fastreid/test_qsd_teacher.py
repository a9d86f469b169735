"""``QSD.EMA`` inside fast-reid: what teaches, what is stored, and what stays out of the optimizer's sight."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from qsd_toy import IDENTITIES, LEVELS, QUALITY, base_model, batch, build, qsd_cfg, step, use_images, with_partners
from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.methods.qsd import QSDLoss, inbatch_pairs
from qsd_plugin.networks import TapRecorder

host.activate()

EMA = {"QSD.EMA.ENABLED": True, "QSD.EMA.MOMENTUM": 0.5}
WEIGHTS = dict(zip(LEVELS, (1.0, 1.0, 1.0, 1.0, 0.1), strict=True))


@pytest.fixture(autouse=True)
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_images(tmp_path / "data", monkeypatch)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def move(model: Any) -> None:
    """What an optimizer's step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01).add_(0.001)


def recorded(plain: Any, inputs: dict[str, Any], *, running_statistics: bool) -> dict[str, torch.Tensor]:
    for module in plain.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.train(not running_statistics)
    with TapRecorder(plain, LEVELS) as taps:
        step(plain, inputs)
    return {name: tap.flatten(1) if tap.shape[2:] == (1, 1) else tap for name, tap in taps.items()}


@pytest.mark.parametrize("pairing", ["inbatch", "partner"])
def test_teachers_tensors_are_the_averages_in_eval_mode(tmp_path: Path, pairing: str) -> None:
    cfg = qsd_cfg(tmp_path, **EMA, **{"QSD.PAIRING": pairing})
    model, plain = build(cfg), base_model(cfg)
    inputs = with_partners() if pairing == "partner" else batch()
    got = step(model, inputs)["loss_qsd"]
    streams = [inputs, {**inputs, "images": inputs["partner_images"]}] if pairing == "partner" else [inputs]
    taught = [recorded(plain, stream, running_statistics=True) for stream in streams]
    levels = [recorded(plain, stream, running_statistics=False) for stream in streams]
    loss = QSDLoss(WEIGHTS, missing="tie")
    if pairing == "partner":
        labels = QUALITY, 100 - QUALITY
        expected = loss(*levels, *labels, teacher_taps_1=taught[0], teacher_taps_2=taught[1])
    else:
        pairs = inbatch_pairs(IDENTITIES, QUALITY)
        expected = loss.in_batch(levels[0], QUALITY, pairs, teacher_taps=taught[0])
    torch.testing.assert_close(got, expected.total)
    assert not torch.isclose(got, loss.in_batch(levels[0], QUALITY, inbatch_pairs(IDENTITIES, QUALITY)).total)


def test_average_follows_at_the_start_of_a_training_step_only(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **EMA))
    first = tensors(model.qsd_teacher)
    move(model)
    with torch.no_grad():
        step(model, batch())  # the host's precise-BN pass
    model.eval()(batch())
    model.train()
    assert all(torch.equal(value, first[name]) for name, value in model.qsd_teacher.state_dict().items())
    student = tensors(model)
    step(model, batch())
    for name, value in model.qsd_teacher.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.5 * first[name] + 0.5 * student[name])
        else:
            assert torch.equal(value, student[name])


def test_average_stays_in_eval_mode_and_starts_as_the_student(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **EMA))
    next_draw = torch.rand(3)
    without = build(qsd_cfg(tmp_path))
    assert torch.equal(torch.rand(3), next_draw)  # building it draws no random number of the run
    assert list(model.state_dict()) == [
        *without.state_dict(),
        *(f"qsd_teacher.{name}" for name in without.state_dict()),
    ]
    for name, value in without.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
        assert torch.equal(model.qsd_teacher.state_dict()[name], value), name
    step(model, batch())["loss_qsd"].backward()
    assert not any(module.training for module in model.train().qsd_teacher.modules())
    assert all(parameter.grad is None for parameter in model.qsd_teacher.parameters())
    assert model.backbone.training


def test_optimizer_and_freezing_do_not_see_the_average(tmp_path: Path) -> None:
    from fastreid.engine.hooks import LayerFreeze
    from fastreid.solver import build_optimizer

    freeze = {"MODEL.FREEZE_LAYERS": ["backbone"], "SOLVER.FREEZE_ITERS": 5, "SOLVER.HEADS_LR_FACTOR": 10.0}
    cfg = qsd_cfg(tmp_path, **EMA, **freeze)
    model, plain = build(cfg), base_model(cfg)
    groups = [build_optimizer(cfg, each)[0].param_groups for each in (model, plain)]
    settings = [
        [(group["lr"], group["freeze_status"], [p.shape for p in group["params"]]) for group in each] for each in groups
    ]
    assert settings[0] == settings[1]
    assert all(value.equal(model.state_dict()[name]) for name, value in model.qsd_teacher.state_dict().items())
    hook = LayerFreeze(model, ["backbone"], 5)
    hook.freeze_specific_layer()
    hook.open_all_layer()
    assert not any(module.training for module in model.qsd_teacher.modules())


def test_checkpoint_of_the_baseline_fills_the_average_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    cfg = qsd_cfg(tmp_path, **EMA)
    plain = base_model(cfg)
    step(plain, batch())
    move(plain)
    torch.save({"model": plain.state_dict()}, tmp_path / "baseline.pth")
    model = build(cfg, seed=1)
    with caplog.at_level(logging.WARNING, "fastreid"):
        Checkpointer(model).load(str(tmp_path / "baseline.pth"))
    said = [message for message in caplog.messages if "EMA teacher" in message]
    # Batch norm fills in a missing counter by itself.
    count = sum(not name.endswith("num_batches_tracked") for name in plain.state_dict())
    assert said == [
        f"The checkpoint lacks {count} tensors of the EMA teacher (QSD.EMA): they start as copies of the student's."
    ]
    assert not any("qsd_teacher" in message for message in caplog.messages if message not in said)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.qsd_teacher.state_dict()[name], value), name


def test_training_goes_on_from_a_checkpoint_bit_by_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    def train(model: Any, steps: int) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            sum(step(model, batch()).values()).backward()  # type: ignore[union-attr]
            optimizer.step()

    cfg = qsd_cfg(tmp_path, **EMA)
    whole, parts = build(cfg), build(cfg)
    train(whole, 3)
    train(parts, 2)
    Checkpointer(parts, str(tmp_path)).save("model_0")
    resumed = build(cfg, seed=1)
    with caplog.at_level(logging.WARNING, "fastreid"):
        Checkpointer(resumed).load(str(tmp_path / "model_0.pth"))
    assert not any("EMA" in message for message in caplog.messages)
    assert all(value.equal(parts.state_dict()[name]) for name, value in resumed.state_dict().items())
    train(resumed, 1)
    assert all(value.equal(whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    # The deployed network is the base's: the average goes by its prefix.
    base = {name: value for name, value in resumed.state_dict().items() if not name.startswith("qsd_teacher.")}
    assert list(base) == list(base_model(cfg).state_dict())


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("MoCo", {"MODEL.QUEUE_SIZE": 64}),
        (
            "MGN",
            {"MODEL.BACKBONE.DEPTH": "50x", "MODEL.BACKBONE.FEAT_DIM": 2048, "MODEL.HEADS.EMBEDDING_DIM": 256},
        ),
    ],
)
def test_bases_other_than_the_baseline(tmp_path: Path, base: str, overrides: dict[str, Any]) -> None:
    model = build(qsd_cfg(tmp_path, **EMA, **{"QSD.BASE": base, **overrides}))
    inputs = batch()
    if base == "MGN":
        inputs["images"] = torch.rand(8, 3, 96, 32) * 255
    before = tensors(model.qsd_teacher)
    losses = step(model, inputs)
    assert losses["loss_qsd"] > 0
    assert len(losses) > 1
    assert not any("memory" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in model.qsd_teacher.state_dict().items())


def test_impossible_momentum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"QSD.EMA.MOMENTUM: got 1\.5; expected a number from 0 to 1"):
        build(qsd_cfg(tmp_path, **{"QSD.EMA.ENABLED": True, "QSD.EMA.MOMENTUM": 1.5}))
