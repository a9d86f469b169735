"""An experiment's YAML file: what is read from it and what it is told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.report.experiment import chosen_arms, load_description, read_experiment

ROOT = Path(__file__).parents[2]

GOOD = """
config: base.yml
output: out
seeds: [3, 1]
splits: {a: {DATA.SPLIT_SEED: 0}, b: {DATA: {SPLIT_SEED: 1}}}
overrides: {INPUT: {SIZE_TEST: [64, 32], PADDING.SIZE: 4}, SOLVER.MAX_EPOCH: 1}
methods: [qsd]
arms:
  plain: {about: without, overrides: {MODEL.META_ARCHITECTURE: Baseline}}
  qsd:
"""


def written(folder: Path, text: str) -> Path:
    (folder / "base.yml").touch()
    file = folder / "my.yml"
    file.write_text(text)
    return file


def test_nested_and_dotted_keys_are_the_same_and_defaults_are_filled_in(tmp_path: Path) -> None:
    experiment = read_experiment(written(tmp_path, GOOD))
    assert experiment.name == "my"
    assert experiment.overrides == {"INPUT.SIZE_TEST": [64, 32], "INPUT.PADDING.SIZE": 4, "SOLVER.MAX_EPOCH": 1}
    assert experiment.splits == {"a": {"DATA.SPLIT_SEED": 0}, "b": {"DATA.SPLIT_SEED": 1}}
    assert experiment.blocks == [("a", 3), ("b", 3), ("a", 1), ("b", 1)]
    assert experiment.arms["plain"].overrides == {"MODEL.META_ARCHITECTURE": "Baseline"}
    assert experiment.arms["qsd"].overrides == {}
    assert (experiment.reference, experiment.methods, experiment.controls) == ("plain", ["qsd"], [])
    assert experiment.folder("a", 3) == Path("out/a/seed3")
    assert chosen_arms(experiment, []) == ["plain", "qsd"]


def test_description_survives_the_move_of_its_folder(tmp_path: Path) -> None:
    text = GOOD.replace("output: out", f"output: {tmp_path / 'out'}")
    experiment = read_experiment(written(tmp_path, text))
    experiment.save()
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert load_description(moved) == read_experiment(written(tmp_path, text.replace("/out\n", "/elsewhere\n")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", "unknown field: got 'seed'. Did you mean 'seeds'"),
        ("about:", "abuot:", "arm plain: unknown field: got 'abuot'. Did you mean 'about'"),
        ("methods: [qsd]", "methods: [qds]", "methods: unknown arm: got 'qds'. Did you mean 'qsd'"),
        ("methods:", "reference: plian\nmethods:", "reference: unknown arm: got 'plian'. Did you mean 'plain'"),
        ("config: base.yml", "config: bass.yml", "config: got 'bass.yml'; expected a config file"),
        ("config: base.yml", "", "config is missing"),
        ("seeds: [3, 1]", "seeds: 3", "a list of different integers"),
        ("seeds: [3, 1]", "seeds: [1, 1]", "a list of different integers"),
        ("seeds: [3, 1]", "seeds: [true]", "a list of different integers"),
        ("  qsd:", "  labels:", "got 'labels'; expected a name that is not one of the recipe's own stages"),
        ("splits: {", "splits: [", "is not YAML"),
        ("methods: [qsd]", "methods: qsd", "a list of arms"),
        ("overrides: {INPUT", "overrides: 7 #", "overrides: got 7; expected a mapping"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read_experiment(written(tmp_path, GOOD.replace(old, new, 1)))
    assert message in str(caught.value)


def test_missing_file_and_unknown_arm_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an existing YAML file"):
        read_experiment(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="Did you mean 'plain'"):
        chosen_arms(read_experiment(written(tmp_path, GOOD)), ["plan"])


def test_shipped_experiments_have_the_arms_the_design_asks_for() -> None:
    real = read_experiment(ROOT / "projects/QSD/experiments/real.yml")
    assert len(real.seeds) >= 3
    assert len(real.splits) == 2
    kinds = {arm.overrides.get("QUALITY.CONTROL") for arm in real.arms.values()}
    assert kinds == {None, "shuffle", "random_direction", "reverse"}
    assert real.arms[real.reference].overrides == {"MODEL.META_ARCHITECTURE": "Baseline"}
    assert real.arms[real.methods[0]].overrides == {}
    demo = read_experiment(ROOT / "projects/QSD/experiments/demo.yml")
    assert demo.pictures
    assert list(demo.arms) == ["control", "qsd"]
