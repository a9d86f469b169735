"""Published weights under fast-reid's names: what is in a file, whose it is, and how it fits a model.

Sources:
    ``agw``, ``qsd``: the person re-identification networks of Ye et al. (TPAMI 2021) and Ou et al. (TMM 2024), which
        have the same parts: ``base.*``, ``global_pool.p``, ``bottleneck.*``, ``classifier.weight``. Often the whole
        module is pickled. They need the backbone ``build_agw_backbone``.
    ``fastreid-zoo``: fast-reid's own model zoo, whose head had other names before version 1.3.
    ``arcface``: backbones of InsightFace's arcface_torch, IResNet (``build_iresnet_backbone``) and MobileFaceNet
        (``build_mobilefacenet_backbone``), as a bare state dict or in its training checkpoints.
    ``qud``: backbones of QUD's teachers and students: IResNets, named as arcface_torch's, and a MobileFaceNet of its
        own. Its ``transface-b`` and ``shufflemixfacenet`` are not built here and thus not converted.
    ``adaface``, ``qgface``: IR networks (``build_ir_backbone``) with the head that trained them, from the authors'
        training checkpoints, or without it. They see BGR; the first layer is turned round, so that ours see RGB.
"""

from __future__ import annotations

import functools
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsd_plugin.core.errors import CheckpointError, ConfigError, did_you_mean
from qsd_plugin.core.inert_pickle import Inert, StoredTensor, read_inert
from qsd_plugin.export.face_weights import describe_network, is_arcface, is_qud
from qsd_plugin.export.ir_weights import PREFIXES, is_ir, read_ir

#: fast-reid's name of the classifier, [num_classes, D].
CLASSIFIER = "heads.weight"

#: Pixel values are 0 to 255, RGB; ImageNet's statistics, with which AGW and QSD were trained.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

#: What face networks subtract and divide by: pixel values end up in -1 to 1.
FACE_PIXELS = (127.5, 127.5, 127.5)

_BACKBONE = "backbone."

_WRAPPERS = ("model", "state_dict", "net", "network", "state_dict_backbone")


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file under the names it gives them.

    Args:
        tensors: State dict, without the ``module.`` of a data-parallel wrapper.
        not_run: Functions the file wanted to call while it is loaded; none was.
    """

    tensors: dict[str, Tensor]
    not_run: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converted:
    """Weights under fast-reid's names.

    Args:
        weights: State dict.
        sources: The name in the file of each entry of ``weights``.
        pixel_mean: What the network subtracts, RGB, pixel values 0 to 255; ``None`` where the file does not say.
        pixel_std: What it divides by.
        notes: What else a user must know to get the published results.
        network: Values of ``MODEL.BACKBONE`` that build the network, for files of a whole backbone, which must be
            filled exactly (:func:`require_complete`); empty for others.
    """

    weights: dict[str, Tensor]
    sources: dict[str, str]
    pixel_mean: tuple[float, ...] | None
    pixel_std: tuple[float, ...] | None
    notes: tuple[str, ...]
    network: str = ""


@dataclass(frozen=True)
class Fit:
    """How converted weights fit a model; each entry is a name of the model or of the weights.

    Args:
        matched: In both, with the same shape.
        missing: In the model only: they keep their initial values.
        unexpected: In the weights only: they are left out.
        reshaped: In both with different shapes, name to (weights, model): left out.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def read_weights(path: Path) -> WeightFile:
    """The tensors of a checkpoint, a bare state dict or a pickled module.

    Files that ``torch.load`` reads in its safe mode are left to it; in all others every class and function is
    replaced by one that does nothing (:mod:`qsd_plugin.core.inert_pickle`).

    Raises:
        CheckpointError: The file is missing, damaged or holds no weights.
    """
    if not path.is_file():
        raise CheckpointError("Weights", value=str(path), expected="an existing file")
    calls: tuple[str, ...] = ()
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about formats, which the second reader names
                content: object = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # refused, or unreadable: the second reader tells which
            file = read_inert(path)
            content, calls = file.content, file.calls
        tensors = _find_tensors(content)
    except (pickle.UnpicklingError, RecursionError) as error:
        raise CheckpointError(
            f"Weights {path}",
            value=f"{path.stat().st_size} bytes that cannot be read ({error})",
            expected="a file written by torch.save",
            remedy="It may be cut off, a saved error page or a TorchScript archive: download it again, or save "
            "model.state_dict() with torch.save.",
        ) from error
    if not tensors:
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"Weights {path}", value=found, expected=f"a module, a state dict, or one under {' or '.join(_WRAPPERS)}"
        )
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return WeightFile(tensors, calls)


