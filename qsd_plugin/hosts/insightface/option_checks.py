"""Reading ``config.qsd_plugin``: every option by itself, then against the others and the host's own keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.hosts.insightface.options import KEY, METHODS, Options, read_section

GRADIENTS = ("exact", "straight_through")


def read_options(config: Mapping[str, Any]) -> Options:
    """The options of a host config, checked by themselves and against the host's own keys.

    Raises:
        ConfigError: Names the option that is misspelt, impossible, or does not go with another one.
    """
    given = config.get(KEY) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.{KEY}", value=given, expected="dict(methods=[...], ...)")
    methods = given.get("methods", ())
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise ConfigError(f"config.{KEY} methods", value=methods, expected=f"a list out of {', '.join(METHODS)}")
    for name in methods:
        if name not in METHODS:
            raise ConfigError(f"config.{KEY} methods", value=name, remedy=did_you_mean(str(name), METHODS))
    options = read_section(Options, {**given, "methods": tuple(methods)}, f"config.{KEY}")
    for name in METHODS:
        if name.lower() in given and name not in methods:
            raise ConfigError(
                f"config.{KEY} {name.lower()}",
                value="options of a method that is not used",
                expected=f"{name!r} among the methods {list(methods)}",
            )
    _check_values(options)
    _check_mix(options)
    _check_host(options, config)
    return options


def _check_values(options: Options) -> None:
    choices = {
        "margin_gradient": (options.margin_gradient, GRADIENTS),
        "qsd partner": (options.qsd.partner, ("identity", "degraded")),
        "qsd quality": (options.qsd.quality, ("file", "norm")),
        "qsd label_scale": (options.qsd.label_scale, ("none", "minmax", "rank")),
        "qsd control": (options.qsd.control, ("none", "shuffle", "reverse")),
        "qsd classify": (options.qsd.classify, ("anchor", "both")),
        "qud loss": (options.qud.loss, ("qud", "soft", "mse", "cosine")),
        "adaface gradient": (options.adaface.gradient, GRADIENTS),
        "qgface gradient": (options.qgface.gradient, GRADIENTS),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"config.{KEY} {name}", value=value, remedy=did_you_mean(value, known))
    ranges = {
        "qsd weight": options.qsd.weight >= 0,
        "qud weight": options.qud.weight >= 0,
        "qgface contrast_weight": options.qgface.contrast_weight >= 0,
        "qsd min_coverage": 0 <= options.qsd.min_coverage <= 1,
        "adaface margin": options.adaface.margin >= 0,
        "adaface h": options.adaface.h > 0,
        "adaface scale": options.adaface.scale > 0,
        "qgface margin": options.qgface.margin >= 0,
        "qgface h": options.qgface.h > 0,
        "qgface scale": options.qgface.scale > 0,
    }
    for name, fits in ranges.items():
        if not fits:
            section, _, option = name.partition(" ")
            raise ConfigError(
                f"config.{KEY} {name}",
                value=getattr(getattr(options, section), option),
                expected="0 to 1" if option == "min_coverage" else "> 0" if option in ("h", "scale") else ">= 0",
            )


def _check_mix(options: Options) -> None:
    methods = options.methods
    if len(set(methods)) < len(methods):
        raise ConfigError(f"config.{KEY} methods", value=list(methods), expected="each once")
    if {"QGFace", "AdaFace"} <= set(methods):
        raise ConfigError(
            f"config.{KEY} methods",
            value=list(methods),
            expected="QGFace or AdaFace",
            remedy="QGFace has AdaFace's margin built in: drop AdaFace.",
        )
    if {"QGFace", "QSD"} <= set(methods) and options.qsd.partner != "degraded":
        raise ConfigError(
            f"config.{KEY} qsd partner",
            value=options.qsd.partner,
            expected="'degraded', the pairs that QGFace trains on",
            remedy="Set qsd=dict(partner='degraded', quality='norm').",
        )
    if "QSD" in methods:
        qsd = options.qsd
        if qsd.partner == "degraded" and qsd.quality == "file":
            raise ConfigError(
                f"config.{KEY} qsd quality",
                value="file",
                expected="'norm' with partner='degraded'",
                remedy="A label file knows no degraded views.",
            )
        if (qsd.quality == "file") != bool(qsd.labels):
            raise ConfigError(
                f"config.{KEY} qsd labels",
                value=qsd.labels,
                expected="a label file with quality='file', and none with quality='norm'",
                remedy="tools/quality_labels.py makes one.",
            )
    if "QUD" in methods:
        teacher = options.qud.teacher
        if bool(teacher.onnx) == bool(teacher.network) or bool(teacher.network) != bool(teacher.weights):
            raise ConfigError(
                f"config.{KEY} qud teacher",
                value={name: getattr(teacher, name) for name in ("network", "weights", "onnx")},
                expected="network and weights, or onnx",
            )


def _check_host(options: Options, config: Mapping[str, Any]) -> None:
    if config.get("dali") and options.paired:
        raise ConfigError(
            "config.dali",
            value=True,
            expected=f"False with {' and '.join(m for m in options.methods if m in ('QSD', 'QGFace'))}",
            remedy="NVIDIA DALI hands out shuffled images without their keys, so nothing can be paired or looked up.",
        )
    if config.get("rec") == "synthetic" and options.paired:
        raise ConfigError(
            "config.rec", value="synthetic", expected="a record file or an image folder, for methods that pair images"
        )
    threshold = config.get("interclass_filtering_threshold") or 0
    if threshold > 0 and (options.margin_gradient == "exact" or {"AdaFace", "QGFace"} & set(options.methods)):
        raise ConfigError(
            "config.interclass_filtering_threshold",
            value=threshold,
            expected="0 with AdaFace, QGFace or margin_gradient='exact'",
            remedy="Only the host's own margin filters classes.",
        )
    margins = config.get("margin_list")
    if options.margin_gradient == "exact" and margins and (margins[0] != 1.0 or margins[2] != 0.0):
        raise ConfigError(
            "config.margin_list",
            value=tuple(margins),
            expected="(1.0, m, 0.0), an ArcFace margin, with margin_gradient='exact'",
            remedy="The host's CosFace margin has its exact gradient already.",
        )
