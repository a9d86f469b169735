"""Does the stored network see images as it was trained to: architecture, colour order, normalisation?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core.errors import CheckpointError, DataError, QSDPluginError
from qsd_plugin.core.progress import progress
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.compat.checkpoints import require_same_architecture
from qsd_plugin.hosts.fastreid.run_checks.stored_runs import build_network, stored_config
from qsd_plugin.report.run_doctor import Finding, Run, StageFolder, Verdict, check

#: Training images looked at: the standard error of an accuracy is then at most 4.4 points.
IMAGES = 128
_BATCH = 32
#: By how much another preprocessing may be more accurate than the configured one.
MARGIN = 0.15
#: From here on nothing can beat the configured preprocessing by that much.
_CERTAIN = 1 - MARGIN
#: Accuracy above chance, as a share of the way to 1, below which a network does not know these images at all.
_KNOWN = 0.2

#: Mean and standard deviation per RGB channel on the host's scale, 0 to 255.
NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "ImageNet mean and std": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "mean and std of half the range": ((127.5,) * 3, (127.5,) * 3),
    "range 0 to 1": ((0.0,) * 3, (255.0,) * 3),
    "no normalisation": ((0.0,) * 3, (1.0,) * 3),
}


@dataclass(frozen=True)
class Preprocessing:
    """One way to feed images: channel order, and mean and standard deviation per RGB channel."""

    name: str
    bgr: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


@check("architecture")
def architecture(run: Run) -> Iterator[Finding]:
    """Do the checkpoints belong to the network of the config?"""
    for stage in run.training:
        checkpoint = _checkpoint(run, stage)
        if checkpoint is None or not stage.config:
            continue
        cfg = stored_config(stage)
        step = "Set MODEL.BACKBONE.* and MODEL.HEADS.* as in the config.yaml that the checkpoint was trained with."
        try:
            model = build_network(cfg).state_dict()
            weights = run.read_weights(checkpoint)
            require_same_architecture(checkpoint.name, weights, model)
        except CheckpointError as error:
            sentence, figure = "Checkpoint and config do not fit", error.what
            yield Finding("architecture", stage.name, "problem", sentence, figure, "the same kernels", step)
            continue
        shared = [name for name, value in model.items() if name in weights and weights[name].shape == value.shape]
        heads = sorted(name for name in model if name not in shared and name.startswith("heads."))
        sentence = f"{checkpoint.name} fits the config"
        figure = f"{len(shared)} of {len(model)} tensors"
        if heads:
            sentence = f"The head of {checkpoint.name} does not fit the config, first {heads[0]}"
        verdict: Verdict = "warning" if heads else "ok"
        yield Finding("architecture", stage.name, verdict, sentence, figure, "all", step if heads else "")


@check("preprocessing")
def preprocessing(run: Run) -> Iterator[Finding]:
    """Feed training images to the network a stage started from, as configured and in other ways.

    A stage without start weights is judged by its own last checkpoint. The training accuracy in eval mode and without
    augmentation decides.
    """
    judged: set[tuple[str, ...]] = set()
    for stage in run.training:
        checkpoint = _checkpoint(run, stage)
        if checkpoint is None or not stage.config:
            continue
        cfg = stored_config(stage)
        seen = (
            str(checkpoint),
            *(str(cfg.MODEL[key]) for key in ("PIXEL_MEAN", "PIXEL_STD")),
            str(cfg.INPUT.SIZE_TEST),
        )
        if seen in judged:
            continue
        judged.add(seen)
        yield _judge(run, stage, cfg, checkpoint)


def candidates(mean: tuple[float, ...], std: tuple[float, ...]) -> list[Preprocessing]:
    """The configured preprocessing (RGB, as the host reads images), then every other one worth trying."""
    configured = Preprocessing("as configured", False, mean, std)
    others = [Preprocessing("BGR channels", True, mean, std)]
    for name, (other_mean, other_std) in NORMALISATIONS.items():
        if not _same((other_mean, other_std), (mean, std)):
            others += [
                Preprocessing(name, False, other_mean, other_std),
                Preprocessing(f"BGR channels and {name}", True, other_mean, other_std),
            ]
    return [configured, *others]


@torch.no_grad()
def accuracies(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, ways: list[Preprocessing]
) -> dict[str, float]:
    """Share of images that the network's own classifier names rightly, by the name of the preprocessing.

    Args:
        model: A host model with one embedding head, in eval mode.
        images: RGB, 0 to 255, [N, 3, H, W].
        targets: Identities as numbered in training, [N].
        ways: Preprocessings to try.
    """
    network: Any = model
    head = network.heads
    result = {}
    for way in progress(ways, "Trying preprocessings"):
        for buffer, values in ((network.pixel_mean, way.mean), (network.pixel_std, way.std)):
            buffer.copy_(torch.tensor(values[::-1] if way.bgr else values).view(1, -1, 1, 1))
        hits = 0
        for first in range(0, len(targets), _BATCH):
            part, identities = images[first : first + _BATCH], targets[first : first + _BATCH]
            features = network({"images": part.flip(1) if way.bgr else part.clone()})
            kernel = head.weight
            if type(head.cls_layer).__name__ != "Linear":
                features, kernel = nn.functional.normalize(features), nn.functional.normalize(kernel)
            hits += int((features @ kernel.t()).argmax(dim=1).eq(identities).sum())
        result[way.name] = hits / len(targets)
    return result


def training_images(cfg: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Evenly chosen training images without augmentation, [N, 3, H, W] in 0 to 255, and their training identities [N].

    Raises:
        DataError: The data are not there.
    """
    from fastreid.data.common import CommDataset
    from fastreid.data.transforms import build_transforms

    items: list[datasets.Item] = []
    for name in cfg.DATASETS.NAMES:
        items += datasets.training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1]
    images = CommDataset(items, build_transforms(cfg, is_train=False), relabel=True)
    chosen = [images[index] for index in range(0, len(items), max(1, len(items) // count))][:count]
    return torch.stack([sample["images"] for sample in chosen]), torch.tensor([sample["targets"] for sample in chosen])


def _judge(run: Run, stage: StageFolder, cfg: Any, checkpoint: Path) -> Finding:
    from fastreid.modeling.heads import EmbeddingHead

    try:
        model: Any = build_network(cfg)
        if type(getattr(model, "heads", None)) is not EmbeddingHead:
            return _untold(stage, f"{cfg.MODEL.META_ARCHITECTURE} has no single EmbeddingHead", "")
        weights = run.read_weights(checkpoint)
        if tuple(weights.get("heads.weight", torch.empty(0)).shape) != tuple(model.heads.weight.shape):
            return _untold(stage, f"{checkpoint.name} has no classifier of this size", "Train on the same identities.")
        require_same_architecture(checkpoint.name, weights, model.state_dict())
        model.load_state_dict(dict(weights), strict=False)
        images, targets = training_images(cfg, IMAGES)
    except DataError as error:
        step = "Name the folder that holds the data sets: add DATA.ROOT FOLDER to this command."
        return _untold(stage, str(error).rstrip("."), step)
    except QSDPluginError as error:
        return _untold(stage, str(error).rstrip("."), "See the check of the architecture.")
    if int(targets.max()) >= len(model.heads.weight):
        return _untold(stage, f"the classifier knows {len(model.heads.weight)} identities only", "See DATASETS.NAMES.")
    ways = candidates(tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))
    found = accuracies(model, images, targets, ways[:1])
    if found["as configured"] < _CERTAIN:
        found |= accuracies(model, images, targets, ways[1:])
    return _verdict(stage, checkpoint, found, len(targets), len(model.heads.weight), ways)


def _verdict(
    stage: StageFolder,
    checkpoint: Path,
    found: dict[str, float],
    images: int,
    classes: int,
    ways: list[Preprocessing],
) -> Finding:
    own, best = found["as configured"], max(found, key=found.__getitem__)
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    figure = f"{own:.1%} of {images} training images recognised as configured"
    if found[best] > own + MARGIN:
        way = next(way for way in ways if way.name == best)
        numbers = f"MODEL.PIXEL_MEAN {list(way.mean)} and MODEL.PIXEL_STD {list(way.std)}"
        step = f"Set {numbers} in every stage"
        if way.bgr:
            step = (
                "Swap the input channels of the checkpoint's first kernel (weight.flip(1)), since fast-reid reads RGB"
            )
            step += f", and set {numbers}" if way.name != "BGR channels" else ""
        return Finding(
            "preprocessing",
            stage.name,
            "problem",
            f"{name} was trained on images in another form: {best}",
            f"{figure}, {found[best]:.1%} with {best}",
            f"{MARGIN:.0%} between them",
            f"{step}; then run again from the stage that reads the checkpoint.",
        )
    least = 1 / classes + _KNOWN * (1 - 1 / classes)
    if own < least:
        return Finding(
            "preprocessing",
            stage.name,
            "warning",
            f"{name} does not know its training images in any colour order or normalisation",
            figure,
            f"{least:.1%}",
            "See the training accuracy; if that is good, identities are numbered otherwise (DATASETS.NAMES).",
        )
    compared = "" if len(found) == 1 else f", at most {found[best]:.1%} otherwise"
    sentence = f"{name} sees images as it was trained to"
    return Finding("preprocessing", stage.name, "ok", sentence, f"{figure}{compared}", f"{MARGIN:.0%} between them")


def _checkpoint(run: Run, stage: StageFolder) -> Path | None:
    """The checkpoint that shows how images were seen before this stage could adapt to its own preprocessing."""
    start = run.start(stage)
    path = start or (stage.checkpoints[-1] if stage.checkpoints else None)
    return path if path and path.is_file() else None


def _untold(stage: StageFolder, reason: str, step: str) -> Finding:
    sentence = "Colour order and normalisation cannot be told"
    return Finding("preprocessing", stage.name, "unknown", sentence, reason, next_step=step)


def _same(one: tuple[tuple[float, ...], ...], other: tuple[tuple[float, ...], ...]) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(first - second) < 1 for first, second in pairs)
