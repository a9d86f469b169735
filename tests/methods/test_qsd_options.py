"""QSDLoss's options beside the authors' settings: gap weights, confidence, normalised maps, teachers of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qsd import QSDLoss, energy_map, gap_weights, inbatch_pairs, level_weights, pair_gate, preset

SHAPES = {"stage": (5, 4, 3), "embedding": (6,)}
WEIGHTS = {"stage": 1.0, "embedding": 0.7}
QUALITY_1 = torch.tensor([90.0, 20.0, 70.0, 15.0, 50.0, 40.0])
QUALITY_2 = torch.tensor([60.0, 55.0, 68.0, 75.0, 50.0, 80.0])  # pair 2 falls below the lower bound, pair 4 ties
KEPT = [0, 1, 3, 5]
GAPS = torch.tensor([30.0, 35.0, 60.0, 40.0], dtype=torch.float64)  # of the kept pairs


def make_taps(name: str, dtype: torch.dtype = torch.float64, grad: bool = False) -> dict[str, torch.Tensor]:
    return {
        level: torch.randn(6, *shape, generator=torch_stream(0, name, level), dtype=dtype).requires_grad_(grad)
        for level, shape in SHAPES.items()
    }


def student_and_teacher(first: dict, second: dict, level: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the kept pairs, one by one."""
    rows = [(first[level][i], second[level][i]) for i in KEPT]
    pairs = [(b, a) if QUALITY_1[i] > QUALITY_2[i] else (a, b) for i, (a, b) in zip(KEPT, rows, strict=True)]
    return torch.stack([student for student, _ in pairs]), torch.stack([teacher for _, teacher in pairs]).detach()


# --- gap weights


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_gap_weights_follow_the_formula(power):
    gate = pair_gate(QUALITY_1, QUALITY_2)
    weights = gap_weights(gate, gate.keep.sum(), power)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[KEPT] = GAPS**power / (GAPS**power).mean()
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_gap_weights_without_a_kept_pair_are_zero():
    gate = pair_gate(QUALITY_1, QUALITY_1)
    assert gap_weights(gate, gate.keep.sum(), 2.0).tolist() == [0.0] * 6


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("scale_grad", ["attached", "detached"])
def test_weighted_levels_equal_the_plain_formula(distance, scale_grad):
    ours, plain = [[make_taps(name, grad=True) for name in "12"] for _ in range(2)]
    loss = QSDLoss(WEIGHTS, map_distance=distance, scale_grad=scale_grad, gap_power=2.0)
    result = loss(*ours, QUALITY_1, QUALITY_2)
    result.total.backward()

    weight = GAPS**2 / (GAPS**2).mean()
    student, teacher = student_and_teacher(*plain, "stage")
    student, teacher = student.square().mean(1), teacher.square().mean(1)
    error = (student - teacher).square() if distance == "l2" else (student - teacher).abs()
    span = student.max() - student.min()
    stage = 2 / (span if scale_grad == "attached" else span.detach()) * (weight[:, None, None] * error).mean()
    student, teacher = student_and_teacher(*plain, "embedding")
    embedding = (weight * (1 - F.cosine_similarity(student, teacher))).mean()
    (WEIGHTS["stage"] * stage + WEIGHTS["embedding"] * embedding).backward()

    torch.testing.assert_close(result.levels["stage"], stage, rtol=1e-10, atol=0)
    torch.testing.assert_close(result.levels["embedding"], embedding, rtol=1e-10, atol=0)
    for mine, theirs in zip(ours, plain, strict=True):
        for level in SHAPES:
            torch.testing.assert_close(mine[level].grad, theirs[level].grad, rtol=1e-9, atol=1e-12)


