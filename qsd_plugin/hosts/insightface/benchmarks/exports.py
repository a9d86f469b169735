"""How long an export takes, and how fast onnxruntime is with it beside the host's own file of the same network.

Both files hold the same weights, and are compared with each other before anything is timed. The host's are made

* by ``convert_onnx`` of the checkout's ``torch2onnx.py``, which takes one image at a time with current torch;
* for larger batches from the checkout's own network by torch's older exporter, opset 11, with a free batch: what
  ``torch2onnx.py`` was written for.

Sessions are opened anew for every round (:func:`~qsd_plugin.report.benchmarks.paired.pooled_ratio`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qsd_plugin.core.errors import ExportError, HostError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.export.face_networks import FACE_SIZE, FaceModel, face_model
from qsd_plugin.hosts.insightface.checkout import find_checkout, host_module, on_path
from qsd_plugin.hosts.insightface.packaging import face_package
from qsd_plugin.hosts.insightface.runtime import require_insightface
from qsd_plugin.report.benchmarks.paired import median_interval, pooled_ratio, seconds

Run = Callable[[], Any]
Images = NDArray[np.float32]

#: Largest allowed ratio to the host's file, and seconds for an export with everything it is checked by.
LIMIT, EXPORT_LIMIT_S = 1.03, 60.0
#: How often both sessions are opened, and how often a package is written.
ROUNDS, EXPORTS = 4, 3
#: Smallest cosine between the two files' embeddings of an image.
COSINE = 0.9999

_OPSET = 11  # torch2onnx.py's


def run(
    host_root: Path | None,
    *,
    pairs: int = 30,
    only: str = "",
    seed: int = 0,
    network: str = "r50",
    batches: Sequence[int] = (1, 8),
) -> dict[str, dict[str, Any]]:
    """Time an export, and both files in onnxruntime.

    Args:
        host_root: An arcface_torch checkout; ``None``: everything but the comparison is run.
        pairs: Interleaved pairs of runs, over all rounds.
        only: Items whose name contains this.
        seed: Seeds weights and images.
        network: The checkout's name of the network; ours is built from its weights.
        batches: Images per run. The host's file of the first is made by ``torch2onnx.py``, of the others by torch.

    Returns:
        *Export*: median seconds of writing a package, ONNX file and all ways through the runtime included.
        *onnxruntime*: ours over the host's file, by :func:`pooled_ratio`, with ``limit``.

    Raises:
        HostError: The checkout is none.
    """
    export = f"export of {network}, loaded back"
    compared = {
        batch: f"onnxruntime, {network} B={batch} beside the host's by {'torch' if number else 'torch2onnx.py'}"
        for number, batch in enumerate(batches)
    }
    wanted = [name for name in (export, *compared.values()) if only in name]
    if not wanted:
        return {}
    try:
        require_insightface()
    except HostError as error:
        return {name: {"skipped": str(error)} for name in wanted}
    items: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout = None if host_root is None else find_checkout(host_root)
        theirs = None if checkout is None else _host_network(checkout, network, seed)
        written = export_time(_our_network(theirs, seed), folder, min(EXPORTS, pairs))
        if export in wanted:
            items[export] = written
        for number, (batch, item) in enumerate(compared.items()):
            if item not in wanted:
                continue
            if checkout is None or theirs is None:
                items[item] = {"skipped": "--host-root names no arcface_torch checkout"}
                continue
            ours, file = folder / "package0" / "recognition.onnx", folder / f"host{batch}.onnx"
            if number:
                export_by_torch(theirs, file)
            else:
                export_by_script(checkout, theirs, file)
            images = _images(batch, seed)
            require_same(ours, file, images)
            items[item] = pooled_ratio(partial(sessions, ours, file, images), pairs, rounds=ROUNDS) | {"limit": LIMIT}
    return items


def export_time(model: FaceModel, folder: Path, times: int) -> dict[str, Any]:
    """Seconds of writing ``package0``, ``package1``, ... into ``folder``."""
    took = sorted(
        seconds(partial(face_package, model, folder / f"package{number}", license_text="for a benchmark"))
        for number in range(times)
    )
    return {
        "a_seconds": took[len(took) // 2],
        "a_high_seconds": median_interval(took)[1],
        "seconds_limit": EXPORT_LIMIT_S,
        "pairs": times,
    }


def sessions(ours: Path, theirs: Path, images: Images, theirs_first: bool = False) -> tuple[Run, Run]:
    """One run of each file over the same images; the order of what is returned stays."""
    files = (theirs, ours) if theirs_first else (ours, theirs)
    runs = {file: _runner(file, images) for file in files}
    return runs[ours], runs[theirs]


def require_same(ours: Path, theirs: Path, images: Images) -> None:
    """Refuse to compare the speed of files that compute different things.

    Raises:
        ExportError: They do.
    """
    found, expected = (torch.from_numpy(work()) for work in sessions(ours, theirs, images))
    cosine = float(torch.cosine_similarity(found, expected).min()) if found.shape == expected.shape else -1.0
    if not cosine > COSINE:
        raise ExportError(
            "The host's ONNX file", value=f"smallest cosine {cosine:.6f} with ours", expected=f"more than {COSINE}"
        )


def export_by_script(checkout: Path, network: nn.Module, file: Path) -> None:
    """The checkout's ``torch2onnx.py``, which needs a name that NumPy has dropped."""
    weights = file.with_suffix(".pt")
    torch.save(network.state_dict(), weights)
    with on_path(checkout), _silent(), _numpy_float():
        host_module("torch2onnx").convert_onnx(network, str(weights), str(file))


def export_by_torch(network: nn.Module, file: Path) -> None:
    """What ``torch2onnx.py`` asks torch for, by the exporter of its time, with a free batch."""
    export: Any = torch.onnx.export
    axes = {"data": {0: "batch"}, "embedding": {0: "batch"}}
    example = torch.zeros(1, 3, FACE_SIZE, FACE_SIZE)
    with _silent():
        export(
            network.eval(),
            (example,),
            str(file),
            input_names=["data"],
            output_names=["embedding"],
            dynamic_axes=axes,
            opset_version=_OPSET,
            dynamo=False,
        )


def _runner(file: Path, images: Images) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads of the session that has just run would go on spinning, on the cores that the other one needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})[0]


def _host_network(checkout: Path, name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with on_path(checkout), _silent():
        network: nn.Module = host_module("backbones").get_model(name, dropout=0.0, fp16=False, num_features=512)
        return _settled(network)


def _our_network(theirs: nn.Module | None, seed: int) -> FaceModel:
    from qsd_plugin.networks import iresnet50

    torch.manual_seed(seed)
    network = _settled(iresnet50(512)) if theirs is None else theirs
    return face_model(network.state_dict(), title="the network of the benchmark")


def _settled(network: nn.Module) -> nn.Module:
    """In eval mode, with the batch statistics of noise: initial ones let activations grow from block to block."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = None  # the average of what is seen
        network.train()(torch.from_numpy(_images(8, 0)))
    return network.eval()


def _images(batch: int, seed: int) -> Images:
    drawn = numpy_stream(seed, "export benchmark", batch).standard_normal((batch, 3, FACE_SIZE, FACE_SIZE))
    return np.asarray(drawn, np.float32)


@contextmanager
def _numpy_float() -> Iterator[None]:
    missing = "float" not in vars(np)
    if missing:
        vars(np)["float"] = float
    try:
        yield
    finally:
        if missing:
            del vars(np)["float"]


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the checkout warns of, and what torch prints about an opset that it cannot convert to."""
    logging.disable(logging.WARNING)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
