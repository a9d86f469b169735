"""DIL's stage 2 and its teacher inside fast-reid: a step is that of the pure parts; what it starts from is checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from dil_toy import CLASSES, build, dil_cfg, step, stored

from qsd_plugin.core.errors import CheckpointError, ConfigError, DataError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.dil_files import save_bank
from qsd_plugin.methods.dil import stage2_terms

host.activate()

NO_DROPOUT = {"DIL.DROPOUT": 0.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A stage 1, a teacher, a bank, and a bank of another stage 1."""
    folder = tmp_path_factory.mktemp("dil")
    first, other = (build(dil_cfg(folder), seed=seed) for seed in (1, 2))
    teacher = build(dil_cfg(folder, "DILTeacher"), seed=3)
    codes = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    for name, model in (("bank", first), ("other_bank", other)):
        save_bank(folder / f"{name}.npz", codes, model.stage.degradation_encoder)
    return {
        "DIL.STAGE1": stored(first, folder / "stage1.pth"),
        "DIL.TEACHER": stored(teacher, folder / "teacher.pth"),
        "DIL.BANK": str(folder / "bank.npz"),
        "other_bank": str(folder / "other_bank.npz"),
    }


def reid(folder: Path, files: dict[str, str], **overrides: Any) -> Any:
    given = {key: value for key, value in files.items() if key.startswith("DIL.")}
    return build(dil_cfg(folder, "DILReID", **(given | overrides)))


