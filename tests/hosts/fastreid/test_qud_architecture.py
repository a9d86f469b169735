"""QUD inside fast-reid: what a step computes, what it reads and what it leaves alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qud_toy import (
    ROWS,
    batch,
    build,
    logits,
    plain_of,
    qud,
    qud_cfg,
    sgd,
    step,
    student_embedding,
    teacher_embedding,
    train,
    write_teacher,
)
from torch import Tensor

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.methods.qud import FeatureQueue

host.activate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qud")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Any:
    """The network behind the files in ``folder``."""
    return write_teacher(folder)


def masked(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    own, same = logits(student, teacher, queue)
    dropped = same > 0.3
    dropped[:, 0] = False
    assert dropped.any()
    scores = (own / 0.1).masked_fill(dropped, -torch.inf)
    return F.cross_entropy(scores, torch.zeros(len(student), dtype=torch.int64))


def soft(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    own, targets = logits(student, teacher, queue)
    return -((targets / 0.05).softmax(1) * (own / 0.2).log_softmax(1)).sum(1).mean()


EQUATIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "qud": ({}, qud),
    "qud with a mask": ({"QUD.MASK_ABOVE": 0.3}, masked),
    "soft": ({"QUD.LOSS": "soft", "QUD.TEMPERATURE": 0.2, "QUD.SOFT_TEMPERATURE": 0.05}, soft),
    "mse": ({"QUD.LOSS": "mse"}, lambda student, teacher, queue: F.mse_loss(student, teacher)),
    "mse, sum over dimensions": (
        {"QUD.LOSS": "mse", "QUD.MSE_REDUCTION": "sum_dim"},
        lambda student, teacher, queue: 16 * F.mse_loss(student, teacher),
    ),
    "cosine, weight 3": (
        {"QUD.LOSS": "cosine", "QUD.WEIGHT": 3.0},
        lambda student, teacher, queue: 3 * (1 - F.cosine_similarity(student, teacher)).mean(),
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_loss_and_gradients_equal_the_equation_on_the_same_embeddings(folder: Path, teacher: Any, name: str) -> None:
    """In the second step, where the queue holds the teacher's embeddings of the first."""
    overrides, equation = EQUATIONS[name]
    cfg = qud_cfg(folder, **overrides)
    model = build(cfg)
    plain = plain_of(model, cfg)
    queue = FeatureQueue(20, 16, seed=3).features.clone()
    queue[:ROWS] = teacher_embedding(teacher, batch(0)["images"])
    student_embedding(plain, batch(0)["images"])  # moves the batch-norm statistics

    assert set(step(model, batch(0))) == {"loss_qud"}
    torch.testing.assert_close(model.qud_queue.features, queue, rtol=1e-5, atol=1e-5)
    loss = step(model, batch(1))["loss_qud"]
    loss.backward()
    student = F.normalize(student_embedding(plain, batch(1)["images"]))
    expected = equation(student, teacher_embedding(teacher, batch(1)["images"]), queue)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for key, parameter in plain.named_parameters():
        if parameter.numel():
            torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad, rtol=2e-3, atol=1e-5, msg=key)
    assert all(torch.equal(model.get_buffer(key), value) for key, value in plain.named_buffers())


def test_host_losses_are_added_with_their_own_factors(folder: Path, teacher: Any) -> None:
    names = {"MODEL.LOSSES.NAME": ("CrossEntropyLoss", "TripletLoss"), "MODEL.LOSSES.TRI.SCALE": 2.0}
    cfg = qud_cfg(folder, **names, **{"QUD.HOST_LOSSES": True})
    model = build(cfg)
    plain = plain_of(model, cfg)
    got, expected = step(model, batch()), step(plain, batch())
    assert set(got) == {*expected, "loss_qud"} == {"loss_cls", "loss_triplet", "loss_qud"}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    alone = step(build(qud_cfg(folder)), batch())["loss_qud"]
    torch.testing.assert_close(got["loss_qud"], alone)  # the same student, whatever else it learns
    sum(got.values()).backward()
    assert model.heads.weight.grad.any()


