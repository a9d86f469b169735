"""Packages in the ``insightface`` runtime: what it computes from them, and that wrong ones are not kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import DataError, ExportError, HostError
from qsd_plugin.export import packages
from qsd_plugin.export.face_networks import FaceModel, face_model
from qsd_plugin.hosts.insightface import runtime, stubs
from qsd_plugin.hosts.insightface.packaging import face_package, person_package
from qsd_plugin.networks import iresnet18, mobilefacenet
from qsd_plugin.networks.quality_regressor import quality_regressor

insightface = pytest.importorskip("insightface", reason="insightface is not installed: requirements/hosts.txt")

CPU = ["CPUExecutionProvider"]
IMAGENET: dict[str, Any] = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch-norm statistics that matter, as after a training."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def recogniser(build: Any = iresnet18) -> FaceModel:
    return face_model(with_statistics(build(16, width=0.0625)).state_dict(), title="tiny")


class Person(nn.Module):
    """A convolution and a batch norm to 256 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 256, 7, 4), nn.BatchNorm1d(256)
        with_statistics(self)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.norm(self.convolution(images).relu().mean((2, 3)))
        return out


def person_into(folder: Path, network: nn.Module | None = None, **options: Any) -> list[runtime.Comparison]:
    settings = {"input_size": (64, 32), "dimension": 256, "license_text": "terms", **IMAGENET, **options}
    return person_package(network or Person(), folder, **settings)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> tuple[FaceModel, Path, list[runtime.Comparison]]:
    """A package below ROOT/models, with a detector."""
    root = tmp_path_factory.mktemp("root")
    stubs.face_detector(root / "detector.onnx")
    package, model = root / "models" / "tiny", recogniser()
    return model, package, face_package(model, package, license_text="terms", detector=root / "detector.onnx")


