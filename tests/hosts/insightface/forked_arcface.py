"""Trains with an arcface_torch tree again and again, each time in new processes forked off one that has imported torch.

A line of JSON on standard input is a training, the line that answers it are the exit codes of its processes. Keys:
``root``, the tree; ``config``, a file; ``log``, the file for the output; ``port``, a free one; ``folder``, to run in;
``processes``; ``plain``: run the tree's script as it is, with what a machine without GPU needs and nothing else; where
it is ``"alone"``, with what it needs to get to its end on current stacks, too, for a config that does not activate.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import torch.distributed  # noqa: F401  what takes long is done once
import torchvision.datasets  # noqa: F401

from qsd_plugin.hosts.insightface import STANDINS, checkout, compat, launcher, shims_cpu

#: Without these the script stops at its schedule, or at its first verification.
ALONE = ("schedule", "interpolation")
TOOL = str(Path(__file__).parents[3] / "tools" / "train_arcface.py")


def run_plain(root: Path, config: str, alone: bool) -> None:
    """``python train_v2.py configs/NAME`` with a config of one's own, on a machine that could be one with a GPU."""
    sys.path.insert(0, str(STANDINS))
    with checkout.on_path(root):
        for shim in compat.SHIMS:
            if shim.needed is shims_cpu.no_cuda or (alone and shim.name in ALONE and shim.needed()):
                shim.apply()
        sys.modules.pop("configs", None)
        package = checkout.host_module("configs")
        package.__path__.append(str(Path(config).parent))
        sys.argv = ["train_v2.py", f"configs/{Path(config).stem}"]
        runpy.run_path(str(root / "train_v2.py"), run_name="__main__")


def train(job: dict[str, Any], rank: int) -> None:
    """What a forked process does."""
    output = os.open(job["log"] + (f".{rank}" if rank else ""), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    if job["processes"] > 1 or job.get("plain"):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": job["port"]}
        os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
    if job.get("plain"):
        run_plain(Path(job["root"]), job["config"], job["plain"] == "alone")
        return
    sys.argv = [TOOL, "--host-root", job["root"], job["config"]]
    runpy.run_path(TOOL, run_name="__main__")


def main() -> None:
    """Entry point."""
    assert launcher
    if os.environ.get("QSD_TEST_ARCFACE"):  # a checkout's verification takes a second to import this
        with contextlib.suppress(ImportError):
            importlib.import_module("sklearn.model_selection")
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(job["processes"]):
            child = os.fork()
            if not child:
                code = 0
                try:
                    train(job, rank)
                except SystemExit as error:
                    code = int(error.code or 0)
                except BaseException:
                    traceback.print_exc()
                    code = 1
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)  # taking torch down takes longer than such a training
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
