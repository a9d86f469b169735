"""Which images the host's losses see, flips that pairs share, and erasing that spares teachers."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from qsd_toy import IDENTITIES, QUALITY, base_model, batch, build, qsd_cfg, step, use_images, with_partners

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import loaders
from qsd_plugin.networks import TapRecorder

host.activate()

PARTNER = {"QSD.PAIRING": "partner"}
FLIP = {"QSD.PAIR_FLIP": "shared", "INPUT.FLIP.ENABLED": True}
ERASE = {"QSD.TEACHER_ERASE": False, "INPUT.REA.ENABLED": True}
#: The anchor's label is q, its partner's 100 - q.
ANCHOR_TEACHES = QUALITY > 50
FILL = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255


@pytest.fixture(autouse=True)
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_images(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(loaders, "_records", {})


def logits(plain: Any, *image_batches: torch.Tensor) -> list[torch.Tensor]:
    recorded = []
    for images in image_batches:
        targets = IDENTITIES.repeat(len(images) // 8)
        with TapRecorder(plain, ["heads:cls_outputs"]) as taps:
            step(plain, {"images": images.clone(), "targets": targets})
        recorded.append(taps["heads:cls_outputs"])
    return recorded


@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("cls_on", ["anchor", "teacher", "both"])
def test_host_losses_see_the_images_that_were_chosen(tmp_path: Path, forward: str, cls_on: str) -> None:
    cfg = qsd_cfg(tmp_path, **PARTNER, **{"QSD.PARTNER_FORWARD": forward, "QSD.CLS_ON": cls_on})
    model, plain, inputs = build(cfg), base_model(cfg), with_partners()
    losses = step(model, inputs)
    assert set(losses) == {"loss_cls", "loss_qsd"}
    images = inputs["images"], inputs["partner_images"]
    if forward == "joint":
        anchors, partners = logits(plain, torch.cat(images))[0].chunk(2)
    else:
        anchors, partners = logits(plain, *images)
    expected = {
        "anchor": F.cross_entropy(anchors, IDENTITIES),
        "teacher": F.cross_entropy(torch.where(ANCHOR_TEACHES[:, None], anchors, partners), IDENTITIES),
        "both": F.cross_entropy(torch.cat([anchors, partners]), IDENTITIES.repeat(2)),
    }
    torch.testing.assert_close(losses["loss_cls"], expected[cls_on])
    assert len({round(value.item(), 5) for value in expected.values()}) == 3
    losses["loss_cls"].backward()
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_anchor_stands_in_where_the_teacher_is_unknown(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path, **PARTNER, **{"QSD.CLS_ON": "teacher"})
    model, plain, inputs = build(cfg), base_model(cfg), with_partners()
    inputs["partner_valid"] = torch.zeros(8)
    expected = F.cross_entropy(logits(plain, inputs["images"])[0], IDENTITIES)
    torch.testing.assert_close(step(model, inputs)["loss_cls"], expected)


def test_base_that_has_no_losses_to_choose_for_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreid.modeling.meta_arch import Baseline

    def forward(self: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.heads(self.backbone(self.preprocess_image(inputs)), inputs["targets"])
        return {}

    model = build(qsd_cfg(tmp_path, **PARTNER, **{"QSD.CLS_ON": "teacher"}))
    monkeypatch.setattr(Baseline, "forward", forward)
    with pytest.raises(ConfigError, match=r"QSD.CLS_ON: got 'teacher'; expected a QSD.BASE that calls its losses\(\)"):
        step(model, with_partners())


# --- the loader


def batches(cfg: Any, count: int) -> list[dict[str, Any]]:
    from fastreid.data import build_reid_train_loader

    np.random.seed(5)  # noqa: NPY002  (the host's sampler draws its seed from the global generator)
    return list(islice(build_reid_train_loader(cfg), count))


def loader_cfg(tmp_path: Path, **keys: Any) -> Any:
    """Batches of both identities, four images each, that are not changed beyond flips and erasing."""
    return qsd_cfg(tmp_path, **{"SOLVER.IMS_PER_BATCH": 8, **keys})


def mirrored(images: torch.Tensor, paths: list[str]) -> list[bool]:
    """Whether each image is its file's mirror image; it must be one or the other."""
    flags = []
    for image, path in zip(images, paths, strict=True):
        stored = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float()
        flags.append(torch.equal(image, stored.flip(2)))
        assert flags[-1] or torch.equal(image, stored)
    return flags


