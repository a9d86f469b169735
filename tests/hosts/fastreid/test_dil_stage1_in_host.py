"""DIL's stage 1 inside fast-reid: steps through the host's trainer are those of the pure part; refusals; evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dil_toy import ROWS, build, dil_cfg, pair_batch, step

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.methods.dil import Pair, PhaseSchedule, Stage1Trainer

host.activate()


class Batches:
    """An endless loader of the batches of iterations 1, 2, ..."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        iteration = 1
        while True:
            yield pair_batch(iteration)
            iteration += 1


def host_steps(cfg: Any, model: Any, count: int) -> list[dict[str, float]]:
    """Losses of steps by the host's trainer with the optimizer that the host builds."""
    from fastreid.engine.defaults import DefaultTrainer
    from fastreid.engine.train_loop import SimpleTrainer
    from fastreid.utils.events import EventStorage

    optimizer, parameters = DefaultTrainer.build_optimizer(cfg, model)
    trainer = SimpleTrainer(model, Batches(), optimizer, parameters)
    found = []
    with EventStorage(0) as storage:
        for index in range(count):
            trainer.iter = index
            trainer.run_step()
            found.append({name: value for name, (value, _) in storage.latest().items() if name.startswith("loss_")})
    return found


@pytest.mark.parametrize(("other", "count"), [("unsupervised", 3), ("unpaired", 2)])
def test_steps_of_the_host_are_those_of_the_pure_stage(tmp_path: Path, other: str, count: int) -> None:
    """Both phases: losses, weights of every network and the discriminators' moments; dropout is off."""
    options = {"DIL.DROPOUT": 0.0, "DIL.PAIRS.OTHER": other, "DIL.PAIRS.DEGRADED_CAMERAS": [1]}
    cfg = dil_cfg(tmp_path, **options)
    model = build(cfg)
    model.stage.adam.lr = 1.0  # the host's rate counts
    pure = copy.deepcopy(model.stage)
    pure.adam.lr = 1e-3
    trainer = Stage1Trainer(pure, PhaseSchedule(other=other, seed=3), lr=1e-3, milestones=())
    start = {name: value.clone() for name, value in pure.state_dict().items()}
    losses = host_steps(cfg, model, count)
    for iteration in range(1, count + 1):
        batch = pair_batch(iteration)
        images = [(batch[key] - model.pixel_mean) / model.pixel_std for key in ("images", "worse_images")]
        phase = trainer.next_phase()
        labels = [] if phase == "paired" else [batch["targets"], batch["worse_targets"]]
        expected = trainer.step(Pair(phase, *images, *labels))
        for name, value in expected.items():
            if not name.startswith("discriminator"):
                assert losses[iteration - 1][f"loss_dil_{name}"] == pytest.approx(float(value), rel=1e-4), (phase, name)
    found = model.stage.state_dict()
    for name, value in pure.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=name)
    moved = {name.split(".")[0] for name, value in found.items() if not value.equal(start[name])}
    assert moved >= {"generator", "degradation_encoder", "content_encoder", "real_discriminator", "adam"}


def test_only_what_a_phase_reaches_moves(tmp_path: Path) -> None:
    """With weight decay, which a flat buffer would apply to everything, and gradients of zero as two ranks have."""
    cfg = dil_cfg(tmp_path)
    model = build(cfg)
    start = {name: value.clone() for name, value in model.named_parameters()}
    host_steps(cfg, model, 1)
    still = {name for name, value in model.named_parameters() if value.equal(start[name])}
    assert {name for name in still if ".classifier." in name} == {
        name for name in start if name.startswith("stage.content_encoder.classifier.")
    }
    assert not any("conv3_sync" in name for name in still)
    assert any(name.startswith("stage.content_encoder.model.") for name in still)


def test_ranks_touch_every_parameter_and_the_optimizer_drops_what_is_not_the_phase_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastreid.solver import build_optimizer

    from qsd_plugin.hosts.fastreid.meta_arch import dil_base

    cfg = dil_cfg(tmp_path)
    model = build(cfg)
    start = {name: value.clone() for name, value in model.named_parameters()}
    monkeypatch.setattr(dil_base, "world_size", lambda: 2)
    sum(step(model, pair_batch(1)).values()).backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    optimizer, _ = build_optimizer(cfg, model)
    optimizer.step()
    assert model.stage.content_encoder.classifier.classifier[0].weight.equal(
        start["stage.content_encoder.classifier.classifier.0.weight"]
    )


