"""Exported models loaded back through the ``insightface`` package and compared with torch, image by image.

Every way in that a user has is taken: ``get_model`` with the manifest and without, ``FaceAnalysis``, ``PersonReID`` and
``PersonAnalysis``. Pictures are smooth random colour fields; all are 8-bit and BGR, as these classes take them.

Shapes: N pictures, H x W their size, D embedding.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qsd_plugin.core.errors import ExportError, HostError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.export import packages
from qsd_plugin.hosts.insightface import stubs

#: Smallest accepted cosine between the embedding in the runtime and torch's.
COSINE = 0.99999

#: Largest accepted difference of one number, relative to the largest of the batch: it also sees the length of the
#: embedding, which may carry a quality.
DIFFERENCE = 1e-3

#: Where the runtime computes: as torch here.
CPU = ["CPUExecutionProvider"]

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Reference:
    """What the runtime must compute.

    Args:
        network: Normalised RGB images [N, 3, H, W] to embeddings [N, D], in eval mode on the CPU.
        size: H and W in pixels.
        mean: Per channel, of pixel values 0 to 255.
        std: The same.
    """

    network: nn.Module
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Embeddings [N, D] of BGR pictures of any size, resized to H x W as the runtime does (linear)."""
        height, width = self.size
        resized = [cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR) for picture in pictures]
        images = torch.from_numpy(np.stack(resized)[..., ::-1].copy()).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        embeddings: Tensor = self.network((images - mean) / std)
        return embeddings


@dataclass(frozen=True)
class Comparison:
    """One way into the runtime at one batch size.

    Args:
        way: Class or function of ``insightface``, and how it was called.
        batch: Number of images given at once.
        cosine: Smallest over the images.
        difference: Largest of a number, relative to the largest number.
    """

    way: str
    batch: int
    cosine: float
    difference: float


def require_insightface() -> None:
    """Say in one sentence that the runtime is missing or does not import.

    Raises:
        HostError: It is so.
    """
    try:
        with quiet():
            importlib.import_module("insightface")
            importlib.import_module("insightface.model_zoo.person_reid")
    except ImportError as error:
        raise HostError(
            "InsightFace packages are loaded back before they are kept, and insightface >= 2.1 cannot be imported "
            f"({error}): pip install --no-deps insightface==2.1 and what it needs, see requirements/hosts.txt"
        ) from error


def check_face_package(package: Path, reference: Reference, *, batches: Sequence[int]) -> list[Comparison]:
    """Load the recogniser of a package in every way and compare it with torch.

    Args:
        package: Folder of a V2 package with the task ``recognition``; it needs no detector, a stub takes its place.
        reference: Of the same network.
        batches: Numbers of images to compare at, each >= 1.

    Raises:
        ExportError: The runtime refuses the package, or computes something else.
        HostError: ``insightface`` is missing.
    """
    require_insightface()
    model_zoo = importlib.import_module("insightface.model_zoo")
    task = packages.read_manifest(package)["tasks"][packages.RECOGNITION]
    ways: list[tuple[str, Callable[[], Any]]] = [
        (
            "get_model(PACKAGE, model_task='recognition')",
            lambda: model_zoo.get_model(str(package), model_task=packages.RECOGNITION, providers=CPU),
        )
    ]
    if task["preprocessing"] == {"mean": 127.5, "std": 127.5}:  # what the runtime assumes of a bare file
        file = str(package / task["file"])
        ways.append((f"get_model({task['file']})", lambda: model_zoo.get_model(file, providers=CPU)))
    found = []
    for way, load in ways:
        with _refusals(way):
            model = load()
        if type(model).__name__ != "ArcFaceONNX":
            raise ExportError(f"{way} makes a {type(model).__name__} of the file", expected="ArcFaceONNX")
        for batch in batches:
            images = pictures(batch, reference.size)
            with _refusals(way):
                embeddings = model.get_feat(images)
            found.append(compare(way, embeddings, reference(images)))
    return found + _face_analysis(package, reference, count=max(batches))


def check_person_package(package: Path, reference: Reference, *, batches: Sequence[int]) -> list[Comparison]:
    """Load the person network of a package in every way and compare it with torch; arguments as for faces.

    The runtime normalises, so that only directions are compared.

    Raises:
        ExportError: The runtime refuses the package, or computes something else.
        HostError: ``insightface`` is missing.
    """
    require_insightface()
    person_reid = importlib.import_module("insightface.model_zoo.person_reid")
    descriptor = packages.person_descriptor(package)
    with _refusals("PersonReID"):
        model = person_reid.PersonReID(descriptor, CPU)
    found = []
    images = pictures(max(batches), reference.size)
    expected = nn.functional.normalize(reference(images))
    with _refusals("PersonReID"):
        found.append(compare("PersonReID.embed", np.stack([model.embed(image) for image in images]), expected, batch=1))
    for batch in batches:
        # The class takes one image; trackers run its session on all boxes of a frame.
        blob = np.concatenate([model._preprocess(image) for image in images[:batch]])
        with _refusals("PersonReID's session"):
            raw = torch.from_numpy(model.session.run(["reid_embedding"], {"data": blob})[0])
        found.append(compare("PersonReID.session", nn.functional.normalize(raw), expected[:batch]))
    return found + _person_analysis(package, reference, count=max(batches))


