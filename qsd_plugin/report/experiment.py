"""An experiment: arms x seeds x identity splits of one recipe, as its YAML file describes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.files import write_atomically

#: Where an experiment's folder keeps its description.
DESCRIPTION = "experiment.json"
#: Stage folders beside those of the arms: what QSD's arms share, what QUD's and DIL's arms share, the pictures.
BASELINE, LABELS = "baseline", "labels"
TEACHER, CACHE = "teacher", "cache"
DIL_STAGES = ("dil_teacher", "dil_stage1", "dil_bank", "dil_stage2")
PICTURES = "report"
RESERVED = (BASELINE, LABELS, TEACHER, CACHE, *DIL_STAGES, PICTURES)
#: Shared stages that are evaluated, and so have a row in the tables.
TRAINED = {
    BASELINE: "where all arms start",
    TEACHER: "whom the students learn from",
    DIL_STAGES[0]: "where DIL starts: its network without DIL",
}

_FIELDS = (
    "config",
    "output",
    "overrides",
    "seeds",
    "splits",
    "arms",
    "reference",
    "methods",
    "controls",
    "pictures",
)
_ARM_FIELDS = ("about", "overrides", "config")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        about: What it is, in words, for the tables.
        overrides: Config values by dotted key.
        config: Config file instead of the experiment's; empty: the experiment's.
    """

    about: str
    overrides: dict[str, Any] = field(default_factory=dict)
    config: str = ""


@dataclass(frozen=True)
class Experiment:
    """What is run and what is compared.

    Args:
        name: Of the file.
        config: Config file of the recipe.
        output: Folder of the results.
        overrides: Config values of all arms, by dotted key.
        seeds: Of training and labels; every (split, seed) has one baseline that all arms start from.
        splits: Config values of each split of the data, by its name.
        arms: By name.
        reference: The arm that differences are taken to.
        methods: Arms the experiment is about; the first is the one that controls are compared with.
        controls: Arms that take one ingredient of the method away.
        pictures: Whether each (split, seed) ends with rank lists and pictures of the labels.
    """

    name: str
    config: str
    output: str
    overrides: dict[str, Any]
    seeds: list[int]
    splits: dict[str, dict[str, Any]]
    arms: dict[str, Arm]
    reference: str
    methods: list[str]
    controls: list[str]
    pictures: bool = False

    @property
    def blocks(self) -> list[tuple[str, int]]:
        """Every (split, seed), seeds of a split side by side last, so that early results span the splits."""
        return [(split, seed) for seed in self.seeds for split in self.splits]

    def folder(self, split: str, seed: int) -> Path:
        """Where a block's stages lie."""
        return Path(self.output) / split / f"seed{seed}"

    def save(self) -> None:
        """Write the description to the results' folder, for ``tools/compare.py``."""
        write_atomically(Path(self.output) / DESCRIPTION, json.dumps(asdict(self), indent=1).encode())


