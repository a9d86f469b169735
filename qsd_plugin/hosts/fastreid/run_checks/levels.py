"""QSD's levels by their names in fast-reid, and the labels' coverage of its data sets."""

from __future__ import annotations

from collections.abc import Iterator

from qsd_plugin.core.errors import DataError, LabelError
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.run_checks.stored_runs import stored_config
from qsd_plugin.hosts.fastreid.taps import parse_taps
from qsd_plugin.methods.qsd import level_weights, preset
from qsd_plugin.methods.qsd.presets import ROLES
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.report.run_doctor import Finding, Run, StageFolder, check
from qsd_plugin.report.run_doctor.distillation import level_shares, logged_levels


@check("levels")
def levels(run: Run) -> Iterator[Finding]:
    """Does one level dominate QSD's term?"""
    for stage in run.training:
        if stage.setting("MODEL.META_ARCHITECTURE") == "QSD":
            yield from level_shares(stage, stored_weights(stage))


def stored_weights(stage: StageFolder) -> dict[str, float]:
    """The level weights a training used, from its config and the levels it logged."""
    given = parse_taps(stage.setting("QSD.TAPS") or [])
    # As the default levels are ordered, which matters to presets that single out the last one; logs are alphabetical.
    taps = given or sorted(parse_taps(logged_levels(stage)), key=lambda tap: ROLES.index(tap.role))
    weights = level_weights(preset(stage.setting("QSD.PRESET", "official")), {tap.name: tap.role for tap in taps})
    return weights | {tap.name: tap.weight for tap in given if tap.weight is not None}


@check("coverage")
def coverage(run: Run) -> Iterator[Finding]:
    """Which share of the training images has a label?"""
    user = run.label_user or next((stage for stage in run.training if stage.config), None)
    files = [(path, stage) for path, stage in run.label_files() if path.is_file()]
    if user is None or not files:
        return
    cfg = stored_config(user)
    if run.label_user is None:  # labels that no training has read yet: by the name the recipe gives their files
        named = [(path.stem, (path, stage)) for path, stage in files if path.stem in cfg.DATASETS.NAMES]
    else:
        named = list(zip(cfg.DATASETS.NAMES, files, strict=False))
    for name, (path, stage) in named:
        try:
            labels = QualityLabels.load(path)
            items = datasets.training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1]
            share = labels.coverage([item[0] for item in items], root=datasets.dataset_folder(cfg, name))
        except (DataError, LabelError) as error:
            step = "Name the folder that holds the data sets: add DATA.ROOT FOLDER to this command."
            yield Finding(
                "coverage", stage.name, "unknown", "Coverage cannot be told", str(error).rstrip("."), next_step=step
            )
            continue
        low = share < cfg.QUALITY.MIN_COVERAGE
        example = labels.keys[0] if len(labels) else "none"
        yield Finding(
            "coverage",
            stage.name,
            "problem" if low else "ok",
            f"Training images of {name} have no label (a key of the file: {example})" if low else "Labels cover",
            f"{share:.1%} of {len(items)} images of {name} labelled",
            f"{cfg.QUALITY.MIN_COVERAGE:.0%}, QUALITY.MIN_COVERAGE",
            "Use the label file of this data set, or make labels again with --from-stage labels." if low else "",
        )
