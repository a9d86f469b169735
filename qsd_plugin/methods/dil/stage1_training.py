"""Stage 1 without a host: the generator's optimizer, the order of phases, and a state that resumes exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.distributed import world_size
from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.methods.dil.adam import joined_mean, stepped_lr
from qsd_plugin.methods.dil.pairs import Pair, PhaseSchedule
from qsd_plugin.methods.dil.stage1 import Stage1


class Stage1Trainer:
    """Steps a :class:`~.stage1.Stage1` with an Adam of the authors' settings.

    Use: make a batch of the phase :meth:`next_phase` names, then ``terms = trainer.step(pair)``.

    Across ranks: gradients are averaged here, without a data-parallel wrapper; the ranks must start from the same
    weights and take batches of equal size, all of the same phase. Batch statistics are each rank's.

    Args:
        stage: What is trained.
        schedule: Which phase comes when.
        lr: Of encoders and generator.
        betas: Of their Adam.
        weight_decay: Of their Adam.
        milestones: Numbers of iterations behind which the learning rate falls to a tenth.

    Raises:
        ConfigError: On :meth:`step`, the batch is of another phase.
        CheckpointError: On :meth:`load_state_dict`, the state is of another schedule or seed.
    """

    def __init__(
        self,
        stage: Stage1,
        schedule: PhaseSchedule,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 5e-4,
        milestones: Sequence[int] = (20_000, 30_000, 35_000),
    ) -> None:
        self.stage, self.schedule = stage, schedule
        self.lr, self.milestones = lr, tuple(milestones)
        self._parameters: list[nn.Parameter] = [part for part in stage.parameters() if part.requires_grad]
        # Fused: a pass over each parameter and its moments instead of a dozen.
        self.optimizer = torch.optim.Adam(self._parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def next_phase(self) -> str:
        """The phase of the batch that :meth:`step` takes next."""
        return self.schedule.phase(self.stage.iteration + 1)

    def step(self, pair: Pair) -> dict[str, Tensor]:
        """One iteration: discriminators, then encoders and generator.

        Returns:
            Weighted terms of both sides, detached.
        """
        completed = self.stage.iteration
        expected = self.schedule.phase(completed + 1)
        if pair.phase != expected:
            raise ConfigError(
                f"DIL batch of iteration {completed + 1}: phase",
                value=pair.phase,
                expected=repr(expected),
                remedy="Ask next_phase() before making a batch.",
            )
        result = self.stage(pair)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(result.terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        self._average()
        for group in self.optimizer.param_groups:
            group["lr"] = stepped_lr(self.lr, completed, self.milestones)
        self.optimizer.step()
        return {**{name: term.detach() for name, term in result.terms.items()}, **result.stats}

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on exactly, torch's generators included: dropout draws from them."""
        return {
            "stage": self.stage.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": self._settings(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if state["settings"] != self._settings():
            raise CheckpointError(
                "DIL stage 1 state: phases and seed",
                value=state["settings"],
                expected=str(self._settings()),
                remedy="Resume with the settings the run was started with.",
            )
        self.stage.load_state_dict(state["stage"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.schedule), "stage_seed": self.stage.seed}

    def _average(self) -> None:
        """Over the ranks; what the phase does not reach has no gradient on any of them."""
        if world_size() == 1:
            return
        gradients = [part.grad for part in self._parameters if part.grad is not None]
        start, whole = 0, joined_mean(gradients)
        for gradient in gradients:
            gradient.copy_(whole[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
