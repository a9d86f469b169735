"""A projection that is trained: the directions of an embedding that tell the people of the training images apart.

PCA (:func:`~qsd_plugin.export.projection.fit_pca`) keeps the cosines; this keeps what separates identities. The network
is not touched: only the linear layer behind its normalised embedding is trained, on embeddings that are computed once.

Shapes: N images, D length of the embedding, K length after projection, C identities.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ExportError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.export.projection import Projection, fit_pca

#: Passes over the embeddings, at least so many steps, and embeddings per step.
EPOCHS, STEPS, BATCH = 20, 600, 256
#: Factor on the cosines to the class centres.
SCALE = 24.0
#: Adam's rate relative to the size of the numbers it starts from (rows have length 1); falls to zero along a cosine.
RATE = 0.02


def train_linear(embeddings: Tensor, identities: Sequence[Hashable], dimension: int, *, seed: int = 0) -> Projection:
    """A linear layer trained with a normalised softmax over the identities (NormFace: Wang et al., ACM MM 2017).

    It starts as the PCA, and the class centres as the means of their projected embeddings, so that few steps are
    needed. The same embeddings and seed give the same layer.

    Args:
        embeddings: [N, D] of any lengths, D > K.
        identities: Of each, [N]; at least two.
        dimension: K.
        seed: For the order of the embeddings.

    Raises:
        ExportError: As :func:`fit_pca`; or one identity only.
    """
    known = {identity: number for number, identity in enumerate(dict.fromkeys(identities))}
    if len(known) < 2:
        raise ExportError(
            "Identities to train the projection on", value=len(known), expected="at least two, thousands are better"
        )
    labels = torch.tensor([known[identity] for identity in identities])
    start = fit_pca([embeddings], dimension)
    unit = F.normalize(embeddings.detach().cpu().float())
    layer = nn.Parameter(start.matrix.clone())
    centres = nn.Parameter(_means(F.normalize(unit @ start.matrix.T), labels, len(known)))
    groups = [{"params": [rows], "lr": RATE / math.sqrt(rows.shape[1])} for rows in (layer, centres)]
    optimizer = torch.optim.Adam(groups)
    per_epoch = math.ceil(len(unit) / BATCH)
    epochs = max(EPOCHS, math.ceil(STEPS / per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for epoch in range(epochs):
        order = torch.randperm(len(unit), generator=torch_stream(seed, "projection", epoch))
        for rows in torch.split(order, BATCH):
            cosines = F.normalize(unit[rows] @ layer.T) @ F.normalize(centres).T
            optimizer.zero_grad()
            F.cross_entropy(SCALE * cosines, labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return Projection(layer.detach().contiguous(), None, "trained", images=len(unit), identities=len(known))


def _means(vectors: Tensor, labels: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, vectors.shape[1]).index_add_(0, labels, vectors)
    return F.normalize(sums)
