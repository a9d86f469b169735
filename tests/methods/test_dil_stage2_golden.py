"""Stage 2 against the recorded runs: replay, losses, one step with its gradients and weights, inference.

The run at 256 x 128 is compared when QSD_DIL_RECORDED names the folder of the recordings: ``pytest -m recorded``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from dil_recorded import (
    NUM_CLASSES,
    Golden,
    close,
    fill,
    image,
    normal,
    recorded,
    recorded_at_full_size,
    same_digest,
    same_digests,
)
from torch import Tensor, nn

from qsd_plugin.methods.dil import (
    BranchOutputs,
    ClassBlock,
    ContentEncoder,
    DegradationAttention,
    DegradationBank,
    DegradationEncoder,
    DualBranchReID,
    Generator,
    IdentityEncoder,
    ReplayAugmenter,
    SensitiveBranch,
    Stage2Options,
    flip_averaged_codes,
    stage2_terms,
)

#: Adam's first step is sign-like: where a gradient is small its rounding shows in the weight.
AFTER_A_STEP = 1e-7
LABELS = torch.tensor([2, 2, 5, 5])


class Parts(NamedTuple):
    """The networks of a recorded run at its start."""

    content_encoder: ContentEncoder
    degradation_encoder: DegradationEncoder
    generator: Generator
    bank: DegradationBank
    model: DualBranchReID

    def augmenter(self, mode: str, repeats: int = 1) -> ReplayAugmenter:
        return ReplayAugmenter(
            self.content_encoder, self.degradation_encoder, self.generator, self.bank, mode=mode, repeats=repeats
        )


def parts() -> Parts:
    content_encoder = fill(ContentEncoder(NUM_CLASSES, dropout=0.0), "E_con")
    teacher = fill(IdentityEncoder(NUM_CLASSES, dropout=0.0), "E_id")
    sensitive = SensitiveBranch(teacher.model.layer4, teacher.classifier)
    fuse_classifier = fill(ClassBlock(4096, NUM_CLASSES, dropout=0.0), "C")
    return Parts(
        content_encoder,
        fill(DegradationEncoder(), "E_deg"),
        fill(Generator(), "G"),
        DegradationBank(normal("bank", 50, 128)),
        DualBranchReID(content_encoder, sensitive, fuse_classifier),
    )


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check_replay(run: Parts, golden: Golden, images: Tensor) -> None:
    close(run.bank.sample(4, seeded()), run.bank.codes[golden["bank.idx(seed0,n=4)"]].numpy())
    same_digest(run.augmenter("bank")(images, seeded())[1], golden["augment.bank.digest"])
    same_digest(run.augmenter("bank", 3)(images[:1], seeded())[1], golden["augment.bank.step3.digest"])
    same_digest(run.augmenter("shuffle")(images, seeded())[1], golden["augment.shuffle.digest"])
    # The authors' bank is float32 in a float64 run as well.
    close(flip_averaged_codes(run.degradation_encoder, images), golden["bank.extract"], rtol=1e-6)


def check_outputs(outputs: BranchOutputs, golden: Golden, name: str) -> None:
    for branch in ("fuse", "inv", "sen"):
        close(outputs.logits[branch], golden[f"{name}/p_{branch}"])
        same_digest(outputs.features[branch], golden[f"{name}/f_{branch}"])


def check_losses(outputs: BranchOutputs, replayed: Tensor, golden: Golden) -> None:
    kinds = {f"loss.{kind}": Stage2Options(replay_loss=kind) for kind in ("kl", "js", "js_detach")}
    for kind in ("ce", "none"):
        kinds[f"loss.id_{kind}"] = Stage2Options(fuse_loss=kind, inv_loss=kind, sen_loss=kind)
    for name, options in {"loss": Stage2Options(), **kinds}.items():
        terms = stage2_terms(outputs, replayed, LABELS, options)
        for ours, theirs in (("fuse", "fuse"), ("inv", "inv"), ("sen", "sen"), ("replay", "smooth")):
            close(terms[ours], golden[f"{name}/loss_reid_{theirs}"])
        close(torch.stack(list(terms.values())).sum(), golden[f"{name}/loss_reid_total"])


def named(run: Parts) -> dict[str, nn.Module]:
    return {"E_con": run.content_encoder, "E_id": run.model.sensitive, "C": run.model.fuse_classifier}


def check_run(golden: Golden, size: tuple[int, int]) -> None:
    run, images = parts(), image("s2.x", 4, size)
    with torch.no_grad():
        check_replay(run, golden, images)
    rendered = run.augmenter("bank")(images, seeded())[1]
    run.model.train()
    parameters = [part for part in run.model.parameters() if part.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3.5e-4, betas=(0.9, 0.999), weight_decay=5e-4)
    outputs, replayed = run.model(images), run.model(rendered)
    check_outputs(outputs, golden, "feats1")
    check_outputs(replayed, golden, "feats2")
    check_losses(outputs, replayed.logits["inv"], golden)
    terms = stage2_terms(outputs, replayed.logits["inv"], LABELS)
    torch.stack(list(terms.values())).sum().backward()
    missing = []
    for name, module in named(run).items():
        gradients = {key: parameter.grad for key, parameter in module.named_parameters()}
        same_digests(gradients, golden, f"step1.grad/{name}", AFTER_A_STEP)
        missing += [f"{name}/{key}" for key, gradient in gradients.items() if gradient is None]
    assert set(missing) == set(golden["none_grads"].tolist())
    optimizer.step()
    # The authors' program runs the content branch, too. Nothing uses it in this stage, so that its batch statistics
    # are all that comes of it; here it is left out.
    for name, module in named(run).items():
        same_digests(dict(module.state_dict()), golden, f"step1.state/{name}", AFTER_A_STEP, skip="head.content")
    untouched = fill(ContentEncoder(NUM_CLASSES), "E_con").state_dict()
    for name, value in run.content_encoder.state_dict().items():
        assert "head.content" not in name or torch.equal(value, untouched[name]), name


@torch.no_grad()
def check_inference(golden: Golden, size: tuple[int, int]) -> None:
    run, images = parts(), image("s2.x", 4, size)[:2]
    run.model.eval()
    for kind in ("fuse", "inv", "sen"):
        close(run.model.embed(images, kind), golden[f"inference.{kind}"])
    run.model.attention = fill(DegradationAttention(), "A_deg").eval()
    close(run.model.embed(images), golden["inference.fuse.attention"])


def test_replay_losses_and_one_step() -> None:
    check_run(recorded("stage2"), (64, 32))


def test_inference() -> None:
    check_inference(recorded("stage2"), (64, 32))


@pytest.mark.recorded
def test_the_paper_s_image_size() -> None:
    folder = os.environ.get("QSD_DIL_RECORDED")
    if not folder:
        pytest.skip("QSD_DIL_RECORDED does not name the folder of the recordings")
    golden = recorded_at_full_size(Path(folder), "stage2")
    check_run(golden, (256, 128))
    check_inference(golden, (256, 128))
