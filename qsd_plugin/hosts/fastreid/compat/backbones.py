"""Backbones: architecture files found from any folder (S12), pretrained weights found or explained (S25)."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import load_safely, numpy_allowed
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace

_PATH_KEY = "MODEL.BACKBONE.PRETRAIN_PATH"


def _find_architecture_files() -> Undo:
    import fastreid
    from fastreid.modeling.backbones.regnet.config import cfg as architecture

    package = Path(fastreid.__file__).parent
    defaults = architecture.clone()
    host_merge = architecture.merge_from_file

    def merge_from_file(filename: str) -> None:
        # RegNet and EffNet share one global config: what the last model set (RegNetY: SE_ON) must not reach the next.
        architecture.merge_from_other_cfg(defaults)
        inside = package.parent / filename
        host_merge(str(inside if inside.is_file() else filename))

    # Not setattr: the node would take it for a config key.
    vars(architecture)["merge_from_file"] = merge_from_file

    def undo() -> None:
        del vars(architecture)["merge_from_file"]

    return undo


def _explain_missing_weights() -> Undo:
    from fastreid.modeling.backbones.build import BACKBONE_REGISTRY

    builders: dict[str, Callable[[Any], Any]] = BACKBONE_REGISTRY._obj_map
    before = dict(builders)
    builders.update({name: explained(builder) for name, builder in before.items()})

    def undo() -> None:
        builders.update(before)

    return undo


def explained(builder: Callable[[Any], Any], *, reads_files: bool = False) -> Callable[[Any], Any]:
    """A backbone builder whose failures over pretrained weights and ``DEPTH`` say what to do.

    Args:
        builder: Config to backbone.
        reads_files: It reads ``PRETRAIN_PATH`` in its own safe way and refuses what does not fit.
    """

    @functools.wraps(builder)
    def build(cfg: Any) -> Any:
        options = cfg.MODEL.BACKBONE
        try:
            if not options.PRETRAIN or reads_files:
                return builder(cfg)
            if options.PRETRAIN_PATH:
                return _build_from_file(builder, cfg, Path(options.PRETRAIN_PATH))
            return _build_from_download(builder, cfg)
        except KeyError as error:
            if error.args != (options.DEPTH,):
                raise
            raise ConfigError(
                "MODEL.BACKBONE.DEPTH", value=options.DEPTH, expected=f"a depth (size) that {options.NAME} knows"
            ) from error

    return build


def _build_from_download(builder: Callable[[Any], Any], cfg: Any) -> Any:
    try:
        with explained_downloads():
            return builder(cfg)
    except (KeyError, ValueError, FileNotFoundError) as error:
        plain = cfg.clone()
        plain.defrost()
        plain.MODEL.BACKBONE.PRETRAIN = False
        builder(plain)  # raises the same error again unless the pretrained weights are its reason
        raise CheckpointError(
            "MODEL.BACKBONE.PRETRAIN True: nobody publishes ImageNet weights for this backbone",
            value=f"{cfg.MODEL.BACKBONE.NAME} {cfg.MODEL.BACKBONE.DEPTH}",
            remedy=f"Set {_PATH_KEY} to a file of your own, or MODEL.BACKBONE.PRETRAIN False.",
        ) from error


def _build_from_file(builder: Callable[[Any], Any], cfg: Any, path: Path) -> Any:
    try:
        with numpy_allowed():
            backbone = builder(cfg)
    except Exception:
        load_safely(path, title=_PATH_KEY)  # says it in words when the file is to blame
        raise
    # The host loads with strict=False: a file whose names do not fit would leave random weights and a log line.
    by_shape: dict[Any, list[Any]] = {}
    for tensor in _tensors(load_safely(path, title=_PATH_KEY)):
        by_shape.setdefault(tensor.shape, []).append(tensor)
    kernels = [tensor for tensor in backbone.state_dict().values() if tensor.dim() > 1]
    if not any(tensor.equal(candidate) for tensor in kernels for candidate in by_shape.get(tensor.shape, ())):
        raise CheckpointError(
            _PATH_KEY,
            value=str(path),
            expected=f"weights of {cfg.MODEL.BACKBONE.NAME} {cfg.MODEL.BACKBONE.DEPTH} under its own names, such as "
            f"{next(iter(backbone.state_dict()))}",
            remedy="Nothing in it reached the backbone. Checkpoints of whole models belong into MODEL.WEIGHTS.",
        )
    return backbone


def _tensors(content: Any) -> Iterator[Any]:
    import torch

    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)


@contextmanager
def explained_downloads() -> Iterator[None]:
    """Inside, a failing download of the host's says which file to put where, and gdown serves Google Drive only.

    Raises:
        CheckpointError: The file could not be fetched.
    """
    import torch.hub

    fetch = torch.hub.download_url_to_file
    try:
        drive: Any = importlib.import_module("gdown")
    except ModuleNotFoundError:
        drive = None

    def download(url: str, path: str, *args: Any, **kwargs: Any) -> None:
        try:
            fetch(url, path, *args, **kwargs)
        except Exception as error:  # name lookup, HTTP, socket, file system and checksum errors alike
            raise _download_failed(url, path, str(error)) from error

    def gdown_download(url: str, output: str, quiet: bool = False) -> None:
        if "drive.google.com" not in url:
            download(url, output)
        elif drive is None:
            raise _download_failed(url, output, "Google Drive needs the package gdown, which is not installed")
        else:
            try:
                drive.download(url, output, quiet=quiet)
            except Exception as error:
                raise _download_failed(url, output, str(error)) from error
            if not Path(output).is_file():
                raise _download_failed(url, output, "gdown returned without a file")

    stand_in = types.ModuleType("gdown")
    vars(stand_in)["download"] = gdown_download
    undo_hub = replace(torch.hub, "download_url_to_file", download)
    undo_gdown = _replace_module("gdown", stand_in)
    try:
        yield
    finally:
        undo_gdown()
        undo_hub()


def _replace_module(name: str, module: types.ModuleType) -> Undo:
    modules: dict[str, Any] = sys.modules
    existed, before = name in modules, modules.get(name)

    def undo() -> None:
        if existed:
            modules[name] = before
        else:
            del modules[name]

    modules[name] = module
    return undo


def _download_failed(url: str, path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"MODEL.BACKBONE.PRETRAIN True: the ImageNet weights could not be fetched from {url} ({reason})",
        expected=f"a network connection, or the file {path}",
        remedy=f"Download it on another machine and save it as {path}; or set {_PATH_KEY} to a file of your own, or "
        "MODEL.BACKBONE.PRETRAIN False.",
    )


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S12",
        where="modeling/backbones/regnet/regnet.py:568, effnet.py:253",
        symptom="FileNotFoundError for every RegNet and EffNet unless the working directory holds fastreid/; a RegNetX "
        "built after a RegNetY gets its squeeze-and-excitation blocks.",
        action="Architecture files are read from the package, each into a fresh copy of the defaults.",
        needed=always,
        apply=_find_architecture_files,
        proof="test_s12_regnet_builds_from_any_folder",
    ),
    Patch(
        row="S25",
        where="modeling/backbones/*.py (init_pretrained_weights, PRETRAIN_PATH)",
        symptom="PRETRAIN True without gdown or network: ModuleNotFoundError or a traceback from urllib; a file that "
        "does not fit leaves random weights.",
        action="Downloads need gdown for Google Drive only; a failure names the file and the place for it; an unknown "
        "DEPTH is named too.",
        needed=always,
        apply=_explain_missing_weights,
        proof="test_s25_a_failed_download_says_which_file_to_put_where",
    ),
)
