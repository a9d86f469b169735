"""Converters: names, what files of old versions need, and refusals of the wrong source."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.export.weights import IMAGENET_MEAN, IMAGENET_STD, convert, fit

AGW = {
    "base.conv1.weight": torch.zeros(2, 3, 7, 7),
    "base.NL_2.0.W.1.running_mean": torch.zeros(4),
    "global_pool.p": torch.tensor([2.5]),
    "bottleneck.weight": torch.zeros(8),
    "bottleneck.running_var": torch.zeros(8),
    "classifier.weight": torch.zeros(5, 8),
}
ZOO = {
    "backbone.conv1.weight": torch.zeros(2, 3, 7, 7),
    "heads.bottleneck.0.weight": torch.zeros(8),
    "heads.weight": torch.zeros(5, 8),
}


@pytest.mark.parametrize("source", ["agw", "qsd"])
def test_authors_names(source: str) -> None:
    converted = convert(AGW, source)
    assert converted.sources == {
        "backbone.conv1.weight": "base.conv1.weight",
        "backbone.NL_2.0.W.1.running_mean": "base.NL_2.0.W.1.running_mean",
        "heads.pool_layer.p": "global_pool.p",
        "heads.bottleneck.0.weight": "bottleneck.weight",
        "heads.bottleneck.0.running_var": "bottleneck.running_var",
        "heads.weight": "classifier.weight",
    }
    assert all(converted.weights[new] is AGW[old] for new, old in converted.sources.items())
    assert (converted.pixel_mean, converted.pixel_std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert any("RGB" in note and "bicubic" in note for note in converted.notes)
    assert not any("GlobalAvgPool" in note for note in converted.notes)


def test_authors_network_without_gem_says_how_it_pools() -> None:
    converted = convert({name: value for name, value in AGW.items() if name != "global_pool.p"}, "agw")
    assert any("MODEL.HEADS.POOL_LAYER GlobalAvgPool" in note for note in converted.notes)


def zoo(**changes: Tensor) -> dict[str, Tensor]:
    return {**ZOO, **{name.replace("__", "."): value for name, value in changes.items()}}


def test_todays_names_stay() -> None:
    assert convert(ZOO, "fastreid-zoo").weights == ZOO


@pytest.mark.parametrize("neck", ["heads.bnneck.", "heads.bnneck.0."])
def test_names_of_old_versions(neck: str) -> None:
    """As in the logs of JDAI-CV/fast-reid issues 427 and 617."""
    old = {
        "pixel_mean": torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1),
        "pixel_std": torch.tensor(IMAGENET_STD).view(1, 3, 1, 1),
        "backbone.conv1.weight": torch.zeros(2, 3, 7, 7),
        f"{neck}weight": torch.zeros(8),
        f"{neck}num_batches_tracked": torch.tensor(1),
        "heads.classifier.weight": torch.zeros(5, 8),
    }
    converted = convert(old, "fastreid-zoo")
    assert sorted(converted.weights) == [
        "backbone.conv1.weight",
        "heads.bottleneck.0.num_batches_tracked",
        "heads.bottleneck.0.weight",
        "heads.weight",
    ]
    assert converted.pixel_mean == pytest.approx(IMAGENET_MEAN)
    assert converted.pixel_std == pytest.approx(IMAGENET_STD)


def test_neck_behind_a_reduction_is_the_second_layer() -> None:
    converted = convert(
        zoo(heads__bottleneck__0__weight=torch.zeros(8, 16, 1, 1), heads__bnneck__weight=torch.ones(8)), "fastreid-zoo"
    )
    assert converted.sources["heads.bottleneck.1.weight"] == "heads.bnneck.weight"
    assert converted.weights["heads.bottleneck.0.weight"].dim() == 4


def test_left_over_neck_does_not_replace_the_new_one() -> None:
    """Version 0.1.1 stored the counter of the neck under both names."""
    new, old = torch.tensor(7), torch.tensor(0)
    converted = convert(
        zoo(heads__bottleneck__0__num_batches_tracked=new, heads__bnneck__num_batches_tracked=old), "fastreid-zoo"
    )
    assert converted.weights["heads.bottleneck.0.num_batches_tracked"] is new


def test_trained_exponent_is_told() -> None:
    notes = convert(zoo(heads__pool_layer__p=torch.tensor([3.21])), "fastreid-zoo").notes
    assert any("GeM exponent 3.21" in note and "GeneralizedMeanPoolingP" in note for note in notes)


@pytest.mark.parametrize(
    ("weights", "source", "message"),
    [
        (ZOO, "agw", r"x\.pth are not from agw: got \['backbone.*names such as base\.conv1.*pass --from fastreid-zoo"),
        (AGW, "fastreid-zoo", r"are not from fastreid-zoo: got \['base.*They look like agw or qsd: pass --from agw\."),
        ({"fc.weight": torch.zeros(1)}, "qsd", r"got \['fc\.weight'\].*They look like none of the known sources\."),
    ],
)
def test_wrong_source_is_refused(weights: dict[str, Tensor], source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(weights, source, title="x.pth")


def test_misspelt_source_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Source of the weights: got 'fastreid'.*'fastreid-zoo'"):
        convert(ZOO, "fastreid")


def test_fit_sorts_names_by_what_becomes_of_them() -> None:
    model = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1)}
    result = fit({"a": torch.ones(2), "b": torch.ones(2, 4), "d": torch.ones(1)}, model)
    assert (result.matched, result.missing, result.unexpected) == (["a"], ["c"], ["d"])
    assert result.reshaped == {"b": ((2, 4), (2, 3))}
