"""Both stages against the same steps written plainly, module by module: losses and updated weights."""

from __future__ import annotations

import pytest
import torch
from dil_small import NUM_CLASSES, pair, pictures, small_networks
from torch import nn

from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil import (
    ClassBlock,
    DegradationBank,
    DualBranchReID,
    IdentityEncoder,
    Networks,
    PhaseSchedule,
    ReplayAugmenter,
    SensitiveBranch,
    Stage1,
    Stage1Trainer,
    stage2_terms,
)
from qsd_plugin.networks.resnet_stages import ResNetStages
from qsd_plugin.report.benchmarks.dil_plain import PlainStage1, PlainStage2

#: Adam's first step is sign-like: where a gradient is small its rounding shows in the weight.
LOOSE = {"rtol": 1e-6, "atol": 1e-7}


def same_state(ours: nn.Module, plain: nn.Module) -> None:
    expected = plain.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], **LOOSE, msg=lambda text, name=name: f"{name}: {text}")


def double_networks() -> Networks:
    return Networks(*(part.double().train() for part in small_networks(dropout=0.0, degradation_scales=2)))


@pytest.mark.parametrize("phase", ["paired", "unpaired", "unsupervised"])
def test_stage_1(phase: str) -> None:
    networks, theirs = double_networks(), double_networks()
    stage = Stage1(networks)
    schedule = PhaseSchedule(other="unpaired" if phase == "paired" else phase, paired_probability=phase == "paired")
    trainer = Stage1Trainer(stage.double(), schedule)
    plain = PlainStage1(theirs)
    for step in range(2):
        plain.shown = stage.shown_fake(step + 1)
        batch = pair(phase, 3, seed=step, dtype=torch.float64)
        found, expected = trainer.step(batch), plain.step(batch)
        found.pop("discriminator_gradient")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9 if step == 0 else 1e-6, atol=0, msg=name)
    for own, other in zip(networks, theirs, strict=True):
        same_state(own, other)


def stage2() -> tuple[ReplayAugmenter, DualBranchReID]:
    networks = double_networks()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        teacher = IdentityEncoder(
            NUM_CLASSES, network=ResNetStages(blocks=(1, 1, 1, 1), block="basic", width=8), dropout=0.0
        )
        code_dim = networks.degradation_encoder.code_dim
        bank = DegradationBank(torch.randn(9, code_dim))
        fuse = ClassBlock(teacher.model.channels[-1] + networks.content_encoder.identity_dim, NUM_CLASSES, dropout=0.0)
    augmenter = ReplayAugmenter(*networks[:3], bank)
    model = DualBranchReID(
        networks.content_encoder, SensitiveBranch(teacher.model.layer4, teacher.classifier), fuse
    ).train()
    return augmenter.double(), model.double()


def test_stage_2() -> None:
    (augmenter, model), (frozen, other) = stage2(), stage2()
    plain = PlainStage2(frozen, other)
    optimizer = torch.optim.Adam(
        [part for part in model.parameters() if part.requires_grad], lr=3.5e-4, weight_decay=5e-4
    )
    labels = torch.tensor([0, 0, 2, 2])
    for step in range(2):
        images = pictures(4, step).double()
        _, rendered = augmenter(images, torch_stream(step, "codes"))
        terms = stage2_terms(model(images), model.robust_logits(rendered), labels)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        expected = plain.step(images, labels, torch_stream(step, "codes"))
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(terms[name], value, rtol=1e-9 if step == 0 else 1e-6, atol=0, msg=name)
    same_state(model, other)
