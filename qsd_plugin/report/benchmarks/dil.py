"""DIL's steps beside the same steps written module by module (:mod:`.dil_plain`): CPU seconds and peak memory.

Both sides start from the same weights and take the same images and optimizers of the same settings; images are noise,
which costs the same. Time is that of the process on all its threads, so that other work on the machine counts less.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil import (
    ClassBlock,
    DegradationBank,
    DualBranchReID,
    IdentityEncoder,
    Networks,
    Pair,
    PhaseSchedule,
    ReplayAugmenter,
    SensitiveBranch,
    Stage1,
    Stage1Trainer,
    dil_networks,
    stage2_terms,
)
from qsd_plugin.networks.resnet_stages import ResNetStages
from qsd_plugin.report.benchmarks.dil_plain import PlainStage1, PlainStage2
from qsd_plugin.report.benchmarks.paired import extra_memory_mib, freed_memory_kept, pooled_ratio

Step = Callable[[], Any]

#: What is timed: an iteration of stage 1 of either kind, and one of stage 2.
KINDS = ("stage 1 paired", "stage 1 unpaired", "stage 2")
#: Largest ratio of the CPU seconds, and of the peak memory.
TIME_LIMIT, MEMORY_LIMIT = 0.9, 0.8
#: Steps whose peak is taken: the optimizers make their moments in the first.
MEMORY_STEPS = 2
_CLASSES = 751


@dataclass(frozen=True)
class Size:
    """Pairs of stage 1 and images of stage 2 in a batch, image height H (W is half of it), factor on the channels.

    The authors' batches are 8 and 32; what a batch takes beside the networks grows with it.
    """

    pairs: int = 2
    images: int = 8
    height: int = 256
    width: float = 1.0

    def item(self, kind: str) -> str:
        """Name of a kind of step at this size."""
        batch = self.images if kind == "stage 2" else self.pairs
        return f"DIL {kind}, B={batch} {self.height}x{self.height // 2} width {self.width:g}"


#: The paper's networks and image size.
SIZES = (Size(),)


def run(
    chosen: Sequence[Size] = SIZES, *, pairs: int = 6, rounds: int = 2, memory_rounds: int = 2, seed: int = 0
) -> dict[str, Any]:
    """Compare every kind of step at every size.

    Args:
        chosen: Sizes.
        pairs: Interleaved pairs of steps after the warm-up, over all rounds.
        rounds: How often both sides are built.
        memory_rounds: Pairs of processes whose peak is taken.
        seed: Seeds weights and images.

    Returns:
        ``threads``, ``load`` (one-minute average at the start) and ``items``: what :func:`pooled_ratio` gives for the
        CPU seconds, ours over the plain step, and the peak memory of both beyond a process that has only imported
        everything, networks and optimizers included: ``extra_memory_mib`` (ours), ``plain_memory_mib``,
        ``memory_ratio`` with ``memory_low`` and ``memory_high``, the range of the rounds. ``None`` outside Linux.
    """
    load = os.getloadavg()[0]
    items = {}
    for size in chosen:
        for kind in KINDS:
            build = partial(both_steps, kind, size, seed)
            with freed_memory_kept():
                timed = pooled_ratio(build, pairs, rounds=rounds, clock=time.process_time)
            items[size.item(kind)] = timed | {"limit": TIME_LIMIT} | memory(kind, size, seed, memory_rounds)
    return {"threads": torch.get_num_threads(), "load": load, "clock": "CPU seconds of the process", "items": items}


def both_steps(kind: str, size: Size, seed: int, plain_first: bool = False) -> tuple[Step, Step]:
    """Our step and the plain one.

    Args:
        kind: Of :data:`KINDS`.
        size: Of the problem.
        seed: Of weights and images.
        plain_first: Build the plain one before ours; the order of what is returned stays.
    """
    built = {
        plain: step_function(kind, size, seed, plain=plain) for plain in sorted((False, True), reverse=plain_first)
    }
    return built[False], built[True]


def step_function(kind: str, size: Size, seed: int, *, plain: bool) -> Step:
    """A step that trains; its arguments as for :func:`both_steps`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = Networks._make(part.train() for part in dil_networks(_CLASSES, width=size.width))
        if kind == "stage 2":
            return _stage2_step(networks, size, seed, plain)
    phase = kind.rsplit(" ", maxsplit=1)[-1]
    labels = torch.arange(size.pairs)
    better, worse = (_images(size, size.pairs, number) for number in (seed, seed + 1))
    pair = Pair(phase, better, worse, labels, labels)
    if plain:
        return partial(PlainStage1(networks).step, pair)
    schedule = PhaseSchedule(paired_probability=float(phase == "paired"))
    return partial(Stage1Trainer(Stage1(networks), schedule).step, pair)