def test_labels_are_not_read(folder: Path, teacher: Any) -> None:
    """Bit for bit the same student from shuffled labels, impossible ones and none; with host losses it is another."""

    def trained(targets: Any, **overrides: Any) -> dict[str, Tensor]:
        model = build(qud_cfg(folder, **overrides))
        batches = [batch(index) for index in range(3)]
        for inputs in batches:
            targets(inputs)
        train(model, sgd(model), batches)
        return dict(model.state_dict())

    def as_is(inputs: Any) -> None:
        pass

    def shuffled(inputs: Any) -> None:
        inputs["targets"] = inputs["targets"].flip(0)

    def impossible(inputs: Any) -> None:
        inputs["targets"] = torch.full((ROWS,), 10**6)

    def none(inputs: Any) -> None:
        del inputs["targets"]

    expected = trained(as_is)
    for change in (shuffled, impossible, none):
        got = trained(change)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    key = "backbone.conv1.conv.weight"
    labelled = [trained(change, **{"QUD.HOST_LOSSES": True})[key] for change in (as_is, shuffled)]
    assert not torch.equal(*labelled)


def test_no_classifier_is_built_for_any_number_of_identities(folder: Path, teacher: Any) -> None:
    few, many = (build(qud_cfg(folder, **{"MODEL.HEADS.NUM_CLASSES": classes})) for classes in (7, 90))
    assert few.heads.weight.shape == many.heads.weight.shape == (0, 16)
    assert not few.heads.weight.requires_grad
    assert all(torch.equal(few.state_dict()[name], value) for name, value in many.state_dict().items())


def test_resumed_training_goes_on_bit_for_bit_and_not_without_the_queue(folder: Path, teacher: Any) -> None:
    from fastreid.utils.checkpoint import Checkpointer

    cfg = qud_cfg(folder)
    batches = [batch(index) for index in range(6)]
    whole = build(cfg)
    curve = train(whole, sgd(whole), batches)

    def resumed(state: dict[str, Any]) -> list[float]:
        model = build(cfg, seed=1)
        optimizer = sgd(model)
        torch.save(state, folder / "model_0001.pth")
        Checkpointer(model, str(folder), optimizer=optimizer).load(str(folder / "model_0001.pth"))
        return train(model, optimizer, batches[3:])

    first = build(cfg)
    optimizer = sgd(first)
    assert train(first, optimizer, batches[:3]) == curve[:3]
    state = {"model": dict(first.state_dict()), "optimizer": optimizer.state_dict()}
    assert resumed(state) == curve[3:]
    state["model"].pop("qud_queue.features")
    assert resumed(state)[0] != pytest.approx(curve[3], rel=1e-3)


def test_last_batch_may_be_smaller_and_the_queue_wraps(folder: Path, teacher: Any) -> None:
    model = build(qud_cfg(folder))
    for index, rows in enumerate((8, 8, 3, 8)):
        step(model, batch(index, rows))
    assert (model.qud_queue.pointer.item(), model.qud_queue.filled.item()) == (7, 20)
    newest = teacher_embedding(teacher, batch(3, 8)["images"])
    torch.testing.assert_close(model.qud_queue.features[[19, *range(7)]], newest, rtol=1e-5, atol=1e-5)


def test_loss_is_computed_in_float32_under_autocast(folder: Path, teacher: Any) -> None:
    cfg = qud_cfg(folder, **{"MODEL.BACKBONE.FEAT_DIM": 24})  # with a projector
    model = build(cfg)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(model, batch())["loss_qud"]
    assert loss.dtype == model.qud_queue.features.dtype == torch.float32
    assert loss.item() == pytest.approx(step(build(cfg), batch())["loss_qud"].item(), abs=0.2)  # of bfloat16 embeddings
    loss.backward()
    assert model.qud_projector.weight.grad.isfinite().all()


def test_evaluation_and_precise_bn_are_the_base_s(folder: Path, teacher: Any) -> None:
    for overrides in ({}, {"QUD.HOST_LOSSES": True}):
        cfg = qud_cfg(folder, **overrides)
        model = build(cfg)
        plain = plain_of(model, cfg)
        start = model.qud_queue.features.clone()
        with torch.no_grad():  # the host's precise-BN pass: training mode, targets of -1
            losses = step(model, {**batch(), "targets": torch.full((ROWS,), -1)})
            student_embedding(plain, batch()["images"])
        assert "loss_qud" not in losses
        assert torch.equal(model.qud_queue.features, start)
        assert model.qud_queue.filled == 0
        assert all(module.training for name, module in model.named_modules() if not name.startswith("qud_teacher"))
        model.eval(), plain.eval()
        output = model(batch())
        assert torch.equal(output, plain(batch()))
        assert not torch.equal(output, build(cfg).eval()(batch()))  # the statistics have moved


