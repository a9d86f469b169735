"""Collects the statistics that methods return and writes them to the host's event storage at the logging period."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import torch

logger = logging.getLogger("fastreid.qsd_plugin.statistics")


class Statistics:
    """Running means on the device; the only synchronisation is one transfer per ``period`` steps.

    Args:
        prefix: Put in front of every name, with a slash.
        period: Steps between two writes; the host's own writers run every 200 steps and at the end of an epoch.
        watch: Called at each write with the means (names without prefix) and the number of steps they are of; returns
            warnings for the log, and may raise.
    """

    def __init__(
        self,
        prefix: str,
        *,
        period: int = 20,
        watch: Callable[[Mapping[str, float], int], Iterable[str]] | None = None,
    ) -> None:
        self.prefix = prefix
        self.period = period
        self._watch = watch
        # One vector for each set of names, of which there is one as a rule; adding value by value would be slow.
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._steps = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add one step's 0-d tensors; every ``period`` steps their means go to the host's event storage."""
        if values:
            names = tuple(values)
            with torch.no_grad():
                self._sums[names] = self._sums.get(names, 0.0) + torch.stack(list(values.values())).float()
        self._steps += 1
        if self._steps >= self.period:
            self.flush()

    def flush(self) -> dict[str, float]:
        """Write the means of the steps since the last write, forget them and return them."""
        from fastreid.utils import events

        if not self._steps:
            return {}
        values = (torch.cat(list(self._sums.values())) / self._steps).tolist() if self._sums else []
        means, steps = dict.fromkeys(chain(*self._sums), 0.0), self._steps
        for name, value in zip(chain(*self._sums), values, strict=True):
            means[name] += value
        self._sums, self._steps = {}, 0
        for warning in self._watch(means, steps) if self._watch else ():
            logger.warning(warning)
        written = {f"{self.prefix}/{name}": mean for name, mean in means.items()}
        if events._CURRENT_STORAGE_STACK:
            events.get_event_storage().put_scalars(**written)
        return written
