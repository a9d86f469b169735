"""TapRecorder: what it records, what it leaves behind, what it says about wrong names."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.networks import TapRecorder, tokens_to_map


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.BatchNorm2d(6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.neck(x.mean((2, 3), keepdim=True))
        return {"features": features[..., 0, 0], "pred_class_logits": self.classifier(features[..., 0, 0])}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.add_module("layer1", nn.Conv2d(3, 4, 3, padding=1))
        self.backbone.add_module("layer2", nn.Conv2d(4, 6, 3, stride=2, padding=1))
        self.heads = Head()
        self.unused = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.heads(self.backbone(x))
        return outputs["features"], outputs["pred_class_logits"]


@pytest.fixture
def model() -> Net:
    return Net()


def images(index: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 6, generator=torch_stream(0, index))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_records_the_outputs_of_modules_and_their_entries(model):
    names = ["backbone.layer1", "backbone.layer2", "heads:features", "heads:pred_class_logits", ":1"]
    with TapRecorder(model, names) as taps:
        _, logits = model(images())
    assert list(taps) == names
    first = model.backbone.layer1(images())
    torch.testing.assert_close(taps["backbone.layer1"], first)
    torch.testing.assert_close(taps["backbone.layer2"], model.backbone.layer2(first))
    assert taps["heads:pred_class_logits"] is logits
    assert taps[":1"] is logits
    torch.testing.assert_close(model.heads.classifier(taps["heads:features"]), logits)


def test_gradients_flow_through_a_tap_after_the_block(model):
    with TapRecorder(model, ["backbone.layer1"]) as taps:
        model(images())
    taps["backbone.layer1"].sum().backward()
    assert model.backbone.layer1.weight.grad.abs().sum() > 0
    assert model.backbone.layer2.weight.grad is None


def test_records_only_inside_the_block_and_leaves_no_hook(model):
    recorder = TapRecorder(model, ["backbone.layer1"])
    model(images())
    assert hooks(model) == 0
    with recorder as taps:
        assert not taps
        model(images(1))
        inside = taps["backbone.layer1"]
    model(images(2))
    assert taps["backbone.layer1"] is inside
    assert hooks(model) == 0


def test_the_last_forward_wins_and_every_block_starts_afresh(model):
    recorder = TapRecorder(model, ["backbone.layer1"])
    with recorder as taps:
        model(images(1))
        model(images(2))
    torch.testing.assert_close(taps["backbone.layer1"], model.backbone.layer1(images(2)))
    with recorder as again:
        model(images(3))
    assert again is not taps
    torch.testing.assert_close(taps["backbone.layer1"], model.backbone.layer1(images(2)))
    torch.testing.assert_close(again["backbone.layer1"], model.backbone.layer1(images(3)))


def test_nothing_is_kept_alive_once_the_dict_is_gone(model):
    recorder = TapRecorder(model, ["backbone.layer1"])
    with recorder as taps:
        model(images())
    alive = weakref.ref(taps["backbone.layer1"])
    del taps
    gc.collect()
    assert alive() is None
    assert recorder is not None


def test_an_exception_in_the_forward_removes_the_hooks(model):
    recorder = TapRecorder(model, ["backbone.layer1"])
    with pytest.raises(RuntimeError, match="channels"), recorder:
        model(torch.zeros(2, 5, 8, 6))
    assert hooks(model) == 0
    with recorder as taps:
        model(images())
    assert "backbone.layer1" in taps


def test_a_module_that_is_not_called_leaves_no_entry(model):
    with TapRecorder(model, ["unused", "backbone"]) as taps:
        model(images())
    assert list(taps) == ["backbone"]


def test_recording_changes_neither_output_nor_state(model):
    keys = list(model.state_dict())
    model.eval()
    expected = model(images())
    with TapRecorder(model, ["heads:features", "heads.neck"]):
        recorded = model(images())
    assert all(torch.equal(a, b) for a, b in zip(expected, recorded, strict=True))
    assert list(model.state_dict()) == keys


def test_transforms_reshape_what_is_stored(model):
    with TapRecorder(
        model, ["heads.neck", "backbone"], transforms={"heads.neck": partial(torch.flatten, start_dim=1)}
    ) as taps:
        features, _ = model(images())
    assert taps["heads.neck"].shape == (2, 6)
    assert torch.equal(taps["heads.neck"], features)
    assert taps["backbone"].shape == (2, 6, 4, 3)


def test_two_recorders_nest_but_one_does_not_enter_twice(model):
    outer, inner = TapRecorder(model, ["backbone"]), TapRecorder(model, ["backbone"])
    with outer as taps, inner as more:
        model(images())
        with pytest.raises(ConfigError, match=r"recording already.*second recorder"):
            outer.__enter__()
    assert taps["backbone"] is more["backbone"]
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("backbone.layer3", "'backbone.layer3'; expected a module path of the model. Did you mean 'backbone.layer"),
        ("layer2", "Did you mean 'backbone.layer2'"),
        ("head:features", "Did you mean 'heads'"),
        ("xyz", "top-level modules are: backbone, heads, unused"),
    ],
)
def test_unknown_modules_are_answered_with_the_nearest_path(model, name, message):
    with pytest.raises(ConfigError, match=message):
        TapRecorder(model, ["backbone", name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heads", r"got \"a dict with keys \['features', 'pred_class_logits'\]\"; expected a tensor.*'heads:KEY'"),
        ("heads:feature", "expected an output with an entry 'feature'"),
        ("backbone:0", "got 'a Tensor'; expected an output with an entry '0'"),
        (":2", "got 'a tuple of 2'"),
    ],
)
def test_outputs_that_do_not_fit_are_described(model, name, message):
    with pytest.raises(ConfigError, match=message), TapRecorder(model, [name]):
        model(images())
    assert hooks(model) == 0


def test_wrong_arguments_are_named(model):
    with pytest.raises(ConfigError, match=r"Write \['backbone'\]"):
        TapRecorder(model, "backbone")
    with pytest.raises(ConfigError, match=r"got \['backbone'\]; expected each name once"):
        TapRecorder(model, ["backbone", "backbone"])
    with pytest.raises(ConfigError, match="Tap transforms"):
        TapRecorder(model, ["backbone"], transforms={"heads": torch.sigmoid})


def test_tokens_lie_row_by_row():
    grid = torch.arange(2 * 3 * 4 * 5.0).view(2, 5, 3, 4)  # [B, C, H, W]
    patches = torch.stack([grid[:, :, i // 4, i % 4] for i in range(12)], dim=1)
    tokens = torch.cat([torch.full((2, 2, 5), -1.0), patches], dim=1)
    assert torch.equal(tokens_to_map(tokens, (3, 4), num_prefix=2), grid)
    with pytest.raises(ConfigError, match=r"got \(2, 14, 5\); expected \[B, 1 \+ 3\*4, C\].*class tokens"):
        tokens_to_map(tokens, (3, 4))
