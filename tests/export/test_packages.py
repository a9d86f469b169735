"""Manifests of InsightFace packages: what is in them, and what is refused. The runtime: tests/hosts/insightface."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qsd_plugin.core.errors import DataError, ExportError
from qsd_plugin.export import packages

FACE: dict[str, Any] = {"mean": (127.5,) * 3, "std": (127.5,) * 3, "size": (112, 112), "dimension": 64}
PERSON: dict[str, Any] = {"mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0), "size": (256, 128), "dimension": 256}


def model(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(name.encode())
    return folder / name


def package(folder: Path, **tasks: Any) -> Path:
    packages.write_manifest(folder, model_id="net", license_text="terms", tasks=tasks, notes={"metric": "cosine"})
    return folder


def test_manifest_of_a_recogniser(tmp_path: Path) -> None:
    task = packages.recognition_task(model(tmp_path, "r.onnx"), **FACE)
    package(tmp_path, recognition=task)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "manifest_version": 2,
        "model_id": "net",
        "license": "MODEL.LICENSE",
        "tasks": {
            "recognition": {
                "file": "r.onnx",
                "sha256": hashlib.sha256(b"r.onnx").hexdigest(),
                "preprocessing": {"mean": 127.5, "std": 127.5},
                "preprocessing_version": "insightface-arcface-1",
                "input_size": [112, 112],
                "embedding_dimension": 64,
            }
        },
        "qsd_plugin": {"metric": "cosine"},
    }
    assert (tmp_path / "MODEL.LICENSE").read_text() == "terms"


def test_descriptor_of_a_person_network(tmp_path: Path) -> None:
    package(tmp_path, person_reid=packages.person_task(model(tmp_path, "p.onnx"), **PERSON))
    descriptor = packages.person_descriptor(tmp_path)
    assert descriptor["path"] == str((tmp_path / "p.onnx").resolve())
    assert descriptor["preprocessing"] == {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    assert descriptor["input_size"] == [256, 128]
    with pytest.raises(DataError, match="got 'no person_reid'"):
        packages.person_descriptor(package(tmp_path / "faces"))


def test_other_models_are_taken_over_with_their_licence(tmp_path: Path) -> None:
    base, new = tmp_path / "base", tmp_path / "new"
    file = model(base, "d.onnx")
    package(base, detection={"file": "d.onnx", "preprocessing": "embedded"}, recognition={"file": "gone.onnx"})
    new.mkdir()
    tasks = packages.take_over(base, new, without=["recognition"])
    assert tasks == {
        "detection": {"file": "detection.onnx", "preprocessing": "embedded", "sha256": packages.sha256(file)}
    }
    assert sorted(path.name for path in new.iterdir()) == ["detection.onnx", "net.LICENSE"]
    with pytest.raises(DataError, match=r"recognition: got .*gone\.onnx"):
        packages.take_over(base, new, without=[])


@pytest.mark.parametrize("size", [(80, 80), (96, 96), (120, 120), (160, 160), (112, 128), (256, 128)])
def test_sizes_to_which_faces_are_not_aligned(size: tuple[int, int], tmp_path: Path) -> None:
    message = rf"Input size of the face network: got \({size[0]}, {size[1]}\); expected a square.* 112 or 128"
    with pytest.raises(ExportError, match=message):
        packages.recognition_task(model(tmp_path, "r.onnx"), **{**FACE, "size": size})


@pytest.mark.parametrize("side", [112, 128, 224, 256])
def test_sizes_to_which_they_are(side: int) -> None:
    packages.check_face_size((side, side))


def test_statistics_that_the_manifest_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"pixels: got \(1\.0, 2\.0, 3\.0.*one number for all channels"):
        packages.recognition_task(model(tmp_path, "r.onnx"), **{**FACE, "mean": (1.0, 2.0, 3.0)})


def test_person_network_of_another_length_is_told_what_to_do(tmp_path: Path) -> None:
    message = r"person network: got 2048; expected 256 numbers.*--projection pca.*EMBEDDING_DIM 256"
    with pytest.raises(ExportError, match=message):
        packages.person_task(model(tmp_path, "p.onnx"), **{**PERSON, "dimension": 2048})


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_licence_is_compulsory(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ExportError, match=r"Licence of the model: got '.*terms\.txt'.*--license FILE"):
        packages.read_license(path)
    with pytest.raises(ExportError, match=r"Licence of the model; expected a file with the terms"):
        packages.read_license(None)
    path.write_text("MIT")
    assert packages.read_license(path) == "MIT"


def test_folder_of_the_same_name_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    (work / "net").mkdir(parents=True)
    monkeypatch.chdir(work)
    with pytest.raises(ExportError, match=r"Package net: got '.*work/net has the same name'.*looks there first"):
        packages.check_not_shadowed(tmp_path / "models" / "net")
    packages.check_not_shadowed(tmp_path / "models" / "other")
    packages.check_not_shadowed(tmp_path / "elsewhere" / "net")  # is used by its path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "net").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    packages.check_not_shadowed(Path("net"))  # itself


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "x" * 129])
def test_names_that_the_runtime_refuses(name: str) -> None:
    with pytest.raises(ExportError, match=r"Name of the package: got .*--model-id NAME"):
        packages.check_model_id(name)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"manifest_version": 1}', '{"manifest_version": 2, "tasks": {}}']
)
def test_folders_that_are_no_package(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"Package.*(a folder with manifest\.json|manifest_version 2)"):
        packages.read_manifest(tmp_path)