def test_equal_gaps_weigh_as_without_weights():
    labels = torch.tensor([10.0, 20.0, 30.0, 90.0, 80.0, 70.0]), torch.tensor([40.0, 50.0, 60.0, 60.0, 50.0, 40.0])
    taps = make_taps("1"), make_taps("2")
    plain = QSDLoss(WEIGHTS)(*taps, *labels)
    assert plain.stats["kept"] == 6
    torch.testing.assert_close(QSDLoss(WEIGHTS, gap_power=3.0)(*taps, *labels).total, plain.total, rtol=1e-12, atol=0)


# --- confidence


def test_pairs_within_the_spread_of_their_labels_are_dropped():
    nan = float("nan")
    spread_1 = torch.tensor([18.0, 0.0, 99.0, nan, 99.0, 20.0])
    spread_2 = torch.tensor([24.0, 10.0, 99.0, 50.0, 99.0, 0.0])
    # Pair 0: sqrt(18^2 + 24^2) = 30 is its gap, not below 1 x 30; pair 3 is unknown; 2 and 4 are dropped anyway.
    for confidence, kept, unsure in ((1.0, [0, 1, 3, 5], 0), (1.01, [1, 3, 5], 1), (2.5, [1, 3], 2), (3.6, [3], 3)):
        gate = pair_gate(QUALITY_1, QUALITY_2, spread_1=spread_1, spread_2=spread_2, confidence=confidence)
        assert torch.nonzero(gate.keep).flatten().tolist() == kept
        counts = {name: count.item() for name, count in gate.counts().items()}
        assert counts["dropped_unsure"] == unsure
        assert (counts["dropped_low"], counts["ties"], counts["unlabelled"]) == (1, 1, 0)
        assert gate.mean_gap == pair_gate(QUALITY_1, QUALITY_2).mean_gap


def test_confidence_without_spreads_drops_nothing():
    gate = pair_gate(QUALITY_1, QUALITY_2, confidence=5.0)
    assert torch.equal(gate.keep, pair_gate(QUALITY_1, QUALITY_2).keep)