def batch(seed: int = 0) -> dict[str, Any]:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 255
    return {"images": images, "targets": torch.arange(8) // 4}


def test_it_starts_from_stage_1_and_from_the_teacher(tmp_path: Path, files: dict[str, str]) -> None:
    model = reid(tmp_path, files)
    first = torch.load(files["DIL.STAGE1"])["model"]
    teacher = torch.load(files["DIL.TEACHER"])["model"]
    found = model.state_dict()
    for name, value in found.items():
        if name.startswith("reid.content_encoder."):
            assert value.equal(first[name.replace("reid.", "stage.", 1)]), name
        if name.startswith("reid.sensitive."):
            assert value.equal(teacher[name.replace("reid.sensitive.", "teacher.", 1)]), name
    assert not any(name.startswith("dil_replay.") for name in found)
    assert not any(parameter.requires_grad for parameter in model.dil_replay.parameters())


@pytest.mark.parametrize(("classes", "warned"), [(CLASSES, False), (CLASSES + 2, True), (1, False)])
def test_a_stage_1_of_other_identities_is_told_where_classes_matter(
    tmp_path: Path,
    files: dict[str, str],
    classes: int,
    warned: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("fastreid"), "propagate", True)
    reid(tmp_path, files, **{"MODEL.HEADS.NUM_CLASSES": classes})  # 1: built to embed
    assert ("stage1.pth is of other identities: the class layer keeps its initial values" in caplog.text) == warned


def test_two_steps_are_those_of_the_pure_parts(tmp_path: Path, files: dict[str, str]) -> None:
    model = reid(tmp_path, files, **NO_DROPOUT)
    pure = reid(tmp_path, files, **NO_DROPOUT)
    for index in range(2):
        inputs = batch(index)
        losses = step(model, inputs)
        images = (inputs["images"] - model.pixel_mean) / model.pixel_std
        shown, rendered = pure.dil_replay(images, torch_stream(3, "dil replay", index))
        outputs = pure.reid(shown)
        expected = stage2_terms(outputs, pure.reid.robust_logits(rendered), inputs["targets"])
        assert losses.keys() == {f"loss_dil_{name}" for name in ("fuse", "inv", "sen", "replay")}
        for name, value in expected.items():
            torch.testing.assert_close(losses[f"loss_dil_{name}"], value, rtol=1e-5, atol=1e-6, msg=name)
        sum(losses.values()).backward()
        sum(expected.values()).backward()
        for (name, own), other in zip(model.reid.named_parameters(), pure.reid.parameters(), strict=True):
            assert (own.grad is None) == (other.grad is None) == name.startswith("content_encoder.head.content"), name
            if own.grad is not None:
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert int(model.steps) == 2
    with torch.no_grad():
        step(model, batch())
    assert int(model.steps) == 2


def test_replay_depends_on_the_step_and_resumes_with_it(tmp_path: Path, files: dict[str, str]) -> None:
    """Dropout included: the second step of a loaded model is the second step of the first one."""
    model = reid(tmp_path, files)
    step(model, batch())
    loaded = reid(tmp_path, files)
    loaded.load_state_dict(model.state_dict())
    torch.manual_seed(99)
    second = step(loaded, batch())
    torch.manual_seed(5)
    for name, value in step(model, batch()).items():
        assert value.equal(second[name]), name


def test_repeated_renderings_repeat_the_labels(tmp_path: Path, files: dict[str, str]) -> None:
    losses = step(reid(tmp_path, files, **{"DIL.REPLAY.REPEATS": 2, "DIL.REPLAY.MODE": "shuffle"}), batch())
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize(("feature", "dim"), [("fuse", 64), ("inv", 32), ("sen", 32)])
def test_evaluation_returns_the_feature_that_is_asked_for(
    tmp_path: Path, files: dict[str, str], feature: str, dim: int
) -> None:
    model = reid(tmp_path, files, **{"DIL.STAGE2_OPTIONS.FEATURE": feature}).eval()
    images = batch()["images"]
    features = model({"images": images.clone()})
    assert features.shape == (8, dim)
    assert features.equal(model.reid.embed((images - model.pixel_mean) / model.pixel_std, feature))


def test_evaluation_needs_none_of_the_files(tmp_path: Path, files: dict[str, str]) -> None:
    from qsd_plugin.hosts.fastreid.extract import load_model

    model = reid(tmp_path, files)
    missing = {"DIL.STAGE1": "no.pth", "DIL.TEACHER": "no.pth", "DIL.BANK": "no.npz"}
    checkpoint = stored(model, tmp_path / "stage2.pth")
    loaded = load_model(dil_cfg(tmp_path, "DILReID", **missing), Path(checkpoint))
    images = batch()["images"]
    torch.testing.assert_close(loaded({"images": images.clone()}), model.eval()({"images": images.clone()}))


def test_files_of_another_stage_or_encoder_are_refused(tmp_path: Path, files: dict[str, str]) -> None:
    second = stored(reid(tmp_path, files), tmp_path / "stage2.pth")
    for options, error, message in (
        ({"DIL.STAGE1": second}, CheckpointError, r"stage2.pth: got 'a checkpoint of stage 2 \(DILReID\)'"),
        ({"DIL.STAGE1": files["DIL.TEACHER"]}, CheckpointError, "got 'a checkpoint of the teacher"),
        ({"DIL.TEACHER": files["DIL.STAGE1"]}, CheckpointError, r"got 'a checkpoint of stage 1 \(DIL\)'"),
        ({"DIL.BANK": files["other_bank"]}, DataError, "codes of another degradation encoder"),
        ({"DIL.BANK": files["DIL.STAGE1"]}, DataError, "a file of the recipe's stage bank"),
        ({"DIL.BANK": "none.npz"}, DataError, "DIL.BANK: got 'none.npz'.*--stage bank"),
        ({"DIL.WIDTH": 0.125}, CheckpointError, "as DIL.WIDTH, DIL.BLOCKS and DIL.BLOCK make it"),
        ({"DIL.REPLAY.MODE": "banks"}, ConfigError, "DIL.REPLAY.MODE: got 'banks'"),
        ({"DATALOADER.SAMPLER_TRAIN": "TrainingSampler"}, ConfigError, "repeats identities.*FUSE_LOSS"),
    ):
        with pytest.raises(error, match=message):
            reid(tmp_path, files, **options)


def test_training_without_stage_1_needs_replay_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DIL.STAGE1 is empty.*DIL.REPLAY.MODE none"):
        step(build(dil_cfg(tmp_path, "DILReID")), batch())
    losses = step(build(dil_cfg(tmp_path, "DILReID", **{"DIL.REPLAY.MODE": "none"})), batch())
    assert losses.keys() == {"loss_dil_fuse", "loss_dil_inv", "loss_dil_sen"}


def test_the_teacher_learns_and_is_taken_over_by_stage_1(tmp_path: Path, files: dict[str, str]) -> None:
    teacher = build(dil_cfg(tmp_path, "DILTeacher", **NO_DROPOUT))
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    curve = []
    for _ in range(8):
        optimizer.zero_grad()
        (loss,) = step(teacher, batch()).values()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[0] / 2
    assert teacher.eval()(batch()).shape == (8, 32)
    first = build(dil_cfg(tmp_path, **{"DIL.TEACHER": files["DIL.TEACHER"]}))
    trained = torch.load(files["DIL.TEACHER"])["model"]
    assert first.stage.content_encoder.model.conv1.weight.equal(trained["teacher.model.conv1.weight"])
    assert len(first.stage.content_encoder.classifier.classifier[0].weight) == CLASSES
