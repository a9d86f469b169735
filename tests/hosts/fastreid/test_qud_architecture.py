"""QUD inside fast-reid: what a step computes, what it reads and what it leaves alone."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qud_toy import ROWS, batch, build, plain_of, qud_cfg, sgd, step, train, write_teacher
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from qsd_plugin.core.errors import CheckpointError, ConfigError, DataError
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


def teacher_embedding(teacher: Any, images: Tensor) -> Tensor:
    """By the host's own evaluation of the teacher."""
    size = [48, 48]
    shown = resize(images, size, InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    with torch.no_grad():
        return F.normalize(teacher({"images": shown}))


def student_embedding(plain: Any, images: Tensor) -> Tensor:
    """Layer by layer, as in a training step of the host."""
    pooled = plain.heads.pool_layer(plain.backbone((images - plain.pixel_mean) / plain.pixel_std))
    return plain.heads.bottleneck(pooled)[..., 0, 0]


def logits(student: Tensor, teacher: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines with the row's own teacher embedding in front of those with the queue: the student's, the teacher's."""
    cosines = [torch.cat([(rows * teacher).sum(1, keepdim=True), rows @ queue.T], 1) for rows in (student, teacher)]
    return cosines[0], cosines[1]


def qud(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    return F.cross_entropy(logits(student, teacher, queue)[0] / 0.1, torch.zeros(len(student), dtype=torch.int64))


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


def test_teacher_stays_as_it_is_and_is_in_no_checkpoint(folder: Path, teacher: Any) -> None:
    model = build(qud_cfg(folder))
    before = {name: value.clone() for name, value in model.qud_teacher.network.state_dict().items()}
    for name, value in teacher.state_dict().items():
        assert name == "heads.weight" or torch.equal(before[name], value)
    model.train()
    train(model, sgd(model), [batch(index) for index in range(3)])
    assert all(torch.equal(before[name], value) for name, value in model.qud_teacher.network.state_dict().items())
    assert not any(module.training for module in model.qud_teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.qud_teacher.parameters())
    state = model.state_dict()
    queue = ["qud_queue.features", "qud_queue.filled", "qud_queue.pointer"]
    assert list(state) == [*plain_of(model, qud_cfg(folder)).state_dict(), *queue]
    assert list(build(qud_cfg(folder), seed=1).load_state_dict(state).missing_keys) == []  # strict
    assert next(model.qud_teacher.parameters()).dtype == torch.float32
    assert next(model.half().qud_teacher.parameters()).dtype == torch.float16  # moved with the model all the same


def test_building_the_teacher_draws_nothing_from_the_global_stream(folder: Path, teacher: Any) -> None:
    cfg = qud_cfg(folder)
    build(cfg)
    after = torch.rand(1)
    build(qud_cfg(folder, **{"QUD.TEACHER.SOURCE": "cache"}))
    assert torch.equal(after, torch.rand(1))


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
        "QUD.HOST_LOSSES": True,
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.BACKBONE.DEPTH": "50x",
        "MODEL.BACKBONE.FEAT_DIM": 2048,
        "MODEL.HEADS.POOL_LAYER": "GlobalAvgPool",
        "MODEL.HEADS.EMBEDDING_DIM": 2,
        "MODEL.LOSSES.NAME": ("TripletLoss",),
        "INPUT.SIZE_TRAIN": [96, 32],
    }
    model = build(qud_cfg(folder, **overrides))
    order = ["b1", "b2", "b3", "b21", "b22", "b31", "b32", "b33"]
    assert model._qud_pieces == [f"{part}_head.bottleneck" for part in order]
    assert model.qud_projector is None  # 8 times 2 numbers, as many as the teacher's


def write_onnx(path: Path, size: Any) -> Tensor:
    """A model that averages a convolution over the image; its kernel [16, 3, 3, 3]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kernel = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(4))
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, *size])]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 16, 1, 1])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [numpy_helper.from_array(kernel.numpy(), "kernel")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return kernel


def test_onnx_teacher_gets_its_size_colours_and_normalisation(folder: Path, tmp_path: Path) -> None:
    kernel = write_onnx(tmp_path / "teacher.onnx", (20, 20))
    options = {
        "QUD.TEACHER.SOURCE": "onnx",
        "QUD.TEACHER.ONNX": str(tmp_path / "teacher.onnx"),
        "QUD.TEACHER.MEAN": [120.0, 110.0, 100.0],
        "QUD.TEACHER.STD": [60.0, 50.0, 40.0],
        "QUD.TEACHER.COLOUR": "BGR",
        "KD.MODEL_CONFIG": [],
        "KD.MODEL_WEIGHTS": [],
    }
    cfg = qud_cfg(folder, **options)
    model = build(cfg)
    plain = plain_of(model, cfg)
    start = model.qud_queue.features.clone()
    loss = step(model, batch())["loss_qud"]
    shown = resize(batch()["images"], [20, 20], InterpolationMode.BICUBIC, antialias=True).clamp(0, 255).flip(1)
    mean, std = torch.tensor(options["QUD.TEACHER.MEAN"]), torch.tensor(options["QUD.TEACHER.STD"])
    maps = F.conv2d((shown - mean.view(3, 1, 1)) / std.view(3, 1, 1), kernel)
    student = F.normalize(student_embedding(plain, batch()["images"]))
    torch.testing.assert_close(loss, qud(student, F.normalize(maps.mean(dim=(2, 3))), start), rtol=1e-4, atol=1e-5)

    with pytest.raises(ConfigError, match=r"teacher\.onnx: image size \(H, W\): got \(112, 112\).*model's \(20, 20\)"):
        build(qud_cfg(folder, **options, **{"QUD.TEACHER.SIZE": [112, 112]}))
    with pytest.raises(ConfigError, match=r"QUD.TEACHER.SIZE: got \[112\]"):
        build(qud_cfg(folder, **options, **{"QUD.TEACHER.SIZE": [112]}))
    with pytest.raises(CheckpointError, match=r"ONNX model: got '.*gone\.onnx'; expected an existing file"):
        build(qud_cfg(folder, **{**options, "QUD.TEACHER.ONNX": str(tmp_path / "gone.onnx")}))
    with pytest.raises(ConfigError, match=r"QUD.TEACHER.ONNX is empty"):
        build(qud_cfg(folder, **{**options, "QUD.TEACHER.ONNX": ""}))


def test_cached_embeddings_train_as_the_live_teacher_does(folder: Path, teacher: Any) -> None:
    live = build(qud_cfg(folder))
    expected = train(live, sgd(live), [batch(index) for index in range(3)])
    cached = {"QUD.TEACHER.SOURCE": "cache", "KD.MODEL_CONFIG": [], "KD.MODEL_WEIGHTS": []}
    curves = {}
    for dtype in (torch.float32, torch.float16):
        batches = [batch(index) for index in range(3)]
        for inputs in batches:
            inputs["teacher_features"] = live.qud_teacher(inputs["images"]).to(dtype)
        model = build(qud_cfg(folder, **cached))
        assert model.qud_teacher is None
        assert list(model.state_dict()) == list(live.state_dict())
        curves[dtype] = train(model, sgd(model), batches)
    assert curves[torch.float32] == expected
    assert curves[torch.float16][0] == pytest.approx(expected[0], abs=2e-3)

    with pytest.raises(DataError, match=r"without the teacher's embeddings.*expected the key teacher_features"):
        step(model, batch())
    with pytest.raises(DataError, match=r"teacher_features: got \(8, 5\); expected \(8, 16\).*QUD.TEACHER.DIM"):
        step(model, {**batch(), "teacher_features": torch.ones(8, 5)})
    longer = build(qud_cfg(folder, **cached, **{"QUD.TEACHER.DIM": 5}))
    assert longer.qud_projector.weight.shape == (5, 16)
    assert step(longer, {**batch(), "teacher_features": torch.rand(8, 5)})["loss_qud"] > 0


def test_checkpoints_of_trainings_serve_as_teachers(folder: Path, teacher: Any, tmp_path: Path) -> None:
    """With what else they hold, from data-parallel training, and without a classifier; and the config of a QSD."""
    expected = step(build(qud_cfg(folder)), batch())["loss_qud"]
    write_teacher(tmp_path, extra={"center_loss.centers": torch.ones(7, 16)}, **{"MODEL.META_ARCHITECTURE": "Baseline"})
    config = (tmp_path / "teacher.yaml").read_text()
    (tmp_path / "teacher.yaml").write_text(config.replace("META_ARCHITECTURE: Baseline", "META_ARCHITECTURE: QSD"))
    assert torch.equal(step(build(qud_cfg(tmp_path)), batch())["loss_qud"], expected)
    weights = {f"module.{name}": value for name, value in teacher.state_dict().items() if name != "heads.weight"}
    torch.save(weights, tmp_path / "teacher.pth")
    assert torch.equal(step(build(qud_cfg(tmp_path)), batch())["loss_qud"], expected)


def test_a_teacher_that_is_not_there_or_not_itself_is_refused(folder: Path, teacher: Any, tmp_path: Path) -> None:
    write_teacher(tmp_path)
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)["model"]

    def refusal(kind: type[Exception], **overrides: Any) -> str:
        with pytest.raises(kind) as caught:
            build(qud_cfg(tmp_path, **overrides))
        return str(caught.value)

    text = refusal(ConfigError, **{"KD.MODEL_WEIGHTS": []})
    assert re.search(r"KD.MODEL_WEIGHTS is empty; expected the checkpoint of the teacher .*teacher\.yaml", text)
    assert "--stage teacher" not in text
    assert "--stage teacher" in refusal(ConfigError, **{"KD.MODEL_WEIGHTS": [], "RECIPE.NAME": "qud"})
    assert re.search(r"KD.MODEL_CONFIG is empty.*QUD.TEACHER.SOURCE", refusal(ConfigError, **{"KD.MODEL_CONFIG": []}))
    assert "KD.MODEL_CONFIG: got 'gone.yaml'" in refusal(ConfigError, **{"KD.MODEL_CONFIG": ["gone.yaml"]})
    misspelt = {"KD.MODEL_WEIGHTS": [str(tmp_path / "teachr.pth")]}
    assert "Did you mean 'teacher.pth'" in refusal(CheckpointError, **misspelt)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "teacher.pth").read_bytes()[:5000])
    assert "cannot be read" in refusal(CheckpointError, **{"KD.MODEL_WEIGHTS": [str(tmp_path / "cut.pth")]})

    partial = {name: value for name, value in weights.items() if not name.startswith("backbone.layer4")}
    torch.save(partial, tmp_path / "teacher.pth")
    text = refusal(CheckpointError)
    assert re.search(r"teacher\.pth is not of the network in KD.MODEL_CONFIG .*teacher\.yaml: got '\d+ missing", text)
    write_teacher(tmp_path, **{"MODEL.BACKBONE.DEPTH": "34x"})
    config = (tmp_path / "teacher.yaml").read_text().replace("DEPTH: 34x", "DEPTH: 18x")
    (tmp_path / "teacher.yaml").write_text(config)
    assert re.search(r"is not of the network.*\d+ left over \(backbone\.layer1\.2", refusal(CheckpointError))


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
