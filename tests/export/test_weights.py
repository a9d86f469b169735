"""Converters: names, what files of old versions need, and refusals of the wrong source."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.export.weights import FACE_PIXELS, IMAGENET_MEAN, IMAGENET_STD, convert, fit, require_complete
from qsd_plugin.networks import iresnet18, iresnet100, mobilefacenet, mobilefacenet_large, mobilefacenet_qud

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
        (
            AGW,
            "arcface",
            r"are not from arcface: .*names such as layer1\.0\.prelu\.weight or conv_sep.*pass --from agw",
        ),
        (mobilefacenet(8, width=1 / 64).state_dict(), "qud", r"like arcface: pass --from arcface\."),
        (
            mobilefacenet_qud(8, width=1 / 64).state_dict(),
            "arcface",
            r"are not from arcface: .*like qud: pass --from qud\.",
        ),
        (iresnet18(8, width=1 / 64).state_dict(), "agw", r"They look like arcface or qud: pass --from arcface\."),
        (AGW, "fastreid-zoo", r"are not from fastreid-zoo: got \['base.*They look like agw or qsd: pass --from agw\."),
        ({"fc.weight": torch.zeros(1)}, "qsd", r"got \['fc\.weight'\].*They look like none of the known sources\."),
    ],
)
def test_wrong_source_is_refused(weights: dict[str, Tensor], source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(weights, source, title="x.pth")


@pytest.mark.parametrize(
    ("build", "sources", "network"),
    [
        (iresnet18, ("arcface", "qud"), "NAME build_iresnet_backbone DEPTH 18x WIDTH 0.5 FEAT_DIM 8"),
        (iresnet100, ("arcface", "qud"), "NAME build_iresnet_backbone DEPTH 100x WIDTH 0.5 FEAT_DIM 8"),
        (mobilefacenet, ("arcface",), "NAME build_mobilefacenet_backbone DEPTH mbf WIDTH 0.5 FEAT_DIM 8"),
        (mobilefacenet_large, ("arcface",), "NAME build_mobilefacenet_backbone DEPTH mbf_large WIDTH 0.5 FEAT_DIM 8"),
        (mobilefacenet_qud, ("qud",), "NAME build_mobilefacenet_backbone DEPTH qud WIDTH 0.5 FEAT_DIM 8"),
    ],
)
def test_faces_are_prefixed_and_described(
    build: Callable[..., nn.Module], sources: tuple[str, ...], network: str
) -> None:
    with torch.device("meta"):
        weights = build(8, width=0.5).state_dict()
    for source in sources:
        converted = convert(weights, source)
        assert converted.sources == {f"backbone.{name}": name for name in weights}
        assert all(converted.weights[new] is weights[old] for new, old in converted.sources.items())
        assert converted.network == network
        assert (converted.pixel_mean, converted.pixel_std) == (FACE_PIXELS, FACE_PIXELS)


def test_a_network_that_nobody_published_is_described_by_its_blocks() -> None:
    weights = {name: value for name, value in iresnet18(8, width=1 / 64).state_dict().items() if "layer3.1" not in name}
    assert "DEPTH of blocks (2, 2, 1, 2) WIDTH 0.015625" in convert(weights, "arcface").network


def test_backbones_are_filled_exactly() -> None:
    model = {
        "backbone.a": torch.zeros(2),
        "backbone.b.num_batches_tracked": torch.tensor(0),
        "heads.weight": torch.ones(1),
    }
    require_complete(fit({"backbone.a": torch.ones(2)}, model), "x.pt", "NAME n")
    for weights, message in (
        ({}, r"x\.pt does not fill the backbone: got '0 matched, 1 missing \(first backbone\.a\)'.*BACKBONE NAME n;"),
        ({"backbone.a": torch.ones(2), "backbone.c": torch.ones(1)}, r"1 matched, 1 unexpected \(first backbone\.c\)"),
        ({"backbone.a": torch.ones(3)}, r"0 matched, 1 of another shape \(first backbone\.a\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            require_complete(fit(weights, model), "x.pt", "NAME n")


def test_misspelt_source_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Source of the weights: got 'fastreid'.*'fastreid-zoo'"):
        convert(ZOO, "fastreid")


def test_fit_sorts_names_by_what_becomes_of_them() -> None:
    model = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(1)}
    result = fit({"a": torch.ones(2), "b": torch.ones(2, 4), "d": torch.ones(1)}, model)
    assert (result.matched, result.missing, result.unexpected) == (["a"], ["c"], ["d"])
    assert result.reshaped == {"b": ((2, 4), (2, 3))}