def convert(weights: Mapping[str, Tensor], source: str, *, title: str = "Weights") -> Converted:
    """Rename the weights of a published network to fast-reid's names.

    Args:
        weights: State dict under the source's names.
        source: One of :data:`SOURCES`.
        title: What the weights are to the user, for messages.

    Raises:
        ConfigError: Unknown source.
        CheckpointError: The names are not that source's; the message says whose they are.
    """
    if source not in SOURCES:
        raise ConfigError("Source of the weights", value=source, remedy=did_you_mean(source, SOURCES))
    if not _SIGNATURES[source](weights):
        fitting = [name for name, belongs in _SIGNATURES.items() if belongs(weights)]
        raise CheckpointError(
            f"{title} are not from {source}",
            value=list(weights)[:4],
            expected=f"names such as {_EXAMPLES[source]}",
            remedy=f"They look like {' or '.join(fitting)}: pass --from {fitting[0]}."
            if fitting
            else "They look like none of the known sources.",
        )
    return SOURCES[source](weights)


def fit(weights: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> Fit:
    """Compare two state dicts by name and shape."""
    result = Fit([], [name for name in model if name not in weights], [], {})
    for name, tensor in weights.items():
        if name not in model:
            result.unexpected.append(name)
        elif tensor.shape != model[name].shape:
            result.reshaped[name] = (tuple(tensor.shape), tuple(model[name].shape))
        else:
            result.matched.append(name)
    return result


def require_complete(result: Fit, title: str, network: str) -> None:
    """Refuse weights that do not fill a backbone exactly; old files may lack the counters of batch norms.

    Args:
        result: How the converted weights fit; names outside the backbone may be missing.
        title: What the weights are to the user.
        network: What they are weights of, from :class:`Converted`.

    Raises:
        CheckpointError: Something is missing, left over or of another shape.
    """
    missing = [
        name for name in result.missing if name.startswith(_BACKBONE) and not name.endswith("num_batches_tracked")
    ]
    kinds = {"missing": missing, "unexpected": result.unexpected, "of another shape": list(result.reshaped)}
    wrong = [f"{len(names)} {kind} (first {names[0]})" for kind, names in kinds.items() if names]
    if wrong:
        raise CheckpointError(
            f"{title} does not fill the backbone",
            value=f"{len(result.matched)} matched, {', '.join(wrong)}",
            expected="every entry of one in the other, with the same shape",
            remedy=f"It holds MODEL.BACKBONE {network}; INPUT.SIZE_TRAIN and SIZE_TEST must be as it was trained.",
        )


def _from_faces(weights: Mapping[str, Tensor]) -> Converted:
    renamed = {f"{_BACKBONE}{name}": tensor for name, tensor in weights.items()}
    sources = {f"{_BACKBONE}{name}": name for name in weights}
    network = describe_network(weights)
    notes = (
        f"MODEL.BACKBONE {network}.",
        "Colour order: RGB. The network expects aligned faces, mostly of 112 x 112 pixels.",
        "A backbone without a classifier: identities are learnt anew.",
    )
    return Converted(renamed, sources, FACE_PIXELS, FACE_PIXELS, notes, network)


def _from_ir(source: str, weights: Mapping[str, Tensor]) -> Converted:
    file = read_ir(weights, source)
    return Converted(file.weights, file.sources, FACE_PIXELS, FACE_PIXELS, file.notes, file.network)


def _from_agw(weights: Mapping[str, Tensor]) -> Converted:
    renamed = _rename(weights, _AGW_NAMES)
    notes = [
        "Colour order: RGB. The authors resize with bilinear interpolation, fast-reid with bicubic.",
        "Class order: the authors number identities by number (DukeMTMC: in no fixed order), fast-reid by their text "
        "(10 before 2), so the classifier's rows need --match-classes before training goes on.",
    ]
    if "global_pool.p" not in weights:
        notes.append("No GeM exponent: the network pools by averaging. Set MODEL.HEADS.POOL_LAYER GlobalAvgPool.")
    return Converted(*renamed, IMAGENET_MEAN, IMAGENET_STD, tuple(notes))


def _from_zoo(weights: Mapping[str, Tensor]) -> Converted:
    pixels = {key: tuple(weights[key].flatten().tolist()) for key in ("pixel_mean", "pixel_std") if key in weights}
    kept = {name: tensor for name, tensor in weights.items() if name not in pixels}
    # A reduction to EMBEDDING_DIM comes before the neck, which then is the second layer of the bottleneck.
    reduced = kept.get("heads.bottleneck.0.weight", torch.empty(0)).dim() == 4
    neck = f"heads.bottleneck.{int(reduced)}."
    names = [(r"heads\.bnneck\.(?:0\.)?(?=\w)", neck), (r"heads\.classifier\.weight$", CLASSIFIER)]
    present = {name for name in kept if not name.startswith("heads.bnneck.")}
    # Files of version 0.1.1 hold the neck under its new name and its counter under the old one as well.
    kept = {name: kept[name] for name in kept if name in present or re.sub(*names[0], name) not in present}
    renamed = _rename(kept, names)
    notes = ["Colour order: RGB."]
    if "heads.pool_layer.p" in kept:
        exponent = kept["heads.pool_layer.p"].item()
        notes.append(
            f"GeM exponent {exponent:.4g}: it takes effect with MODEL.HEADS.POOL_LAYER GeneralizedMeanPoolingP only."
        )
    return Converted(*renamed, pixels.get("pixel_mean"), pixels.get("pixel_std"), tuple(notes))


def _rename(weights: Mapping[str, Tensor], patterns: list[tuple[str, str]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    renamed: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, tensor in weights.items():
        new = name
        for pattern, replacement in patterns:
            new = re.sub(f"^{pattern}", replacement, new)
        renamed[new], sources[new] = tensor, name
    return renamed, sources


_AGW_NAMES = [
    (r"base\.", "backbone."),
    (r"global_pool\.p$", "heads.pool_layer.p"),
    (r"bottleneck\.", "heads.bottleneck.0."),
    (r"classifier\.weight$", CLASSIFIER),
]

#: Converter of each source.
SOURCES: Mapping[str, Callable[[Mapping[str, Tensor]], Converted]] = {
    "agw": _from_agw,
    "qsd": _from_agw,
    "fastreid-zoo": _from_zoo,
    "arcface": _from_faces,
    "qud": _from_faces,
    **{source: functools.partial(_from_ir, source) for source in PREFIXES},
}


def _is_agw(weights: Mapping[str, Tensor]) -> bool:
    return "base.conv1.weight" in weights and any(name.startswith("bottleneck.") for name in weights)


def _is_zoo(weights: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("backbone.") for name in weights) and any(name.startswith("heads.") for name in weights)


_SIGNATURES: Mapping[str, Callable[[Mapping[str, Tensor]], bool]] = {
    "agw": _is_agw,
    "qsd": _is_agw,
    "fastreid-zoo": _is_zoo,
    "arcface": is_arcface,
    "qud": is_qud,
    **{source: functools.partial(is_ir, source=source) for source in PREFIXES},
}
_EXAMPLES = {
    "agw": "base.conv1.weight and bottleneck.weight",
    "qsd": "base.conv1.weight and bottleneck.weight",
    "fastreid-zoo": "backbone.conv1.weight and heads.bottleneck.0.weight",
    "arcface": "layer1.0.prelu.weight or conv_sep.layers.0.weight",
    "qud": "layer1.0.prelu.weight or conv_6_sep.conv.weight",
    "adaface": "model.input_layer.0.weight and head.kernel",
    "qgface": "backbone.input_layer.0.weight and head.kernel",
}


def _find_tensors(content: object) -> dict[str, Tensor]:
    """The state dict in ``content``; empty when there is none."""
    if isinstance(content, Inert):
        found: dict[str, Tensor] = {}
        _collect(content, "", found, ())
        return found
    if not isinstance(content, dict):
        return {}
    tensors = {name: _as_tensor(value) for name, value in content.items() if isinstance(name, str)}
    if content and all(value is not None for value in tensors.values()):
        return {name: value for name, value in tensors.items() if value is not None}
    for name in _WRAPPERS:
        if name in content:
            return _find_tensors(content[name])
    return {}


def _collect(module: Inert, prefix: str, found: dict[str, Tensor], parents: tuple[int, ...]) -> None:
    """The state dict of a pickled ``torch.nn.Module``."""
    if id(module) in parents:
        raise pickle.UnpicklingError("a module that contains itself")
    parts: dict[str, Any] = {}
    for kind in ("_parameters", "_buffers", "_modules"):
        parts[kind] = module.state.get(kind, {})
        if not isinstance(parts[kind], dict):
            raise pickle.UnpicklingError(f"a module whose {kind} are a {type(parts[kind]).__name__}")
    passing = module.state.get("_non_persistent_buffers_set", ())
    for name, value in (parts["_parameters"] | parts["_buffers"]).items():
        if value is None or name in passing:
            continue
        tensor = _as_tensor(value)
        if tensor is None:
            raise pickle.UnpicklingError(f"{prefix}{name} is no tensor but a {type(value).__name__}")
        found[f"{prefix}{name}"] = tensor
    for name, child in parts["_modules"].items():
        if isinstance(child, Inert):
            _collect(child, f"{prefix}{name}.", found, (*parents, id(module)))


def _as_tensor(value: object) -> Tensor | None:
    if isinstance(value, StoredTensor):
        return value.load()
    return value.detach() if isinstance(value, Tensor) else None
