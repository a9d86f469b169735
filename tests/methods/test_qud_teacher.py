"""Teachers: their own size, colours and normalisation, nothing trained, nothing random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qud import FeatureQueue, ModuleTeacher, OnnxTeacher, Teacher, qud_loss

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
KERNEL = 0.2 * torch.randn(5, 3, 3, 3, generator=torch_stream(0, "kernel"))


def pictures(count: int, height: int = 20, width: int = 12) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch_stream(1)) * 255


def conv() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.AdaptiveAvgPool2d(1))


def write_model(path: Path, shape: list[Any], channels: int = 3) -> Path:
    """The network of :func:`conv` with ``KERNEL``."""
    weight = numpy_helper.from_array(KERNEL[:, :channels].numpy(), "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [shape[0], 5, 1, 1])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def embedding_by_hand(images: Tensor, size: tuple[int, int], *, bgr: bool) -> Tensor:
    """Resized by PIL, channel by channel."""
    rows = []
    for image in images.numpy():
        channels = [Image.fromarray(channel).resize(size[::-1], Image.Resampling.BICUBIC) for channel in image]
        values = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)
        values = values.flip(0) if bgr else values
        values = (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        rows.append(nn.functional.conv2d(values, KERNEL).mean(dim=(1, 2)))
    return torch.stack(rows)


def both(tmp_path: Path, **options: Any) -> dict[str, Teacher]:
    model = write_model(tmp_path / "m.onnx", ["batch", 3, "h", "w"])
    options = {"mean": MEAN, "std": STD, **options}
    return {"module": ModuleTeacher(conv(), {"0.weight": KERNEL}, **options), "onnx": OnnxTeacher(model, **options)}


@pytest.mark.parametrize("kind", ["module", "onnx"])
@pytest.mark.parametrize(("size", "colour"), [((16, 8), "RGB"), ((31, 17), "BGR"), ((20, 12), "BGR")])
def test_images_are_prepared_as_the_teacher_wants_them(
    tmp_path: Path, kind: str, size: tuple[int, int], colour: str
) -> None:
    teacher = both(tmp_path, size=size, colour=colour)[kind]
    images = pictures(3)
    wanted = embedding_by_hand(images, size, bgr=colour == "BGR")
    found = teacher(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad
    assert teacher(images[:1]).shape == (1, 5)
    assert teacher(images[:0]).shape == (0, 5)


def test_onnx_models_of_fixed_size_and_batch(tmp_path: Path) -> None:
    teacher = OnnxTeacher(write_model(tmp_path / "m.onnx", [2, 3, 16, 8]), mean=MEAN, std=STD)
    assert teacher.size == (16, 8)
    wanted = embedding_by_hand(pictures(3), (16, 8), bgr=False)
    torch.testing.assert_close(teacher(pictures(3)), wanted, rtol=1e-4, atol=1e-4)
    assert teacher.state_dict() == {}


class Net(nn.Module):
    """Something of everything that training would change or make random."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean(dim=(2, 3)))


def test_training_leaves_the_teacher_alone() -> None:
    trained = {name: value + 0.1 for name, value in Net().state_dict().items()}
    student, teacher = Net(), ModuleTeacher(Net(), trained, mean=MEAN, std=STD, size=(10, 9))
    queue = FeatureQueue(8, 4)
    wrapper = nn.ModuleList([student, teacher])
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert torch.equal(before["network.body.0.weight"], trained["body.0.weight"])
    images = pictures(6, 10, 9)
    embeddings = teacher(images)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        wrapper.train()
        loss = qud_loss(student(images / 255), teacher(images), queue.features, 0.1)
        queue.enqueue(teacher(images))
        loss.backward()
        optimizer.step()
    assert student.training
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(teacher(images), embeddings)  # no dropout


