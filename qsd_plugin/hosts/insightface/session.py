"""The three names of arcface_torch's script that the plugin replaces, bound to the config of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.insightface.heads import build_head
from qsd_plugin.hosts.insightface.loaders import training_loader
from qsd_plugin.hosts.insightface.option_checks import read_options
from qsd_plugin.hosts.insightface.options import Options, TeacherOptions
from qsd_plugin.hosts.insightface.wrappers import MethodModel, default_levels, student_weights
from qsd_plugin.methods.qsd import level_weights
from qsd_plugin.methods.qsd import preset as qsd_preset
from qsd_plugin.methods.qud import ModuleTeacher, OnnxTeacher, Teacher

FACE_MEAN = FACE_STD = (127.5, 127.5, 127.5)


class Session:
    """One run.

    The host's script asks for a loader, a network and a head, in this order, after it has read its config; that is when
    the config is read here.

    Args:
        get_model: The host's ``backbones.get_model``.
        get_dataloader: The host's ``dataset.get_dataloader``.
        partial_fc: The host's ``partial_fc_v2.PartialFC_V2``.
    """

    def __init__(
        self, get_model: Callable[..., nn.Module], get_dataloader: Callable[..., Any], partial_fc: type[nn.Module]
    ) -> None:
        self._host_model, self._host_loader, self._host_head = get_model, get_dataloader, partial_fc
        self._levels: dict[str, float] = {}

    def names(self) -> dict[str, Any]:
        """What stands in for the host's names."""
        return {
            "get_model": self.get_model,
            "get_dataloader": self.get_dataloader,
            "PartialFC_V2": self.partial_fc,
        }

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The host's merged config; the script merges into the base module's object."""
        base = sys.modules.get("configs.base")
        config = getattr(base, "config", None)
        if not isinstance(config, Mapping):
            raise HostError("arcface_torch's configs.base.config", value=type(config).__name__, expected="a dict")
        return config

    @cached_property
    def options(self) -> Options:
        """The plugin's, see :func:`~.option_checks.read_options`."""
        return read_options(self.config)

    def get_dataloader(self, *arguments: Any, **named: Any) -> Any:
        """As the host's."""
        if not self.options.methods or self.config.get("dali"):  # DALI reads by itself
            return self._host_loader(*arguments, **named)
        return training_loader(self._host_loader, self.config, self.options, arguments, named)

    def get_model(self, name: str, **arguments: Any) -> nn.Module:
        """As the host's, wrapped where a method needs more than an embedding of single images."""
        student = self._host_model(name, **arguments)
        methods = self.options.methods
        if "QSD" in methods:
            self._levels = self._qsd_levels(student)
        teacher = self._teacher(self.options.qud.teacher, arguments) if "QUD" in methods else None
        if not self.options.paired and teacher is None:
            return student
        return MethodModel(student, levels=list(self._levels), teacher=teacher)

    def partial_fc(self, *arguments: Any, **named: Any) -> nn.Module:
        """As the host's ``PartialFC_V2(margin_loss, embedding_size, num_classes, sample_rate, fp16)``."""
        options = self.options
        if not (options.methods or options.margin_gradient == "exact"):
            return self._host_head(*arguments, **named)
        return build_head(self._host_head, options, self.config, self._levels, arguments, named)

    def _qsd_levels(self, student: nn.Module) -> dict[str, float]:
        qsd = self.options.qsd
        return qsd.levels or level_weights(qsd_preset(qsd.preset), default_levels(student))

    def _teacher(self, options: TeacherOptions, arguments: Mapping[str, Any]) -> Teacher:
        if options.onnx:
            size = (options.size, options.size) if options.size else None
            mean, std = [options.mean] * 3, [options.std] * 3
            return OnnxTeacher(Path(options.onnx), mean=mean, std=std, size=size, colour=options.colour)
        network = self._host_model(options.network, **{**arguments, "dropout": 0.0})
        return ModuleTeacher(network, student_weights(options.weights), mean=FACE_MEAN, std=FACE_STD)
