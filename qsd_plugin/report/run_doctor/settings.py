"""Do the stages of a recipe look at images the same way, with the same network?"""

from __future__ import annotations

from collections.abc import Iterator

from qsd_plugin.report.run_doctor.findings import Finding
from qsd_plugin.report.run_doctor.registry import check
from qsd_plugin.report.run_doctor.run_files import Run

#: A fine-tuned network sees images as its baseline did only if these agree.
SHARED = (
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "INPUT.SIZE_TRAIN",
    "INPUT.SIZE_TEST",
    "MODEL.BACKBONE.",
    "MODEL.HEADS.NUM_CLASSES",
    "MODEL.HEADS.POOL_LAYER",
    "MODEL.HEADS.EMBEDDING_DIM",
    "DATASETS.NAMES",
    "DATASETS.COMBINEALL",
)
_INDIFFERENT = ("MODEL.BACKBONE.PRETRAIN", "MODEL.BACKBONE.PRETRAIN_PATH")


@check("settings")
def settings(run: Run) -> Iterator[Finding]:
    """Compare a stage's config with that of the stage whose checkpoint it started from."""
    for stage in run.training:
        origin = run.origin(stage)
        if origin is None or not origin.config:
            continue
        keys = [key for key in stage.config if key.startswith(SHARED) and key not in _INDIFFERENT]
        differing = [key for key in keys if stage.config[key] != origin.config.get(key)]
        if not differing:
            figure = f"{len(keys)} keys equal to {origin.name}'s"
            yield Finding("settings", stage.name, "ok", "Input and network are its baseline's", figure)
            continue
        shown = "; ".join(f"{key} {origin.config.get(key)} -> {stage.config[key]}" for key in differing)
        yield Finding(
            "settings",
            stage.name,
            "problem",
            f"Input or network differ from those of {origin.name}, whose checkpoint it started from",
            shown,
            "no difference",
            f"Give all stages the same values and run again with --from-stage {stage.name}.",
        )
