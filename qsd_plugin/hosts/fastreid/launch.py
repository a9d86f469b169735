"""The host's ``launch()`` with child processes that are activated before they import the host.

The host starts children by ``multiprocessing.spawn``, which imports the host in each child before anything of ours can
run, and only knows NCCL. Here every child runs the user's script again through :mod:`qsd_plugin.run`, in an environment
such as torchrun makes; the same call of ``launch()`` then joins the process group (gloo without CUDA) and runs
``main_func``.
A script started by torchrun, or by anything else that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, joins in the
same way.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.fastreid import processes

#: Set for the children of a ``launch()``: which call of the script they are for, counted from 1.
LAUNCHED_VARIABLE = "QSD_PLUGIN_LAUNCHED"

#: What describes a process group, as torchrun sets it.
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_logger = logging.getLogger("fastreid.qsd_plugin")
_calls = 0  # of launch() with several processes, in this process


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: Sequence[Any] = (),
) -> None:
    """Run ``main_func(*args)`` in every process of a training; replaces ``fastreid.engine.launch``.

    Args:
        main_func: The script's main function.
        num_gpus_per_machine: Processes per machine; on the CPU as well, where each is one gloo process.
        num_machines: Machines that take part; this must be called on each of them.
        machine_rank: Number of this machine, from 0.
        dist_url: ``tcp://HOST:PORT`` of machine 0, or ``auto`` on a single machine. A port that is taken on a single
            machine is replaced by a free one.
        args: Arguments of ``main_func``.

    Raises:
        HostError: The processes cannot be started as asked.
        SystemExit: A child failed (its exit code), or this is a child and its work is done.
    """
    global _calls
    if LAUNCHED_VARIABLE not in os.environ and all(name in os.environ for name in GROUP_VARIABLES):
        _check_group(num_gpus_per_machine, num_machines)
        _run_in_group(main_func, args, local_size=num_gpus_per_machine)
        return
    if num_machines * num_gpus_per_machine == 1:
        main_func(*args)
        return
    _calls += 1
    if LAUNCHED_VARIABLE not in os.environ:
        _start_children(num_gpus_per_machine, num_machines, machine_rank, dist_url)
    elif int(os.environ[LAUNCHED_VARIABLE]) == _calls:
        processes.exit_with_parent()
        _run_in_group(main_func, args, local_size=num_gpus_per_machine)
        # What the script does after launch() is the parent's business, as it is with the host's spawned children.
        raise SystemExit(0)


def _check_group(num_processes: int, num_machines: int) -> None:
    """Refuse a command line that asks for other processes than the environment has started.

    Raises:
        HostError: It does.
    """
    asked, started = num_processes * num_machines, int(os.environ["WORLD_SIZE"])
    if "TORCHELASTIC_RUN_ID" in os.environ or asked in (1, started):
        return  # one is the default of the command line: torchrun has been told the number instead
    raise HostError(
        "Processes of the training (--num-gpus times --num-machines)",
        value=asked,
        expected=f"{started}, as WORLD_SIZE in the environment says, or the options left out",
        remedy=f"If nothing has started these processes, unset {', '.join(GROUP_VARIABLES)}.",
    )


def _run_in_group(main_func: Callable[..., Any], args: Sequence[Any], *, local_size: int) -> None:
    """Join the process group that the environment describes, run ``main_func``, leave the group.

    Args:
        main_func: The script's main function.
        args: Its arguments.
        local_size: Processes per machine where ``LOCAL_WORLD_SIZE`` does not say.
    """
    import torch
    import torch.distributed as dist
    from fastreid.utils import comm

    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_size))
    local_rank = int(os.environ.get("LOCAL_RANK", rank % local_size))
    if world_size == 1:
        main_func(*args)
        return
    cuda = torch.cuda.is_available()
    if cuda:
        _require_devices(local_size)
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", init_method="env://", world_size=world_size, rank=rank)
    comm.synchronize()
    for first in range(0, world_size, local_size):
        group = dist.new_group(list(range(first, first + local_size)))
        if first <= rank < first + local_size:
            comm._LOCAL_PROCESS_GROUP = group
    main_func(*args)
    comm.synchronize()
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()


def _start_children(num_processes: int, num_machines: int, machine_rank: int, dist_url: str | None) -> None:
    import torch

    if torch.cuda.is_available():
        _require_devices(num_processes)
    address, port = _rendezvous(dist_url, num_machines)
    shared = {
        **_import_environment(),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_machines * num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        LAUNCHED_VARIABLE: str(_calls),
    }
    if not torch.cuda.is_available():
        # Otherwise every process starts a thread per core, and all of them wait for each other.
        threads = max(1, (os.cpu_count() or 1) // num_processes)
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-m", "qsd_plugin.run", str(_script()), *sys.argv[1:]]
    processes.run_all(
        command,
        [
            {**shared, "RANK": str(machine_rank * num_processes + local_rank), "LOCAL_RANK": str(local_rank)}
            for local_rank in range(num_processes)
        ],
    )


def _script() -> Path:
    """The script to run again in the children.

    Raises:
        HostError: This program is no script: an interactive session, a notebook, ``python -c``, or pytest.
    """
    script = Path(sys.argv[0])
    is_program = getattr(sys.modules["__main__"], "__file__", None) is not None
    if not (is_program and script.is_file()) or "pytest" in (script.stem, script.parent.name):
        raise HostError(
            "Several processes are started by running the script again, and this program is not one",
            value=sys.argv[0],
            expected="python SCRIPT ... or python -m qsd_plugin.run SCRIPT ...",
            remedy="Put the call of launch() into a Python file and run that, or use torchrun, or one process.",
        )
    return script


def _import_environment() -> dict[str, str]:
    """Variables with which a child finds this plugin and the host that is loaded here."""
    import sysconfig

    import fastreid

    import qsd_plugin

    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    host, plugin = (str(Path(str(package.__file__)).parents[1]) for package in (fastreid, qsd_plugin))
    variables = {"QSD_PLUGIN_HOST": os.environ.get("QSD_PLUGIN_HOST", "wheel" if host in installed else host)}
    if plugin not in installed:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), plugin)))
    return variables


def _require_devices(count: int) -> None:
    import torch

    if count > torch.cuda.device_count():
        raise HostError(
            "Processes per machine (--num-gpus)",
            value=count,
            expected=f"at most {torch.cuda.device_count()}, the number of CUDA devices here",
            remedy="Hide the devices with CUDA_VISIBLE_DEVICES= to run that many processes on the CPU.",
        )


def _rendezvous(dist_url: str | None, num_machines: int) -> tuple[str, int]:
    """Address and port of the process group's meeting point."""
    if dist_url in (None, "auto"):
        if num_machines == 1:
            return "127.0.0.1", processes.free_port()
        dist_url = str(dist_url)
    parts = urlsplit(str(dist_url))
    if parts.scheme != "tcp" or parts.hostname is None or parts.port is None:
        raise HostError(
            "Meeting point of the processes (--dist-url)",
            value=dist_url,
            expected="tcp://HOST:PORT of machine 0" + (", or 'auto'" if num_machines == 1 else ""),
        )
    if num_machines == 1 and not processes.port_is_free(parts.hostname, parts.port):
        port = processes.free_port()
        _logger.warning(f"Port {parts.port} of --dist-url is taken (another training?): using {port} instead.")
        return parts.hostname, port
    return parts.hostname, parts.port
