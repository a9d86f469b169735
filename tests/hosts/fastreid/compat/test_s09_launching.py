"""S09: several processes without CUDA; children that end together; refusals in words."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_config, write_market

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.fastreid import launch as launching
from qsd_plugin.hosts.fastreid import processes

# A script such as the host's own tools/train_net.py; it knows nothing of the plugin.
_SCRIPT = """
import json, sys, zlib
from fastreid.config import get_cfg
from fastreid.engine import DefaultTrainer, default_argument_parser, launch
from fastreid.utils import comm


class Trainer(DefaultTrainer):
    @classmethod
    def test(cls, cfg, model):
        return {"metric": 0.0}


def main(args):
    cfg = get_cfg()
    cfg.merge_from_list(args.opts)
    trainer = Trainer(cfg)
    trainer.train()
    weights = b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())
    mine = {"rank": comm.get_rank(), "local": comm.get_local_rank(), "sum": zlib.crc32(weights), "iter": trainer.iter}
    everyone = comm.all_gather(mine)
    if comm.is_main_process():
        with open(cfg.OUTPUT_DIR + "/result.json", "w") as f:
            json.dump(everyone, f)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args.num_gpus, num_machines=args.num_machines, machine_rank=args.machine_rank,
           dist_url=args.dist_url, args=(args,))
    print("AFTER LAUNCH")
"""


@pytest.mark.timeout(180)
def test_s09_two_gloo_processes_train_the_same_model(tmp_path: Path) -> None:
    script, output = tmp_path / "train_net.py", tmp_path / "out"
    script.write_text(_SCRIPT)
    output.mkdir()
    options = toy_config(output, **{"MODEL.BACKBONE.NORM": "syncBN", "MODEL.HEADS.NORM": "syncBN"})
    run = subprocess.run(
        [sys.executable, "-m", "qsd_plugin.run", str(script), "--num-gpus", "2", *map(str, options)],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "FASTREID_DATASETS": str(write_market(tmp_path / "data", num_ids=4)),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((output / "result.json").read_text())
    assert [(result["rank"], result["local"], result["iter"]) for result in results] == [(0, 0, 2), (1, 1, 2)]
    assert results[0]["sum"] == results[1]["sum"]
    assert run.stdout.count("AFTER LAUNCH") == 1  # by the parent, as with the host's launch


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until(condition: Any, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


_WRITE_PID_AND = "import os, pathlib, sys, time; pathlib.Path(os.environ['PIDS'], str(os.getpid())).touch(); "


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which each child leaves its process id."""
    folder = tmp_path / "pids"
    folder.mkdir()
    monkeypatch.setenv("PIDS", str(folder))
    return folder


@pytest.mark.timeout(30)
def test_s09_the_first_failure_ends_all_with_its_code(pids: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import signal; asked = lambda *_: (print('asked to end', file=sys.stderr, flush=True), os._exit(0))\n"
        "signal.signal(signal.SIGTERM, asked)\n"
        + _WRITE_PID_AND
        + "\nwhile len(os.listdir(os.environ['PIDS'])) < 2: time.sleep(0.02)\n"
        "if os.environ['RANK'] == '1': print('boom', file=sys.stderr, flush=True); os._exit(7)\n"
        "time.sleep(60)"
    )
    with pytest.raises(SystemExit) as caught:
        processes.run_all(python(code), [{"RANK": "0"}, {"RANK": "1"}])
    assert caught.value.code == 7
    stderr = capfd.readouterr().err
    assert "boom" in stderr
    assert stderr.count("asked to end") == 1  # the other one could have cleaned up
    assert "Process 1 of 2 failed with exit code 7" in stderr
    assert len(list(pids.iterdir())) == 2
    assert not any(alive(int(file.name)) for file in pids.iterdir())


@pytest.mark.timeout(30)
def test_s09_a_child_ended_by_a_signal_counts_as_failed() -> None:
    with pytest.raises(SystemExit) as caught:
        processes.run_all(python("import os; os.kill(os.getpid(), 9)"), [{}])
    assert caught.value.code == 128 + 9


@pytest.mark.timeout(30)
def test_s09_success_returns() -> None:
    processes.run_all(python("pass"), [{}, {}])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_s09_stopping_the_parent_stops_the_children(number: int, pids: Path) -> None:
    command = python(_WRITE_PID_AND + "time.sleep(60)")
    parent = multiprocessing.get_context("fork").Process(target=_run_all_interruptibly, args=(command,))
    parent.start()
    assert wait_until(lambda: len(list(pids.iterdir())) == 2)
    os.kill(int(parent.pid or 0), number)
    parent.join(20)
    assert parent.exitcode not in (None, 0)
    assert not any(alive(int(file.name)) for file in pids.iterdir())


def _run_all_interruptibly(command: list[str]) -> None:
    # A shell starts background jobs, such as a test run of its own, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes.run_all(command, [{}, {}])


def _parent_of_an_orphan(folder: Path) -> None:
    if os.fork() == 0:
        processes.exit_with_parent()
        (folder / str(os.getpid())).touch()
        time.sleep(60)
    time.sleep(60)


@pytest.mark.timeout(60)
def test_s09_a_child_does_not_outlive_a_killed_parent(pids: Path) -> None:
    parent = multiprocessing.get_context("fork").Process(target=_parent_of_an_orphan, args=(pids,))
    parent.start()
    assert wait_until(lambda: len(list(pids.iterdir())) == 1)
    child = int(next(pids.iterdir()).name)
    assert alive(child)
    parent.kill()
    parent.join()
    assert wait_until(lambda: not alive(child))