def test_monitors_reach_the_event_storage_and_the_temperature_the_log(
    folder: Path, teacher: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from fastreid.utils.events import EventStorage

    caplog.set_level(logging.INFO, "fastreid.qsd_plugin")
    cfg = qud_cfg(folder)
    model = build(cfg)
    assert "temperature 0.1, queue 20 x 16: half-saturation cosine" in caplog.text
    plain = plain_of(model, cfg)
    start = model.qud_queue.features.clone()
    model._qud_stats.period = 1
    with EventStorage(0) as storage:
        model(batch())
        written = {name: value for name, (value, _) in storage.latest().items() if name.startswith("qud/")}
    own = logits(
        F.normalize(student_embedding(plain, batch()["images"])), teacher_embedding(teacher, batch()["images"]), start
    )[0]
    assert written == pytest.approx(
        {
            "qud/mean_cosine": own[:, 0].mean().item(),
            "qud/p_positive": (own / 0.1).softmax(1)[:, 0].mean().item(),
            "qud/top_1": (own[:, 0] > own[:, 1:].amax(1)).float().mean().item(),
            "qud/queue_filled": ROWS / 20,
        },
        rel=1e-4,
    )


def test_projector_bridges_different_sizes_and_is_not_evaluated(folder: Path, teacher: Any) -> None:
    cfg = qud_cfg(folder, **{"MODEL.BACKBONE.FEAT_DIM": 24})
    model = build(cfg)
    plain = plain_of(model, cfg)
    weight = model.qud_projector.weight.detach().clone().requires_grad_()
    assert weight.shape == (16, 24)
    start = model.qud_queue.features.clone()
    loss = step(model, batch())["loss_qud"]
    loss.backward()
    student = F.normalize(student_embedding(plain, batch()["images"]) @ weight.T)
    expected = qud(student, teacher_embedding(teacher, batch()["images"]), start)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.qud_projector.weight.grad, weight.grad, rtol=1e-3, atol=1e-5)
    assert model.eval()(batch()).shape == (ROWS, 24)
    again = build(cfg, seed=1)
    assert torch.equal(again.qud_projector.weight, weight)  # from SEED, as on every rank

    assert build(qud_cfg(folder)).qud_projector is None
    assert build(qud_cfg(folder, **{"QUD.PROJECTOR": "linear"})).qud_projector.weight.shape == (16, 16)
    with pytest.raises(ConfigError, match=r"QUD.PROJECTOR: got 'none'.*student's embedding has 24.*teacher's 16"):
        build(qud_cfg(folder, **{"MODEL.BACKBONE.FEAT_DIM": 24, "QUD.PROJECTOR": "none"}))


def test_deployed_network_has_neither_projector_nor_queue_nor_teacher(folder: Path, tmp_path: Path) -> None:
    from qsd_plugin.hosts.fastreid import deploy, deployed

    write_teacher(tmp_path)
    person = {
        "MODEL.BACKBONE.NAME": "build_osnet_backbone",
        "MODEL.BACKBONE.DEPTH": "x0_25",
        "MODEL.BACKBONE.FEAT_DIM": 128,
        "MODEL.BACKBONE.WIDTH": 1.0,
        "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool",
        "MODEL.HEADS.WITH_BNNECK": True,
    }
    cfg = qud_cfg(tmp_path, **person)
    model = build(cfg)
    assert model.qud_projector is not None
    step(model, batch())
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    deploy.write_deploy(
        tmp_path / "deploy", cfg, tmp_path / "model_final.pth", metrics={}, config_hash="", command=["train"]
    )
    state = torch.load(tmp_path / "deploy" / "model.pth", weights_only=True)["model"]
    plain = plain_of(model, cfg)
    assert list(state) == list(plain.state_dict())
    assert "QUD" not in (tmp_path / "deploy" / "config.yaml").read_text()
    network = deployed.load(tmp_path / "deploy").model
    torch.testing.assert_close(network(batch()), model.eval()(batch()))


