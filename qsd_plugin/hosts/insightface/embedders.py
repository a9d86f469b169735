"""Networks of packages as the ``insightface`` runtime loads them, for whole test sets.

Pictures are 8-bit BGR [H, W, 3] of any size, as the runtime takes them; it resizes them in its own way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.export import packages
from qsd_plugin.hosts.insightface.runtime import CPU, Picture, quiet, require_insightface


def recogniser(package: Path) -> Callable[[Sequence[Picture]], Any]:
    """``get_model`` of a package: aligned faces, N of them, to embeddings [N, D], not normalised.

    Raises:
        HostError: ``insightface`` is missing.
    """
    require_insightface()
    model_zoo = importlib.import_module("insightface.model_zoo")
    with quiet():
        model = model_zoo.get_model(str(package), model_task=packages.RECOGNITION, providers=CPU)
    return lambda images: model.get_feat(list(images))


def person_embedder(package: Path) -> Callable[[Picture], Any]:
    """``PersonReID`` of a package: a picture of a person to an embedding [256] of length 1.

    Raises:
        HostError: ``insightface`` is missing.
    """
    require_insightface()
    person_reid = importlib.import_module("insightface.model_zoo.person_reid")
    embed: Callable[[Picture], Any] = person_reid.PersonReID(packages.person_descriptor(package), CPU).embed
    return embed
