"""Where a training step gets its quality scores from: ``QUALITY.SOURCE``.

A source is a callable. It is given the batch as a mapping and returns two tensors::

    scores, valid = source({"paths": [...], "embeddings": embeddings})   # float32 [B], bool [B]

``paths`` are the image paths as the host knows them, ``embeddings`` [B, D] the features before any normalisation,
``images`` [B, 3, H, W] the augmented training images in the range that the host feeds its model with (fast-reid: RGB, 0
to 255, before the model's own normalisation); a host passes what it has, and a source says what it misses. Scores are
higher for better images and run from 0 to 100; where ``valid`` is False the score means nothing. Sources do not carry
gradients. One with learned or running state is an ``nn.Module`` whose state lies in parameters and buffers.

Shapes: B images of a batch, D embedding size.
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qsd_plugin.core.distributed import all_reduce_sum
from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.registry import Registry
from qsd_plugin.quality.labels import PathLike, QualityLabels
from qsd_plugin.quality.scaling import TOP

_IMPORT = "import:"


class QualitySource(Protocol):
    """What a source looks like from outside; see the module's docstring."""

    def __call__(self, batch: Mapping[str, Any], /) -> tuple[torch.Tensor, torch.Tensor]: ...


#: Factories of sources by name; their keyword arguments are the source's options.
QUALITY_SOURCES: Registry[Callable[..., QualitySource]] = Registry("quality source")


def build_source(name: str, **options: Any) -> QualitySource:
    """The source called ``name``.

    Args:
        name: A name in :data:`QUALITY_SOURCES`, or ``import:module:function`` for a function of your own that is the
            source itself.
        options: Keyword arguments of the registered factory; an imported function takes none.

    Raises:
        RegistryError: Unknown name.
        ConfigError: The function cannot be imported, is not callable, or was given options.
    """
    if not name.startswith(_IMPORT):
        return QUALITY_SOURCES.get(name)(**options)
    if options:
        raise ConfigError(
            f"QUALITY.SOURCE {name}", value=sorted(options), expected="no options for an imported function"
        )
    return _imported("QUALITY.SOURCE", name, "a function (batch) -> (scores [B], valid [B])")  # type: ignore[no-any-return]


