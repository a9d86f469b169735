"""ONNX files with a dynamic batch, compared with torch before they are given their name."""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core import streams
from qsd_plugin.core.errors import ExportError
from qsd_plugin.core.files import check_writable, write_atomically

INPUT = "images"
OUTPUT = "embedding"

#: Batch sizes at which a file is compared with torch: the smallest, and one that no exporter specialises on.
CHECK_BATCHES = (1, 7)

#: Largest accepted difference between the two, relative to the largest absolute value of the embeddings (at least 1).
TOLERANCE = 1e-4

#: What torch 2.6 to 2.12 translate to without converting afterwards, and every current runtime reads.
_OPSET = 18

#: Whether this torch exports through ``torch.export`` unless told otherwise (since 2.9). That exporter fails where the
#: older one, which traces, would freeze a decision taken on the example batch; before 2.9 its files are not valid.
_BY_TORCH_EXPORT = bool(inspect.signature(torch.onnx.export).parameters["dynamo"].default)

_PACKAGES = ("onnx", "onnxruntime")


@dataclass(frozen=True)
class Form:
    """How a file is written.

    Args:
        input: Name of the image batch.
        output: Name of the embedding.
        traced_opset: Translate by tracing, to this opset, as runtimes of several years read it; 11 to 20. ``None``:
            with the exporter that this torch prefers, to the opset that needs no conversion.
    """

    input: str = INPUT
    output: str = OUTPUT
    traced_opset: int | None = None


#: Names and exporter of a file that no host reads.
_DEFAULT_FORM = Form()

_FREE_BATCH = "a forward made of tensor operations that takes no decision on the batch size"


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    input_size: tuple[int, int],
    channels: int = 3,
    metadata: Mapping[str, str],
    check_batches: Sequence[int] = CHECK_BATCHES,
    tolerance: float = TOLERANCE,
    form: Form = _DEFAULT_FORM,
) -> dict[int, float]:
    """Write ``model`` as an ONNX file, or nothing when the file does not compute what the model computes.

    The file's input ``images`` is what the model's ``forward`` takes: **normalised** images, float32 [B, C, H, W]. Mean
    and standard deviation are never part of the graph; they belong into ``metadata``. The output is ``embedding``
    [B, D], not normalised unless the model does it. B is free, the other sizes are fixed. Weights lie in the file.

    Args:
        model: In eval mode, on the CPU; one tensor in, one tensor out.
        path: File to write; replaced only by a file that passed the check.
        input_size: Height and width in pixels.
        channels: Of an image.
        metadata: Stored in the file's ``metadata_props``.
        check_batches: Batch sizes to compare at, each >= 1.
        tolerance: See :data:`TOLERANCE`.
        form: Other names and another opset.

    Returns:
        Largest absolute difference between the file in onnxruntime and torch, by batch size.

    Raises:
        ExportError: A package is missing, the model is in training mode, cannot be translated, returns something else
            than [B, D], or the file differs from it.
        DataError: The folder cannot be written.
    """
    by_torch_export = _BY_TORCH_EXPORT and form.traced_opset is None
    require_onnx(traced=not by_torch_export)
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode", remedy="Call model.eval() first.")
    if not check_batches or min(check_batches) < 1:
        raise ExportError("Batch sizes to check", value=list(check_batches), expected="at least one, each >= 1")
    check_writable(path.absolute().parent)
    pairs = [_images_and_embeddings(model, batch, (channels, *input_size)) for batch in check_batches]
    translate = _exported if by_torch_export else _traced
    content = _add_metadata(_translate(translate, model, pairs[-1][0], form), metadata)
    differences = _compare(content, pairs, tolerance, form)
    write_atomically(path, content)
    return differences


