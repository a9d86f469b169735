"""The stages of one block of an experiment: what its arms share, and the arms themselves, each by its own recipe.

``qsd``: baseline -> labels -> arms that fine-tune it. ``qud``: teacher -> [cache] -> arms that learn from it, or
without it. ``dil``: [teacher] -> stage 1 -> [bank] -> stage 2 -> arms that evaluate a feature of it. ``qgface``, or no
recipe: arms from scratch, which share no stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.stages import Stage
from qsd_plugin.hosts.fastreid import face_tests, face_trials, recipes, recipes_dil, recipes_qgface, training_stages
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.experiment_dil import check_labels, dil_block, dil_folders, dil_needs, wants_labels
from qsd_plugin.hosts.fastreid.experiment_recipes import (
    Needs,
    baseline_checkpoint,
    check_teachers,
    in_order,
    qsd_block,
    qsd_needs,
    qud_block,
    qud_needs,
    scratch_block,
)
from qsd_plugin.report.experiment import BASELINE, PICTURES

#: Recipes that an experiment can have arms of; the empty one is a training from scratch, as ``qgface``.
RECIPES = ("qsd", "qud", "qgface", "dil", "")


class Block:
    """One (split, seed) of an experiment.

    Args:
        cfg: What all arms have in common; ``OUTPUT_DIR`` is the block's folder.
        every: Config of every arm of the experiment, by name.
        chosen: Names of the arms that are run.
        pictures: Whether the last stage draws the recipe's pictures.

    Attributes:
        needs: Names of the stages in order, each with those that it is made from.

    Raises:
        ConfigError: Arms that cannot be in one experiment.
    """

    def __init__(self, cfg: Any, every: Mapping[str, Any], chosen: Sequence[str], *, pictures: bool) -> None:
        self._arms = {
            recipe: {arm: every[arm] for arm in chosen if _recipe(every[arm]) == recipe}
            for recipe in ("qsd", "qud", "dil", "")
        }
        qsd = {arm: own for arm, own in every.items() if _recipe(own) == "qsd"}
        self._qsd_cfg = cfg if _recipe(cfg) == "qsd" else next(iter(qsd.values()), None)
        self._folders = dil_folders({arm: own for arm, own in every.items() if _recipe(own) == "dil"})
        self._pictures = pictures
        self.needs = self._needs(chosen)

    def _needs(self, chosen: Sequence[str]) -> Needs:
        arms, found = self._arms, Needs()
        labelled = any(map(wants_labels, arms["dil"].values()))
        if self._qsd_cfg is not None and (arms["qsd"] or labelled):
            found |= qsd_needs(self._qsd_cfg, arms["qsd"])
        if arms["qud"]:
            check_teachers(arms["qud"])
            found |= qud_needs(arms["qud"])
        check_labels(arms["dil"], found)
        found |= dil_needs(arms["dil"], self._folders) | dict.fromkeys(arms[""], ())
        shared = [name for name in found if name not in chosen]
        needs = {name: found[name] for name in (*shared, *chosen)}
        if self._pictures:
            if len(arms["qsd"]) < len(chosen):
                names = sorted({_recipe(own) for own in _joined(arms).values()} - {"qsd"})
                expected = f"false with RECIPE.NAME {' or '.join(names) or repr('')}"
                raise ConfigError("pictures of an experiment", value=True, expected=expected)
            needs[PICTURES] = tuple(needs)
        return needs

    def stages(self) -> list[Stage]:
        """The stages of :attr:`needs`."""
        arms, cfg = self._arms, self._qsd_cfg
        stages = scratch_block(arms[""]) + dil_block(arms["dil"], self._folders)
        if BASELINE in self.needs:
            stages += qsd_block(cfg, arms["qsd"])
        if arms["qud"]:
            stages += qud_block(arms["qud"])
        if PICTURES in self.needs:
            stages.append(_pictures(cfg, arms["qsd"]))
        return in_order(stages, list(self.needs))


def check_arm(cfg: Any) -> None:
    """Refuse an arm that cannot be run or compared, before anything is trained.

    Raises:
        QSDPluginError: Whatever is wrong with its recipe, its architecture or its test sets.
    """
    recipe = _recipe(cfg)
    scored_here = [name for name in cfg.DATASETS.TESTS if name in face_tests.TESTS]
    if len(cfg.DATASETS.TESTS) != 1 and len(scored_here) < len(cfg.DATASETS.TESTS):
        raise ConfigError(
            "DATASETS.TESTS",
            value=list(cfg.DATASETS.TESTS),
            expected="one person re-identification set, or face test sets, in an experiment",
        )
    for name in scored_here:
        face_trials.check(name)
    if recipe == "qsd":
        recipes.check_final_stage(cfg, faces=True)
    elif recipe == "dil":
        recipes_dil.check(cfg)
    elif recipe == "qud":
        _check_student(cfg)
    else:
        recipes_qgface.check(cfg)


def _check_student(cfg: Any) -> None:
    if not cfg.KD.MODEL_CONFIG or cfg.QUD.TEACHER.SOURCE == "onnx":
        raise ConfigError(
            "Teacher of an experiment",
            value=f"KD.MODEL_CONFIG {list(cfg.KD.MODEL_CONFIG)}, QUD.TEACHER.SOURCE {cfg.QUD.TEACHER.SOURCE}",
            expected="KD.MODEL_CONFIG, the config of a network, which is trained or evaluated like the arms",
            remedy="Name it under overrides, with QUD.TEACHER.SOURCE network or cache.",
        )
    # The teacher may not be there yet; an arm without one is an ordinary training.
    training_stages.check_model(cfg, **({"QUD__TEACHER__SOURCE": "cache"} if in_chain(cfg, "QUD") else {}))


def _pictures(cfg: Any, arms: Mapping[str, Any]) -> Stage:
    root = Path(cfg.OUTPUT_DIR)
    checkpoints = {BASELINE: baseline_checkpoint(cfg), **{arm: root / arm / "model_final.pth" for arm in arms}}
    return recipes.report_stage(cfg, recipes.baseline_config(cfg, root / BASELINE), checkpoints, name=PICTURES)


def _recipe(cfg: Any) -> str:
    """The recipe that the stages of an arm follow.

    Raises:
        ConfigError: It is none of :data:`RECIPES`.
    """
    if cfg.RECIPE.NAME not in RECIPES:
        known = " or ".join(filter(None, RECIPES))
        raise ConfigError("RECIPE.NAME", value=cfg.RECIPE.NAME, expected=f"{known} in an experiment, or nothing")
    return "" if cfg.RECIPE.NAME == recipes_qgface.NAME else str(cfg.RECIPE.NAME)


def _joined(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {arm: cfg for own in arms.values() for arm, cfg in own.items()}