def by_hand(network: nn.Module, pictures: list[Any], mean: Any, std: Any) -> np.ndarray:
    """The embedding of BGR pictures of the right size, without this package's preprocessing."""
    rgb = np.stack([cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) for picture in pictures]).astype(np.float64)
    images = torch.from_numpy(((rgb - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).copy()).float()
    with torch.no_grad():
        return network(images).numpy()


def noise(count: int, height: int, width: int) -> list[np.ndarray]:
    return list(np.random.default_rng(5).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("count", [1, 7])
def test_get_model_computes_what_torch_computes(faces: Any, count: int) -> None:
    model, package, _ = faces
    pictures = noise(count, 112, 112)
    expected = by_hand(model.network, pictures, model.mean, model.std)
    for name, options in ((str(package), {"model_task": "recognition"}), (str(package / "recognition.onnx"), {})):
        loaded = insightface.model_zoo.get_model(name, providers=CPU, **options)
        assert type(loaded).__name__ == "ArcFaceONNX"
        assert (loaded.input_mean, loaded.input_std) == (127.5, 127.5)
        np.testing.assert_allclose(loaded.get_feat(pictures), expected, rtol=1e-4, atol=1e-5)


def test_face_analysis_by_name_embeds_the_aligned_face(
    faces: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, package, _ = faces
    monkeypatch.chdir(tmp_path)
    analysis = insightface.app.FaceAnalysis("tiny", root=str(package.parents[1]), providers=CPU)
    analysis.prepare(ctx_id=-1)
    picture = noise(1, 112, 112)[0]
    (face,) = analysis.get(picture)
    np.testing.assert_allclose(face.kps, stubs.template(112), atol=1e-3)  # so that the crop is the picture
    np.testing.assert_allclose(
        face.embedding, by_hand(model.network, [picture], model.mean, model.std)[0], rtol=1e-3, atol=1e-4
    )


def test_every_way_in_is_compared_at_every_batch(faces: Any, tmp_path: Path) -> None:
    *_, comparisons = faces
    ways = [(one.way.split("(")[0], one.batch) for one in comparisons]
    assert ways == [*[("get_model", 1), ("get_model", 7)] * 2, ("FaceAnalysis.get", 1)]
    assert all(one.cosine > 0.99999 and one.difference < 1e-4 for one in comparisons)
    assert [(one.way, one.batch) for one in person_into(tmp_path / "net", check_batches=(1, 3))] == [
        ("PersonReID.embed", 1),
        ("PersonReID.session", 1),
        ("PersonReID.session", 3),
        ("PersonAnalysis.get", 1),
    ]


def test_files_are_as_hosts_and_trackers_want_them(faces: Any, tmp_path: Path) -> None:
    person_into(tmp_path / "net")
    for file, output, dimension in (
        (faces[1] / "recognition.onnx", "embedding", 16),
        (tmp_path / "net" / "person_reid.onnx", "reid_embedding", 256),
    ):
        graph = onnx.load(file, load_external_data=False)
        assert not any(tensor.external_data for tensor in graph.graph.initializer)
        assert [one.version for one in graph.opset_import if not one.domain] == [17]
        (given,), (returned,) = graph.graph.input, graph.graph.output
        assert (given.name, returned.name) == ("data", output)
        assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert returned.type.tensor_type.shape.dim[1].dim_value == dimension
        said = {entry.key: entry.value for entry in graph.metadata_props}
        assert "outside the file" in said["normalisation"]
    assert sorted(path.name for path in faces[1].iterdir()) == [
        "MODEL.LICENSE",
        "detection.onnx",
        "manifest.json",
        "recognition.onnx",
    ]


def test_quality_is_the_length_of_the_embedding(tmp_path: Path) -> None:
    model = recogniser(mobilefacenet)
    torch.manual_seed(0)
    judge = quality_regressor(nn.AdaptiveAvgPool2d(1), 3).eval()
    nn.init.constant_(judge[-2].weight, 0.1)
    face_package(model, tmp_path / "net", license_text="terms", quality=judge, check_batches=(1, 3))
    loaded = insightface.model_zoo.get_model(str(tmp_path / "net"), model_task="recognition", providers=CPU)
    pictures = [np.full((112, 112, 3), value, np.uint8) for value in (20, 200)]
    embeddings = loaded.get_feat(pictures)
    with torch.no_grad():
        scores = judge(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()).clamp(0.1, 100)
    assert len(set(scores.tolist())) == 2
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), scores, rtol=1e-4)
    plain = by_hand(model.network, pictures, model.mean, model.std)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings / scores[:, None].numpy(), plain, atol=1e-4)
    assert "quality" in json.loads((tmp_path / "net" / "manifest.json").read_text())["qsd_plugin"]["embedding_norm"]


def test_person_reid_computes_what_torch_computes(tmp_path: Path) -> None:
    from insightface.model_zoo.person_reid import PersonReID

    network = Person()
    person_into(tmp_path / "net", network)
    loaded = PersonReID(packages.person_descriptor(tmp_path / "net"), CPU)
    pictures = noise(7, 64, 32)
    expected = by_hand(network, pictures, IMAGENET["mean"], IMAGENET["std"])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.stack([loaded.embed(one) for one in pictures]), expected, atol=1e-5)


def test_person_analysis_runs_with_the_models_of_another_package(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    stubs.person_detector(base / "person_detection.onnx", (128, 64))
    stubs.face_detector(base / "detection.onnx", side=640, finds=False)
    stubs.face_recogniser(base / "recognition.onnx")
    tasks: dict[str, Any] = {
        name: {"file": f"{name}.onnx"} for name in ("person_detection", "detection", "recognition")
    }
    tasks["person_detection"]["input_size"] = [64, 64]
    tasks["recognition"]["embedding_dimension"] = 3
    packages.write_manifest(base, model_id="base", license_text="theirs", tasks=tasks, notes={})
    person_into(tmp_path / "models" / "net", base=base, check_batches=(1,))
    assert (tmp_path / "models" / "net" / "base.LICENSE").read_text() == "theirs"
    analysis = insightface.app.PersonAnalysis("net", root=str(tmp_path), providers=CPU)
    (person,) = analysis.get(noise(1, 128, 64)[0])
    assert person.reid_feature.shape == (256,)


class Other(Person):
    """Computes something else each time, though not while a file is written."""

    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images) + (self.calls > 3) * torch.linspace(-1, 1, 256)


