"""Makes tests/data/dil_{networks,losses,stage1,stage2,codes}.npz of the recorded runs of DIL: small inputs, float64.

python tests/methods/convert_dil_recorded.py DIR

Of a large tensor the recording holds a digest of seven numbers; those of many tensors are packed into one array beside
their names, with NaN where a parameter got no gradient. Entries that are a text, i.e. at which the official program
failed, are left out, by name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

TARGET = Path(__file__).parents[1] / "data"
SKIPPED = ("spec", "circle", "f32", "versions")
#: Images that a digest stands for just as well.
LARGE = 20_000


def main() -> None:
    """Converts what tests read; of data.pt the codes' manipulation only, the rest has tests elsewhere."""
    folder = Path(sys.argv[1])
    recorded = {name: load(folder / f"{name}.pt") for name in ("modules", "losses", "stage1_small", "stage2_small")}
    data = load(folder / "data.pt")
    recorded["codes"] = {key: value for key, value in data.items() if key.startswith(("manip", "lr."))}
    for name, target in zip(recorded, ("networks", "losses", "stage1", "stage2", "codes"), strict=True):
        np.savez_compressed(TARGET / f"dil_{target}.npz", **arrays(recorded[name]))


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=False)
    return content.get("f64", content)  # type: ignore[no-any-return]


def arrays(entries: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every entry as plain arrays, nested ones under joined names."""
    flat: dict[str, np.ndarray] = {}
    for key, value in entries.items():
        if not str(key).startswith(SKIPPED):
            put(flat, str(key).replace("/", "_"), value)
    return flat


def put(flat: dict[str, np.ndarray], name: str, value: Any) -> None:
    if isinstance(value, str) and value.startswith("ERROR"):
        print(f"left out: {name}: {value}")
    elif isinstance(value, torch.Tensor):
        if value.numel() <= LARGE:
            flat[name] = value.numpy()
    elif isinstance(value, dict) and all(is_digest(entry) for entry in value.values()):
        flat[f"{name}/names"] = np.array(list(value), dtype=str)
        rows = [[np.nan] * 7 if entry is None else entry + [0.0] * (7 - len(entry)) for entry in value.values()]
        flat[f"{name}/digests"] = np.array(rows)
    elif isinstance(value, dict):
        for key, entry in value.items():
            put(flat, f"{name}/{key}", entry)
    elif is_digest(value) or isinstance(value, (bool, int, float, np.ndarray)):
        if value is not None:
            flat[name] = np.asarray(value)
    elif all(isinstance(entry, str) for entry in value):
        flat[name] = np.array(value, dtype=str)
    else:
        for index, entry in enumerate(value):
            put(flat, f"{name}/{index}", entry)


def is_digest(value: Any) -> bool:
    """Sum, absolute sum, length and the first four values, or as many as there are."""
    return value is None or (
        isinstance(value, list) and 4 <= len(value) <= 7 and all(isinstance(number, float) for number in value)
    )


if __name__ == "__main__":
    main()
