"""QUD through ``tools/train_net.py``: identities do not matter, and a killed training goes on bit for bit."""

from __future__ import annotations

import io
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, assert_same, forked_trainings, options
from PIL import Image
from qud_toy import write_teacher

from qsd_plugin.data.recordio import RecordWriter
from qsd_plugin.data.synthetic.faces import FaceSample, SyntheticFaces, render_face
from qsd_plugin.hosts import fastreid as host

host.activate()

IMAGES, BATCH, EPOCHS = 22, 4, 3  # a pass over the images is no whole number of steps
STEPS = IMAGES // BATCH
TINY: dict[str, Any] = {
    "SEED": 3,
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.WIDTH": 0.0625,
    "MODEL.BACKBONE.FEAT_DIM": 16,
    "INPUT.SIZE_TRAIN": [32, 32],
    "INPUT.SIZE_TEST": [32, 32],
    "INPUT.PADDING.ENABLED": True,  # random crops by the host's transforms, beside the flips
    "QUD.QUEUE_SIZE": 10,
    "SOLVER.IMS_PER_BATCH": BATCH,
    "SOLVER.MAX_EPOCH": EPOCHS,
    "SOLVER.STEPS": [1, 2],
    "DATALOADER.NUM_WORKERS": 2,
    "DATASETS.TESTS": "()",
}
#: One step of each epoch, none of them its first.
KILLED_AT = [epoch * STEPS + int(np.random.default_rng(epoch).integers(1, STEPS)) for epoch in range(EPOCHS)]


@dataclass(frozen=True)
class Training:
    """What trainings into one folder left behind.

    Args:
        ends: How each process ended.
        losses: Total losses in hexadecimal by step, of every process that got there.
        folder: The recipe's.
    """

    ends: list[int]
    losses: dict[int, list[str]]
    folder: Path

    def curve(self) -> list[str]:
        """The loss of every step, which no process computed differently."""
        assert all(len(set(found)) == 1 for found in self.losses.values()), self.losses
        return [self.losses[step][0] for step in range(EPOCHS * STEPS)]

    def state(self) -> dict[str, Any]:
        """The last checkpoint."""
        stored: dict[str, Any] = torch.load(self.folder / "student" / "model_final.pth", weights_only=True)
        return stored

    def metrics(self) -> list[dict[str, float]]:
        """What the host logged, without times."""
        rows = map(json.loads, (self.folder / "student" / "metrics.json").open())
        return [{key: value for key, value in row.items() if "time" not in key and "eta" not in key} for row in rows]


Train = Callable[..., Training]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and synthetic faces recorded twice: 11 people, and dealt out anew to 7."""
    folder = tmp_path_factory.mktemp("qud_resume")
    write_teacher(folder / "teacher")
    spec = SyntheticFaces(size=32, seed=1)
    samples = [FaceSample("train", 1 + index // 2, index % 2) for index in range(IMAGES)]
    pictures = [jpeg(render_face(spec, sample).image) for sample in samples]
    record(folder / "people" / "train.rec", pictures, [index // 2 for index in range(IMAGES)])
    record(folder / "dealt" / "train.rec", pictures, np.random.default_rng(0).permutation(IMAGES) % 7)
    return folder


def jpeg(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def record(path: Path, pictures: Sequence[bytes], identities: Any) -> None:
    with RecordWriter(path, image_size=(32, 32)) as writer:
        for picture, identity in zip(pictures, identities, strict=True):
            writer.append(picture, label=int(identity))


@pytest.fixture(scope="module")
def train(folder: Path) -> Iterator[Train]:
    """Run the recipe once for each step to be killed at and once more; the keyword arguments are those of a job."""
    with forked_trainings(folder) as server:

        def run(name: str, *, data: str = "people", kill_at: Sequence[int] = (), **job: Any) -> Training:
            paths = {
                "DATA.RECORD": folder / data / "train.rec",
                "KD.MODEL_CONFIG": [str(folder / "teacher" / "teacher.yaml")],
                "KD.MODEL_WEIGHTS": [str(folder / "teacher" / "teacher.pth")],
                "OUTPUT_DIR": folder / name,
            }
            config = str(ROOT / "projects" / "QUD" / "ms1mv2_r50_to_mbf.yml")
            job["arguments"] = ["--config-file", config, *options(TINY | paths)]
            job |= {"losses": str(folder / f"{name}.losses"), "log": str(folder / f"{name}.log")}
            ends = []
            for step in [*kill_at, None]:
                ends.append(server(job | {"kill_at": step}))
                assert ends[-1] in (0, -signal.SIGKILL), (folder / f"{name}.log").read_text()
            losses: dict[int, list[str]] = {}
            for line in (folder / f"{name}.losses").read_text().splitlines():
                _, step, loss = line.split()
                losses.setdefault(int(step), []).append(loss)
            return Training(ends, losses, folder / name)

        yield run


@pytest.fixture(scope="module")
def undisturbed(train: Train) -> Training:
    return train("undisturbed")


def test_identities_dealt_out_anew_change_no_bit(train: Train, undisturbed: Training) -> None:
    dealt = train("dealt", data="dealt")
    assert len(set(undisturbed.curve())) == EPOCHS * STEPS
    assert dealt.curve() == undisturbed.curve()
    assert dealt.metrics() == undisturbed.metrics()
    assert {"total_loss", "lr"} <= set(dealt.metrics()[-1])
    assert_same(dealt.state(), undisturbed.state())
    for run, people in ((undisturbed, 11), (dealt, 7)):
        log = (run.folder.parent / f"{run.folder.name}.log").read_text()
        assert re.search(rf"train\W+{people}\W+{IMAGES}\b", log)


def test_killed_three_times_it_ends_as_if_it_never_was(train: Train, undisturbed: Training) -> None:
    killed = train("killed", kill_at=KILLED_AT)
    assert killed.ends == [-signal.SIGKILL] * 3 + [0]
    # Each process went on behind the last checkpoint, at the beginning of an epoch, and got to where it was killed.
    again = [step for kill in KILLED_AT for step in range(kill // STEPS * STEPS, kill)]
    assert {step: len(found) for step, found in killed.losses.items()} == {
        step: 1 + again.count(step) for step in range(EPOCHS * STEPS)
    }
    assert killed.curve() == undisturbed.curve()
    assert_same(killed.state(), undisturbed.state())


def test_a_queue_that_is_not_saved_changes_the_curve(train: Train, undisturbed: Training) -> None:
    forgetful = train("forgetful", kill_at=KILLED_AT[1:2], forget="FeatureQueue.features")
    assert forgetful.ends == [-signal.SIGKILL, 0]
    expected = undisturbed.curve()
    assert [found[0] for _, found in sorted(forgetful.losses.items())][: KILLED_AT[1]] == expected[: KILLED_AT[1]]
    assert forgetful.losses[STEPS][-1] != expected[STEPS]
    assert forgetful.losses[EPOCHS * STEPS - 1] != [expected[-1]]
