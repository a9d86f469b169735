"""Several processes, with and without CUDA (S09); the replacement itself is ``qsd_plugin.hosts.fastreid.launch``."""

from __future__ import annotations

import sys
from typing import Any

from qsd_plugin.hosts.fastreid.compat.loading import no_cuda
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together


def _replace_launch() -> Undo:
    import fastreid.engine
    import fastreid.engine.defaults
    from torch.nn.parallel import DistributedDataParallel

    from qsd_plugin.hosts.fastreid.launch import launch

    def distributed_on_cpu(model: Any, device_ids: Any = None, **kwargs: Any) -> Any:
        return DistributedDataParallel(model, **kwargs)

    # The package's attribute `launch` is the function: its star import hides the submodule of that name.
    undos = [replace(owner, "launch", launch) for owner in (sys.modules["fastreid.engine.launch"], fastreid.engine)]
    if no_cuda():
        undos.append(replace(fastreid.engine.defaults, "DistributedDataParallel", distributed_on_cpu))
    return together(*undos)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S09",
        where="engine/launch.py:77,81,91; engine/defaults.py:211",
        symptom="--num-gpus 2 without CUDA: AssertionError; with CUDA the spawned children import the host unpatched.",
        action="launch() runs the script in each child through qsd_plugin.run; without CUDA gloo and no device ids.",
        needed=always,
        apply=_replace_launch,
        proof="test_s09_two_gloo_processes_train_the_same_model",
    ),
)
