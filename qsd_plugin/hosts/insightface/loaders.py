"""The host's ``get_dataloader`` over data sets of the plugin.

The host's data sets, transforms, sampler and loader stay in use; only what an index of the data set gives is new, see
:mod:`.pairs`.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Mapping
from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.insightface.images import FolderImages, Images, RecordImages
from qsd_plugin.hosts.insightface.options import Options
from qsd_plugin.hosts.insightface.pairs import CheckedDataset, PairDataset


def training_loader(
    host: Callable[..., Any],
    config: Mapping[str, Any],
    options: Options,
    arguments: tuple[Any, ...],
    named: Mapping[str, Any] | None = None,
) -> Any:
    """What the host's ``get_dataloader`` builds, over data sets of the plugin.

    The function runs with a copy of its module's names in which the data sets are built here; the classes themselves,
    which refer to each other by these names, stay as they are.

    Args:
        host: ``dataset.get_dataloader``.
        config: The host's.
        options: Of the plugin.
        arguments: Of the call.
        named: More of them, by name.
    """
    built: list[CheckedDataset] = []

    def wrapped(kind: Any, images: type[RecordImages] | type[FolderImages]) -> Callable[..., CheckedDataset]:
        def build(*args: Any, **kwargs: Any) -> CheckedDataset:
            dataset = kind(*args, **kwargs)
            classes, seed = int(config["num_classes"]), int(config.get("seed") or 0)
            source: Images = images(dataset)
            if options.paired:
                built.append(PairDataset(dataset, source, classes, seed, options))
            else:
                built.append(CheckedDataset(dataset, source, classes, seed))
            _check_length(len(dataset), config)
            return built[-1]

        return build

    found: Mapping[str, Any] = getattr(host, "__globals__", {})
    loader = with_names(
        host,
        {
            "MXFaceDataset": wrapped(found.get("MXFaceDataset"), RecordImages),
            "ImageFolder": wrapped(found.get("ImageFolder"), FolderImages),
        },
    )(*arguments, **(named or {}))
    for dataset in built:
        dataset.sampler = loader.sampler
    return loader


def with_names(function: Any, names: Mapping[str, Any]) -> Callable[..., Any]:
    """A copy of a function of the host that finds ``names`` among its global names."""
    if not isinstance(function, types.FunctionType):
        raise ConfigError(
            "arcface_torch's get_dataloader", value=type(function).__name__, expected="a plain function, undecorated"
        )
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _check_length(images: int, config: Mapping[str, Any]) -> None:
    stated = config.get("num_image")
    if stated and abs(stated - images) > images // 100:
        logging.warning(
            "config.num_image is %s, the training set has %d: the learning rate follows config.num_image",
            stated,
            images,
        )