def test_a_pair_that_is_dropped_as_unsure_does_not_count():
    taps = make_taps("1"), make_taps("2")
    spread = torch.tensor([99.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    unsure = QSDLoss(WEIGHTS, confidence=1.0)(*taps, QUALITY_1, QUALITY_2, spread_1=spread, spread_2=spread)
    missing = torch.tensor([False, True, True, True, True, True])
    without = QSDLoss(WEIGHTS, tau=0.0)(*taps, QUALITY_1, QUALITY_2, missing, missing)
    assert unsure.stats["dropped_unsure"] == 1
    keep_low = QSDLoss(WEIGHTS, tau=0.0, confidence=1.0)(*taps, QUALITY_1, QUALITY_2, spread_1=spread, spread_2=spread)
    torch.testing.assert_close(keep_low.total, without.total, rtol=1e-12, atol=0)


def test_fates_of_pairs_add_up_and_labels_out_of_range_are_counted():
    q1, q2 = torch.tensor([-3.0, 20.0, 101.0, 50.0]), torch.tensor([60.0, 55.0, 68.0, float("nan")])
    counts = {name: count.item() for name, count in pair_gate(q1, q2).counts().items()}
    assert counts["out_of_range"] == 2
    fates = ("kept", "dropped_low", "dropped_high", "dropped_unsure", "ties", "unlabelled")
    assert sum(counts[name] for name in fates) == counts["pairs"] == 4


@pytest.mark.parametrize(("quality_2", "empty"), [(QUALITY_2, 0.0), (QUALITY_1, 1.0)])
def test_empty_steps_are_marked(quality_2, empty):
    assert QSDLoss(WEIGHTS)(make_taps("1"), make_taps("2"), QUALITY_1, quality_2).stats["empty"].item() == empty


# --- normalised maps


def test_rms_maps_are_unit_length_maps_times_the_root_of_their_size():
    features = make_taps("1")["stage"]
    rms = energy_map(features, "rms")
    torch.testing.assert_close(rms.square().mean((1, 2)), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(rms, energy_map(features, "l2") * 12**0.5)
    plain = energy_map(features)
    torch.testing.assert_close(rms, plain / plain.square().mean((1, 2), keepdim=True).sqrt())


@pytest.mark.parametrize(("norm", "factor"), [("rms", 1.0), ("l2", 0.5)])
def test_size_of_the_level_when_the_map_grows(norm, factor):
    """The same picture at twice the height and width."""
    small = make_taps("1"), make_taps("2")
    large = [{"stage": F.interpolate(taps["stage"], scale_factor=2.0, mode="nearest")} for taps in small]
    loss = QSDLoss({"stage": 1.0}, map_norm=norm)
    before = loss(*({"stage": taps["stage"]} for taps in small), QUALITY_1, QUALITY_2)
    after = loss(*large, QUALITY_1, QUALITY_2)
    torch.testing.assert_close(after.total, factor * before.total)


def test_rms_level_is_a_cosine_over_the_range():
    """L = (2 / R) 2 (1 - cos) for every pair, which is what makes it comparable with a vector level."""
    taps = make_taps("1"), make_taps("2")
    student, teacher = student_and_teacher(*taps, "stage")
    student, teacher = (energy_map(x, "rms").flatten(1) for x in (student, teacher))
    distance = (1 - F.cosine_similarity(student, teacher)).mean()
    level = QSDLoss(WEIGHTS, map_norm="rms")(*taps, QUALITY_1, QUALITY_2).levels["stage"]
    torch.testing.assert_close(level, 4 * distance / (student.max() - student.min()))


@pytest.mark.parametrize(("map_norm", "gap_power"), [("l2", 0.0), ("rms", 0.0), (None, 1.5), ("rms", 1.5)])
def test_gradcheck(map_norm, gap_power):
    """Only the students' rows are varied: the value depends on teachers too, on purpose without gradient."""
    loss = QSDLoss(WEIGHTS, map_norm=map_norm, gap_power=gap_power)
    taps_1, taps_2 = make_taps("1"), make_taps("2")

    def total(*students: torch.Tensor) -> torch.Tensor:
        streams: tuple[dict[str, torch.Tensor], ...] = ({}, {})
        for (name, first), student in zip(taps_1.items(), students, strict=True):
            rows = (QUALITY_1 > QUALITY_2).view(-1, *[1] * (student.dim() - 1))
            streams[0][name] = torch.where(rows, first, student)
            streams[1][name] = torch.where(rows, student, taps_2[name])
        return loss(*streams, QUALITY_1, QUALITY_2).total

    assert torch.autograd.gradcheck(total, [tap.requires_grad_() for tap in make_taps("students").values()])


# --- teachers of another network


def test_teachers_of_their_own_take_the_place_of_the_better_rows():
    """With the teachers' taps put into the streams by hand, the authors' loss says the same about the students."""
    taps, teachers = [make_taps(name, grad=True) for name in "12"], [make_taps(name, grad=True) for name in "34"]
    loss = QSDLoss(WEIGHTS)
    result = loss(*taps, QUALITY_1, QUALITY_2, teacher_taps_1=teachers[0], teacher_taps_2=teachers[1])
    result.total.backward()
    by_hand = [make_taps(name, grad=True) for name in "12"]
    first_teaches = QUALITY_1 > QUALITY_2
    mixed = [
        {
            level: torch.where(teaches.view(-1, *[1] * (tap.dim() - 1)), teacher[level].detach(), tap)
            for level, tap in own.items()
        }
        for own, teacher, teaches in zip(by_hand, teachers, (first_teaches, ~first_teaches), strict=True)
    ]
    expected = loss(*mixed, QUALITY_1, QUALITY_2)
    expected.total.backward()
    torch.testing.assert_close(result.total, expected.total, rtol=1e-12, atol=0)
    for mine, theirs in zip(taps, by_hand, strict=True):
        for level in SHAPES:
            torch.testing.assert_close(mine[level].grad, theirs[level].grad, rtol=1e-9, atol=1e-14)
    assert all(tap.grad is None for each in teachers for tap in each.values())


def test_in_batch_with_every_option_equals_forward_on_gathered_rows():
    identities = torch.tensor([0, 0, 0, 1, 1, 1])
    pairs = inbatch_pairs(identities, QUALITY_1)
    spread = torch.tensor([1.0, 60.0, 2.0, float("nan"), 3.0, 1.0])
    loss = QSDLoss(WEIGHTS, gap_power=1.0, confidence=1.0, map_norm="rms")
    taps, teachers = make_taps("1"), make_taps("3")
    result = loss.in_batch(taps, QUALITY_1, pairs, spread=spread, teacher_taps=teachers)
    rows = [[{level: tap[index] for level, tap in each.items()} for index in pairs] for each in (taps, teachers)]
    expected = loss(
        *rows[0],
        *(QUALITY_1[index] for index in pairs),
        spread_1=spread[pairs[0]],
        spread_2=spread[pairs[1]],
        teacher_taps_1=rows[1][0],
        teacher_taps_2=rows[1][1],
    )
    assert result.stats["dropped_unsure"] == expected.stats["dropped_unsure"] == 1
    assert torch.equal(result.total, expected.total)


def test_nothing_waits_for_the_device():
    with FakeTensorMode():
        taps = [{level: torch.randn(8, *shape, requires_grad=True) for level, shape in SHAPES.items()} for _ in "1234"]
        quality, spread = torch.rand(8), torch.rand(8)
        loss = QSDLoss(WEIGHTS, gap_power=1.0, confidence=1.0, map_norm="rms")
        result = loss(*taps[:2], quality, quality, None, None, spread, spread, teacher_taps_1=taps[2])
        result.total.backward()
        index = torch.zeros(12, dtype=torch.int64)
        loss.in_batch(taps[0], quality, (index, index), None, spread, taps[1]).total.backward()


# --- preset and errors


def test_recommended_preset_builds_our_loss():
    chosen = preset("recommended")
    weights = level_weights(chosen, {"layer4": "map", "neck": "vector", "classifier": "logits"})
    assert list(weights.values()) == [1.0, 1.0, 0.1]
    loss = QSDLoss(weights, **chosen.options())
    assert (loss.scale_grad, loss.map_norm, loss.missing) == ("detached", "rms", "exclude")
    assert (loss.tau, loss.map_distance) == (0.3, "l2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap_power": -1.0}, r"gap_power: got -1\.0; expected a finite number >= 0"),
        ({"gap_power": float("inf")}, "gap_power: got inf"),
        ({"confidence": float("nan")}, "confidence: got nan; expected a finite number >= 0"),
        ({"map_norm": "rsm"}, r"map_norm: got 'rsm'; expected one of 'l2', 'rms'\. Did you mean 'rms'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        QSDLoss(WEIGHTS, **options)


def test_spreads_and_teachers_that_do_not_fit_are_named():
    taps = make_taps("1"), make_taps("2")
    with pytest.raises(ConfigError, match=r"got \[\(6,\), \(6,\), \(5,\)\]; expected one vector of length B"):
        QSDLoss(WEIGHTS)(*taps, QUALITY_1, QUALITY_2, spread_1=torch.zeros(5))
    with pytest.raises(ConfigError, match="level 'embedding' has no tap"):
        QSDLoss(WEIGHTS)(*taps, QUALITY_1, QUALITY_2, teacher_taps_1={"stage": taps[0]["stage"]})
    wrong = {**taps[0], "embedding": torch.zeros(6, 7)}
    with pytest.raises(ConfigError, match=r"'embedding': got .*\(6, 7\)\); expected the same shape"):
        QSDLoss(WEIGHTS)(*taps, QUALITY_1, QUALITY_2, teacher_taps_2=wrong)
