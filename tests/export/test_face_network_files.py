"""Face networks built from their weights alone, and the length of an embedding as a quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ExportError
from qsd_plugin.export.face_networks import face_model, read_face_model
from qsd_plugin.export.quality_norm import FLOOR, QualityNorm
from qsd_plugin.networks import iresnet18, mobilefacenet, mobilefacenet_large, mobilefacenet_qud
from qsd_plugin.networks.ir import ir_18, ir_se_50


def images(count: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "size", "names"),
    [
        (iresnet18, (112, 112), "arcface"),
        (iresnet18, (48, 32), "arcface"),
        (mobilefacenet, (48, 48), "arcface"),
        (mobilefacenet_large, (32, 32), "arcface"),
        (mobilefacenet_qud, (48, 32), "qud"),
    ],
)
def test_network_is_built_from_its_weights(
    build: Callable[..., nn.Module], size: tuple[int, int], names: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = build(8, width=0.0625, input_size=size).eval()
    path = tmp_path / "backbone.pth"
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, path)
    model = read_face_model(path, input_size=size)
    assert (model.dimension, model.names, model.input_size, model.mean) == (8, names, size, (127.5,) * 3)
    with torch.no_grad():
        assert torch.equal(model.network(images(2, size)), network(images(2, size)))
    assert model.network.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(("build", "prefix"), [(ir_18, ""), (ir_18, "backbone."), (ir_se_50, "model.")])
def test_network_of_adaface_sees_rgb_and_its_file_bgr(
    build: Callable[..., nn.Module], prefix: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    published = build(8, width=0.0625, input_size=32).eval()
    state = published.state_dict()
    content = {f"{prefix}{name}": value for name, value in state.items()} | {"head.kernel": torch.zeros(8, 3)}
    torch.save({"state_dict": content if prefix else state}, tmp_path / "adaface.ckpt")
    model = read_face_model(tmp_path / "adaface.ckpt", input_size=32)
    assert (model.names, model.dimension, model.metadata()["colour_order"]) == ("ir", 8, "RGB")
    rgb = images(2, (32, 32))
    with torch.no_grad():
        expected = published(rgb.flip(1))
        torch.testing.assert_close(model.network(rgb), expected, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(published(rgb), expected, rtol=1e-2)
    written = model.weights()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_blocks_that_nobody_published_and_files_without_counters() -> None:
    weights = iresnet18(8, width=0.0625, input_size=32).state_dict()
    left = {name: value for name, value in weights.items() if "layer3.1" not in name and "num_batches" not in name}
    model = face_model(left, title="x", input_size=32)
    assert model.network(images(1, (32, 32))).shape == (1, 8)


WEIGHTS = iresnet18(8, width=0.0625, input_size=32).state_dict()


@pytest.mark.parametrize(
    ("weights", "size", "message"),
    [
        ({"base.conv1.weight": torch.zeros(1)}, 32, r"x\.pt holds no face network: got \['base\.conv1.*finished run"),
        (WEIGHTS, 112, r"x\.pt: input size: got \(112, 112\); .* has 4 positions.*has 7 x 7.*--input-size PIXELS"),
        ({**WEIGHTS, "extra": torch.zeros(1)}, 32, r"x\.pt does not fill the network: got 'Unexpected key.*extra"),
        (
            {name: value for name, value in WEIGHTS.items() if name != "bn2.bias"},
            32,
            r"x\.pt does not fill the network: got 'Missing key.*bn2\.bias",
        ),
    ],
)
def test_foreign_weights_are_refused(weights: dict[str, Tensor], size: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        face_model(weights, title="x.pt", input_size=size)


class Embedder(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + torch.tensor([3.0, 4.0, 0.0])


class Brightness(nn.Module):
    """Mean pixel, on a scale to 255: beyond 100 the score is off the scale."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))


def test_length_is_the_quality_and_the_direction_stays() -> None:
    pixels = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 25.0, 60.0, 200.0)])
    mean, std = (127.5,) * 3, (127.5,) * 3
    network = QualityNorm(Embedder(), Brightness(), mean=mean, std=std)
    normalised = (pixels - 127.5) / 127.5
    embedding = network(normalised)
    torch.testing.assert_close(embedding.norm(dim=1), torch.tensor([FLOOR, 25.0, 60.0, 100.0]))
    cosine = torch.cosine_similarity(embedding, Embedder()(normalised))
    torch.testing.assert_close(cosine, torch.ones(4))


def test_quality_network_that_returns_no_score_is_refused() -> None:
    network = QualityNorm(Embedder(), nn.Identity(), mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(ExportError, match=r"Output of the quality network: got \(2, 3, 4, 4\); expected \[2\]"):
        network(torch.zeros(2, 3, 4, 4))
