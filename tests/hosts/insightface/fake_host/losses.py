"""The host's margin: ArcFace in place under no_grad, CosFace with its gradient."""

import torch


class CombinedMarginLoss(torch.nn.Module):
    def __init__(self, s, m1, m2, m3, interclass_filtering_threshold=0):
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3

    def forward(self, logits, labels):
        index = torch.where(labels != -1)[0]
        own = labels[index].view(-1)
        if self.m1 == 1.0 and self.m3 == 0.0:
            with torch.no_grad():
                logits.arccos_()
                logits[index, own] += self.m2
                logits.cos_()
            return logits * self.s
        logits[index, own] = logits[index, own] - self.m3
        return logits * self.s
