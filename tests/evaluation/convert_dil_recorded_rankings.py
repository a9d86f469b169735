"""Makes tests/data/dil_rankings.npz of the rankings that DIL's program was recorded with (data.pt), no pickles.

python tests/evaluation/convert_dil_recorded_rankings.py DIR/data.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

TARGET = Path(__file__).parents[1] / "data" / "dil_rankings.npz"


def main() -> None:
    """Inputs under their own names; results as ``<name>/cmc`` and ``<name>/map``."""
    recorded = torch.load(sys.argv[1], weights_only=False)
    arrays = {name: np.asarray(value) for name, value in recorded["eval.in"].items()}
    for key, value in recorded.items():
        if key.startswith(("eval.multi", "eval.single")):
            name = key.removeprefix("eval.")
            arrays[f"{name}/cmc"], arrays[f"{name}/map"] = np.asarray(value[0]), np.asarray(value[1])
    np.savez_compressed(TARGET, **arrays)


if __name__ == "__main__":
    main()