def require_onnx(*, traced: bool = not _BY_TORCH_EXPORT) -> None:
    """Say in one sentence which of the packages for ONNX export is missing.

    Args:
        traced: For files that are translated by tracing, which needs one package less.

    Raises:
        ExportError: One is.
    """
    packages = _PACKAGES if traced else (*_PACKAGES, "onnxscript")
    missing = next((package for package in packages if not _importable(package)), None)
    if missing:
        raise ExportError(
            f"ONNX export needs the package {missing}, which is not installed: pip install {' '.join(packages)}"
        )


def _importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@torch.no_grad()
def _images_and_embeddings(model: nn.Module, batch: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of mean 0 and deviation 1, as normalised images are, and what the model makes of it."""
    images = torch.randn(batch, *shape, generator=streams.torch_stream(0, "onnx-check", batch))
    try:
        output = model(images.clone())
    except RuntimeError as error:
        raise ExportError(f"{type(model).__name__} fails at batch size {batch}", value=str(error)) from error
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != batch:
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ExportError(f"Output of {type(model).__name__}", value=found, expected="one tensor [batch, dimension]")
    return images, output


def _translate(
    translate: Callable[[nn.Module, torch.Tensor, Form], bytes], model: nn.Module, example: torch.Tensor, form: Form
) -> bytes:
    try:
        with _quiet():
            return translate(model, example, form)
    except Exception as error:  # the exporters and what they call fail in many ways
        raise ExportError(
            f"{type(model).__name__} cannot be translated to ONNX",
            value=(str(error).strip() or repr(error)).splitlines()[0],
            expected=_FREE_BATCH,
        ) from error


def _exported(model: nn.Module, example: torch.Tensor, form: Form) -> bytes:
    export: Any = torch.onnx.export
    program = export(
        model,
        (example,),
        input_names=[form.input],
        output_names=[form.output],
        opset_version=_OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    return bytes(program.model_proto.SerializeToString())


def _traced(model: nn.Module, example: torch.Tensor, form: Form) -> bytes:
    export: Any = torch.onnx.export
    file = io.BytesIO()
    export(
        model,
        (example,),
        file,
        input_names=[form.input],
        output_names=[form.output],
        opset_version=form.traced_opset or _OPSET,
        dynamic_axes={form.input: {0: "batch"}, form.output: {0: "batch"}},
        dynamo=False,
    )
    return file.getvalue()


def _add_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    onnx = importlib.import_module("onnx")
    program = onnx.load_model_from_string(content)
    onnx.helper.set_model_props(program, dict(metadata))
    try:
        onnx.checker.check_model(program, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError("The translation to ONNX is not valid", value=str(error).splitlines()[0]) from error
    batch = program.graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:  # torch's exporter gives way to a network that works at one batch size only
        raise ExportError("The translation to ONNX has a fixed batch size", value=batch.dim_value, expected=_FREE_BATCH)
    return bytes(program.SerializeToString())


def _compare(
    content: bytes, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], tolerance: float, form: Form
) -> dict[int, float]:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = {}
    for images, expected in pairs:
        batch = len(images)
        try:
            found = torch.from_numpy(session.run([form.output], {form.input: images.numpy()})[0])
        except Exception as error:  # onnxruntime's errors have no common base but this
            raise ExportError(f"The ONNX file fails at batch size {batch}", value=str(error)) from error
        same_shape = found.shape == expected.shape
        difference = float((found - expected).abs().max()) if same_shape else math.inf
        limit = tolerance * max(1.0, float(expected.abs().max()))
        if not difference <= limit:  # also when it is not a number
            raise ExportError(
                f"The ONNX file differs from torch at batch size {batch}",
                value=difference,
                expected=f"at most {limit:.1e}",
                remedy="Nothing was written.",
            )
        differences[batch] = difference
    return differences


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own internals and on torchvision's operators."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # The older exporter prints the whole graph when it fails, past Python's own output.
    prints: Callable[[bool], None] = getattr(torch._C, "_jit_set_onnx_log_enabled", lambda _: None)
    prints(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        prints(True)