@QUALITY_SOURCES.register("file")
class FileSource:
    """Labels looked up by image path in one or more label files.

    Args:
        files: Label files, one per data set.
        roots: The data-set folder of each file on this machine, ``None`` where unknown.
        scale: ``none``, ``minmax`` or ``rank``, fitted to each file by itself.
        control: ``none``, ``shuffle`` or ``reverse``, within each file.
        seed: Seeds the shuffle.

    Raises:
        LabelError: A file is missing or wrong.
        ConfigError: No file, a different number of roots, or an unknown scale or control.
    """

    def __init__(
        self,
        files: Sequence[PathLike],
        *,
        roots: Sequence[PathLike | None] | None = None,
        scale: str = "none",
        control: str = "none",
        seed: int = 0,
    ) -> None:
        if not files:
            raise ConfigError("QUALITY.FILES is empty", expected="one label file for each of DATASETS.NAMES")
        self.roots = tuple(roots) if roots is not None else (None,) * len(files)
        if len(self.roots) != len(files):
            raise ConfigError(
                "QUALITY.FILES", value=len(files), expected=f"one label file for each of {len(self.roots)} data sets"
            )
        self.labels = tuple(QualityLabels.load(file).rescaled(scale).controlled(control, seed=seed) for file in files)

    def __call__(self, batch: Mapping[str, Any], /) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels of ``batch["paths"]``, on the CPU; the first file that knows a path decides."""
        paths = _entry(batch, "paths", "file")
        scores, valid = self.labels[0].lookup(paths, root=self.roots[0], basenames=self.basenames)
        for labels, root in zip(self.labels[1:], self.roots[1:], strict=True):
            more, found = labels.lookup(paths, root=root, basenames=self.basenames)
            scores, valid = torch.where(valid, scores, more), valid | found
        return scores, valid

    def spread(self, paths: Sequence[PathLike]) -> torch.Tensor:
        """Spread of the labels of ``paths``, in units of the scores, [B] float32 on the CPU; NaN where not known."""
        spread = torch.full((len(paths),), torch.nan)
        valid = torch.zeros(len(paths), dtype=torch.bool)
        for labels, root in zip(self.labels, self.roots, strict=True):
            more = labels.lookup_spread(paths, root=root, basenames=self.basenames)
            spread = torch.where(valid, spread, more)
            valid |= labels.lookup(paths, root=root, basenames=self.basenames)[1]
        return spread

    @property
    def basenames(self) -> bool:
        """Whether a basename identifies an image: with several files it may occur in two data sets."""
        return len(self.labels) == 1


@QUALITY_SOURCES.register("embedding_norm")
class EmbeddingNorm(nn.Module):
    """The norm of an embedding, relative to the norms seen so far, as its quality.

    With margin softmax losses the norm grows with quality (MagFace, arXiv 2103.06627; AdaFace, arXiv 2204.00964).
    ``score = clamp(50 + 50 (norm - mean) / (3 std), 0, 100)`` with exponential moving statistics of the norms: three
    standard deviations reach the ends of the scale. Norms are taken over all ranks (``reduces statistics``).

    The statistics only advance in training mode with gradients enabled, so an evaluation, or the recomputation of
    batch-norm statistics under ``no_grad``, leaves no trace. Before the first training batch no score is valid.

    Args:
        momentum: Weight of a batch in the moving statistics, 0 to 1; the first batch sets them.
    """

    mean: torch.Tensor
    std: torch.Tensor
    batches: torch.Tensor

    def __init__(self, *, momentum: float = 0.01) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ConfigError("embedding_norm: momentum", value=momentum, expected="above 0 and at most 1")
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Mapping[str, Any], /) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of ``batch["embeddings"]`` [B, D], on its device; a norm that is not finite is not valid."""
        embeddings = _entry(batch, "embeddings", "embedding_norm").detach()
        norm = torch.linalg.vector_norm(embeddings.float(), dim=1)
        finite = torch.isfinite(norm)
        norm = torch.where(finite, norm, 0.0)
        if self.training and torch.is_grad_enabled():
            self._update(norm, finite)
        deviation = (norm - self.mean) / (3 * self.std.clamp_min(torch.finfo(norm.dtype).eps))
        scores = (TOP / 2 * (1 + deviation)).clamp(0, TOP)
        return scores, finite & (self.batches > 0)

    @torch.no_grad()
    def _update(self, norm: torch.Tensor, finite: torch.Tensor) -> None:
        norm = norm.double()
        count, total, squares = all_reduce_sum(torch.stack([finite.sum().double(), norm.sum(), norm.square().sum()]))
        mean = total / count.clamp_min(1)
        std = (squares / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
        weight = torch.where(self.batches > 0, self.momentum, 1.0) * (count > 0)
        self.mean.lerp_(mean.to(self.mean), weight.to(self.mean))
        self.std.lerp_(std.to(self.std), weight.to(self.std))
        self.batches += count > 0


@QUALITY_SOURCES.register("network")
class NetworkSource(nn.Module):
    """Scores of a frozen quality network for the very images of a step, whatever augmentation did to them.

    The network sees ``batch["images"]`` as float32, outside autocast, and returns a score per image, [B] or [B, 1], on
    the 0 to 100 scale. One that wants other pixel values normalises in its own forward. It stays in eval mode and gets
    no gradient. A regressor overshoots the ends of its scale a little: scores up to 10 beyond them are clamped, while
    anything further off is left for the range check to find. A score that is not finite is not valid.

    Args:
        network: The network, or ``import:module:factory``, a function without arguments that builds it.
        weights: File with its state dict (also below ``"model"`` or ``"state_dict"``); ``""``: the network has none.

    Raises:
        ConfigError: The factory cannot be imported or builds something else; weights are missing, do not fit, or are
            not given for a network that has parameters, whose scores would be random.
    """

    def __init__(self, network: nn.Module | str, weights: PathLike = "") -> None:
        super().__init__()
        if isinstance(network, str):
            build = _imported("QUALITY.NETWORK", network, "a function without arguments that returns a torch module")
            network = build()
        if not isinstance(network, nn.Module):
            raise ConfigError("QUALITY.NETWORK", value=type(network).__name__, expected="a factory of a torch module")
        if weights:
            _load_weights(network, Path(weights))
        elif any(True for _ in network.parameters()):
            raise ConfigError(
                "QUALITY.NETWORK_WEIGHTS is empty",
                expected="the trained weights of QUALITY.NETWORK, because a fresh network scores at random",
                remedy="Save its state dict with torch.save(network.state_dict(), PATH) and name that file.",
            )
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> NetworkSource:
        """Stays in eval mode, whatever ``mode``."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any], /) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of ``batch["images"]`` [B, 3, H, W], on its device."""
        images: torch.Tensor = _entry(batch, "images", "network")
        with torch.autocast(images.device.type, enabled=False):
            scores = self.network(images.float())
        if scores.shape not in ((len(images),), (len(images), 1)):
            raise ConfigError(
                "Output of QUALITY.NETWORK", value=tuple(scores.shape), expected=f"[{len(images)}], a score per image"
            )
        scores = scores.flatten().float()
        near = (scores >= -0.1 * TOP) & (scores <= 1.1 * TOP)
        return torch.where(near, scores.clamp(0, TOP), scores), torch.isfinite(scores)


def _load_weights(network: nn.Module, path: Path) -> None:
    what = "QUALITY.NETWORK_WEIGHTS"
    if not path.is_file():
        raise ConfigError(what, value=str(path), expected="an existing file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(
            what,
            value=str(path),
            expected="a state dict that loads without running code",
            remedy="Save it with torch.save(network.state_dict(), PATH).",
        ) from error
    for key in ("model", "state_dict"):
        content = content.get(key, content) if isinstance(content, Mapping) else content
    try:
        network.load_state_dict(content)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{what} {path} does not fit QUALITY.NETWORK", value=str(error)) from error


def _entry(batch: Mapping[str, Any], key: str, source: str) -> Any:
    if key not in batch:
        raise ConfigError(
            f"Quality source {source!r} needs batch[{key!r}]",
            value=sorted(batch),
            remedy="Choose another QUALITY.SOURCE, or a host adapter that passes this entry.",
        )
    return batch[key]


def _imported(key: str, name: str, expected: str) -> Any:
    what = f"{key} {name}"
    module_name, colon, function_name = name.removeprefix(_IMPORT).partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(key, value=name, expected="import:module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            what,
            value=str(error),
            expected=f"an importable module {module_name!r}",
            remedy=f"Install it, or put its folder on PYTHONPATH (working directory: {os.getcwd()}).",
        ) from error
    function = getattr(module, function_name, None)
    if function is None:
        raise ConfigError(
            f"{what}: {module_name} has no such function", remedy=did_you_mean(function_name, vars(module))
        )
    if not callable(function):
        raise ConfigError(what, value=function, expected=expected)
    return function
