"""What QGFace may change from epoch to epoch: threshold, weight of the contrastive loss, size of the queue.

The authors' program has these switches, but their values were never published. Everything follows from the epoch
(from 0), so there is no state to resume.
"""

from __future__ import annotations

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.qgface.gates import check_threshold


def threshold_at(epoch: int, *, threshold: float, warmup_epochs: int = 0) -> float:
    """Quality threshold b that grows linearly from 0 in epoch 0 to ``threshold`` in epoch ``warmup_epochs``.

    Raises:
        ConfigError: The threshold lies outside [0, 1], or an epoch is negative.
    """
    check_threshold(threshold)
    _check_epochs(epoch=epoch, warmup_epochs=warmup_epochs)
    return threshold if epoch >= warmup_epochs else threshold * epoch / warmup_epochs


def contrast_weight_at(
    epoch: int, *, weight: float = 1.0, start_epoch: int = 0, stop_epoch: int | None = None
) -> float:
    """Weight lambda of the contrastive loss: 0 before ``start_epoch`` and from ``stop_epoch`` on.

    The queue is to be filled all the same, so that it is full when the loss starts.

    Raises:
        ConfigError: An epoch is negative.
    """
    _check_epochs(epoch=epoch, start_epoch=start_epoch, stop_epoch=stop_epoch or 0)
    stopped = stop_epoch is not None and epoch >= stop_epoch
    return 0.0 if epoch < start_epoch or stopped else weight


def queue_limit_at(epoch: int, *, size: int, smallest: int, epochs: int) -> int:
    """Entries of the queue that count, for :attr:`~.queue.ProxyQueue.limit`: linear up to ``size`` in the last epoch.

    Args:
        epoch: From 0.
        size: Slots of the queue.
        smallest: In epoch 0, 1 to ``size``; at least the embeddings of one step.
        epochs: Of the whole training, >= 1; with one, all slots count.

    Raises:
        ConfigError: An epoch is negative, or ``smallest`` does not fit.
    """
    _check_epochs(epoch=epoch, epochs=epochs)
    if not 1 <= smallest <= size:
        raise ConfigError("QGFace smallest queue", value=smallest, expected=f"1 to the queue's size {size}")
    return size if epoch >= epochs - 1 else smallest + (size - smallest) * epoch // (epochs - 1)


def _check_epochs(**epochs: int) -> None:
    for name, value in epochs.items():
        if value < 0:
            raise ConfigError(f"QGFace {name}", value=value, expected=">= 0")