# What torchrun starts: a process of its own, not a fork of this one, whose threads a fork would leave behind.
_WORKER = """
import json, sys
import qsd_plugin.hosts.fastreid
from fastreid.engine import launch
from fastreid.utils import comm


def main(word):
    gathered = comm.all_gather(comm.get_rank())
    with open(sys.argv[1], "w") as file:
        json.dump([word, gathered, comm.get_local_rank(), comm.get_local_size()], file)


launch(main, 1, args=("hello",))  # --num-gpus keeps its default under torchrun
assert comm.get_world_size() == 1  # the group is left
"""


@pytest.mark.timeout(120)
@pytest.mark.skipif(torch.cuda.is_available(), reason="S09 with gloo is for machines without CUDA")
def test_s09_torchrun_with_two_machines_joins_one_group(tmp_path: Path) -> None:
    torchrun = {
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(processes.free_port()),
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(tmp_path / str(rank))],
            env=os.environ | torchrun | {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
        )
        for rank in range(4)
    ]
    try:
        assert [worker.wait(100) for worker in workers] == [0] * 4
    finally:
        for worker in workers:
            worker.kill()
    results = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    assert results == [["hello", [0, 1, 2, 3], rank % 2, 2] for rank in range(4)]


@pytest.mark.parametrize(("processes_asked", "machines", "started"), [(2, 1, 4), (2, 2, 2)])
def test_s09_other_processes_than_the_environment_started_are_refused(
    monkeypatch: pytest.MonkeyPatch, processes_asked: int, machines: int, started: int
) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": started, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    message = rf"got {processes_asked * machines}; expected {started}, as WORLD_SIZE .*unset RANK, WORLD_SIZE, MASTER"
    with pytest.raises(HostError, match=message):
        launching.launch(lambda: None, processes_asked, num_machines=machines)


def test_s09_a_described_group_of_one_just_calls_main(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    called: list[int] = []
    launching.launch(lambda: called.append(1), 1)
    assert called == [1]


def test_s09_one_process_just_calls_main() -> None:
    from fastreid.engine import launch

    called: list[Any] = []
    launch(lambda *args: called.append(args), 1, args=(1, 2))
    assert called == [(1, 2)]


def test_s09_both_names_of_the_hosts_launch_are_replaced() -> None:
    import fastreid.engine

    assert fastreid.engine.launch is launching.launch
    assert sys.modules["fastreid.engine.launch"].launch is launching.launch


def test_s09_a_child_runs_only_the_call_it_was_started_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setenv(launching.LAUNCHED_VARIABLE, "2")
    monkeypatch.setattr(launching, "_calls", 0)
    monkeypatch.setattr(processes, "exit_with_parent", lambda: None)
    monkeypatch.setattr(launching, "_run_in_group", lambda main, args, local_size: main())
    launching.launch(lambda: ran.append("first"), 2)
    with pytest.raises(SystemExit) as caught:
        launching.launch(lambda: ran.append("second"), 2)
    assert caught.value.code == 0
    assert ran == ["second"]


def test_s09_without_a_script_it_says_so() -> None:
    with pytest.raises(HostError, match=r"running the script again.*python -m qsd_plugin\.run SCRIPT.*torchrun"):
        launching.launch(lambda: None, 2)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, str]]:
    """Environments of the children that ``launch`` would start."""
    started: list[dict[str, str]] = []
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(script), "--flag"])
    # A test process started by pytest-xdist is no script of its own.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(processes, "run_all", lambda command, environments: started.extend(environments))
    return started


def test_s09_children_of_the_second_machine_get_their_global_ranks(children: list[dict[str, str]]) -> None:
    launching.launch(lambda: None, 2, num_machines=3, machine_rank=1, dist_url="tcp://10.0.0.5:4321")
    assert [(child["RANK"], child["LOCAL_RANK"]) for child in children] == [("2", "0"), ("3", "1")]
    for child in children:
        assert (child["WORLD_SIZE"], child["LOCAL_WORLD_SIZE"]) == ("6", "2")
        assert (child["MASTER_ADDR"], child["MASTER_PORT"]) == ("10.0.0.5", "4321")
        assert child["QSD_PLUGIN_HOST"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_s09_a_taken_port_is_replaced_on_one_machine(children: list[dict[str, str]], taken_port: int) -> None:
    launching.launch(lambda: None, 2, dist_url=f"tcp://127.0.0.1:{taken_port}")
    assert children[0]["MASTER_PORT"] == children[1]["MASTER_PORT"] != str(taken_port)
    free = processes.free_port()
    launching.launch(lambda: None, 2, dist_url=f"tcp://127.0.0.1:{free}")
    assert children[-1]["MASTER_PORT"] == str(free)


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize(("url", "machines"), [("auto", 2), (None, 2), ("file:///tmp/store", 1), ("tcp://host", 1)])
def test_s09_other_meeting_points_are_refused(url: str | None, machines: int) -> None:
    with pytest.raises(HostError, match=r"Meeting point.*expected tcp://HOST:PORT"):
        launching.launch(lambda: None, 2, num_machines=machines, dist_url=url)


def test_s09_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(HostError, match=r"--num-gpus\): got 2; expected at most 1.*CUDA_VISIBLE_DEVICES"):
        launching.launch(lambda: None, 2)
