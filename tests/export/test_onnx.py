"""ONNX files: what they compute, what they say about themselves, and when none is written."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from qsd_plugin.core.errors import DataError, ExportError
from qsd_plugin.export.onnx import export_onnx

SIZE = (16, 8)


class Toy(nn.Module):
    """Convolution, instance norm without statistics (as in IBN), batch norm with statistics, pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.instance = nn.InstanceNorm2d(6, affine=True)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.instance(self.conv(images)).relu()).mean((2, 3))


class Counting(Toy):
    """Computes something else each time it is called."""

    calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(images) + 0.01 * self.calls


class BatchOfTwo(Toy):
    """Works for a batch of two only."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).reshape(2, 6)


class LargeBatchesDiffer(Toy):
    """Takes a decision on the batch size, which a graph cannot."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embedding = super().forward(images)
        return 2 * embedding if len(images) > 3 else embedding


class Tuple(Toy):
    """Returns a tuple."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int]:  # type: ignore[override]
        return super().forward(images), 1


def test_file_computes_what_torch_computes_at_any_batch_and_carries_its_metadata(tmp_path: Path) -> None:
    model, path = Toy(), tmp_path / "new" / "toy.onnx"
    differences = export_onnx(model, path, input_size=SIZE, metadata={"mean": "[1.0]", "metric": "cosine"})
    assert list(differences) == [1, 7]
    assert max(differences.values()) < 1e-5
    program = onnx.load(path)
    assert {entry.key: entry.value for entry in program.metadata_props}.items() >= {
        "mean": "[1.0]",
        "metric": "cosine",
    }.items()
    (images,), (embedding,) = program.graph.input, program.graph.output
    assert (images.name, embedding.name) == ("images", "embedding")
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [dim.dim_value for dim in images.type.tensor_type.shape.dim[1:]] == [3, *SIZE]
    assert {"conv.weight", "norm.running_mean"} <= {tensor.name for tensor in program.graph.initializer} | {
        name for node in program.graph.node for name in node.input
    }
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batch = 50 * torch.randn(5, 3, *SIZE)  # unnormalised values are not normalised by the file
    found = session.run(["embedding"], {"images": batch.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(batch), rtol=1e-4, atol=1e-4)


def test_file_that_differs_from_torch_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    path.write_bytes(b"an earlier file")
    with pytest.raises(
        ExportError, match=r"differs from torch at batch size 1: got 0\.\d+; expected at most \d\.\de-04"
    ):
        export_onnx(Counting(), path, input_size=SIZE, metadata={})
    assert [file.name for file in tmp_path.iterdir()] == ["toy.onnx"]
    assert path.read_bytes() == b"an earlier file"


def test_limit_is_the_given_tolerance_at_the_given_batches(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="differs from torch at batch size 3"):
        export_onnx(Toy(), tmp_path / "toy.onnx", input_size=SIZE, metadata={}, check_batches=(3, 4), tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_network_whose_batch_is_not_free_is_refused(tmp_path: Path) -> None:
    refusals = "has a fixed batch size: got 7; expected a forward .* no decision on the batch size|differs from torch"
    with pytest.raises(ExportError, match=refusals):
        export_onnx(LargeBatchesDiffer(), tmp_path / "toy.onnx", input_size=SIZE, metadata={})
    with pytest.raises(ExportError, match=r"BatchOfTwo fails at batch size 1: got .*shape"):
        export_onnx(BatchOfTwo(), tmp_path / "toy.onnx", input_size=SIZE, metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (Toy().train(), (1,), "Toy is in training mode. Call model.eval"),
        (Toy(), (), r"Batch sizes to check: got \[\]; expected at least one"),
        (Toy(), (1, 0), r"Batch sizes to check: got \[1, 0\]"),
        (Tuple(), (1,), r"Output of Tuple: got 'tuple'; expected one tensor \[batch, dimension\]"),
    ],
)
def test_arguments_that_cannot_work(model: nn.Module, batches: tuple[int, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "toy.onnx", input_size=SIZE, metadata={}, check_batches=batches)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package_is_one_sentence(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError) as caught:
        export_onnx(Toy(), tmp_path / "toy.onnx", input_size=SIZE, metadata={})
    sentence = f"ONNX export needs the package {package}, which is not installed: pip install onnx onnxruntime"
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).count(".") == 1


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Cannot write.*expected a writable folder"):
        export_onnx(Toy(), tmp_path / "file" / "toy.onnx", input_size=SIZE, metadata={})
