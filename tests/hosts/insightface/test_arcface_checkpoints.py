"""Checkpoints of several processes: killed while they are written, incomplete, damaged, divided among other numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trainings, last_state

from qsd_plugin.core.errors import CheckpointError, ConfigError, DataError
from qsd_plugin.hosts.insightface import checkpoints, shards

METHODS = {"methods": ["QGFace"], "qgface": {"queue_size": 32}}

#: Kills the process when, for the second time, a file of this name is about to be in its place.
KILL = """
import os, signal

move, seen = os.replace, []


def deadly(source, target):
    seen.append(str(target).endswith({name!r}))
    if sum(seen) == 2 and seen[-1]:
        os.kill(os.getpid(), signal.SIGKILL)
    move(source, target)


os.replace = deadly
"""


@pytest.fixture(scope="module")
def whole(trainings: Trainings) -> Path:
    """Two epochs in two processes without interruption."""
    return trainings.train(METHODS, processes=2, batch_size=4, num_epoch=2)[0]


@pytest.mark.parametrize(
    ("file", "steps"),
    [
        ("checkpoint_gpu_1.pt.next", [3, 3]),  # while files are written: the old ones are left
        ("checkpoint_gpu_1.pt", [6, 3]),  # between the two moves: both new ones are complete
        ("model.pt", [6, 6]),  # between the shards and the trainer's own file
    ],
)
def test_killed_run_resumes_as_if_it_had_not_been(
    file: str, steps: list[int], trainings: Trainings, whole: Path, tmp_path: Path
) -> None:
    keys = {"batch_size": 4, "num_epoch": 2, "output": str(tmp_path)}
    codes, text = trainings.run(trainings.config(METHODS, KILL.format(name=file), **keys), processes=2)
    assert -9 in codes, text
    assert [checkpoints.step_of(tmp_path / f"checkpoint_gpu_{rank}.pt") for rank in range(2)] == steps
    trainings.train(METHODS, processes=2, resume=True, **keys)
    for rank in range(2):
        expected, found = last_state(whole, rank), last_state(tmp_path, rank)
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert not list(tmp_path.glob("*.next"))
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (whole, tmp_path)]
    assert all(torch.equal(value, models[1][key]) for key, value in models[0].items())


def test_files_of_different_steps_and_another_number_of_processes_are_refused(
    trainings: Trainings, whole: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    shutil.copytree(whole, one)
    text = trainings.refused(METHODS, resume=True, output=str(one))  # in one process
    assert "Number of processes of " in text
    assert "got 2; expected 1, as in this run. Convert the run: tools/arcface_shards.py" in text
    older = torch.load(one / "checkpoint_gpu_1.pt", weights_only=True)
    torch.save({**older, "global_step": 3}, one / "checkpoint_gpu_1.pt")
    config = trainings.config(METHODS, batch_size=4, num_epoch=3, resume=True, output=str(one))
    codes, text = trainings.run(config, processes=2)
    assert codes == [2, 2]
    assert "got {'checkpoint_gpu_0.pt': 6, 'checkpoint_gpu_1.pt': 3}; expected a complete file of every process" in text


@pytest.mark.parametrize(
    ("steps", "step"),
    [
        ([(None, 3), (None, 3)], 3),
        ([(6, 3), (None, 3)], 3),
        ([(6, 3), (6, 3)], 3),
        ([(None, 6), (6, 3)], 6),
        ([(6, None), (None, 6)], 6),  # the first checkpoint of the run
        ([(None, 6), (None, 3)], None),
        ([(None, 6), (9, 3)], None),
        ([(None, None), (None, 3)], None),
        ([(None, None)], None),
    ],
)
def test_step_to_go_on_from(steps: list[tuple[int | None, int | None]], step: int | None) -> None:
    if step is not None:
        assert checkpoints.common_step(Path("run/checkpoint_gpu_0.pt"), steps) == step
        return
    with pytest.raises(CheckpointError, match=r"Checkpoints in run, their steps: got \{'checkpoint_gpu_0.pt': "):
        checkpoints.common_step(Path("run/checkpoint_gpu_0.pt"), steps)


def test_other_files_and_objects_are_torch_s_own_business(tmp_path: Path) -> None:
    save, load = checkpoints.saver(torch.save), checkpoints.loader(torch.load)
    save({"global_step": 1}, tmp_path / "checkpoint_gpu_0.pt")
    assert load(tmp_path / "checkpoint_gpu_0.pt") == {"global_step": 1, "processes": 1}
    save([1, 2], str(tmp_path / "other.pt"))
    assert load(str(tmp_path / "other.pt")) == [1, 2]
    with (tmp_path / "open.pt").open("wb") as file:
        save([3], file)
    assert load(tmp_path / "open.pt") == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_gpu_0.pt", "open.pt", "other.pt"]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.pt")
    with pytest.raises(RuntimeError, match="stop"):
        save(Unstorable(), tmp_path / "other.pt")
    assert load(tmp_path / "other.pt") == [1, 2]


class Unstorable:
    """Fails in the middle of a file."""

    def __reduce__(self) -> Any:
        raise RuntimeError("stop")


def run_of(classes: int, processes: int, folder: Path) -> list[dict[str, Any]]:
    """Checkpoints with rows, momentum and a queue that tell where they belong."""
    folder.mkdir()
    whole = {
        "global_step": 6,
        "state_dict_softmax_fc": {"weight": torch.arange(classes * 2.0).view(-1, 2), "terms.queue": torch.ones(4)},
        "state_optimizer": {
            "param_groups": [{"params": [0]}, {"params": [1]}],
            "state": {
                0: {"momentum_buffer": torch.full((3,), 5.0)},
                1: {"momentum_buffer": -torch.arange(classes * 2.0).view(-1, 2), "step": torch.tensor(6.0)},
            },
        },
    }
    parts = shards.reshard([whole], processes)
    for rank, part in enumerate(parts):
        torch.save({**part, "processes": processes}, folder / f"checkpoint_gpu_{rank}.pt")
    return [whole]


def test_rows_are_divided_as_partial_fc_does_and_joined_again(tmp_path: Path) -> None:
    (whole,) = run_of(10, 4, tmp_path / "four")
    read = shards.read_shards(tmp_path / "four")
    rows = [shard["state_dict_softmax_fc"]["weight"] for shard in read]
    assert [row[:, 0].tolist() for row in rows] == [[0, 2, 4], [6, 8, 10], [12, 14], [16, 18]]
    assert [shard["state_optimizer"]["state"][1]["momentum_buffer"].tolist() for shard in read] == [
        (-row).tolist() for row in rows
    ]
    for count in (3, 1, 7):
        shards.write_shards(shards.reshard(read, count), tmp_path / str(count))
        read = shards.read_shards(tmp_path / str(count))
        assert [shard["processes"] for shard in read] == [count] * count
    (joined,) = shards.reshard(read, 1)
    for one, other in (
        (joined["state_dict_softmax_fc"], whole["state_dict_softmax_fc"]),
        (joined["state_optimizer"]["state"][1], whole["state_optimizer"]["state"][1]),
        (joined["state_optimizer"]["state"][0], whole["state_optimizer"]["state"][0]),
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in other)
    for count in (0, 11):
        with pytest.raises(ConfigError, match=rf"Number of processes: got {count}; expected 1 to the number of"):
            shards.reshard(read, count)


def test_incomplete_or_damaged_runs_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_of(6, 3, folder)
    with pytest.raises(DataError, match="expected one that is empty or does not exist"):
        shards.write_shards([], folder)
    with pytest.raises(CheckpointError, match=r"Checkpoints of a run: got '.*'; expected checkpoint_gpu_0.pt"):
        shards.read_shards(tmp_path)
    last, content = folder / "checkpoint_gpu_2.pt", (folder / "checkpoint_gpu_2.pt").read_bytes()
    last.unlink()
    with pytest.raises(CheckpointError, match=r"Checkpoints in .*run: got 2; expected 3, one per process"):
        shards.read_shards(folder)
    torch.save([1], tmp_path / "list.pt")
    for damaged in (content[: len(content) // 2], b"", b"something else", (tmp_path / "list.pt").read_bytes()):
        last.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"Checkpoint: got '.*gpu_2.pt'; expected a complete file"):
            shards.read_shards(folder)
        assert checkpoints.step_of(last) is None
    last.write_bytes(content)
    (folder / "checkpoint_gpu_1.pt").rename(folder / "checkpoint_gpu_7.pt")
    with pytest.raises(CheckpointError, match=r"gpu_1.pt'; expected a complete file"):
        shards.read_shards(folder)
    (folder / "checkpoint_gpu_7.pt").rename(folder / "checkpoint_gpu_1.pt")
    torch.save({**torch.load(last, weights_only=True), "global_step": 9}, last)
    with pytest.raises(CheckpointError, match=r"got \[6, 6, 9\]; expected the same global step on every rank"):
        shards.read_shards(folder)


def test_killed_conversion_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(6, 1, tmp_path / "run")
    made = shards.reshard(shards.read_shards(tmp_path / "run"), 2)
    save = torch.save

    def fails_second(content: Any, file: Path) -> None:
        if file.name == "checkpoint_gpu_1.pt":
            raise KeyboardInterrupt
        save(content, file)

    monkeypatch.setattr(torch, "save", fails_second)
    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(made, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
