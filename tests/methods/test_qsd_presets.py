"""Presets against the weights the authors published."""

from __future__ import annotations

import pytest
import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.qsd import QSDLoss, level_weights, preset

TAPS = {"layer2": "map", "layer3": "map", "layer4": "map", "neck": "vector", "classifier": "logits"}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("official", [1, 1, 1, 1, 0.1]),
        ("legacy", [4, 4, 4, 0.08, 0.08]),  # 0.375 : 1.5 : 0.03 : 0.03 with the host's losses at 1
        ("author_demo", [1, 1, 1, 1, 0.1]),
    ],
)
def test_level_weights(name, weights):
    computed = level_weights(preset(name), TAPS)
    assert list(computed) == list(TAPS)
    assert list(computed.values()) == pytest.approx(weights)


def test_the_authors_demo_weighs_the_last_level_whatever_it_is():
    maps = dict.fromkeys("abcde", "map")
    assert list(level_weights(preset("author_demo"), maps).values()) == [1, 1, 1, 1, 0.1]
    assert list(level_weights(preset("official"), maps).values()) == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["official", "legacy", "author_demo"])
def test_options_build_the_authors_loss(name):
    chosen = preset(name)
    loss = QSDLoss(level_weights(chosen, TAPS), **chosen.options())
    assert (loss.missing, loss.scale_grad, loss.map_distance, loss.tau) == ("tie", "attached", "l2", 0.3)


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"QSD preset: got 'offical'\. Did you mean 'official'"):
        preset("offical")
    with pytest.raises(ConfigError, match=r"Role of tap 'neck': got 'vectors'\. Did you mean 'vector'"):
        level_weights(preset("official"), {"neck": "vectors"})


def test_preset_weights_reach_the_total():
    taps = {"map": torch.rand(2, 3, 4, 4), "vector": torch.rand(2, 5)}
    others = {name: tap + 0.5 for name, tap in taps.items()}
    weights = level_weights(preset("legacy"), {"map": "map", "vector": "vector"})
    result = QSDLoss(weights)(taps, others, torch.tensor([10.0, 20.0]), torch.tensor([50.0, 60.0]))
    torch.testing.assert_close(result.total, 4 * result.levels["map"] + 0.08 * result.levels["vector"])
