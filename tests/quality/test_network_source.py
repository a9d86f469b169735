"""``QUALITY.SOURCE network``: a frozen network that scores the images of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.networks import quality_regressor
from qsd_plugin.quality import build_source

IMAGES = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 255


class Brightness(nn.Module):
    """Mean pixel on a scale to 100; has no parameters."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        return images.mean((1, 2, 3)) / 2.55


class Constant(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.values)


def regressor() -> nn.Module:
    return quality_regressor(nn.Conv2d(3, 2, 1), 8)


def not_a_network() -> str:
    return "scores"


def test_scores_are_the_networks_on_the_images_it_is_given():
    source = build_source("network", network=f"import:{__name__}:Brightness")
    scores, valid = source({"paths": ["a"] * 4, "images": IMAGES})
    torch.testing.assert_close(scores, IMAGES.mean((1, 2, 3)) / 2.55)
    assert valid.all()
    with pytest.raises(ConfigError, match=r"Quality source 'network' needs batch\['images'\]"):
        source({"paths": ["a"]})


def test_network_is_frozen_in_eval_mode_and_loaded_from_its_file(tmp_path: Path):
    torch.manual_seed(0)
    trained = regressor().eval()
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "weights.pth")
    source = build_source("network", network=f"import:{__name__}:regressor", weights=tmp_path / "weights.pth")
    assert not any(module.training for module in source.train().modules())
    assert not any(parameter.requires_grad for parameter in source.parameters())
    images = IMAGES.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = source({"images": images})
    assert not scores.requires_grad
    expected = trained(IMAGES)
    near = (expected >= -10) & (expected <= 110)
    torch.testing.assert_close(scores, torch.where(near, expected.clamp(0, 100), expected))


def test_small_overshoot_is_clamped_and_nonsense_is_not():
    values = [-9.0, 105.0, 500.0, float("nan")]
    scores, valid = build_source("network", network=Constant(values))({"images": IMAGES})
    assert scores[:3].tolist() == [0.0, 100.0, 500.0]
    assert valid.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "Brightness"}, "QUALITY.NETWORK: got 'Brightness'; expected import:module:function"),
        ({"network": f"import:{__name__}:Brightnes"}, "no such function. Did you mean 'Brightness'"),
        ({"network": f"import:{__name__}:not_a_network"}, "QUALITY.NETWORK: got 'str'; expected a factory"),
        ({"network": f"import:{__name__}:regressor"}, "NETWORK_WEIGHTS is empty; expected the trained weights"),
        (
            {"network": f"import:{__name__}:regressor", "weights": "nowhere.pth"},
            "NETWORK_WEIGHTS: got 'nowhere.pth'; expected an existing file",
        ),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_source("network", **options)


def test_files_that_do_not_hold_the_weights_are_named(tmp_path: Path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    torch.save(regressor(), tmp_path / "module.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in (
        ("other.pth", r"other\.pth does not fit QUALITY.NETWORK"),
        ("module.pth", "expected a state dict that loads without running code"),
        ("text.pth", "expected a state dict"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_source("network", network=regressor(), weights=tmp_path / name)


def test_output_that_is_no_score_per_image_is_named():
    with pytest.raises(ConfigError, match=r"Output of QUALITY.NETWORK: got \(4, 2\); expected \[4\]"):
        build_source("network", network=nn.Sequential(nn.Flatten(), Slice()))({"images": IMAGES})


class Slice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2]
