"""Do the parameters move? Asked once per trainer, after its second update."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qsd_plugin.core.errors import HostError

if TYPE_CHECKING:
    import torch

_UPDATES = 2  # as documented: "at run time the second iteration asserts it"
_SAMPLES = 4096  # elements per tensor that are compared; a copy of everything would cost a model's memory


class LearningCheck:
    """Watches a trainer's first updates and raises when they leave the model as it was.

    Groups that are frozen (``freeze_status``), have a learning rate of 0 or gradients that are all 0 are not expected
    to move; an update that the gradient scaler skipped does not count.

    Args:
        optimizer: The trainer's optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[list[torch.Tensor]] | None = None
        self._updates = 0

    def run(self, run_step: Callable[[], None], scaler: Any = None) -> bool:
        """Run one training step; ``True`` when the question is answered and the check can be dropped.

        Args:
            run_step: The host's training step.
            scaler: The trainer's gradient scaler, if it has one.

        Raises:
            HostError: Two updates were made and nothing can have been learnt.
        """
        if self._before is None:
            self._before = [[_sample(tensor) for tensor in group["params"]] for group in self._optimizer.param_groups]
        expected = any(_may_move(group) for group in self._optimizer.param_groups)
        scale = scaler.get_scale() if scaler is not None else None
        try:
            run_step()
        except AssertionError as error:
            # GradScaler finds no gradient at all in what the optimizer holds.
            if "No inf checks" in str(error):
                raise _nothing_learnt("the gradient scaler finds no gradient in the optimizer") from error
            raise
        skipped = scale is not None and scaler.get_scale() < scale
        self._updates += expected and not skipped
        if self._updates < _UPDATES:
            return False
        self._require_movement()
        return True

    def _require_movement(self) -> None:
        assert self._before is not None
        groups = [
            (tensors, before)
            for group, before in zip(self._optimizer.param_groups, self._before, strict=True)
            if _may_move(group)
            for tensors in (group["params"],)
        ]
        if all(tensor.grad is None for tensors, _ in groups for tensor in tensors):
            raise _nothing_learnt(
                "no tensor of the optimizer holds a gradient, because zero_grad() dropped the buffers they are kept in"
            )
        pairs = [(now, then) for tensors, before in groups for now, then in zip(tensors, before, strict=True)]
        if any(not _sample(now).equal(then) for now, then in pairs):
            return
        if any(now.grad is not None and bool(now.grad.any()) for now, _ in pairs):
            raise _nothing_learnt(f"gradients arrive, but {_UPDATES} updates left every parameter as it was")


def _may_move(group: dict[str, Any]) -> bool:
    return float(group["lr"]) > 0 and group.get("freeze_status") != "freeze"


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()


def _nothing_learnt(finding: str) -> HostError:
    return HostError(
        f"This training would silently learn nothing: {finding}",
        remedy="Unset QSD_PLUGIN_DISABLE if it names S01; in a trainer of your own call "
        "optimizer.zero_grad(set_to_none=False), because fast-reid keeps gradients in flat buffers.",
    )
