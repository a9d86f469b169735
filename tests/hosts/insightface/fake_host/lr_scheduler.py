"""Linear decay after a warm-up, with the argument that torch has dropped."""

from torch.optim.lr_scheduler import _LRScheduler


class PolynomialLRWarmup(_LRScheduler):
    def __init__(self, optimizer, warmup_iters, total_iters=5, power=1.0, last_epoch=-1, verbose=False):
        super().__init__(optimizer, last_epoch=last_epoch, verbose=verbose)
        self.total_iters, self.warmup_iters = total_iters, warmup_iters

    def get_lr(self):
        if self.last_epoch == 0 or self.last_epoch > self.total_iters:
            return [group["lr"] for group in self.optimizer.param_groups]
        left = self.total_iters - self.warmup_iters
        done = self.last_epoch - self.warmup_iters
        factor = (1 - done / left) / (1 - (done - 1) / left)
        return [group["lr"] * factor for group in self.optimizer.param_groups]