def compare(way: str, embeddings: Any, expected: Tensor, *, batch: int | None = None) -> Comparison:
    """Compare embeddings [N, D] of the runtime with torch's.

    Args:
        way: For the message.
        embeddings: The runtime's.
        expected: Torch's.
        batch: Images given at once; N unless given.

    Raises:
        ExportError: They differ by more than :data:`COSINE` and :data:`DIFFERENCE` allow.
    """
    given = torch.as_tensor(np.asarray(embeddings)).double()
    wanted = expected.double()
    if given.shape != wanted.shape:
        raise ExportError(
            f"{way}: shape of the embeddings", value=tuple(given.shape), expected=str(tuple(wanted.shape))
        )
    result = Comparison(
        way,
        batch or len(given),
        float(torch.cosine_similarity(given, wanted).min()),
        float((given - wanted).abs().max() / wanted.abs().max()),
    )
    if not (result.cosine > COSINE and result.difference <= DIFFERENCE):  # also when one is not a number
        raise ExportError(
            f"{way} differs from torch at batch size {result.batch}",
            value=f"cosine {result.cosine:.6f}, difference {result.difference:.1e}",
            expected=f"a cosine above {COSINE} and a difference of at most {DIFFERENCE:.0e} of the largest number",
            remedy="Nothing was kept.",
        )
    return result


def pictures(count: int, size: tuple[int, int]) -> list[Picture]:
    """Smooth random colour fields, uint8 [H, W, 3]; always the same, and each unlike the others."""
    height, width = size
    fields = numpy_stream(0, "insightface-check").integers(0, 256, (count, 6, 4, 3), dtype=np.uint8)
    return [
        np.asarray(cv2.resize(field, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8) for field in fields
    ]


def _face_analysis(package: Path, reference: Reference, *, count: int) -> list[Comparison]:
    """``FaceAnalysis`` from the picture to the embedding, with a stub where it demands a detector."""
    app = importlib.import_module("insightface.app")
    manifest = packages.read_manifest(package)
    task = manifest["tasks"][packages.RECOGNITION]
    if packages.DETECTION in manifest["tasks"]:
        with _refusals("FaceAnalysis with the package's detector"):
            app.FaceAnalysis(str(package), allowed_modules=list(packages.FACE_ANALYSIS), providers=CPU)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(package / task["file"], folder / task["file"])
        stubs.face_detector(folder / "detector.onnx")
        tasks = {packages.RECOGNITION: task, packages.DETECTION: {"file": "detector.onnx"}}
        packages.write_manifest(folder, model_id="check", license_text="none", tasks=tasks, notes={})
        with _refusals("FaceAnalysis"):
            analysis = app.FaceAnalysis(str(folder), providers=CPU)
            analysis.prepare(ctx_id=-1)
            images = pictures(count, reference.size)
            faces = [analysis.get(image) for image in images]
    if [len(found) for found in faces] != [1] * count:
        raise ExportError("FaceAnalysis", value=[len(found) for found in faces], expected="one face per picture")
    align = importlib.import_module("insightface.utils.face_align")
    with quiet():
        crops = [
            align.norm_crop(image, face.kps, reference.size[0]) for image, (face,) in zip(images, faces, strict=True)
        ]
    return [compare("FaceAnalysis.get", np.stack([face.embedding for (face,) in faces]), reference(crops), batch=1)]


def _person_analysis(package: Path, reference: Reference, *, count: int) -> list[Comparison]:
    """``PersonAnalysis`` from the picture to the feature, with stubs for the three models beside the person network."""
    app = importlib.import_module("insightface.app.person_analysis")
    manifest = packages.read_manifest(package)
    task = manifest["tasks"][packages.PERSON_REID]
    if manifest["tasks"].keys() >= set(packages.PERSON_ANALYSIS):
        with tempfile.TemporaryDirectory() as root, _refusals("PersonAnalysis with the package's own models"):
            (Path(root) / "models").mkdir()
            os.symlink(package.resolve(), Path(root) / "models" / "check", target_is_directory=True)
            app.PersonAnalysis("check", root=root, providers=CPU).prepare()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "models" / "check"
        folder.mkdir(parents=True)
        shutil.copyfile(package / task["file"], folder / task["file"])
        images = pictures(count, (2 * reference.size[0], 2 * reference.size[1]))
        stubs.person_detector(folder / "person_detection.onnx", images[0].shape[:2])
        stubs.face_detector(folder / "detection.onnx", side=640, finds=False)
        stubs.face_recogniser(folder / "recognition.onnx")
        tasks: dict[str, Any] = {name: {"file": f"{name}.onnx"} for name in packages.PERSON_ANALYSIS}
        tasks["person_detection"]["input_size"] = list(stubs.PERSON_SIZE)
        tasks[packages.RECOGNITION]["embedding_dimension"] = 3
        tasks[packages.PERSON_REID] = task
        packages.write_manifest(folder, model_id="check", license_text="none", tasks=tasks, notes={})
        with _refusals("PersonAnalysis"):
            analysis = app.PersonAnalysis("check", root=root, providers=CPU)
            people = [analysis.get(image) for image in images]
    if any(len(found) != 1 or found[0].reid_feature is None for found in people):
        raise ExportError("PersonAnalysis", value="no feature", expected="one person with a feature per picture")
    features = np.stack([found[0].reid_feature for found in people])
    return [compare("PersonAnalysis.get", features, nn.functional.normalize(reference(images)), batch=1)]


@contextmanager
def _refusals(way: str) -> Iterator[None]:
    """What the runtime raises, as an error that names the way in."""
    try:
        with quiet():
            yield
    except ExportError:
        raise
    except Exception as error:  # ValueError, RuntimeError, AssertionError, TypeError, onnxruntime's own
        raise ExportError(
            f"{way} refuses the exported model", value=f"{type(error).__name__}: {error}", remedy="Nothing was kept."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, without the deprecation warnings of the runtime's dependencies and what it prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
