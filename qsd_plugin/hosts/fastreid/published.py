"""Published weights into the model of a config: does everything fit, and does the classifier know the classes."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.export.ir_weights import STATISTICS
from qsd_plugin.export.weights import CLASSIFIER, Converted, Fit, convert, fit, read_weights, require_complete
from qsd_plugin.hosts.fastreid.compat.checkpoints import require_same_architecture
from qsd_plugin.hosts.fastreid.datasets import Item, training_set
from qsd_plugin.hosts.fastreid.extract import embed

#: Images per identity that :func:`match_classes` looks at.
IMAGES_PER_IDENTITY = 4


@dataclass(frozen=True)
class Conversion:
    """Converted weights beside the model they are for.

    Args:
        converted: Names of fast-reid.
        fit: What of it the model takes.
        model: The model with these weights, in eval mode, on ``MODEL.DEVICE``.
        not_run: Functions that the file wanted to call; none was.
    """

    converted: Converted
    fit: Fit
    model: nn.Module
    not_run: tuple[str, ...]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that the model takes."""
        return {name: self.converted.weights[name] for name in self.fit.matched}


@dataclass(frozen=True)
class Accuracy:
    """How a classifier does on training images.

    Args:
        accuracy: Fraction of images classified as their identity.
        agreement: Fraction of images classified as most images of their identity are, whatever class that is. High
            with a low accuracy: the classifier knows the identities in another order.
        num_images: How many were looked at.
    """

    accuracy: float
    agreement: float
    num_images: int


def convert_for(cfg: Any, path: Path, source: str, *, keep_classifier: bool = True) -> Conversion:
    """Convert a file and put it into the model of ``cfg``, whose number of classes becomes that of the file.

    Raises:
        CheckpointError: The file cannot be read, is not from ``source`` or belongs to another architecture.
        ConfigError: Unknown source.
    """
    from fastreid.modeling.meta_arch import build_model

    file = read_weights(path)
    converted = convert(file.tensors, source, title=str(path))
    if not keep_classifier:
        weights = {name: value for name, value in converted.weights.items() if name != CLASSIFIER}
        converted = replace(converted, weights=weights)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.PRETRAIN = False
    cfg.MODEL.HEADS.NUM_CLASSES = len(converted.weights.get(CLASSIFIER, ()))
    model: nn.Module = build_model(cfg)
    own = model.state_dict()
    weights = {
        name: value for name, value in converted.weights.items() if name in own or not name.startswith(STATISTICS)
    }
    converted = replace(converted, weights=weights)
    result = fit(converted.weights, own)
    if converted.network:
        require_complete(result, str(path), converted.network)
    else:
        require_same_architecture(str(path), converted.weights, own)
    model.load_state_dict({name: converted.weights[name] for name in result.matched}, strict=False)
    return Conversion(converted, result, model.eval(), file.not_run)


def check_pixels(cfg: Any, converted: Converted) -> list[str]:
    """Where ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD`` are not what the weights were trained with, in words."""
    problems = []
    for key, expected in (("PIXEL_MEAN", converted.pixel_mean), ("PIXEL_STD", converted.pixel_std)):
        given = tuple(map(float, cfg.MODEL[key]))
        if expected is not None and not (len(given) == len(expected) and np.allclose(given, expected, atol=0.01)):
            wanted = [round(value, 3) for value in expected]
            problems.append(f"MODEL.{key} is {list(given)}, but the weights were trained with {wanted}. Set it so.")
    return problems