def test_nothing_is_kept_when_the_runtime_computes_something_else(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"PersonReID\.embed differs from torch at batch size 1: got 'cosine 0\.\d+"):
        person_into(tmp_path / "models" / "net", Other())
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preprocessing": {"mean": 0.0, "std": 255.0}}, "get_model.*differs from torch at batch size 1"),
        ({"sha256": "0" * 64}, "refuses the exported model: got .*SHA-256 mismatch"),
        ({"preprocessing": {"mean": [1, 2, 3], "std": 1}}, "refuses the exported model: got .*must be a number"),
    ],
)
def test_manifest_that_misleads_the_runtime_is_found(faces: Any, tmp_path: Path, change: Any, message: str) -> None:
    model, package, _ = faces
    (tmp_path / "recognition.onnx").write_bytes((package / "recognition.onnx").read_bytes())
    task = packages.read_manifest(package)["tasks"]["recognition"] | change
    packages.write_manifest(tmp_path, model_id="x", license_text="x", tasks={"recognition": task}, notes={})
    reference = runtime.Reference(model.network, model.input_size, model.mean, model.std)
    with pytest.raises(ExportError, match=message):
        runtime.check_face_package(tmp_path, reference, batches=(1, 2))


def test_swapped_colours_and_wrong_lengths_are_differences() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert runtime.compare("x", expected.numpy(), expected).cosine == pytest.approx(1.0)
    with pytest.raises(ExportError, match=r"x differs.*difference 1\.0e-01"):  # a length alone, cosine 1
        runtime.compare("x", 1.1 * expected.numpy(), expected)
    with pytest.raises(ExportError, match=r"x differs.*cosine nan"):
        runtime.compare("x", np.full((2, 2), np.nan), expected)
    with pytest.raises(ExportError, match=r"shape of the embeddings: got \(1, 2\)"):
        runtime.compare("x", expected[:1].numpy(), expected)
    pictures = runtime.pictures(3, (64, 32))
    reference = runtime.Reference(Person(), (64, 32), **IMAGENET)
    swapped = reference([picture[..., ::-1] for picture in pictures])
    with pytest.raises(ExportError, match="x differs"):
        runtime.compare("x", swapped.numpy(), reference(pictures))


def test_refusals_come_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"person network: got 2048; expected 256 numbers"):
        person_into(tmp_path / "net", dimension=2048)
    small = face_model(iresnet18(8, width=0.0625, input_size=80).state_dict(), title="x", input_size=80)
    with pytest.raises(ExportError, match=r"Input size of the face network: got \(80, 80\)"):
        face_package(small, tmp_path / "net", license_text="terms")
    (tmp_path / "work" / "net").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ExportError, match=r"Package net: got .* has the same name"):
        face_package(recogniser(), tmp_path / "models" / "net", license_text="terms")
    with pytest.raises(DataError, match=r"Face detector: got '.*none\.onnx'"):
        face_package(
            recogniser(), tmp_path / "m", license_text="terms", detector=tmp_path / "none.onnx", check_batches=(1,)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_runtime_does_look_into_the_working_directory_first(
    faces: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why packages that a folder shadows are refused."""
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        insightface.app.FaceAnalysis("tiny", root=str(faces[1].parents[1]), providers=CPU)


def test_missing_runtime_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(HostError) as caught:
        face_package(recogniser(), tmp_path / "net", license_text="terms")
    assert "insightface >= 2.1 cannot be imported" in str(caught.value)
    assert "pip install --no-deps insightface==2.1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
