"""Face protocols by ``DATASETS.TESTS``: the host embeds the images, :mod:`qsd_plugin.evaluation` scores.

``VerificationBin`` and ``FacePairs`` (ten-fold verification), ``IJB``, ``IJBB`` and ``IJBC`` (1:1 templates),
``TinyFace`` (closed-set identification), ``SCface`` (the same at three distances), and both kinds on built-in faces
(``SyntheticFacesVerification``, ``SyntheticFacesIdentification``), also with ``--eval-only``. All but templates exist
with degraded images, too: ``SyntheticFacesMixed``, ``VerificationBinMixed``, ..., and ``CRLFW``; so do person sets,
with degraded queries: ``Market1501Mixed``, ... ``TEST.FLIP.ENABLED`` adds the embedding of the mirror image, as
published face results do; ``TEST.FUSION`` says how.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastreid.evaluation import DatasetEvaluator
from PIL import Image
from torch.utils.data import Dataset

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.evaluation.results import to_json
from qsd_plugin.hosts.fastreid import mlr_protocol
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace, together
from qsd_plugin.hosts.fastreid.face_protocol import FaceTest
from qsd_plugin.hosts.fastreid.face_tests import TESTS, build_test, host_flips
from qsd_plugin.report.conditions import condition_table, has_conditions
from qsd_plugin.report.curve_pictures import draw_det

logger = logging.getLogger("fastreid.qsd_plugin.protocols")


class FaceImages(Dataset[dict[str, Any]]):
    """The images of a :class:`FaceTest` as the host's loader takes them; ``targets`` is the image's index."""

    def __init__(self, test: FaceTest, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self._names, self._read = test.names, test.read
        self._transform = transform

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._transform(self._read(index))
        return {"images": image, "targets": index, "camids": 0, "img_paths": self._names[index]}


class ProtocolEvaluator(DatasetEvaluator):  # type: ignore[misc]
    """The host's evaluator interface around a :class:`FaceTest`.

    Args:
        name: Of the test set.
        test: What is evaluated.
        folder: ``<name>.json`` with all curves, and ``<name>_det.png`` are written here; of test sets with several
            conditions also ``<name>.md``, the table.
        host_flips: Whether the host may add the embeddings of mirror images.
    """

    def __init__(self, name: str, test: FaceTest, folder: Path, *, host_flips: bool = True) -> None:
        self._name, self._test, self._folder = name, test, folder
        self.host_flips = host_flips
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def reset(self) -> None:
        """Forget the embeddings of an earlier round."""
        self._parts = []

    def process(self, inputs: Mapping[str, Any], outputs: torch.Tensor) -> None:
        """Keep the embeddings [B, D] of a batch."""
        self._parts.append((inputs["targets"].cpu(), outputs.float().cpu()))

    def evaluate(self) -> OrderedDict[str, float]:
        """The protocol's numbers, in per cent; nothing on ranks other than the first.

        Raises:
            DataError: An image was not embedded, or the protocol cannot be run on these embeddings.
        """
        from fastreid.utils import comm

        parts = self._parts
        if comm.get_world_size() > 1:
            comm.synchronize()
            parts = list(itertools.chain(*comm.gather(parts, dst=0)))
            if not comm.is_main_process():
                return OrderedDict()
        index = torch.cat([part[0] for part in parts])
        embedded = len(set(index.tolist()))
        if embedded != len(self._test.names):
            raise DataError(f"{self._name}: images embedded", value=embedded, expected=f"all {len(self._test.names)}")
        features = torch.cat([part[1] for part in parts])
        ordered = features.new_empty(len(self._test.names), features.shape[1])
        ordered[index] = features  # a sampler that fills up the last batch embeds some images twice
        score = self._test.score(ordered)
        write_atomically(self._folder / f"{self._name}.json", json.dumps(to_json(score.details), indent=1).encode())
        if score.curves:
            draw_det(score.curves, self._folder / f"{self._name}_det.png")
        if has_conditions(score.numbers):
            table = condition_table(score.numbers)
            write_atomically(self._folder / f"{self._name}.md", f"{table}\n".encode())
            logger.info("%s, percent:\n%s", self._name, table)
        logger.info("%s: curves and all numbers are in %s", self._name, self._folder)
        return OrderedDict(score.numbers)


def build(cfg: Any, name: str, output_dir: str | None = None) -> tuple[Any, ProtocolEvaluator]:
    """The host's test loader over a face test set, and its evaluator.

    Args:
        cfg: The host's config.
        name: One of :data:`TESTS`.
        output_dir: For JSON and pictures; default: ``evaluation`` in ``OUTPUT_DIR``.
    """
    from fastreid.data import build as host_data

    test = build_test(cfg, name)
    transforms = host_data.build_transforms(cfg, is_train=False)
    loader, _ = host_data.build_reid_test_loader(cfg, test_set=FaceImages(test, transforms), transforms=transforms)
    flip = f"with mirror images, {cfg.TEST.FUSION}" if cfg.TEST.FLIP.ENABLED else "without mirror images"
    logger.info("%s: %d images, %s (TEST.FLIP.ENABLED)", name, len(test.names), flip)
    folder = Path(output_dir or Path(cfg.OUTPUT_DIR, "evaluation"))
    return loader, ProtocolEvaluator(name, test, folder, host_flips=host_flips(cfg))


def install() -> Undo:
    """Let every ``DefaultTrainer`` evaluate the names of :data:`TESTS`, and sets of two resolutions."""
    import fastreid.engine.defaults
    from fastreid.engine.defaults import DefaultTrainer

    host_inference = fastreid.engine.defaults.inference_on_dataset

    @functools.wraps(host_inference)
    def inference_on_dataset(model: Any, data_loader: Any, evaluator: Any, flip_test: bool = False) -> Any:
        # The host averages embeddings before an evaluator sees them; other fusions need both.
        return host_inference(model, data_loader, evaluator, flip_test and getattr(evaluator, "host_flips", True))

    host_build = DefaultTrainer.build_evaluator.__func__

    @functools.wraps(host_build)
    def build_evaluator(cls: Any, cfg: Any, dataset_name: str, output_dir: str | None = None) -> Any:
        if dataset_name in TESTS:
            return build(cfg, dataset_name, output_dir)
        if mlr_protocol.applies(cfg, dataset_name):
            return mlr_protocol.build(cls, cfg, dataset_name, output_dir)
        return host_build(cls, cfg, dataset_name, output_dir)

    return together(
        replace(DefaultTrainer, "build_evaluator", classmethod(build_evaluator)),
        replace(fastreid.engine.defaults, "inference_on_dataset", inference_on_dataset),
    )