def test_mgn_learns_its_eight_embeddings_in_the_order_of_evaluation(folder: Path, teacher: Any) -> None:
    overrides = {
        "QUD.BASE": "MGN",
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.BACKBONE.DEPTH": "50x",
        "MODEL.BACKBONE.FEAT_DIM": 2048,
        "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool",
        "MODEL.HEADS.EMBEDDING_DIM": 2,
        "MODEL.LOSSES.NAME": ("TripletLoss",),
        "INPUT.SIZE_TRAIN": [96, 32],
    }
    alone = build(qud_cfg(folder, **overrides))
    model = build(qud_cfg(folder, **overrides, **{"QUD.HOST_LOSSES": True}))
    classes = {name: value for name, value in alone.state_dict().items() if not value.numel()}
    alone.load_state_dict(model.state_dict() | classes)
    order = ["b1", "b2", "b3", "b21", "b22", "b31", "b32", "b33"]
    assert model._qud_pieces == [f"{part}_head.bottleneck" for part in order]
    assert model.qud_projector is None  # 8 times 2 numbers, as many as the teacher's
    losses = [step(network, batch(size=(96, 32)))["loss_qud"] for network in (alone, model)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    # Data-parallel training waits for all of them.
    assert all(parameter.grad is not None for parameter in alone.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"QUD.LOSS": "qsd"}, "QUD.LOSS: got 'qsd'; expected qud or mse or cosine or soft"),
        ({"QUD.MSE_REDUCTION": "sum"}, "QUD.MSE_REDUCTION: got 'sum'; expected mean or sum_dim"),
        ({"QUD.PROJECTOR": "mlp"}, "QUD.PROJECTOR: got 'mlp'; expected auto or none or linear"),
        ({"QUD.TEMPERATURE": 0.0}, "QUD.TEMPERATURE: got 0.0; expected a finite number above 0"),
        ({"QUD.SOFT_TEMPERATURE": -1.0}, "QUD.SOFT_TEMPERATURE: got -1.0"),
        ({"QUD.WEIGHT": -1.0}, "QUD.WEIGHT: got -1.0; expected a number >= 0"),
        ({"QUD.MASK_ABOVE": 1.5}, "QUD.MASK_ABOVE: got 1.5"),
        ({"QUD.MASK_ABOVE": 0.5, "QUD.LOSS": "mse"}, r"QUD.MASK_ABOVE: got 0.5; expected 1 .* with QUD.LOSS mse"),
        ({"QUD.QUEUE_SIZE": 7}, "QUD.QUEUE_SIZE: got 7; expected at least SOLVER.IMS_PER_BATCH 8"),
        ({"QUD.TEACHER.SOURCE": "onxx"}, "QUD.TEACHER.SOURCE: got 'onxx'.*Did you mean 'onnx'"),
        ({"QUD.TEACHER.COLOUR": "GBR"}, "colour order: got 'GBR'; expected RGB or BGR"),
        ({"QUD.TEACHER.DIM": -1}, "QUD.TEACHER.DIM: got -1"),
        ({"QUD.BASE": "Basline"}, "QUD.BASE: got 'Basline'.*Did you mean 'Baseline'"),
        ({"QUD.BASE": "QUD"}, "QUD.BASE: got 'QUD -> QUD'"),
        ({"QUD.BASE": "QSD"}, "QUD.BASE: got 'QSD'.*QSD goes on top: MODEL.META_ARCHITECTURE QSD with QSD.BASE QUD"),
        ({"QUD.BASE": "MoCo"}, "QUD.BASE: got 'MoCo'; expected Baseline with QUD.HOST_LOSSES False"),
        ({"MODEL.HEADS.NAME": "ClasHead"}, r"length of the embeddings.*\(0, 16\).*use EmbeddingHead"),
        (
            {"MODEL.META_ARCHITECTURE": "QSD", "QSD.BASE": "QUD", "QSD.EMA.ENABLED": True},
            "QSD.EMA.ENABLED: got True; expected False over QUD without the host's losses",
        ),
        (
            {
                "MODEL.META_ARCHITECTURE": "QSD",
                "QSD.BASE": "QUD",
                "QSD.PAIRING": "partner",
                "QSD.PARTNER_FORWARD": "joint",
            },
            "QSD.PARTNER_FORWARD: got 'joint'; expected separate over QUD",
        ),
    ],
)
def test_impossible_settings_are_refused_when_the_model_is_built(
    folder: Path, teacher: Any, overrides: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(qud_cfg(folder, **overrides))


def test_qsd_on_top_distils_its_levels_and_leaves_partners_out_of_the_queue(
    folder: Path, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "MODEL.META_ARCHITECTURE": "QSD",
        "QSD.BASE": "QUD",
        "QSD.PAIRING": "partner",
        "QUALITY.SOURCE": "embedding_norm",
    }
    model = build(qud_cfg(folder, **options))
    assert not any(":" in tap.name for tap in model._qsd_taps)
    shown: list[Tensor] = []
    model.qud_teacher.register_forward_hook(lambda module, inputs, output: shown.append(inputs[0]))
    partners = {"partner_images": batch(1)["images"], "partner_paths": [""] * ROWS, "partner_valid": torch.ones(ROWS)}
    got = step(model, {**batch(), **partners})
    assert set(got) == {"loss_qud", "loss_qsd"}
    torch.testing.assert_close(got["loss_qud"], step(build(qud_cfg(folder)), batch())["loss_qud"])
    assert [torch.equal(images, batch()["images"]) for images in shown] == [True]
    assert model.qud_queue.filled == ROWS