def test_the_optimizer_is_the_authors_adam_and_holds_no_discriminator(tmp_path: Path) -> None:
    from fastreid.solver import build_optimizer

    cfg = dil_cfg(tmp_path)
    model = build(cfg)
    optimizer, _ = build_optimizer(cfg, model)
    assert all(group["betas"] == (0.0, 0.999) and group["fused"] for group in optimizer.param_groups)
    held = {id(part) for group in optimizer.param_groups for part in group["params"]}
    stage = model.stage
    for part in (stage.content_encoder.model, stage.real_discriminator, stage.degradation_discriminator):
        assert not held & {id(parameter) for parameter in part.parameters()}
    assert {id(parameter) for parameter in stage.generator.parameters()} <= held
    optimizer.param_groups[0]["lr"] = 5e-5
    step(model, pair_batch(1))
    assert model.stage.adam.lr == 5e-5


def test_without_gradients_nothing_is_learnt_or_counted(tmp_path: Path) -> None:
    model = build(dil_cfg(tmp_path))
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        losses = step(model, pair_batch(6))
    assert all(loss.dim() == 0 for loss in losses.values())
    assert model.stage.iteration == 0
    assert all(value.equal(before[name]) for name, value in model.named_parameters())


def test_evaluation_returns_one_row_per_image_and_leaves_the_batch_alone(tmp_path: Path) -> None:
    model = build(dil_cfg(tmp_path)).eval()
    batch = pair_batch(1)
    kept = batch["images"].clone()
    features = model(batch)
    assert features.shape == (ROWS, 32)
    torch.testing.assert_close(features[:1], model({"images": batch["images"][:1]}), rtol=1e-4, atol=1e-5)
    assert batch["images"].equal(kept)


def test_a_batch_without_pairs_is_refused(tmp_path: Path) -> None:
    model = build(dil_cfg(tmp_path))
    with pytest.raises(DataError, match=r"without pairs.*worse_images, worse_targets, dil_iteration"):
        model({"images": torch.zeros(2, 3, 32, 32), "targets": torch.zeros(2)})


def test_phase_and_draws_are_those_of_the_iteration_that_a_batch_was_made_for(tmp_path: Path) -> None:
    """An epoch that is repeated after an error begins with a model that has seen some of it."""
    found = []
    for completed in (0, 3):
        model = build(dil_cfg(tmp_path, **{"DIL.STAGE1_OPTIONS.R1_EVERY": 2}))
        model.stage.adam.steps.fill_(completed)
        found.append(step(model, pair_batch(2)))
        assert model.stage.iteration == completed + 1
    assert "loss_dil_identity" in found[0]
    # Adam's first step differs; what does not see the discriminators is equal bit for bit, dropout included.
    for name in ("loss_dil_self", "loss_dil_cross", "loss_dil_identity"):
        assert found[0][name].equal(found[1][name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"DIL.PAIRS.OTHER": "unpaired"}, "DIL.PAIRS.DEGRADED_CAMERAS is empty"),
        ({"DIL.PAIRS.OTHER": "both"}, "DIL phase beside paired: got 'both'"),
        ({"DIL.PAIRS.PAIRED_PROB": 1.5}, "DIL.PAIRS.PAIRED_PROB: got 1.5"),
        ({"DIL.PAIRS.MIX": "rse"}, "rse"),
        ({"DIL.PAIRS.RATIO": [5.0, 3.0]}, "DIL.PAIRS.RATIO"),
        ({"DIL.BLOCKS": [3, 4, 6]}, "DIL.BLOCKS"),
        ({"INPUT.SIZE_TRAIN": [36, 32]}, "INPUT.SIZE_TRAIN: got .36, 32.*multiples of 16"),
        ({"SOLVER.OPT": "SGD"}, "SOLVER.OPT: got 'SGD'; expected Adam"),
        ({"DIL.STAGE1_OPTIONS.ABLATE": ["paired.contnt"]}, "paired.content"),
        ({"MODEL.BACKBONE.PRETRAIN": True}, "MODEL.BACKBONE.PRETRAIN_PATH is empty"),
        ({"TEST.PRECISE_BN.ENABLED": True}, "PRECISE_BN"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        build(dil_cfg(tmp_path, **options))
    assert isinstance(caught.value, ConfigError) or "rse" in message
