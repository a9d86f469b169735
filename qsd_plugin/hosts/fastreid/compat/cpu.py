"""Training options that only exist on CUDA: mixed precision (S08) and synchronised batch norm (S10) without it."""

from __future__ import annotations

import logging
from typing import Any

from qsd_plugin.hosts.fastreid.compat.loading import no_cuda
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, replace

_logger = logging.getLogger("fastreid.qsd_plugin")  # below the host's logger, so that its handlers print it


def _train_in_full_precision() -> Undo:
    import fastreid.engine.defaults
    from fastreid.engine.train_loop import SimpleTrainer

    def full_precision_trainer(
        model: Any, data_loader: Any, optimizer: Any, param_wrapper: Any, grad_scaler: Any = None
    ) -> Any:
        # Not bfloat16 autocast: CPUs without matrix units for it are slower with it, and results would differ.
        _logger.warning("SOLVER.AMP.ENABLED is ignored without CUDA: this run trains in full precision (float32).")
        return SimpleTrainer(model, data_loader, optimizer, param_wrapper)

    return replace(fastreid.engine.defaults, "AMPTrainer", full_precision_trainer)


def _normalise_per_process() -> Undo:
    import fastreid.layers.batch_norm as host

    told = False

    def per_process_batch_norm(num_features: int, **kwargs: Any) -> Any:
        nonlocal told
        if not told:
            told = True
            _logger.warning("Norm 'syncBN' needs CUDA: batch norm ('BN') uses the statistics of each process instead.")
        return host.BatchNorm(num_features, **kwargs)

    return replace(host, "SyncBatchNorm", per_process_batch_norm)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S08",
        where="engine/train_loop.py:335",
        symptom="AssertionError: CUDA is required for AMP training (the host's Base-*.yml files switch AMP on).",
        action="Without CUDA SOLVER.AMP.ENABLED trains in float32 and says so in one line.",
        needed=no_cuda,
        apply=_train_in_full_precision,
        proof="test_s08_amp_without_cuda_trains_in_full_precision",
    ),
    Patch(
        row="S10",
        where="layers/batch_norm.py:26,200",
        symptom="ValueError: SyncBatchNorm layers only work with GPU modules, in every CPU run with several processes.",
        action="Without CUDA norm 'syncBN' builds 'BN' (same parameters and state-dict keys) and says so in one line.",
        needed=no_cuda,
        apply=_normalise_per_process,
        proof="test_s10_syncbn_becomes_bn_without_cuda",
    ),
)
