"""Image transforms whose torchvision arguments were renamed (S11)."""

from __future__ import annotations

import inspect
import types
from typing import Any

from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, replace


def _random_affine_was_renamed() -> bool:
    from torchvision.transforms import RandomAffine

    return "resample" not in inspect.signature(RandomAffine.__init__).parameters


def _adapt_random_affine() -> Undo:
    import fastreid.data.transforms.build as host
    import torchvision.transforms
    from torchvision.transforms import InterpolationMode, RandomAffine

    # PIL's numbers, which torchvision took before it had names of its own.
    modes = {0: InterpolationMode.NEAREST, 2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}

    def random_affine(*args: Any, resample: int = 0, fillcolor: Any = 0, **kwargs: Any) -> Any:
        return RandomAffine(*args, interpolation=modes[int(resample)], fill=fillcolor, **kwargs)

    # Only the host's name `T` changes, not torchvision.
    adapted = types.SimpleNamespace(**{**vars(torchvision.transforms), "RandomAffine": random_affine})
    return replace(host, "T", adapted)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S11",
        where="data/transforms/build.py:81",
        symptom="INPUT.AFFINE.ENABLED: TypeError: unexpected keyword argument 'resample'.",
        action="resample and fillcolor are passed to RandomAffine as interpolation and fill.",
        needed=_random_affine_was_renamed,
        apply=_adapt_random_affine,
        proof="test_s11_random_affine_takes_the_hosts_arguments",
    ),
)
