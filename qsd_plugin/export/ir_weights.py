"""Files of AdaFace and QGFace: the IR network under a prefix, and beside it the head that trained it.

Both authors save Lightning checkpoints. AdaFace's network is below ``model.``, QGFace's below ``backbone.``; the head's
class centres are ``head.kernel`` [D, C] in both, its norm statistics ``head.batch_mean`` and ``head.batch_std``. Both
networks see BGR images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qsd_plugin.core.errors import CheckpointError
from qsd_plugin.networks.ir import IR_UNITS

#: ``MODEL.BACKBONE.DEPTH`` of each network of :data:`~qsd_plugin.networks.ir.IR_UNITS`.
IR_DEPTHS: Mapping[str, str] = {
    "18x": "ir_18",
    "34x": "ir_34",
    "50x": "ir_50",
    "100x": "ir_101",
    "se_50x": "ir_se_50",
}
#: What stands before the network's names in each author's files.
PREFIXES: Mapping[str, str] = {"adaface": "model.", "qgface": "backbone."}
#: fast-reid's names of the norm statistics of our heads.
STATISTICS = "heads.statistics."

_FIRST, _LAST = "input_layer.0.weight", "output_layer.3.weight"
_IR = {_FIRST, _LAST, "body.0.res_layer.4.weight"}
_KERNEL = "head.kernel"
_CENTRES = "heads.weight"
_MOMENTS = {"mean": "head.batch_mean", "std": "head.batch_std"}
#: Updates that a file's statistics stand for, which it does not count; after so many a start is long forgotten.
_SETTLED = 10_000


class IRFile(NamedTuple):
    """What is in a file.

    Args:
        weights: Under fast-reid's names, for RGB images.
        sources: The name in the file of each entry of ``weights`` that comes from it.
        network: Values of ``MODEL.BACKBONE`` that build the network.
        notes: What else a user must know.
    """

    weights: dict[str, Tensor]
    sources: dict[str, str]
    network: str
    notes: tuple[str, ...]


def is_ir(weights: Mapping[str, Tensor], source: str) -> bool:
    """Whether the names are those of an IR network in a file of ``source``, or of one without any prefix."""
    ours = any(name.startswith("heads.") for name in weights)  # a checkpoint of fast-reid, which has the prefix, too
    return not ours and (weights.keys() >= {PREFIXES[source] + name for name in _IR} or weights.keys() >= _IR)


def is_bare_ir(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of an IR network alone, without any prefix."""
    return weights.keys() >= _IR


def ir_units(network: Mapping[str, Tensor]) -> tuple[tuple[int, ...], bool]:
    """Units of the four stages, and whether they end in squeeze-excite.

    Args:
        network: State dict for which :func:`is_bare_ir` is true.
    """
    base = len(network[_FIRST])
    last = ".res_layer.4.weight"
    widths = Counter(
        len(tensor) for name, tensor in network.items() if name.startswith("body.") and name.endswith(last)
    )
    excite = any(".res_layer.6." in name for name in network)
    return tuple(widths[base * 2**stage] for stage in range(4)), excite


def turned_round(network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network for images with the channels in the opposite order: RGB, or BGR as in the authors' files."""
    return {**network, _FIRST: network[_FIRST].flip(1)}


def read_ir(weights: Mapping[str, Tensor], source: str) -> IRFile:
    """Take a file apart.

    Args:
        weights: State dict for which :func:`is_ir` is true.
        source: ``"adaface"`` or ``"qgface"``.

    Raises:
        CheckpointError: The class centres do not fit the network.
    """
    prefix = "" if weights.keys() >= _IR else PREFIXES[source]
    parts = ("input_layer.", "body.", "output_layer.")
    names = [name for name in weights if name.startswith(tuple(prefix + part for part in parts))]
    own = {name.removeprefix(prefix): weights[name] for name in names}
    network = _describe(own)
    own = turned_round(own)
    renamed = {f"backbone.{name}": tensor for name, tensor in own.items()}
    sources = dict(zip(renamed, names, strict=True))
    notes = [
        f"MODEL.BACKBONE {network}.",
        "Colour order: the authors' network sees BGR. The three slices of its first layer were swapped, so that this "
        "one sees RGB. It expects aligned faces of 112 x 112 pixels.",
    ]
    if _KERNEL in weights:
        renamed[_CENTRES], sources[_CENTRES] = _centres(weights[_KERNEL], len(own[_LAST])), _KERNEL
        notes.append(
            f"Classifier of {len(renamed[_CENTRES])} identities, in the order of the authors' training set. A run on "
            "others does without: --drop-classifier."
        )
    if all(name in weights for name in _MOMENTS.values()):
        moments = {key: weights[name].float().mean() for key, name in _MOMENTS.items()}
        renamed |= {STATISTICS + key: value for key, value in moments.items()}
        sources |= {STATISTICS + key: name for key, name in _MOMENTS.items()}
        renamed[f"{STATISTICS}updates"] = torch.tensor(_SETTLED)
        notes.append(
            f"Norms had mean {moments['mean']:.4g} and deviation {moments['std']:.4g}: AdaFaceHead and QGFaceHead go "
            "on with these, other heads keep none."
        )
    left_out = [name for name in weights if name not in set(sources.values())]
    if left_out:
        notes.append(f"Left out: {len(left_out)} entries beside network and head (first {left_out[0]}).")
    return IRFile(renamed, sources, network, tuple(notes))


def _centres(kernel: Tensor, dim: int) -> Tensor:
    if kernel.dim() != 2 or len(kernel) != dim:
        raise CheckpointError(
            f"{_KERNEL} of the file", value=tuple(kernel.shape), expected=f"class centres [{dim}, classes]"
        )
    return kernel.t().contiguous()


def _describe(network: Mapping[str, Tensor]) -> str:
    units, excite = ir_units(network)
    fitting = [
        depth for depth, name in IR_DEPTHS.items() if IR_UNITS[name] == units and excite == name.startswith("ir_se")
    ]
    depth = fitting[0] if fitting else f"of units {units}{' with squeeze-excite' if excite else ''}"
    return f"NAME build_ir_backbone DEPTH {depth} WIDTH {len(network[_FIRST]) / 64:g} FEAT_DIM {len(network[_LAST])}"
