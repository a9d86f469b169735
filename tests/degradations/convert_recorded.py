"""Makes tests/data/dil_degradations.npz of the recorded degradations (data.pt): every fourth pixel, no pickles.

python tests/degradations/convert_recorded.py DIR/data.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

TARGET = Path(__file__).parents[1] / "data" / "dil_degradations.npz"


def main() -> None:
    """Leaves out what the official program failed at, whose entries are texts."""
    recorded = torch.load(sys.argv[1], weights_only=False)
    arrays = {"stop_probabilities": np.array(recorded["stop_prob(3,.5)"])}
    for key, value in recorded["degrade"].items():
        if isinstance(value, np.ndarray):
            name = f"{key[0]}/{key[1]}"
            step = 4 if value.shape[0] > 130 else 1
            arrays[name] = value[::step, ::step]
            arrays[f"{name}/shape"] = np.array(value.shape)
            arrays[f"{name}/sum"] = np.array(value.sum(dtype=np.int64))
    np.savez_compressed(TARGET, **arrays)


if __name__ == "__main__":
    main()
