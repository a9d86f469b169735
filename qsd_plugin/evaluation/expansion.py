"""Alpha query expansion: every embedding is replaced by a weighted mean of its nearest neighbours.

Chum et al., ICCV 2007, "Total recall"; weights ``similarity ** alpha`` after Radenovic et al., TPAMI 2019, section 5.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.evaluation.arrays import Matrix, to_features
from qsd_plugin.evaluation.neighbours import nearest


@torch.no_grad()
def expand_queries(
    query: Matrix, gallery: Matrix, *, times: int = 1, neighbours: int = 5, alpha: float = 3.0, rows: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand queries and gallery alike, as fast-reid's ``TEST.AQE`` does.

    Args:
        query: Embeddings [Q, D]; their norms count, neighbours are searched by cosine.
        gallery: Embeddings [G, D].
        times: Number of rounds (``TEST.AQE.QE_TIME``).
        neighbours: Embeddings averaged, the own one included (``TEST.AQE.QE_K``); all where there are fewer.
        alpha: Exponent of the cosine weights (``TEST.AQE.ALPHA``). With an exponent that is not a whole number,
            neighbours of negative cosine weigh nothing.
        rows: Embeddings averaged at a time.

    Returns:
        The expanded queries and gallery, not normalised.

    Raises:
        ConfigError: A negative number of rounds, or less than one neighbour.
    """
    if times < 0:
        raise ConfigError("Number of query expansion rounds", value=times, expected="0 or more")
    if neighbours < 1:
        raise ConfigError("Number of query expansion neighbours", value=neighbours, expected="1 or more")
    query, gallery = to_features(query), to_features(gallery)
    features = torch.cat((query, gallery))
    neighbours = min(neighbours, len(features))
    for _ in range(times):
        similarity, index = nearest(F.normalize(features), neighbours, similarity="inner")
        if not float(alpha).is_integer():
            similarity.clamp_min_(0)
        weights = similarity.pow_(alpha).div_(neighbours).unsqueeze(1)
        starts = range(0, len(features), rows)
        parts = [torch.bmm(weights[i : i + rows], features[index[i : i + rows]]).squeeze(1) for i in starts]
        features = torch.cat(parts)
    return features[: len(query)], features[len(query) :]
