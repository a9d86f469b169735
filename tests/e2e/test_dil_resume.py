"""DIL's recipe through ``tools/train_net.py``, killed in every stage: it ends bit for bit as if it never was."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, assert_same, forked_trainings, options
from toy import write_market

IMAGES, EPOCHS = 36, 2
#: Steps of an epoch. Stage 1's are odd, so that its second epoch begins in the other phase.
STEPS = {"DILTeacher": IMAGES // 8, "DIL": IMAGES // 4, "DILReID": IMAGES // 8}
FOLDERS = {"DILTeacher": "teacher", "DIL": "stage1", "DILReID": "stage2"}
TINY: dict[str, Any] = {
    "SEED": 3,
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.PRETRAIN": False,
    "DIL.WIDTH": 0.0625,
    "DIL.BLOCKS": [1, 1, 1, 1],
    "DIL.BLOCK": "basic",
    "INPUT.SIZE_TRAIN": [32, 32],  # padded, cropped, mirrored and erased in teacher and stage 2
    "INPUT.SIZE_TEST": [32, 32],
    "DATALOADER.NUM_WORKERS": 1,
    "DATASETS.TESTS": "()",
    "RECIPE.DIL.TEACHER.MAX_EPOCH": EPOCHS,
    "RECIPE.DIL.TEACHER.STEPS": [1],
    "RECIPE.DIL.STAGE1.MAX_EPOCH": EPOCHS,
    "RECIPE.DIL.STAGE1.STEPS": [1],
    "RECIPE.DIL.STAGE1.IMS_PER_BATCH": 4,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.MAX_EPOCH": EPOCHS,
    "SOLVER.STEPS": [1],
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.IMS_PER_BATCH": 16,
}
#: Where the process ends: in the second epoch of each training, in stage 1 in both phases, and between two batches of
#: codes. Steps count from 0 and phases from 1: step 10 is of the paired phase.
KILLED = (("DILTeacher", 5), ("DIL", 10), ("DIL", 13), ("bank", 1), ("DILReID", 6))


@dataclass(frozen=True)
class Recipe:
    """What runs of the recipe into one folder left behind.

    Args:
        ends: How each process ended.
        losses: Total losses in hexadecimal by architecture and step, of every process that got there.
        folder: The recipe's.
    """

    ends: list[int]
    losses: dict[tuple[str, int], list[str]]
    folder: Path

    def state(self, architecture: str) -> dict[str, Any]:
        """The last checkpoint of a training: networks, discriminators, optimizer, schedule, sampler."""
        path = self.folder / FOLDERS[architecture] / "model_final.pth"
        stored: dict[str, Any] = torch.load(path, weights_only=True)
        return stored

    def codes(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "bank" / "codes.npz") as arrays:
            return dict(arrays)


Run = Callable[..., Recipe]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run the recipe once for each place to be killed at and once more; the keyword arguments are those of a job."""
    folder = tmp_path_factory.mktemp("dil_resume")
    write_market(folder, num_ids=6, per_id=6, test_ids=2)
    with forked_trainings(folder) as server:

        def train(name: str, *, killed: Sequence[tuple[str, int]] = (), keys: Any = (), **job: Any) -> Recipe:
            config = str(ROOT / "projects" / "DIL" / "market.yml")
            values = options({**TINY, "OUTPUT_DIR": folder / name, **dict(keys)})
            losses, log = folder / f"{name}.losses", folder / f"{name}.log"
            job |= {"arguments": ["--config-file", config, *values], "losses": str(losses), "log": str(log)}
            ends = []
            for where, step in [*killed, (None, None)]:
                ends.append(server(job | {"kill_in": where, "kill_at": step}))
                assert ends[-1] in (0, -signal.SIGKILL), log.read_text()
            found: dict[tuple[str, int], list[str]] = {}
            for line in losses.read_text().splitlines():
                architecture, step, loss = line.split()
                found.setdefault((architecture, int(step)), []).append(loss)
            return Recipe(ends, found, folder / name)

        yield train


@pytest.fixture(scope="module")
def undisturbed(run: Run) -> Recipe:
    return run("undisturbed")


def test_killed_in_every_stage_it_ends_as_if_it_never_was(run: Run, undisturbed: Recipe) -> None:
    killed = run("killed", killed=KILLED)
    assert killed.ends == [-signal.SIGKILL] * len(KILLED) + [0]
    # Each process went on at the beginning of the epoch and got to where it was killed.
    again = [(name, step) for name, end in KILLED if name in STEPS for step in range(STEPS[name], end)]
    places = [(name, step) for name, steps in STEPS.items() for step in range(EPOCHS * steps)]
    assert {place: len(found) for place, found in killed.losses.items()} == {
        place: 1 + again.count(place) for place in places
    }
    assert len({found[0] for found in undisturbed.losses.values()}) == len(places)
    for place, found in killed.losses.items():
        assert set(found) == set(undisturbed.losses[place]), place
    for architecture in STEPS:
        assert_same(killed.state(architecture), undisturbed.state(architecture))
    first = killed.state("DIL")["model"]
    assert int(first["stage.adam.steps"]) == EPOCHS * STEPS["DIL"]
    assert {name.split(".")[1] for name in first} >= {"real_discriminator", "degradation_discriminator", "adam"}
    for name, value in undisturbed.codes().items():
        np.testing.assert_array_equal(killed.codes()[name], value)


def test_a_moment_of_the_discriminators_that_is_not_saved_changes_the_curve(run: Run, undisturbed: Recipe) -> None:
    given = {"DIL.TEACHER": undisturbed.folder / "teacher" / "model_final.pth", "DIL.REPLAY.MODE": "shuffle"}
    forgetful = run("forgetful", killed=[("DIL", 10)], keys=given, forget="FlatAdam.square")
    assert forgetful.ends == [-signal.SIGKILL, 0]
    last, start = EPOCHS * STEPS["DIL"] - 1, STEPS["DIL"]
    for step in range(start):
        assert forgetful.losses["DIL", step] == undisturbed.losses["DIL", step]
    assert forgetful.losses["DIL", start][-1] != undisturbed.losses["DIL", start][0]
    assert forgetful.losses["DIL", last] != undisturbed.losses["DIL", last]
