"""QSDLoss beyond the recorded numbers: gradients, invariances, degenerate batches, precision, options, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from qsd_plugin.core.errors import ConfigError, LabelError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qsd import (
    QSDLoss,
    check_quality,
    energy_map,
    inbatch_pairs,
    map_levels,
    pair_gate,
    vector_levels,
    with_known_gradient,
)

WEIGHTS = {"stage": 1.0, "embedding": 0.7, "logits": 0.1}
SHAPES = {"stage": (5, 4, 3), "embedding": (6,), "logits": (4,)}
QUALITY_1 = torch.tensor([90.0, 20.0, 70.0, 15.0, 50.0, 40.0])
QUALITY_2 = torch.tensor([60.0, 55.0, 68.0, 75.0, 50.0, 80.0])  # pair 2 falls below the lower bound, pair 4 ties
KEPT = [0, 1, 3, 5]


def make_taps(
    name: str, batch: int = 6, dtype: torch.dtype = torch.float32, grad: bool = False
) -> dict[str, torch.Tensor]:
    return {
        level: torch.randn(batch, *shape, generator=torch_stream(0, name, level), dtype=dtype).requires_grad_(grad)
        for level, shape in SHAPES.items()
    }


def map_level(student, teacher, keep, **options):
    """One level of [B, H, W] maps on the graph of the students, and its range."""
    flat = student.flatten(1), teacher.flatten(1)
    values, gradients, ranges = map_levels(*flat, [flat[0].shape[1]], keep, keep.sum(), **options)
    return with_known_gradient(values, flat[0], gradients)[0], ranges[0]


def plain_map_level(student, teacher, distance="l2", attached=True):
    """The formula over kept maps only, by ordinary autograd."""
    teacher = teacher.detach()
    error = ((student - teacher) ** 2 if distance == "l2" else (student - teacher).abs()).mean()
    scale = student.max() - student.min()
    return 2 / (scale if attached else scale.detach()) * error


# --- gradients


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_gradcheck(distance):
    """The value depends on teachers too, on purpose without gradient; so only the students' rows are varied."""
    loss = QSDLoss(WEIGHTS, map_distance=distance)
    taps_1, taps_2 = make_taps("1", dtype=torch.float64), make_taps("2", dtype=torch.float64)
    taught_by_1 = QUALITY_1 > QUALITY_2

    def total(*students: torch.Tensor) -> torch.Tensor:
        streams: tuple[dict[str, torch.Tensor], ...] = ({}, {})
        for (name, first), student in zip(taps_1.items(), students, strict=True):
            rows = taught_by_1.view(-1, *[1] * (student.dim() - 1))
            streams[0][name] = torch.where(rows, first, student)
            streams[1][name] = torch.where(rows, student, taps_2[name])
        return loss(*streams, QUALITY_1, QUALITY_2).total

    students = [torch.randn_like(tap).requires_grad_() for tap in taps_1.values()]
    assert torch.autograd.gradcheck(total, students)