def training_accuracy(cfg: Any, model: nn.Module, batches: int) -> Accuracy:
    """Accuracy of a model's classifier on about ``batches`` test batches of training images, whole identities drawn.

    Raises:
        ConfigError: The training set has another number of identities than the classifier.
    """
    items, classes = _classes(cfg, model)
    chosen = _draw(items, batches * cfg.TEST.IMS_PER_BATCH, per_identity=None)
    predicted = _logits(cfg, model, chosen).argmax(dim=1).tolist()
    by_identity: defaultdict[Any, list[int]] = defaultdict(list)
    for item, prediction in zip(chosen, predicted, strict=True):
        by_identity[item[1]].append(prediction)
    right = sum(votes.count(classes[identity]) for identity, votes in by_identity.items())
    agreeing = sum(Counter(votes).most_common(1)[0][1] for votes in by_identity.values())
    return Accuracy(right / len(chosen), agreeing / len(chosen), len(chosen))


def match_classes(cfg: Any, model: nn.Module) -> tuple[torch.Tensor, float]:
    """The classifier's rows in the order of ``cfg``'s training identities, found from what it says of their images.

    Each identity gets the class that is likeliest for it over a few images, no class twice (assignment problem).

    Returns:
        The rows [C, D], and the fraction of the images that they classify as their identity.

    Raises:
        ConfigError: The training set has another number of identities than the classifier.
        CheckpointError: The rows found do not classify most of the images: it was trained on other identities.
    """
    from scipy.optimize import linear_sum_assignment

    items, classes = _classes(cfg, model)
    chosen = _draw(items, len(items), per_identity=IMAGES_PER_IDENTITY)
    logits = _logits(cfg, model, chosen)
    targets = torch.tensor([classes[item[1]] for item in chosen])
    likelihood = torch.zeros(len(classes), logits.shape[1]).index_add_(0, targets, logits.log_softmax(dim=1))
    order = torch.from_numpy(linear_sum_assignment(likelihood.numpy(), maximize=True)[1])
    accuracy = (logits[:, order].argmax(dim=1) == targets).float().mean().item()
    if accuracy < 0.5:
        raise CheckpointError(
            "The classifier does not know the identities of DATASETS.NAMES in any order",
            value=f"{accuracy:.1%} of {len(chosen)} images right in the best one",
            expected="at least half",
            remedy="It was trained on other images: leave it out with --drop-classifier.",
        )
    rows = model.get_parameter(CLASSIFIER).detach().cpu()[order]
    return rows, accuracy


def _classes(cfg: Any, model: nn.Module) -> tuple[list[Item], dict[Any, int]]:
    """Training items, and the class of each identity as the host numbers them."""
    from fastreid.data.common import CommDataset

    items = [
        item for name in cfg.DATASETS.NAMES for item in training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1]
    ]
    classes: dict[Any, int] = CommDataset(items, relabel=True).pid_dict
    rows = len(model.get_parameter(CLASSIFIER))
    if rows != len(classes):
        raise ConfigError(
            "DATASETS.NAMES",
            value=f"{len(classes)} identities in {', '.join(cfg.DATASETS.NAMES)}",
            expected=f"the {rows} identities of the classifier",
            remedy="Name the training set of the weights, or leave the classifier out with --drop-classifier.",
        )
    return items, classes


def _draw(items: list[Item], count: int, *, per_identity: int | None) -> list[Item]:
    """Items of identities in random order until there are ``count``."""
    members: defaultdict[Any, list[Item]] = defaultdict(list)
    for item in items:
        members[item[1]].append(item)
    chosen: list[Item] = []
    for place in numpy_stream(0, "published").permutation(len(members)):
        if len(chosen) < count:
            chosen += list(members.values())[place][:per_identity]
    return chosen


def _logits(cfg: Any, model: nn.Module, items: list[Item]) -> torch.Tensor:
    """Logits without margin and scale, [N, C]."""
    features = embed(cfg, model, items, title="Classifying training images")
    weight = model.get_parameter(CLASSIFIER).detach().cpu()
    head: Any = model.get_submodule(CLASSIFIER.partition(".")[0])
    if type(head.cls_layer).__name__ == "Linear":
        return F.linear(features, weight)
    return F.linear(F.normalize(features), F.normalize(weight)) * float(cfg.MODEL.HEADS.SCALE)
