"""What stage 1 renders while it is trained: sheets as PNG files and in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qsd_plugin.core.distributed import rank
from qsd_plugin.methods.dil import Pair, Stage1
from qsd_plugin.report.dil.renderer import to_pictures
from qsd_plugin.report.dil.sheets import training_sheet

FOLDER = "sheets"
COLUMNS = 8


class TrainingSheets:
    """Draws the pair of an iteration and its four renderings every so many iterations, on the first rank.

    Two iterations in a row are drawn, so that with alternating phases each of them is seen. Nothing else changes: the
    networks are in eval mode meanwhile, and no random number is drawn.

    Args:
        cfg: The host's; ``DIL.STAGE1_OPTIONS.SHEET_EVERY`` decides when, ``OUTPUT_DIR`` where (empty: no files).
    """

    def __init__(self, cfg: Any) -> None:
        self._every = int(cfg.DIL.STAGE1_OPTIONS.SHEET_EVERY)
        self._folder = Path(cfg.OUTPUT_DIR, FOLDER) if cfg.OUTPUT_DIR else None
        self._mean, self._std = (torch.tensor(cfg.MODEL[f"PIXEL_{name}"]).view(1, -1, 1, 1) for name in ("MEAN", "STD"))

    def due(self, iteration: int) -> bool:
        """Whether an iteration, from 1, is drawn: k times SHEET_EVERY, and the one behind it."""
        if not self._every or rank() != 0 or iteration < self._every:
            return False
        return iteration % self._every in (0, 1 % self._every)

    @torch.no_grad()
    def draw(self, stage: Stage1, pair: Pair, iteration: int) -> None:
        """Write ``sheets/<iteration>_<phase>.png`` and hand the sheet to the host's event storage.

        Args:
            stage: Before its step of this iteration; left as it is.
            pair: Of this iteration.
            iteration: From 1.
        """
        from fastreid.utils import events

        modes = {module: module.training for module in stage.modules()}
        stage.eval()
        rendered = stage.render(Pair(pair.phase, pair.better[:COLUMNS], pair.worse[:COLUMNS]))
        for module, training in modes.items():
            module.training = training
        rows = {
            "a, the better": pair.better[:COLUMNS],
            "a rebuilt": rendered.aa,
            "b, the worse": pair.worse[:COLUMNS],
            "b rebuilt": rendered.bb,
            "a with b's code": rendered.ab,
            "b with a's code": rendered.ba,
        }
        sheet = training_sheet(
            [(name, to_pictures(images.float().cpu(), self._mean, self._std)) for name, images in rows.items()]
        )
        if self._folder is not None:
            sheet.save(self._folder / f"{iteration:06d}_{pair.phase}.png")
        if events._CURRENT_STORAGE_STACK:
            events.get_event_storage().put_image(f"dil/{pair.phase}", sheet.picture.transpose(2, 0, 1))