def test_partner_is_mirrored_as_its_anchor(tmp_path: Path) -> None:
    drawn = []
    for batch_ in batches(loader_cfg(tmp_path, **PARTNER, **FLIP), 12):
        anchors = mirrored(batch_["images"], batch_["img_paths"])
        assert mirrored(batch_["partner_images"], batch_["partner_paths"]) == anchors
        drawn += anchors
    assert 30 < sum(drawn) < 66  # of 96, three and a half standard deviations


def test_images_of_an_identity_are_mirrored_together(tmp_path: Path) -> None:
    drawn = defaultdict(list)
    for batch_ in batches(loader_cfg(tmp_path, **FLIP), 40):
        flags = mirrored(batch_["images"], batch_["img_paths"])
        for identity in (0, 1):
            own = {flag for flag, target in zip(flags, batch_["targets"], strict=True) if target == identity}
            assert len(own) == 1
            drawn[identity].append(own.pop())
    assert 9 < sum(drawn[0]) < 31
    assert drawn[0] != drawn[1]


def test_independent_flips_are_the_hosts(tmp_path: Path) -> None:
    cfg = loader_cfg(tmp_path, **{**PARTNER, **FLIP, "QSD.PAIR_FLIP": "independent"})
    both = [
        (mirrored(batch_["images"], batch_["img_paths"]), mirrored(batch_["partner_images"], batch_["partner_paths"]))
        for batch_ in batches(cfg, 4)
    ]
    assert any(anchors != partners for anchors, partners in both)


@pytest.mark.parametrize("pairing", ["inbatch", "partner"])
def test_views_do_not_depend_on_the_number_of_workers(tmp_path: Path, pairing: str) -> None:
    seen = []
    for workers in (0, 2):
        keys = {**FLIP, **ERASE, "QSD.PAIRING": pairing, "DATALOADER.NUM_WORKERS": workers, "SEED": 4}
        seen.append(batches(loader_cfg(tmp_path, **keys), 3))
    for alone, shared in zip(*seen, strict=True):
        assert alone.keys() == shared.keys()
        assert ("partner_erase_boxes" in alone) == (pairing == "partner")
        for name, value in alone.items():
            assert torch.equal(value, shared[name]) if isinstance(value, torch.Tensor) else value == shared[name]


def test_erasing_is_left_to_the_training_step(tmp_path: Path) -> None:
    boxes = []
    for batch_ in batches(loader_cfg(tmp_path, **PARTNER, **ERASE), 12):
        assert not any(mirrored(batch_["images"], batch_["img_paths"]))  # as stored, without a box
        assert not any(mirrored(batch_["partner_images"], batch_["partner_paths"]))
        assert not torch.equal(batch_["erase_boxes"], batch_["partner_erase_boxes"])
        boxes.append(batch_["erase_boxes"])
    erased = torch.cat(boxes)[:, 2] > 0
    assert 30 < erased.sum() < 66
    plain = batches(loader_cfg(tmp_path, **PARTNER, **ERASE, **{"MODEL.META_ARCHITECTURE": "Baseline"}), 1)[0]
    assert not any(name.endswith("boxes") for name in plain)


def test_transforms_of_a_script_cannot_be_taken_apart(tmp_path: Path) -> None:
    from fastreid.data import build_reid_train_loader
    from fastreid.data.build import build_transforms

    cfg = loader_cfg(tmp_path, **FLIP)
    with pytest.raises(ConfigError, match=r"QSD.PAIR_FLIP shared.*Leave the argument out"):
        build_reid_train_loader(cfg, transforms=build_transforms(cfg))


