"""S13: the batch stays as it is, so the flipped pass of TEST.FLIP sees properly normalised images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import toy_cfg

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import HostError


@pytest.mark.parametrize("architecture", ["Baseline", "MGN"])
def test_s13_flip_of_a_symmetric_image_changes_nothing(tmp_path: Path, architecture: str) -> None:
    """Through the host's own evaluation loop: a mirror-symmetric image has one feature, flipped or not."""
    from fastreid.evaluation import DatasetEvaluator, inference_on_dataset
    from fastreid.modeling import build_model

    class Keep(DatasetEvaluator):  # type: ignore[misc]
        def process(self, inputs: dict[str, torch.Tensor], outputs: torch.Tensor) -> None:
            self.outputs = outputs

        def evaluate(self) -> torch.Tensor:
            return self.outputs

    torch.manual_seed(0)
    options: dict[str, Any] = {"MODEL.META_ARCHITECTURE": architecture, "MODEL.BACKBONE.LAST_STRIDE": 1}
    if architecture == "MGN":  # its branches are built from ResNet-50 blocks, whatever the backbone
        options |= {"MODEL.BACKBONE.DEPTH": "50x", "MODEL.BACKBONE.FEAT_DIM": 2048, "MODEL.HEADS.EMBEDDING_DIM": 16}
    model = build_model(toy_cfg(tmp_path, **options)).eval()
    half = torch.randint(0, 256, (2, 3, 96, 16)).float()
    images = torch.cat((half, half.flip(dims=[3])), dim=3)

    def features(flip: bool) -> torch.Tensor:
        class Loader(list):  # type: ignore[type-arg]
            dataset = range(2)

        return inference_on_dataset(model, Loader([{"images": images.clone()}]), Keep(), flip_test=flip)

    plain, flipped = features(flip=False), features(flip=True)
    cosine = torch.nn.functional.cosine_similarity(plain, flipped)
    torch.testing.assert_close(cosine, torch.ones(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(flipped, plain, atol=1e-4, rtol=1e-4)


def test_s13_batch_is_left_alone(tmp_path: Path) -> None:
    from fastreid.modeling import build_model

    model = build_model(toy_cfg(tmp_path))
    images = torch.randint(0, 256, (2, 3, 64, 32)).float()
    batch = {"images": images.clone()}
    normalised = model.preprocess_image(batch)
    assert batch["images"].equal(images)
    assert model.preprocess_image(images).equal(normalised)
    torch.testing.assert_close(normalised, (images - model.pixel_mean) / model.pixel_std, rtol=0, atol=0)
    assert images.mean() > 100  # still 0 to 255


def test_s13_wrong_input_is_explained(tmp_path: Path) -> None:
    from fastreid.modeling import build_model

    model = build_model(toy_cfg(tmp_path))
    with pytest.raises(HostError, match=r"The model's input: got 'list'; expected a tensor of images, or a mapping"):
        model.preprocess_image([1, 2])
