"""Intermediate tensors of any network, by module path, without touching the network.

Shapes: B batch, C channels, H x W grid, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from qsd_plugin.core.errors import ConfigError, nearest

Transform = Callable[[Tensor], Tensor]


class TapRecorder:
    """Records the outputs of named modules while it is entered.

    Entering returns a new dict that every forward pass fills; it holds graph-attached tensors and stays usable after
    the block, while the recorder itself forgets it. Several forwards in one block overwrite: the last one wins, so
    enter once per forward (cheap: one hook per name) when each forward's taps are needed. A module that is never
    called leaves no entry, and one that is called twice leaves its last output. The recorded tensor is the module's
    own output, not a copy: an in-place operation right behind the module (``ReLU(inplace=True)``) changes it too.

    A name is a module path as in ``model.named_modules()``. Where that module returns a dict or a sequence, the entry
    follows after a colon: ``"heads:features"``, ``"backbone:0"``; ``":key"`` reads the output of the model itself.
    A model wrapped for data-parallel training is unwrapped: names never carry its ``module.`` prefix.

    Args:
        model: The network to listen to.
        names: What to record; the names are the keys of the dict.
        transforms: Applied to the tensor of the name before it is stored, e.g. ``tokens_to_map`` for a transformer's
            block or ``lambda x: x.flatten(1)`` for a neck that returns [B, C, 1, 1].

    Raises:
        ConfigError: A name or a transform's key is unknown, or given twice; when recording, an output is not a tensor
            or lacks the selected entry.

    Example:
        >>> with TapRecorder(model, ["layer2", "layer3"]) as taps:
        ...     logits = model(images)
        >>> taps["layer2"].shape
        torch.Size([64, 512, 32, 16])
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], *, transforms: Mapping[str, Transform] | None = None
    ) -> None:
        if isinstance(names, str):
            raise ConfigError("Tap names", value=names, expected="a list of names", remedy=f"Write [{names!r}].")
        repeated = {name for name in names if list(names).count(name) > 1}
        if repeated:
            raise ConfigError("Tap names", value=sorted(repeated), expected="each name once")
        unused = set(transforms or {}) - set(names)
        if unused:
            raise ConfigError("Tap transforms", value=sorted(unused), expected=f"keys among the taps {list(names)}")
        inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        modules = dict(inner.named_modules())
        self._modules = {name: _find_module(name, modules) for name in names}
        self._transforms = dict(transforms or {})
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> dict[str, Tensor]:
        if self._handles:
            raise ConfigError(
                "This TapRecorder is recording already",
                expected="one block at a time",
                remedy="Make a second recorder for a nested block.",
            )
        taps: dict[str, Tensor] = {}
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name, taps)))
        return taps

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str, taps: dict[str, Tensor]) -> Callable[[nn.Module, object, object], None]:
        transform = self._transforms.get(name)

        def record(_module: nn.Module, _inputs: object, output: object) -> None:
            tensor = _select(name, output)
            taps[name] = tensor if transform is None else transform(tensor)

        return record


def tokens_to_map(tokens: Tensor, grid: tuple[int, int], num_prefix: int = 1) -> Tensor:
    """Lay the patch tokens of a transformer out on their grid.

    Args:
        tokens: [B, num_prefix + H*W, C], row by row.
        grid: Patches (H, W), e.g. (16, 8) for 256x128 pixels and patches of 16.
        num_prefix: Class and distillation tokens at the front, dropped.

    Returns:
        [B, C, H, W].

    Raises:
        ConfigError: The number of tokens does not fit the grid.
    """
    height, width = grid
    if tokens.dim() != 3 or tokens.shape[1] != num_prefix + height * width:
        raise ConfigError(
            "Tokens to lay out on a grid",
            value=tuple(tokens.shape),
            expected=f"[B, {num_prefix} + {height}*{width}, C]",
            remedy="Set the grid to (image height, image width) // patch stride and count the class tokens.",
        )
    patches = tokens[:, num_prefix:].transpose(1, 2)
    return patches.reshape(tokens.shape[0], tokens.shape[2], height, width)


def _find_module(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    path = name.partition(":")[0]
    if path in modules:
        return modules[path]
    # A path without its parent ("layer2" for "backbone.layer2") is a commoner slip than a typing error.
    suggestions = [known for known in modules if known.endswith(f".{path}")] or nearest(path, modules)
    if suggestions:
        remedy = f"Did you mean {' or '.join(map(repr, suggestions[:3]))}?"
    else:
        top = sorted({known.partition(".")[0] for known in modules if known})
        remedy = f"The model's top-level modules are: {', '.join(top)}."
    raise ConfigError("Tap name", value=name, expected="a module path of the model", remedy=remedy)


def _select(name: str, output: object) -> Tensor:
    for key in name.split(":")[1:]:
        output = _entry(name, output, key)
    if not isinstance(output, torch.Tensor):
        raise ConfigError(
            f"Tap {name!r}",
            value=_describe(output),
            expected="a tensor",
            remedy=f"Select an entry: '{name}:KEY' for a dict, '{name}:INDEX' for a tuple.",
        )
    return output


def _entry(name: str, output: object, key: str) -> object:
    if isinstance(output, Mapping) and key in output:
        return output[key]
    if isinstance(output, (list, tuple)) and key.isdecimal() and int(key) < len(output):
        return output[int(key)]
    raise ConfigError(f"Tap {name!r}", value=_describe(output), expected=f"an output with an entry {key!r}")


def _describe(output: object) -> str:
    if isinstance(output, Mapping):
        return f"a dict with keys {sorted(map(str, output))}"
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"
