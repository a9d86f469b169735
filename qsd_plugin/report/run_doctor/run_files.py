"""The files of a run: stage folders with the host's config, metrics and checkpoints, and the recipe's own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from qsd_plugin.core.errors import CheckpointError, DataError
from qsd_plugin.core.stages import FINAL_STAGES, MARKER

Weights = Mapping[str, torch.Tensor]

#: Checkpoints whose weights are kept for the next check: first and last of a baseline, and the last of two more stages.
_KEPT = 4


def read_weights(path: Path) -> Weights:
    """The model's weights in a checkpoint that the host or torch wrote; runs no code from the file.

    Raises:
        CheckpointError: The file cannot be read or holds no weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("model", content)
        return {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # damaged files fail in many ways
        raise CheckpointError(
            f"Checkpoint {path}",
            value=type(error).__name__,
            expected="a file written by torch.save",
            remedy="It may be cut off: copy it again, or use an earlier checkpoint.",
        ) from error


@dataclass(frozen=True)
class StageFolder:
    """One folder of a run; everything is read when it is asked for, and what is missing reads as empty.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.path.name

    @property
    def is_training(self) -> bool:
        """Whether the host trained here, or began to; ``deploy/`` holds a config too, beside its contract."""
        if (self.path / "contract.json").is_file():
            return False
        return (self.path / "config.yaml").is_file() or bool(self.checkpoints)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Values of ``config.yaml`` by dotted key."""
        file = self.path / "config.yaml"
        if not file.is_file():
            return {}
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise DataError(f"Config {file}", value=type(error).__name__, expected="the host's YAML") from error
        return dict(_flat(content or {}))

    def setting(self, key: str, default: Any = None) -> Any:
        """A config value, or ``default`` where the config has no such key."""
        return self.config.get(key, default)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.json`` by iteration; a line that was cut off by a kill is left out."""
        lines = [_object(line) for line in _text(self.path / "metrics.json").splitlines()]
        return sorted((line for line in lines if line), key=lambda event: int(event.get("iteration", 0)))

    def series(self, name: str) -> list[float]:
        """The logged values of one figure, in order; a resumed run's second value of an iteration replaces the first.

        The host writes medians over its last 20 values.
        """
        return list({event.get("iteration"): float(event[name]) for event in self.events if name in event}.values())

    @property
    def iterations(self) -> int:
        """Training steps up to the last line of ``metrics.json``."""
        return max((int(event.get("iteration", -1)) for event in self.events), default=-1) + 1

    @cached_property
    def marker(self) -> dict[str, Any] | None:
        """The recipe's ``stage.json``; ``None`` outside a recipe."""
        return _object(_text(self.path / MARKER))

    @cached_property
    def results(self) -> dict[str, Any] | None:
        """``results.json``: the host's last evaluation, or the recipe's report."""
        return _object(_text(self.path / "results.json"))

    @cached_property
    def log(self) -> str:
        """The host's ``log.txt``."""
        return _text(self.path / "log.txt")

    @cached_property
    def checkpoints(self) -> list[Path]:
        """Numbered checkpoints in order, then ``model_final.pth``."""
        return [*sorted(self.path.glob("model_[0-9]*.pth")), *self.path.glob("model_final.pth")]


@dataclass(frozen=True)
class Run:
    """A recipe's root folder with its stages, or a single training folder.

    Args:
        root: The folder that holds the stages' folders.
        stages: In the order in which they were begun.
        read_weights: Reads the model's weights of a checkpoint file.
        recipe: Whether these are all stages of a recipe that were begun; false for a single folder, also a recipe's.
    """

    root: Path
    stages: tuple[StageFolder, ...]
    read_weights: Callable[[Path], Weights]
    recipe: bool

    @property
    def training(self) -> list[StageFolder]:
        """The stages in which the host trained."""
        return [stage for stage in self.stages if stage.is_training]

    @property
    def recipe_name(self) -> str:
        """``RECIPE.NAME``; empty for a single folder."""
        named = (str(stage.setting("RECIPE.NAME")) for stage in self.training if stage.setting("RECIPE.NAME"))
        return next(named, "") if self.recipe else ""

    @property
    def final_stage(self) -> str:
        """Name of the recipe's last training, begun or not; empty for a single folder."""
        return FINAL_STAGES.get(self.recipe_name, self.recipe_name)

    def stage(self, name: str) -> StageFolder | None:
        """The stage of that name, if it was begun."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def start(self, stage: StageFolder) -> Path | None:
        """The checkpoint that a training stage started from, ``None`` if it started from scratch."""
        weights = stage.setting("MODEL.WEIGHTS")
        return self.locate(stage, weights) if weights else None

    def origin(self, stage: StageFolder) -> StageFolder | None:
        """The other stage of this run whose checkpoint a stage started from."""
        start = self.start(stage)
        return next((other for other in self.stages if start and other.path == start.parent and other != stage), None)

    def locate(self, stage: StageFolder, path: str) -> Path:
        """Where a file of the run that a stage's config names lies now, also when the run was moved or copied."""
        recorded, given = Path(str(stage.setting("OUTPUT_DIR", ""))), Path(path)
        for folder, now in ((recorded, stage.path), (recorded.parent, stage.path.parent)):
            if given.is_relative_to(folder) and (now / given.relative_to(folder)).exists():
                return now / given.relative_to(folder)
        return given

    @property
    def label_user(self) -> StageFolder | None:
        """The stage that trained on quality labels."""
        return next((stage for stage in reversed(self.training) if uses_labels(stage)), None)

    def label_files(self) -> list[tuple[Path, StageFolder]]:
        """Quality-label files, each with the stage that speaks for it: the one it lies in, else the one that used it.

        Before any stage has used labels these are the files that lie there.
        """
        user = self.label_user
        if user is None:
            found = ((path, stage) for stage in self.stages for path in sorted(stage.path.glob("*.npz")))
            return [(path, stage) for path, stage in found if stage.name != "bank"]  # DIL's bank holds codes
        names = user.setting("DATASETS.NAMES", ())
        inside = [str(Path(str(user.setting("OUTPUT_DIR", "")), "labels", f"{name}.npz")) for name in names]
        files = [self.locate(user, str(path)) for path in user.setting("QUALITY.FILES") or inside]
        homes = {stage.path: stage for stage in self.stages}
        return [(path, homes.get(path.parent, user)) for path in files]


def uses_labels(stage: StageFolder) -> bool:
    """Whether a training reads quality labels from files."""
    return bool(stage.setting("MODEL.META_ARCHITECTURE") == "QSD" and stage.setting("QUALITY.SOURCE", "file") == "file")


def open_run(path: Path, read_weights: Callable[[Path], Weights] = read_weights) -> Run:
    """The run in a folder: a recipe's ``OUTPUT_DIR`` or that of a single training.

    Args:
        path: The folder.
        read_weights: Reads the model's weights of a checkpoint file.

    Raises:
        DataError: There is no run.
    """
    read_weights = lru_cache(_KEPT)(read_weights)
    if not path.is_dir():
        raise DataError("Run folder", value=str(path), expected="the OUTPUT_DIR of a training")
    folders = [StageFolder(folder) for folder in sorted(path.iterdir()) if (folder / MARKER).is_file()]
    if folders:
        # Sorting is stable: stages begun in the same second stay in alphabetical order.
        folders.sort(key=lambda stage: str((stage.marker or {}).get("written", "")))
        return Run(path, tuple(folders), read_weights, recipe=True)
    single = StageFolder(path)
    if not single.is_training and not single.events:
        raise DataError(
            "Run folder",
            value=str(path),
            expected="stage folders of a recipe, or config.yaml, metrics.json and model_*.pth of one training",
            remedy="Pass the OUTPUT_DIR that tools/train_net.py was given.",
        )
    return Run(path.parent, (single,), read_weights, recipe=False)


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _object(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text or "null")
    except json.JSONDecodeError:
        return None
    return content if isinstance(content, dict) else None
