"""Reading checkpoint files of any origin without running code from them."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import CheckpointError, did_you_mean


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file as the host wants it: a dict with the weights under ``"model"``.

    A bare state dict, or one under ``"state_dict"``, is put under ``"model"``.

    Raises:
        CheckpointError: The file is missing, damaged, holds no weights, or needs code that is not known to be safe.
    """
    content = load_safely(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"Checkpoint {path}", value=type(content).__name__, expected="a dict of weights", remedy=_SAVE_A_STATE_DICT
        )
    if "model" in content:
        return content
    if _is_state_dict(content.get("state_dict")):
        return {"model": content["state_dict"]}
    if _is_state_dict(content):
        return {"model": content}
    raise CheckpointError(
        f"Checkpoint {path}",
        value=sorted(map(str, content))[:8],
        expected="a key 'model' or 'state_dict', or nothing but tensors",
        remedy=_SAVE_A_STATE_DICT,
    )


def load_safely(path: Path, *, title: str = "Checkpoint") -> Any:
    """``torch.load`` on the CPU with numpy's scalars and arrays allowed beside tensors, and nothing else.

    Args:
        path: The file.
        title: What the file is to the user, for the messages.

    Raises:
        CheckpointError: The file is missing, damaged, or needs code that is not known to be safe.
    """
    import torch

    if not path.is_file():
        raise CheckpointError(title, value=str(path), expected="an existing file", remedy=_neighbours(path))
    with numpy_allowed():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files fail in many ways
            blocked = _blocked_globals(path, error) if isinstance(error, pickle.UnpicklingError) else []
            if not blocked:
                raise _damaged(f"{title} {path}", path, error) from error
            raise CheckpointError(
                f"{title} {path} would run code when it is loaded",
                value=", ".join(blocked),
                expected="tensors, numbers and names only",
                remedy="Loading is refused. If you trust its author, convert it once: "
                f"python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
                "torch.save(c.get('model', c), 'converted.pth')\"",
            ) from error


@contextmanager
def numpy_allowed() -> Iterator[None]:
    """Inside, ``torch.load(weights_only=True)`` accepts numpy's scalars and arrays, which hold data and run no code."""
    import torch

    with torch.serialization.safe_globals(list(_numpy_globals())):
        yield


_SAVE_A_STATE_DICT = "Save the weights alone: torch.save({'model': model.state_dict()}, path)."


def _is_state_dict(content: object) -> bool:
    import numpy as np
    import torch

    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(value, torch.Tensor | np.ndarray) for value in content.values())
    )


def _numpy_globals() -> Iterator[Any]:
    """What a pickled numpy scalar or array refers to, under the names of numpy 1 and 2."""
    import _codecs

    import numpy as np

    core = "numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core"
    multiarray = importlib.import_module(f"{core}.multiarray")

    yield from (np.ndarray, np.dtype, _codecs.encode)
    yield from {type(np.dtype(code)) for code in "?bhilqBHILQefdSU"}
    for function in (multiarray.scalar, multiarray._reconstruct):
        for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
            yield (function, f"{module}.{function.__name__}")


def _blocked_globals(path: Path, error: Exception) -> list[str]:
    """Names in the file that the safe loader refuses; empty when it refused the file for another reason."""
    import torch

    if zipfile.is_zipfile(path):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    # torch lists no names for its format before 1.6 and for plain pickles, but its message holds the first one.
    return re.findall(r"GLOBAL ([\w.]+)", str(error))


def _damaged(what: str, path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        what,
        value=f"{path.stat().st_size} bytes that cannot be read ({type(error).__name__})",
        expected="a file written by torch.save",
        remedy="It may be cut off or be a saved error page: copy or download it again, or use an earlier checkpoint.",
    )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"There is no folder {path.parent}."
    names = [file.name for file in path.parent.glob("*.pt*")]
    return did_you_mean(path.name, names) if names else f"The folder {path.parent} holds no checkpoint."