# --- the training step


def shown_images(model: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What went into the network and, with an average, into that: one tensor per forward."""
    from fastreid.modeling.meta_arch import Baseline

    shown = []
    preprocess = Baseline.preprocess_image

    def spy(self: Any, batched_inputs: dict[str, Any]) -> torch.Tensor:
        shown.append(batched_inputs["images"].clone())
        return preprocess(self, batched_inputs)

    monkeypatch.setattr(Baseline, "preprocess_image", spy)
    step(model, inputs)
    return shown


def erased(images: torch.Tensor) -> torch.Tensor:
    """The upper left 20 x 10 pixels filled with the mean colour."""
    images = images.clone()
    images[:, :, :20, :10] = FILL
    return images


BOXES = torch.tensor([[0, 0, 20, 10]]).repeat(8, 1)


@pytest.mark.parametrize("forward", ["separate", "joint"])
def test_of_a_pair_only_the_student_is_erased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forward: str) -> None:
    model = build(qsd_cfg(tmp_path, **PARTNER, **ERASE, **{"QSD.PARTNER_FORWARD": forward}))
    inputs = {**with_partners(), "erase_boxes": BOXES, "partner_erase_boxes": BOXES}
    shown = torch.cat(shown_images(model, inputs, monkeypatch))
    teaches = ANCHOR_TEACHES[:, None, None, None]
    anchors, partners = inputs["images"], inputs["partner_images"]
    assert torch.equal(shown[:8], torch.where(teaches, anchors, erased(anchors)))
    assert torch.equal(shown[8:], torch.where(teaches, erased(partners), partners))


def test_within_a_batch_only_images_that_never_teach_are_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(qsd_cfg(tmp_path, **ERASE))
    inputs = {**batch(), "erase_boxes": BOXES}
    (shown,) = shown_images(model, inputs, monkeypatch)
    worst = torch.zeros(8, dtype=torch.bool)
    worst[[0, 4]] = True
    assert torch.equal(shown, torch.where(worst[:, None, None, None], erased(inputs["images"]), inputs["images"]))


def test_another_teacher_sees_every_image_whole_and_the_student_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(qsd_cfg(tmp_path, **ERASE, **{"QSD.EMA.ENABLED": True, "QUALITY.SOURCE": "embedding_norm"}))
    inputs = {**batch(), "erase_boxes": BOXES}
    student, teacher = shown_images(model, inputs, monkeypatch)
    assert torch.equal(student, erased(inputs["images"]))
    assert torch.equal(teacher, inputs["images"])


def test_precise_bn_pass_takes_a_batch_with_boxes(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **ERASE))
    with torch.no_grad():
        assert "loss_qsd" not in step(model, {**batch(), "erase_boxes": BOXES})
    assert list(model.state_dict()) == list(base_model(qsd_cfg(tmp_path)).state_dict())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"QSD.CLS_ON": "teacher"}, r"QSD.CLS_ON: got 'teacher'; expected anchor or both with QSD.PAIRING inbatch"),
        ({"QSD.CLS_ON": "student"}, r"QSD.CLS_ON: got 'student'; expected anchor or teacher or both"),
        ({"QSD.PAIR_FLIP": "same"}, r"QSD.PAIR_FLIP: got 'same'; expected independent or shared"),
        (
            {"QSD.TEACHER_ERASE": False, "QUALITY.SOURCE": "embedding_norm"},
            r"QSD.TEACHER_ERASE: got False; expected True with QUALITY.SOURCE embedding_norm.*QSD.EMA.ENABLED",
        ),
        ({**ERASE, "INPUT.REA.VALUE": ["random"]}, r"INPUT.REA.VALUE: got \['random'\]; expected numbers"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(qsd_cfg(tmp_path, **overrides))