@pytest.mark.parametrize("scale_grad", ["attached", "detached"])
def test_map_gradient_is_the_written_formula(scale_grad):
    generator = torch_stream(1)
    student = torch.rand(6, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.rand(6, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    keep = torch.zeros(6, dtype=torch.bool)
    keep[KEPT] = True
    level, scale = map_level(student, teacher, keep, scale_grad=scale_grad)
    level.backward()

    s, t = student.detach()[KEPT], teacher.detach()[KEPT]
    error, span = ((s - t) ** 2).mean(), s.max() - s.min()
    expected = 4 / (span * s.numel()) * (s - t)
    if scale_grad == "attached":
        expected -= 2 * error / span**2 * ((s == s.max()).double() - (s == s.min()).double())
    torch.testing.assert_close(student.grad[KEPT], expected, rtol=1e-12, atol=1e-15)
    assert not student.grad[[2, 4]].any()
    assert teacher.grad is None
    assert scale.item() == pytest.approx(span.item(), rel=1e-12)
    assert level.item() == pytest.approx((2 / span * error).item(), rel=1e-12)


def test_no_scale_gradient_below_the_smallest_range():
    """There R is a constant, and the written second term would be 1e16 times the first."""
    student = torch.ones(2, 4, 3, dtype=torch.float64)
    student[0, 0, 0] += 1e-14
    teacher = torch.zeros_like(student)
    keep = torch.ones(2, dtype=torch.bool)
    gradients = []
    for scale_grad in ("attached", "detached"):
        ours = student.clone().requires_grad_()
        map_level(ours, teacher, keep, scale_grad=scale_grad)[0].backward()
        gradients.append(ours.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_equal_extremes_share_the_scale_gradient(distance):
    student = torch.rand(3, 4, 4, generator=torch_stream(2), dtype=torch.float64)
    student[0, 0, 0] = student[2, 1, 1] = 2.0
    student[1, :2, 0] = -1.0
    teacher = torch.rand(3, 4, 4, generator=torch_stream(3), dtype=torch.float64)
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    keep = torch.ones(3, dtype=torch.bool)
    map_level(ours, teacher, keep, distance=distance)[0].backward()
    plain_map_level(plain, teacher, distance).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("distance", "scale_grad"), [("l2", "attached"), ("l1", "attached"), ("l2", "detached")])
def test_equals_the_plain_formula_over_selected_rows(distance, scale_grad):
    ours = [make_taps(name, dtype=torch.float64, grad=True) for name in "12"]
    plain = [make_taps(name, dtype=torch.float64, grad=True) for name in "12"]
    QSDLoss(WEIGHTS, map_distance=distance, scale_grad=scale_grad)(*ours, QUALITY_1, QUALITY_2).total.backward()

    def rows(level: str, indices: list[int], flip: bool) -> torch.Tensor:
        return torch.stack([plain[(QUALITY_1[i] > QUALITY_2[i]).item() ^ flip][level][i] for i in indices])

    students = {level: rows(level, KEPT, False) for level in SHAPES}
    teachers = {level: rows(level, KEPT, True).detach() for level in SHAPES}
    total = WEIGHTS["stage"] * plain_map_level(
        (students["stage"] ** 2).mean(1), (teachers["stage"] ** 2).mean(1), distance, scale_grad == "attached"
    )
    for level in ("embedding", "logits"):
        total = (
            total + WEIGHTS[level] * (1 - (F.normalize(students[level]) * F.normalize(teachers[level])).sum(1)).mean()
        )
    total.backward()
    for mine, theirs in zip(ours, plain, strict=True):
        for level in SHAPES:
            torch.testing.assert_close(mine[level].grad, theirs[level].grad, rtol=1e-9, atol=1e-12)


def test_vector_gradient_is_that_of_the_cosine_and_of_the_floored_length_below():
    """Two levels side by side; of the second's students one is zero and one shorter than the smallest length."""
    student = torch.randn(4, 5, generator=torch_stream(5), dtype=torch.float64)
    student[0, 3:], student[1, 3:] = 0.0, torch.tensor([3e-7, 4e-7])
    student.requires_grad_()
    teacher = torch.randn(4, 5, generator=torch_stream(6), dtype=torch.float64)
    keep = torch.tensor([True, True, True, False])
    values, gradients = vector_levels(student.detach(), teacher, [3, 2], keep, keep.sum())
    for columns, value, gradient in zip((slice(3), slice(3, 5)), values, gradients, strict=True):
        s, t = student[:3, columns], F.normalize(teacher[:3, columns])
        length = s.norm(dim=1)
        floored = torch.where(length > 1e-6, length, 1e-6)
        plain = (1 - (s * t).sum(1) / floored).mean()
        (expected,) = torch.autograd.grad(plain, student)
        torch.testing.assert_close(value, plain.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected[:, columns], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale_grad", ["attached", "detached"])
def test_maps_of_different_sizes_side_by_side_equal_each_alone(scale_grad):
    student, teacher = (torch.rand(6, 16, generator=torch_stream(seed), dtype=torch.float64) for seed in (7, 8))
    keep = torch.zeros(6, dtype=torch.bool)
    keep[KEPT] = True
    together = map_levels(student, teacher, [12, 4], keep, keep.sum(), scale_grad=scale_grad)
    for level, (columns, size) in enumerate(((slice(12), 12), (slice(12, 16), 4))):
        parts = student[:, columns], teacher[:, columns]
        alone = map_levels(*parts, [size], keep, keep.sum(), scale_grad=scale_grad)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[level], expected[0], rtol=1e-12, atol=0)


def test_each_level_has_its_own_gradient():
    """Of levels side by side only the one that is asked for moves, and by what is asked."""
    loss, labels = QSDLoss(WEIGHTS), (QUALITY_1, QUALITY_2)
    taps = [make_taps(name, dtype=torch.float64, grad=True) for name in "12"]
    everything = loss(*taps, *labels)
    for name in SHAPES:
        rows = [each[level] for each in taps for level in SHAPES]
        got = torch.autograd.grad(3 * everything.levels[name], rows, retain_graph=True)
        alone = [{name: each[name]} for each in taps]
        expected = iter(torch.autograd.grad(3 * QSDLoss({name: 1.0})(*alone, *labels).total, [x[name] for x in alone]))
        for gradient, level in zip(got, [*SHAPES, *SHAPES], strict=True):
            wanted = next(expected) if level == name else torch.zeros_like(gradient)
            torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=0)


def test_a_second_derivative_is_refused():
    """The gradient is known as a number; going through it again would give a part of the derivative only."""
    taps = make_taps("1", grad=True)
    total = QSDLoss(WEIGHTS)(taps, make_taps("2"), QUALITY_1, QUALITY_2).total
    (gradient,) = torch.autograd.grad(total.square(), taps["embedding"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_order_of_the_levels_is_that_of_the_weights_and_roles_may_mix():
    taps = make_taps("1"), make_taps("2")
    mixed = {name: WEIGHTS[name] for name in ("logits", "stage", "embedding")}
    result, usual = (QSDLoss(weights)(*taps, QUALITY_1, QUALITY_2) for weights in (mixed, WEIGHTS))
    assert list(result.levels) == list(mixed)
    assert all(torch.equal(result.levels[name], usual.levels[name]) for name in WEIGHTS)
    torch.testing.assert_close(result.total, sum(w * usual.levels[name] for name, w in WEIGHTS.items()))


# --- invariances


def test_swapping_the_streams_changes_nothing():
    loss, taps_1, taps_2 = QSDLoss(WEIGHTS), make_taps("1"), make_taps("2")
    forward = loss(taps_1, taps_2, QUALITY_1, QUALITY_2)
    backward = loss(taps_2, taps_1, QUALITY_2, QUALITY_1)
    torch.testing.assert_close(backward.total, forward.total, rtol=1e-6, atol=0)
    assert forward.stats["teacher_share_1"] + backward.stats["teacher_share_1"] == 1


def test_permuting_the_pairs_changes_nothing():
    loss, taps_1, taps_2 = QSDLoss(WEIGHTS), make_taps("1"), make_taps("2")
    order = torch.randperm(6, generator=torch_stream(4))
    permuted = [{level: tap[order] for level, tap in taps.items()} for taps in (taps_1, taps_2)]
    expected = loss(taps_1, taps_2, QUALITY_1, QUALITY_2).total
    torch.testing.assert_close(loss(*permuted, QUALITY_1[order], QUALITY_2[order]).total, expected, rtol=1e-6, atol=0)


def test_shifting_the_labels_changes_nothing():
    loss, taps_1, taps_2 = QSDLoss(WEIGHTS), make_taps("1"), make_taps("2")
    expected = loss(taps_1, taps_2, QUALITY_1, QUALITY_2).total
    assert torch.equal(loss(taps_1, taps_2, QUALITY_1 + 8, QUALITY_2 + 8).total, expected)


def test_tied_pairs_change_only_the_mean_gap():
    loss = QSDLoss(WEIGHTS)
    longer = [make_taps(name, batch=8) for name in "12"]
    shorter = [{level: tap[:6] for level, tap in taps.items()} for taps in longer]
    tied = torch.tensor([30.0, 30.0])
    expected = loss(*shorter, QUALITY_1, QUALITY_2)
    result = loss(*longer, torch.cat([QUALITY_1, tied]), torch.cat([QUALITY_2, tied]))
    torch.testing.assert_close(result.stats["mean_gap"], expected.stats["mean_gap"] * 6 / 8)
    assert result.stats["kept"] == expected.stats["kept"] == 4
    torch.testing.assert_close(result.total, expected.total, rtol=1e-6, atol=0)


def test_unit_length_maps_make_the_map_level_scale_free():
    taps_1, taps_2 = make_taps("1"), make_taps("2")
    scaled = {**taps_1, "stage": 3 * taps_1["stage"]}, {**taps_2, "stage": 3 * taps_2["stage"]}
    for norm, factor in ((None, 9.0), ("l2", 1.0)):
        loss = QSDLoss(WEIGHTS, map_norm=norm)
        before, after = loss(taps_1, taps_2, QUALITY_1, QUALITY_2), loss(*scaled, QUALITY_1, QUALITY_2)
        torch.testing.assert_close(after.levels["stage"], factor * before.levels["stage"])
    energy = energy_map(taps_1["stage"], "l2")
    torch.testing.assert_close(energy.flatten(1).norm(dim=1), torch.ones(6))


# --- degenerate batches


def test_a_single_pair_is_its_own_mean():
    taps_1, taps_2 = make_taps("1", batch=1), make_taps("2", batch=1)
    for low, high, kept in ((0.0, 100.0, 1), (49.0, 50.0, 1), (50.0, 50.0, 0)):
        result = QSDLoss(WEIGHTS)(taps_1, taps_2, torch.tensor([low]), torch.tensor([high]))
        assert result.stats["kept"] == kept
        assert (result.total != 0) == bool(kept)


def test_no_kept_pair_gives_exactly_zero_gradients_even_for_degenerate_taps():
    taps_1, taps_2 = make_taps("1", grad=True), make_taps("2")
    taps_2 = {level: torch.zeros_like(tap).requires_grad_() for level, tap in taps_2.items()}
    result = QSDLoss(WEIGHTS)(taps_1, taps_2, QUALITY_1, QUALITY_1)
    result.total.backward()
    assert result.total.item() == 0
    for tap in (*taps_1.values(), *taps_2.values()):
        assert torch.equal(tap.grad, torch.zeros_like(tap))


@pytest.mark.parametrize("scale_grad", ["attached", "detached"])
@pytest.mark.parametrize(("student", "teacher"), [(3.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_constant_maps_stay_finite(student, teacher, scale_grad):
    taps_1 = {"stage": torch.full((2, 5, 4, 3), student, requires_grad=True)}
    taps_2 = {"stage": torch.full((2, 5, 4, 3), teacher, requires_grad=True)}
    labels = torch.tensor([10.0, 20.0]), torch.tensor([60.0, 80.0])
    result = QSDLoss({"stage": 1.0}, scale_grad=scale_grad)(taps_1, taps_2, *labels)
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(taps_1["stage"].grad).all()
    assert result.stats["range/stage"].item() == 0
    energies = student**2, teacher**2
    if any(energies):  # E = (difference of energies)^2 over the smallest range that is allowed
        expected = 2 * (energies[0] - energies[1]) ** 2 / (1e-12 * max(energies))
        assert result.total.item() == pytest.approx(expected, rel=1e-5)
        slope = (
            4 * (energies[0] - energies[1]) / (1e-12 * max(energies)) / 24 * 2 * student / 5
        )  # 24 pixels, 5 channels
        torch.testing.assert_close(taps_1["stage"].grad, torch.full((2, 5, 4, 3), slope), rtol=1e-5, atol=0)


# --- precision and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_taps_under_autocast_equal_float32(dtype):
    taps = [{level: tap.to(dtype) for level, tap in make_taps(name).items()} for name in "12"]
    expected = QSDLoss(WEIGHTS)(*[{k: v.float() for k, v in t.items()} for t in taps], QUALITY_1, QUALITY_2)
    with torch.autocast("cpu", dtype=dtype):
        result = QSDLoss(WEIGHTS)(*taps, QUALITY_1, QUALITY_2)
    assert result.total.dtype == torch.float32
    assert torch.equal(result.total, expected.total)


def test_squares_beyond_the_range_of_float16():
    stage = torch.full((2, 4, 2, 2), 300.0, dtype=torch.float16)
    assert torch.isinf(stage.square()).all()
    stage[0, 0, 0, 0] = 0
    stage.requires_grad_()
    labels = torch.tensor([10.0, 20.0]), torch.tensor([60.0, 80.0])
    result = QSDLoss({"stage": 1.0})({"stage": stage}, {"stage": torch.zeros_like(stage)}, *labels)
    result.total.backward()
    # Energies are 9e4 except one pixel with three quarters of it: E = 9e4^2 (7 + 9/16) / 8 and R = 9e4 / 4.
    assert result.total.item() == pytest.approx(8 * 9e4 * (7 + 9 / 16) / 8, rel=1e-6)
    assert torch.isfinite(stage.grad).all()


@pytest.mark.parametrize("missing", ["exclude", "tie"])
def test_nothing_waits_for_the_device(missing):
    """Fake tensors have no data: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        taps = [{level: torch.randn(8, *shape, requires_grad=True) for level, shape in SHAPES.items()} for _ in "12"]
        quality = torch.rand(8), torch.rand(8)
        valid = torch.ones(8, dtype=torch.bool)
        loss = QSDLoss(WEIGHTS, missing=missing, compat_empty_test=True)
        loss(*taps, *quality, valid, valid).total.backward()
        index = torch.zeros(12, dtype=torch.int64)
        loss.in_batch(taps[0], quality[0], (index, index), valid).total.backward()


# --- labels


def test_stats_account_for_every_pair():
    q1 = torch.tensor([99.0, 30.0, 20.0, 50.0, 10.0, float("nan"), 40.0])
    q2 = torch.tensor([1.0, 31.0, 60.0, 50.0, 50.0, 10.0, 80.0])
    valid = torch.tensor([True, True, True, True, True, True, False])
    taps_1, taps_2 = make_taps("1", batch=7), make_taps("2", batch=7)
    stats = QSDLoss(WEIGHTS)(taps_1, taps_2, q1, q2, valid, None).stats
    counts = {
        name: stats[name].item() for name in ("pairs", "kept", "ties", "unlabelled", "dropped_low", "dropped_high")
    }
    assert counts == {"pairs": 7, "kept": 2, "ties": 1, "unlabelled": 2, "dropped_low": 1, "dropped_high": 1}
    assert stats["mean_gap"].item() == pytest.approx((98 + 1 + 40 + 0 + 40) / 5)
    assert stats["teacher_share_1"].item() == 0
    students = (taps_1["stage"][[2, 4]] ** 2).mean(1)
    assert stats["range/stage"].item() == pytest.approx((students.max() - students.min()).item(), rel=1e-6)
    assert not any(stat.requires_grad for stat in stats.values())


def test_missing_labels_are_ties_or_not_there():
    valid = torch.tensor([True, True, False])
    q1, q2 = torch.tensor([10.0, 20.0, 0.0]), torch.tensor([40.0, 80.0, 100.0])
    exclude = pair_gate(q1, q2, valid, missing="exclude")
    tie = pair_gate(q1, q2, valid, missing="tie")
    assert exclude.mean_gap.item() == pytest.approx(45.0)
    assert tie.mean_gap.item() == pytest.approx(30.0)
    assert exclude.keep.tolist() == tie.keep.tolist() == [True, True, False]
    fifty = torch.tensor([40.0, 80.0, 50.0]), torch.tensor([10.0, 20.0, 50.0])  # what the authors' loader does
    assert pair_gate(*fifty).mean_gap == tie.mean_gap


def test_the_callers_labels_are_left_alone():
    q1, q2 = QUALITY_1.clone(), QUALITY_2.clone()
    QSDLoss(WEIGHTS)(make_taps("1"), make_taps("2"), q1, q2)
    assert torch.equal(q1, QUALITY_1)
    assert torch.equal(q2, QUALITY_2)


def test_label_range_scales_with_q_max():
    taps = make_taps("1"), make_taps("2")
    hundred = QSDLoss(WEIGHTS)(*taps, QUALITY_1, QUALITY_2)
    one = QSDLoss(WEIGHTS, q_max=1.0)(*taps, QUALITY_1 / 100, QUALITY_2 / 100)
    assert torch.equal(one.total, hundred.total)


def test_check_quality():
    check_quality(torch.tensor([0.0, 55.5, 100.0]))
    check_quality(torch.tensor([50.0, -1.0]), valid=torch.tensor([True, False]))
    with pytest.raises(LabelError, match=r"2 of 3 out of range, e\.g\. nan, 120; expected finite values in \[0, 100\]"):
        check_quality(torch.tensor([50.0, float("nan"), 120.0]))


# --- in-batch pairs


def test_in_batch_equals_forward_on_gathered_rows():
    identities = torch.tensor([0, 0, 0, 1, 1, 1])
    valid = torch.tensor([True, True, True, True, True, False])
    pairs = inbatch_pairs(identities, QUALITY_1)
    gathered, single = make_taps("1", grad=True), make_taps("1", grad=True)
    loss = QSDLoss(WEIGHTS, missing="tie")
    streams = [{level: tap[index] for level, tap in gathered.items()} for index in pairs]
    labels = [QUALITY_1[index] for index in pairs]
    expected = loss(*streams, *labels, *[valid[index] for index in pairs])
    result = loss.in_batch(single, QUALITY_1, pairs, valid)
    expected.total.backward()
    result.total.backward()
    assert expected.stats["kept"] == 4
    assert torch.equal(result.total, expected.total)
    for level in SHAPES:
        torch.testing.assert_close(single[level].grad, gathered[level].grad)


def test_a_batch_without_pairs_is_a_zero_on_the_graph():
    taps, nothing = make_taps("1", grad=True), torch.empty(0, dtype=torch.int64)
    result = QSDLoss(WEIGHTS).in_batch(taps, QUALITY_1, (nothing, nothing))
    result.total.backward()
    assert result.total.item() == 0
    assert result.stats["pairs"].item() == 0
    assert all(torch.equal(tap.grad, torch.zeros_like(tap)) for tap in taps.values())


# --- the module


def test_it_has_no_state_and_prints_its_options():
    loss = QSDLoss(WEIGHTS)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert "tau=0.3" in repr(loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map_distance": "L2"}, r"map_distance: got 'L2'; expected one of 'l2', 'l1'\. Did you mean 'l2'"),
        ({"scale_grad": "atached"}, "Did you mean 'attached'"),
        ({"missing": "skip"}, "missing: got 'skip'; expected one of 'exclude', 'tie'"),
        ({"map_norm": "l1"}, "map_norm: got 'l1'; expected one of 'l2'"),
        ({"tau": 1.0}, r"tau: got 1\.0; expected a number in \[0, 1\)"),
        ({"tau": float("nan")}, "tau: got nan"),
        ({"q_max": 0.0}, r"q_max: got 0\.0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        QSDLoss(WEIGHTS, **options)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "at least one level"),
        ({"stage": -1.0}, r"weight of level 'stage': got -1\.0; expected a finite number >= 0"),
        ({"stage": float("inf")}, "got inf"),
    ],
)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ConfigError, match=message):
        QSDLoss(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": None}, "level 'stage' has no tap.*tap its last block"),
        ({"embeding": torch.zeros(6, 2)}, "without a level: got 'embeding'. Did you mean 'embedding'"),
        ({"stage": torch.zeros(6, 13, 5)}, r"got \(6, 13, 5\); expected \[6, C, H, W\] or \[6, D\].*tokens_to_map"),
        ({"embedding": torch.zeros(5, 6)}, r"got \(5, 6\); expected \[6, C"),
        ({"embedding": torch.zeros(6, 7)}, r"'embedding': got \(\(6, 7\), \(6, 6\)\); expected the same shape"),
    ],
)
def test_taps_that_do_not_fit_are_named(change, message):
    taps_1 = {name: tap for name, tap in {**make_taps("1"), **change}.items() if tap is not None}
    with pytest.raises(ConfigError, match=message):
        QSDLoss(WEIGHTS)(taps_1, make_taps("2"), QUALITY_1, QUALITY_2)


def test_labels_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"got \[\(6,\), \(5,\)\]; expected one vector of length B each"):
        QSDLoss(WEIGHTS)(make_taps("1"), make_taps("2"), QUALITY_1, QUALITY_2[:5])
