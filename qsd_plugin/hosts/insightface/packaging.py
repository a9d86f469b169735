"""Networks of the plugin as InsightFace packages: exported, described, loaded back, and only then given their name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import qsd_plugin
from qsd_plugin.core.errors import DataError
from qsd_plugin.core.files import new_folder
from qsd_plugin.export import packages
from qsd_plugin.export.face_networks import FaceModel
from qsd_plugin.export.onnx import CHECK_BATCHES, Form, export_onnx
from qsd_plugin.export.quality_norm import QualityNorm
from qsd_plugin.hosts.insightface.runtime import (
    Comparison,
    Reference,
    check_face_package,
    check_person_package,
    require_insightface,
)

#: Opset that runtimes since 2022 read, and that torch's older exporter writes without external data.
OPSET = 17

#: Names in a recogniser's file are free; these are customary.
FACE_FORM = Form("data", "embedding", OPSET)

#: Names that ``PersonReID`` demands.
PERSON_FORM = Form("data", "reid_embedding", OPSET)


def face_package(
    model: FaceModel,
    folder: Path,
    *,
    license_text: str,
    model_id: str = "",
    quality: nn.Module | None = None,
    detector: Path | None = None,
    base: Path | None = None,
    notes: Mapping[str, Any] | None = None,
    check_batches: Sequence[int] = CHECK_BATCHES,
) -> list[Comparison]:
    """Write a V2 package with a face recogniser, or nothing when the runtime does not compute what torch computes.

    Args:
        model: The network.
        folder: The package; must not exist or be empty.
        license_text: Terms of use, compulsory.
        model_id: Name of the package; the folder's unless given.
        quality: Images of 0 to 255 to scores [B] of 0 to 100: the embedding gets that length. ``None``: it keeps the
            length that the network gives it, a quality already where a margin head trained it so.
        detector: ONNX file of a face detector, without which ``FaceAnalysis`` does not start.
        base: Package whose other models are taken over.
        notes: More about the model for the manifest.
        check_batches: See :data:`qsd_plugin.export.onnx.CHECK_BATCHES`.

    Returns:
        How the runtime compares with torch, way by way.

    Raises:
        ExportError: An input size that faces are not aligned to, a missing licence, a shadowed name, a file that
            differs.
        DataError: The folder exists, or the detector or the base does not.
        HostError: ``insightface`` is missing.
    """
    model_id = model_id or folder.name
    packages.check_face_size(model.input_size)
    _check_target(folder, model_id)
    network = packaged_network(model, quality)
    norm = "the length that training gave it" if quality is None else "quality, up to 100"
    about = {"embedding_norm": norm, "normalisation": "outside the file", **(notes or {})}
    with new_folder(folder) as partial:
        file = partial / "recognition.onnx"
        _write_onnx(network, file, FACE_FORM, model.input_size, about, check_batches)
        tasks = packages.take_over(base, partial, without=[packages.RECOGNITION]) if base else {}
        if detector is not None:
            tasks[packages.DETECTION] = _copy_detector(detector, partial)
        tasks[packages.RECOGNITION] = packages.recognition_task(
            file, mean=model.mean, std=model.std, size=model.input_size, dimension=model.dimension
        )
        packages.write_manifest(partial, model_id=model_id, license_text=license_text, tasks=tasks, notes=about)
        reference = Reference(network, model.input_size, model.mean, model.std)
        return check_face_package(partial, reference, batches=check_batches)


def person_package(
    network: nn.Module,
    folder: Path,
    *,
    input_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dimension: int,
    license_text: str,
    model_id: str = "",
    base: Path | None = None,
    notes: Mapping[str, Any] | None = None,
    check_batches: Sequence[int] = CHECK_BATCHES,
) -> list[Comparison]:
    """Write a V2 package with a person network, or nothing when the runtime does not compute what torch computes.

    ``PersonReID`` takes it as it is (:func:`qsd_plugin.export.packages.person_descriptor`); ``PersonAnalysis`` also
    needs the three detectors and recognisers of ``base``.

    Args:
        network: Normalised RGB images [B, 3, H, W] to [B, 256].
        folder: See :func:`face_package`.
        input_size: H and W in pixels.
        mean: Per channel, of pixel values 0 to 255.
        std: The same.
        dimension: Of the embedding.
        license_text: See :func:`face_package`.
        model_id: See :func:`face_package`.
        base: Package whose other models are taken over, as a downloaded ``cheetah_s``.
        notes: See :func:`face_package`.
        check_batches: See :func:`face_package`.

    Raises:
        ExportError: Another dimension than 256, a missing licence, a shadowed name, a file that differs.
        DataError: The folder exists, or the base does not.
        HostError: ``insightface`` is missing.
    """
    model_id = model_id or folder.name
    packages.check_person_dimension(dimension)
    _check_target(folder, model_id)
    about = {"normalisation": "outside the file", **(notes or {})}
    with new_folder(folder) as partial:
        file = partial / "person_reid.onnx"
        _write_onnx(network, file, PERSON_FORM, input_size, about, check_batches)
        tasks = packages.take_over(base, partial, without=[packages.PERSON_REID]) if base else {}
        tasks[packages.PERSON_REID] = packages.person_task(
            file, mean=mean, std=std, size=input_size, dimension=dimension
        )
        packages.write_manifest(partial, model_id=model_id, license_text=license_text, tasks=tasks, notes=about)
        reference = Reference(network, input_size, tuple(mean), tuple(std))
        return check_person_package(partial, reference, batches=check_batches)


def packaged_network(model: FaceModel, quality: nn.Module | None) -> nn.Module:
    """What :func:`face_package` exports, in torch."""
    return model.network if quality is None else QualityNorm(model.network, quality, mean=model.mean, std=model.std)


def _check_target(folder: Path, model_id: str) -> None:
    packages.check_model_id(model_id)
    packages.check_not_shadowed(folder)
    require_insightface()


def _write_onnx(
    network: nn.Module,
    file: Path,
    form: Form,
    size: tuple[int, int],
    about: Mapping[str, Any],
    check_batches: Sequence[int],
) -> None:
    metadata = {key: str(value) for key, value in about.items()} | {"qsd_plugin": qsd_plugin.__version__}
    export_onnx(network, file, input_size=size, metadata=metadata, check_batches=check_batches, form=form)


def _copy_detector(detector: Path, folder: Path) -> dict[str, Any]:
    if not detector.is_file():
        raise DataError("Face detector", value=str(detector), expected="an existing ONNX file, such as det_10g.onnx")
    target = folder / "detection.onnx"
    shutil.copyfile(detector, target)
    return {
        "file": target.name,
        "sha256": packages.sha256(target),
        "preprocessing": {"mean": 127.5, "std": 128.0},
        "preprocessing_version": "insightface-scrfd-1",
    }