def memory(kind: str, size: Size, seed: int, rounds: int) -> dict[str, Any]:
    """Peaks of both sides, each in processes of its own."""
    peaks: list[tuple[float, float]] = []
    for _ in range(rounds):
        ours, plain = (_peak(kind, size, seed, side) for side in (False, True))
        if ours is None or plain is None:
            return {"extra_memory_mib": None}
        peaks.append((ours, plain))
    ratios = [ours / plain for ours, plain in peaks]
    return {
        "extra_memory_mib": median(ours for ours, _ in peaks),
        "plain_memory_mib": median(plain for _, plain in peaks),
        "memory_ratio": median(ratios),
        "memory_low": min(ratios),
        "memory_high": max(ratios),
        "memory_ratio_limit": MEMORY_LIMIT,
    }


def peak_mib(kind: str, size: Size, seed: int, *, plain: bool) -> float | None:
    """Peak of a few steps, networks included, in MiB beyond this process; ``None`` outside Linux."""
    torch.nn.functional.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3))  # libraries are there from now on

    def work() -> None:
        step = step_function(kind, size, seed, plain=plain)
        for _ in range(MEMORY_STEPS):
            step()

    return extra_memory_mib(work)


def _peak(kind: str, size: Size, seed: int, plain: bool) -> float | None:
    code = (
        "import torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"from qsd_plugin.report.benchmarks.dil import Size, peak_mib\n"
        f"print(peak_mib({kind!r}, Size(*{astuple(size)!r}), {seed}, plain={plain}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed = done.stdout.split()[-1]
    return None if printed == "None" else float(printed)


def _stage2_step(networks: Networks, size: Size, seed: int, plain: bool) -> Step:
    encoder = networks.content_encoder
    assert isinstance(encoder.model, ResNetStages)  # the default of dil_networks
    stages = ResNetStages(width=encoder.model.channels[0])
    teacher = IdentityEncoder(_CLASSES, network=stages)
    bank = DegradationBank(torch.randn(64, networks.degradation_encoder.code_dim))
    augmenter = ReplayAugmenter(*networks[:3], bank)
    model = DualBranchReID(
        encoder,
        SensitiveBranch(stages.get_submodule("layer4"), teacher.classifier),
        ClassBlock(stages.channels[-1] + encoder.identity_dim, _CLASSES),
    ).train()
    images, labels = _images(size, size.images, seed), torch.arange(size.images) // 2
    if plain:
        side = PlainStage2(augmenter, model)
        return lambda: side.step(images, labels, torch_stream(seed, "codes"))
    trained = [part for part in model.parameters() if part.requires_grad]
    # As the host's optimizer is set for DIL.
    optimizer = torch.optim.Adam(trained, lr=3.5e-4, weight_decay=5e-4, fused=True)

    def step() -> None:
        _, rendered = augmenter(images, torch_stream(seed, "codes"))
        terms = stage2_terms(model(images), model.robust_logits(rendered), labels)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _images(size: Size, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, size.height, size.height // 2, generator=torch_stream(seed, "images"))
