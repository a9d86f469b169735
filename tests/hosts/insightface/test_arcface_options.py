"""``config.qsd_plugin``: defaults, misspelt names, wrong types, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.insightface.option_checks import read_options

LABELS = {"labels": "labels.csv"}
TEACHER = {"network": "r50", "weights": "r50.pt"}


def options(**given: Any) -> Any:
    return read_options({"qsd_plugin": given})


def test_defaults_are_those_of_the_papers() -> None:
    assert read_options({}).methods == ()
    read = options(methods=["QSD", "AdaFace", "QUD"], qsd=LABELS, qud={"teacher": TEACHER, "temperature": 1})
    assert read.methods == ("QSD", "AdaFace", "QUD")
    assert (read.qsd.tau, read.qsd.preset, read.paired, read.classified) == (0.3, "official", "identity", True)
    assert (read.adaface.margin, read.adaface.h, read.adaface.gradient) == (0.4, 0.333, "exact")
    assert (read.qud.queue_size, read.qud.temperature, read.qud.teacher.network) == (1024, 1, "r50")
    alone = options(methods=["QUD"], qud={"teacher": TEACHER})
    assert (alone.paired, alone.classified) == ("", False)
    assert options(methods=["QUD"], qud={"teacher": TEACHER, "classify": True}).classified
    assert options(methods=["QGFace"]).paired == "degraded"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"methods": ["QSDD"]}, "config.qsd_plugin methods: got 'QSDD'. Did you mean 'QSD'?"),
    ({"methods": "QSD"}, "config.qsd_plugin methods: got 'QSD'; expected a list out of QSD, QGFace, AdaFace, QUD"),
    ({"methods": [], "adafaec": {}}, "config.qsd_plugin: unknown option: got 'adafaec'. Did you mean 'adaface'?"),
    ({"methods": ["QSD"], "qsd": {"prset": ""}}, "qsd: unknown option: got 'prset'. Did you mean 'preset'?"),
    (
        {"methods": ["QUD"], "qud": {"teacher": {"wights": ""}}},
        "qud teacher: unknown option: got 'wights'. Did you mean",
    ),
    ({"methods": ["AdaFace"], "qsd": LABELS}, "qsd: got 'options of a method that is not used'; expected 'QSD' among"),
    ({"methods": ["AdaFace"], "adaface": {"margin": "0.4"}}, "adaface margin: got '0.4'; expected a number"),
    ({"methods": ["AdaFace"], "adaface": {"margin": -1.0}}, "adaface margin: got -1.0; expected >= 0"),
    (
        {"methods": ["AdaFace"], "adaface": {"gradient": "exakt"}},
        "adaface gradient: got 'exakt'. Did you mean 'exact'?",
    ),
    ({"methods": ["AdaFace", "AdaFace"]}, "methods: got ['AdaFace', 'AdaFace']; expected each once"),
    ({"methods": ["QGFace", "AdaFace"]}, "QGFace has AdaFace's margin built in: drop AdaFace."),
    ({"methods": ["QGFace", "QSD"], "qsd": LABELS}, "qsd partner: got 'identity'; expected 'degraded'"),
    ({"methods": ["QSD"]}, "qsd labels: got ''; expected a label file"),
    ({"methods": ["QSD"], "qsd": {"quality": "norm", **LABELS}}, "qsd labels: got 'labels.csv'; expected a label file"),
    ({"methods": ["QSD"], "qsd": {"partner": "degraded", **LABELS}}, "qsd quality: got 'file'; expected 'norm'"),
    ({"methods": ["QUD"]}, "qud teacher: got {'network': '', 'weights': '', 'onnx': ''}; expected network and weights"),
    ({"methods": ["QUD"], "qud": {"queue_size": 1.5}}, "qud queue_size: got 1.5; expected a whole number"),
    ({"methods": ["QUD"], "qud": {"teacher": "r50"}}, "qud teacher: got 'r50'; expected dict(...)"),
]


@pytest.mark.parametrize(("given", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_wrong_options_are_refused_by_name(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(**given)
    assert text in str(caught.value)


def test_changes_in_time_are_refused_because_of_the_static_graph() -> None:
    for where in ({"qsd": {**LABELS, "start_epoch": 5}}, {"qsd": LABELS, "freeze_epochs": 1}):
        with pytest.raises(ConfigError, match=r"(start_epoch|freeze_epochs): got \d; .*static graph"):
            options(methods=["QSD"], **where)


HOST: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"dali": True}, {"methods": ["QSD"], "qsd": LABELS}, "config.dali: got True; expected False with QSD"),
    ({"dali": True}, {"methods": ["QGFace"]}, "config.dali: got True; expected False with QGFace"),
    ({"rec": "synthetic"}, {"methods": ["QGFace"]}, "config.rec: got 'synthetic'"),
    (
        {"interclass_filtering_threshold": 0.4},
        {"methods": ["AdaFace"]},
        "config.interclass_filtering_threshold: got 0.4",
    ),
    ({"margin_list": (1.0, 0.0, 0.4)}, {"margin_gradient": "exact"}, "config.margin_list: got (1.0, 0.0, 0.4)"),
]


@pytest.mark.parametrize(("config", "given", "text"), HOST, ids=[text[:30] for *_, text in HOST])
def test_the_hosts_keys_that_do_not_go_with_a_method_are_named(
    config: dict[str, Any], given: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_options({**config, "qsd_plugin": given})
    assert text in str(caught.value)


def test_dali_goes_with_methods_that_need_neither_keys_nor_pairs() -> None:
    for given in ({"methods": ["AdaFace"]}, {"methods": ["QUD"], "qud": {"teacher": TEACHER}}):
        assert read_options({"dali": True, "qsd_plugin": given}).paired == ""