def test_weights_that_are_not_all_there_are_refused() -> None:
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    whole = Net().state_dict()
    with pytest.raises(CheckpointError, match=r"^QUD teacher has no weights; .*untrained teacher would teach noise"):
        ModuleTeacher(Net(), {}, **options)
    less = {name: value for name, value in whole.items() if not name.startswith("head")}
    with pytest.raises(
        CheckpointError, match=r"not this network's: got '2 missing \(head\.weight, head\.bias\)'; .*all"
    ):
        ModuleTeacher(Net(), less, **options)
    other = {**whole, "head.weight": torch.ones(7, 6)}
    with pytest.raises(CheckpointError, match=r"got '1 of another shape \(head\.weight\)'"):
        ModuleTeacher(Net(), other, **options)
    # All names of a smaller network are among those of a larger one.
    more = {**whole, **{f"body.{i}.weight": torch.ones(1) for i in range(4, 9)}, "classifier.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"'6 left over \(body\.4\.weight, body\.5.*, \.\.\.\)'.*named in unused"):
        ModuleTeacher(Net(), more, **options)
    with pytest.raises(CheckpointError, match="5 left over"):
        ModuleTeacher(Net(), more, unused=["classifier"], **options)
    old = {name: value for name, value in whole.items() if not name.endswith("num_batches_tracked")}
    taught = ModuleTeacher(Net(), {**old, "classifier.weight": torch.ones(1)}, unused=["classifier"], **options)
    assert torch.equal(taught.network.state_dict()["head.bias"], whole["head.bias"])


class Two(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


def test_options_and_images_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    teacher = ModuleTeacher(conv(), {"0.weight": KERNEL}, **options)
    with pytest.raises(ConfigError, match=r"images: got \(2, 1, 9, 9\); expected \[B, 3, H, W\]"):
        teacher(torch.ones(2, 1, 9, 9))
    with pytest.raises(ConfigError, match=r"QUD teacher: colour order: got 'rgb'; expected RGB or BGR"):
        ModuleTeacher(conv(), {"0.weight": KERNEL}, colour="rgb", **options)
    with pytest.raises(ConfigError, match=r"QUD teacher: mean and std: got .*std above 0"):
        ModuleTeacher(conv(), {"0.weight": KERNEL}, mean=MEAN, std=(1, 1, 0))
    with pytest.raises(ConfigError, match=r"size \(H, W\): got \(0, 8\); expected two positive numbers"):
        ModuleTeacher(conv(), {"0.weight": KERNEL}, size=(0, 8), **options)
    network = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), Two())
    with pytest.raises(ConfigError, match=r"its network returned: got 'tuple'; expected one tensor \[B, D\]"):
        ModuleTeacher(network, {"0.weight": KERNEL}, **options)(pictures(2))
    with pytest.raises(CheckpointError, match=r"ONNX model: got '.*none\.onnx'; expected an existing file"):
        OnnxTeacher(tmp_path / "none.onnx", **options)


def test_onnx_models_of_another_input_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"mean": MEAN, "std": STD}
    fixed = write_model(tmp_path / "fixed.onnx", ["b", 3, 16, 8])
    with pytest.raises(ConfigError, match=r"image size \(H, W\): got \(112, 112\); expected the model's \(16, 8\)"):
        OnnxTeacher(fixed, size=(112, 112), **options)
    with pytest.raises(ConfigError, match=r"free\.onnx takes images of any size\. Say which .*size=\(H, W\)"):
        OnnxTeacher(write_model(tmp_path / "free.onnx", ["b", 3, "h", "w"]), **options)
    grey = write_model(tmp_path / "grey.onnx", ["b", 1, 16, 8], channels=1)
    with pytest.raises(CheckpointError, match=r"input: got .images .*'b', 1, 16, 8\].; expected one image batch"):
        OnnxTeacher(grey, **options)


def test_digest_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    kept = ModuleTeacher(conv(), {"0.weight": KERNEL}, mean=MEAN, std=STD)
    again = ModuleTeacher(conv(), {"0.weight": KERNEL.clone()}, mean=STD, std=STD, size=(8, 8), colour="BGR")
    assert kept.weights_digest() == again.weights_digest() != ""
    assert kept.extra_repr() != again.extra_repr()  # which tells the preprocessing
    changed = KERNEL.clone()
    changed[4, 2, 2, 2] = torch.nextafter(changed[4, 2, 2, 2], torch.tensor(9.0))
    assert ModuleTeacher(conv(), {"0.weight": changed}, mean=MEAN, std=STD).weights_digest() != kept.weights_digest()
    network = conv()
    network.register_buffer("pixel_mean", torch.zeros(3), persistent=False)
    shifted = ModuleTeacher(network, {"0.weight": KERNEL}, mean=MEAN, std=STD)
    before = shifted.weights_digest()
    shifted.network.pixel_mean += 1  # not in any state dict, but the network may subtract it
    assert len({before, shifted.weights_digest(), kept.weights_digest()}) == 3


def test_digest_of_onnx_models_is_their_files(tmp_path: Path) -> None:
    first = write_model(tmp_path / "m.onnx", ["batch", 3, "h", "w"])
    second = write_model(tmp_path / "other.onnx", ["batch", 3, 20, 12])
    teachers = [OnnxTeacher(path, mean=MEAN, std=STD, size=(20, 12)) for path in (first, second)]
    digests = [teacher.weights_digest() for teacher in teachers]
    assert digests == [teacher.weights_digest() for teacher in teachers]
    assert digests[0] != digests[1]
    (tmp_path / "m.onnx.data").write_bytes(b"weights outside the model file")
    assert teachers[0].weights_digest() != digests[0]
    assert teachers[1].weights_digest() == digests[1]