def load_description(folder: Path) -> Experiment:
    """The description in a results' folder; its ``output`` is that folder, wherever it has been moved.

    Raises:
        ConfigError: The folder holds none.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise ConfigError(
            "Experiment folder",
            value=str(folder),
            expected=f"a folder with {DESCRIPTION}",
            remedy="tools/experiment.py writes it to the experiment's output folder.",
        )
    fields = json.loads(file.read_text(encoding="utf-8"))
    arms = {name: Arm(**arm) for name, arm in fields.pop("arms").items()}
    return Experiment(**{**fields, "arms": arms, "output": str(folder)})


def read_experiment(file: str | Path) -> Experiment:
    """Read an experiment's YAML file.

    Fields: ``config`` (relative to the file), ``output``, ``overrides``, ``seeds``, ``splits`` (name: overrides; left
    out: one split without overrides), ``arms`` (name: ``about``, ``overrides`` and, for one of another recipe, a
    ``config`` of its own), ``reference`` (default: the first arm), ``methods`` and ``controls`` (lists of arms),
    ``pictures``. Overrides are nested or have dotted keys; an arm's go over those of all.

    Raises:
        ConfigError: The file or its config is missing, or a field is unknown, missing or of the wrong kind.
    """
    import yaml

    path = Path(file)
    if not path.is_file():
        raise ConfigError("Experiment file", value=str(file), expected="an existing YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"Experiment file {file} is not YAML", value=str(error).replace("\n", " ")) from error
    fields = _mapping(content, f"Experiment file {file}", _FIELDS)
    where = f"{file}:"
    for name in ("config", "output", "seeds", "arms"):
        if not fields.get(name):
            raise ConfigError(f"{where} {name} is missing", expected=f"the fields {', '.join(_FIELDS[:6])}")
    config = _config_file(path, fields["config"], f"{where} config")
    arms = _arms(fields["arms"], where, path)
    splits = _mapping(fields.get("splits") or {"all": {}}, f"{where} splits")
    return Experiment(
        name=path.stem,
        config=config,
        output=str(fields["output"]),
        overrides=flat(fields.get("overrides") or {}, f"{where} overrides"),
        seeds=_seeds(fields["seeds"], where),
        splits={name: flat(values or {}, f"{where} splits {name}") for name, values in splits.items()},
        arms=arms,
        reference=_known([fields.get("reference", next(iter(arms)))], arms, f"{where} reference")[0],
        methods=_known(fields.get("methods") or [], arms, f"{where} methods"),
        controls=_known(fields.get("controls") or [], arms, f"{where} controls"),
        pictures=bool(fields.get("pictures", False)),
    )


def flat(values: Any, what: str, prefix: str = "") -> dict[str, Any]:
    """Nested or dotted config values as one mapping by dotted key."""
    result: dict[str, Any] = {}
    for key, value in _mapping(values, what).items():
        if isinstance(value, dict):
            result |= flat(value, what, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def chosen_arms(experiment: Experiment, names: Sequence[str]) -> list[str]:
    """``names``, or all arms where it is empty.

    Raises:
        ConfigError: An unknown arm; the message suggests the nearest ones.
    """
    return _known(names, experiment.arms, "Arm") if names else list(experiment.arms)


def of_split(experiment: Experiment, split: str) -> Experiment:
    """The part of ``experiment`` on one split of the data; its name says which.

    Raises:
        ConfigError: There is no such split; the message suggests the nearest one.
    """
    if split not in experiment.splits:
        raise ConfigError("Split", value=split, remedy=did_you_mean(split, experiment.splits))
    return replace(experiment, name=f"{experiment.name}, {split}", splits={split: experiment.splits[split]})


def _config_file(experiment: Path, name: Any, what: str) -> str:
    file = experiment.parent / str(name)
    if not file.is_file():
        raise ConfigError(what, value=str(name), expected=f"a config file, found at {file}")
    return str(file)


def _arms(value: Any, where: str, path: Path) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for name, fields in _mapping(value, f"{where} arms").items():
        if name in RESERVED or name.startswith(tuple(f"{stage}-" for stage in DIL_STAGES)):
            raise ConfigError(f"{where} arms", value=name, expected="a name that is not one of the recipe's own stages")
        fields = _mapping(fields or {}, f"{where} arm {name}", _ARM_FIELDS)
        overrides = flat(fields.get("overrides") or {}, f"{where} arm {name}: overrides")
        config = _config_file(path, fields["config"], f"{where} arm {name}: config") if fields.get("config") else ""
        arms[name] = Arm(str(fields.get("about", "")), overrides, config)
    return arms


def _seeds(value: Any, where: str) -> list[int]:
    good = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    if not good or len(set(value)) != len(value):
        raise ConfigError(
            f"{where} seeds", value=value, expected="a list of different integers >= 0, such as [0, 1, 2]"
        )
    return list(value)


def _known(names: Any, arms: Mapping[str, Arm], what: str) -> list[str]:
    if not isinstance(names, (list, tuple)):
        raise ConfigError(what, value=names, expected="a list of arms")
    for name in names:
        if name not in arms:
            raise ConfigError(f"{what}: unknown arm", value=name, remedy=did_you_mean(str(name), arms))
    return [str(name) for name in names]


def _mapping(value: Any, what: str, known: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(what, value=value, expected="a mapping of names to values")
    for key in value:
        if known and key not in known:
            raise ConfigError(f"{what}: unknown field", value=key, remedy=did_you_mean(str(key), known))
    return {str(key): item for key, item in value.items()}
