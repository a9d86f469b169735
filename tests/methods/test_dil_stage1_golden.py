"""Stage 1 against the recorded runs: every loss branch, and two iterations with their gradients and weights.

The runs at 256 x 128 are compared when QSD_DIL_RECORDED names the folder of the recordings: ``pytest -m recorded``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dil_recorded import Golden, close, image, networks, recorded, recorded_at_full_size, same_digest, same_digests
from torch import nn

from qsd_plugin.methods.dil import Networks, Pair, PhaseSchedule, Stage1, Stage1Options, Stage1Trainer

#: Adam's first step is sign-like: where a gradient is small its rounding shows in the weight.
AFTER_A_STEP = 1e-7
#: Our names of the recorded terms.
NAMES = {
    "self": "self_rec",
    "cross": "rec",
    "content": "inv",
    "identity": "id",
    "degradation": "deg",
    "realness": "real",
    "discriminator_realness": "real",
    "discriminator_degradation": "deg",
}


class Recorded:
    """A recorded run: its numbers, the networks at its start, and its batches."""

    def __init__(self, golden: Golden, size: tuple[int, int]) -> None:
        self.golden, self.size = golden, size
        self.parts = networks(dropout=0.0)
        first, noise, other = (image(tag, 2, size) for tag in ("s1.a", "s1.noise", "s1.real"))
        labels = torch.tensor([1, 7]), torch.tensor([3, 0])
        self.pairs = {
            "paired": Pair("paired", first, 0.7 * first + 0.2 * noise),
            "unpaired": Pair("unpaired", first, other, *labels),
            "unsupervised": Pair("unsupervised", first, other, *labels),
        }

    def stage(self, **options: Any) -> Stage1:
        names = ("E_con", "E_deg", "G", "D_real", "D_deg")
        networks = Networks(*(self.parts[name] for name in names))
        stage = Stage1(networks, options=Stage1Options(**options)).double()
        while stage.shown_fake(1) != "ba":  # as the recorded coin fell
            stage.seed += 1
        return stage

    def check_terms(self, found: dict[str, torch.Tensor], name: str, rtol: float = 1e-9) -> None:
        side = "dis" if name.rsplit("/", 1)[-1].startswith("dis") or ".dis" in name else "gen"
        for term, value in found.items():
            close(value, self.golden[f"{name}/loss_{side}_{NAMES[term]}"], rtol)
        close(torch.stack(list(found.values())).sum(), self.golden[f"{name}/loss_{side}_total"], rtol)


@pytest.fixture(scope="module")
def run() -> Recorded:
    return Recorded(recorded("stage1"), (64, 32))


def states(parts: dict[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: dict(part.state_dict()) for name, part in parts.items()}


def check_branches(run: Recorded) -> None:
    stage = run.stage()
    for name, phase in (("self", "paired"), ("inter", "unpaired")):
        pair = run.pairs[phase]
        with torch.no_grad():
            rendered = stage.render(pair)
        for index, tensor in enumerate(rendered[:8]):
            same_digest(tensor, run.golden[f"{name}.forward.digest/{index}"], f"{name}.forward/{index}")
        with torch.no_grad():
            run.check_terms(stage.generator_terms(pair, rendered), f"{name}.gen")
        if phase == "paired":
            for fake, entry in (("ba", "self.dis(random=0.844)"), ("ab", "self.dis(random=0.134)")):
                run.check_terms(stage.discriminator_terms(pair, rendered, fake=fake), entry)
            tied = run.stage(predictions_agree=True)
            with torch.no_grad():
                run.check_terms(tied.generator_terms(pair, rendered), "self.gen(enable_kl,dropout=0)")
        else:
            run.check_terms(stage.discriminator_terms(pair, rendered), "inter.dis")
            ranked = run.pairs["unsupervised"]
            run.check_terms(stage.discriminator_terms(ranked, rendered), "inter.rank.dis")
            with torch.no_grad():
                run.check_terms(stage.generator_terms(ranked, rendered), "inter.rank.gen")


def check_two_iterations(run: Recorded) -> None:
    stage = run.stage()
    trainer = Stage1Trainer(stage, PhaseSchedule())
    for number, phase in ((1, "paired"), (2, "unpaired")):
        assert trainer.next_phase() == phase
        terms = trainer.step(run.pairs[phase])
        terms.pop("discriminator_gradient")
        judged = {name: terms.pop(name) for name in tuple(terms) if name.startswith("discriminator")}
        rtol = 1e-9 if number == 1 else AFTER_A_STEP
        run.check_terms(judged, f"step{number}/dis", rtol)
        run.check_terms(terms, f"step{number}/gen", rtol)
        for name in ("E_con", "E_deg", "G"):
            gradients = {key: parameter.grad for key, parameter in run.parts[name].named_parameters()}
            same_digests(gradients, run.golden, f"step{number}.grad_G/{name}", AFTER_A_STEP)
        for name, state in states(run.parts).items():
            same_digests(state, run.golden, f"step{number}.state/{name}", AFTER_A_STEP)


def check_first_discriminator_gradients(run: Recorded) -> None:
    stage = run.stage()
    with torch.no_grad():
        rendered = stage.render(run.pairs["paired"])
    judges = {name: dict(run.parts[name].requires_grad_(True).named_parameters()) for name in ("D_deg", "D_real")}
    total = torch.stack(list(stage.discriminator_terms(run.pairs["paired"], rendered, fake="ba").values())).sum()
    for name, parameters in judges.items():
        gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
        same_digests(dict(zip(parameters, gradients, strict=True)), run.golden, f"step1.grad_D/{name}")
        run.parts[name].requires_grad_(False)


def test_every_branch(run: Recorded) -> None:
    check_branches(run)


def test_gradients_of_the_discriminators(run: Recorded) -> None:
    check_first_discriminator_gradients(run)


def test_two_iterations() -> None:
    """Paired, then unpaired: terms, gradients (and which parameters have none), and all weights and statistics."""
    check_two_iterations(Recorded(recorded("stage1"), (64, 32)))


@pytest.mark.recorded
@pytest.mark.parametrize("check", [check_branches, check_two_iterations])
def test_the_paper_s_image_size(check: Callable[[Recorded], None]) -> None:
    """Up to 9 GB, and some minutes of a CPU core."""
    folder = os.environ.get("QSD_DIL_RECORDED")
    if not folder:
        pytest.skip("QSD_DIL_RECORDED does not name the folder of the recordings")
    check(Recorded(recorded_at_full_size(Path(folder), "stage1"), (256, 128)))
