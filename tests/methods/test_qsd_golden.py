"""QSDLoss against numbers recorded from the authors' program (values, masks, gradients of both streams)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qsd_plugin.methods.qsd import QSDLoss, QSDResult, pair_gate

DATA = Path(__file__).parents[1] / "data" / "qsd_loss.npz"
Taps = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA) as arrays:
        return dict(arrays)


def run(golden: dict[str, np.ndarray], group: str, **options: object) -> tuple[QSDResult, Taps, Taps]:
    inputs = "qsd_typical" if group == "qsd_typical_L1" else group  # recorded with the same taps
    weights = {str(level): float(weight) for level, weight in enumerate(golden[f"{group}/weights"])}
    taps_1, taps_2 = (
        {level: torch.tensor(golden[f"{inputs}/f{stream}_{level}"], requires_grad=True) for level in weights}
        for stream in (1, 2)
    )
    labels = (torch.tensor(golden[f"{group}/q{stream}"]) for stream in (1, 2))
    options = {"missing": "tie", "map_distance": "l1" if group.endswith("L1") else "l2", **options}
    result = QSDLoss(weights, **options)(taps_1, taps_2, *labels)
    result.total.backward()
    return result, taps_1, taps_2


@pytest.mark.parametrize(
    ("group", "total"),
    [
        ("qsd_typical", 1.9679456),
        ("qsd_typical_L1", 2.2995360),
        ("qsd_realistic64", 1.8690686),
        ("qsd_missing", 2.0248606),
        ("qsd_single_hi1", 2.0672565),
        ("qsd_onesided", 2.1403332),
        ("qsd_q1_zero_swapped", 2.0784898),
        ("qsd_zero_vec", 1.0),
    ],
)
def test_values_and_gradients(golden, group, total):
    result, taps_1, taps_2 = run(golden, group)
    assert result.total.item() == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(result.total.detach(), golden[f"{group}/total"], rtol=1e-6)
    levels = [level.item() for level in result.levels.values()]
    np.testing.assert_allclose(levels, golden[f"{group}/unweighted"], rtol=1e-6)
    for stream, taps in enumerate((taps_1, taps_2), start=1):
        for level, tap in taps.items():
            expected = golden[f"{group}/grad_f{stream}_{level}"]
            np.testing.assert_allclose(tap.grad, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "group",
    [
        "qsd_typical",
        "qsd_typical_L1",
        "qsd_realistic64",
        "qsd_missing",
        "qsd_single_hi1",
        "qsd_onesided",
        "qsd_all_dropped",
        "qsd_q1_zero",
        "qsd_q1_zero_swapped",
        "qsd_const_student",
        "qsd_zero_vec",
    ],
)
def test_gate(golden, group):
    q1, q2 = (torch.tensor(golden[f"{group}/q{stream}"]) for stream in (1, 2))
    gate = pair_gate(q1, q2, missing="tie")
    np.testing.assert_allclose(gate.gap, golden[f"{group}/d"], rtol=1e-6)
    bounds = [gate.mean_gap.item(), gate.lower.item(), gate.upper.item()]
    np.testing.assert_allclose(bounds, [golden[f"{group}/{name}"] for name in ("mean_d", "lower", "upper")], rtol=1e-6)
    np.testing.assert_array_equal(gate.keep, ~golden[f"{group}/dropped"] & (q1 != q2).numpy())
    for stream, teaches in ((1, gate.teacher_1), (2, ~gate.teacher_1)):
        kept = torch.nonzero(gate.keep & teaches).flatten()
        np.testing.assert_array_equal(kept, golden[f"{group}/teacher_in_{stream}"])


def test_gate_bounds_are_inclusive(golden):
    q1, q2 = (torch.tensor(golden[f"qsd_boundary/q{stream}"]) for stream in (1, 2))
    gate = pair_gate(q1, q2)
    assert gate.lower.item() == golden["qsd_boundary/lower"] == gate.gap[0].item()
    assert gate.keep.tolist() == [True, True, True]


def test_the_authors_demo(golden):
    labels = torch.tensor([[30.1, 50.2, 70.7, 90.1], [35.2, 45.3, 47.5, 92.5]])
    taps_1 = {str(i): torch.full((4, 4 * (i + 1), 64, 64), i + 1.0) for i in range(5)}
    taps_2 = {name: torch.zeros_like(tap) for name, tap in taps_1.items()}
    weights = dict(zip(taps_1, (1.0, 1.0, 1.0, 1.0, 0.1), strict=True))
    result = QSDLoss(weights, missing="tie")(taps_1, taps_2, *labels)
    weighted = [weights[name] * level.item() for name, level in result.levels.items()]
    np.testing.assert_allclose(weighted, golden["qsd_author_demo/weighted"], rtol=1e-6)
    assert result.total.item() == pytest.approx(65.0, rel=1e-6)


@pytest.mark.parametrize("group", ["qsd_all_dropped", "qsd_all_ties", "qsd_all_ties_2d_only"])
def test_without_a_kept_pair_the_loss_is_a_zero_on_the_graph(golden, group):
    """The authors' program returns an integer zero, raises, or returns NaN."""
    result, taps_1, taps_2 = run(golden, group)
    assert result.total.item() == 0
    assert result.total.dtype == torch.float32
    assert result.total.requires_grad
    for tap in (*taps_1.values(), *taps_2.values()):
        assert torch.equal(tap.grad, torch.zeros_like(tap))


def test_labels_of_zero_do_not_lose_the_batch_unless_asked_to(golden):
    """The authors test the sum of the kept stream-1 labels for emptiness, which a batch of zeros fails."""
    swapped = golden["qsd_q1_zero_swapped/total"]
    assert run(golden, "qsd_q1_zero")[0].total.item() == pytest.approx(swapped, rel=1e-6)
    compat = run(golden, "qsd_q1_zero", compat_empty_test=True)[0]
    assert compat.total.item() == golden["qsd_q1_zero/total"] == 0
    assert compat.stats["kept"].item() == 0
    kept = run(golden, "qsd_q1_zero_swapped", compat_empty_test=True)[0]
    assert kept.total.item() == pytest.approx(swapped, rel=1e-6)


def test_constant_student_maps_give_a_finite_loss(golden):
    assert np.isinf(golden["qsd_const_student/total"])
    result, taps_1, taps_2 = run(golden, "qsd_const_student")
    assert torch.isfinite(result.total)
    assert all(torch.isfinite(tap.grad).all() for tap in (*taps_1.values(), *taps_2.values()))


@pytest.mark.parametrize(
    ("group", "level", "attached", "detached"),
    [
        ("qsd_realistic64", 0, 0.124, 0.017),
        ("qsd_realistic64", 1, 0.075, 0.018),
        ("qsd_realistic64", 2, 0.088, 0.021),
        ("qsd_typical", 0, 0.166, 0.037),
        ("qsd_typical", 1, 0.093, 0.036),
        ("qsd_typical", 2, 0.101, 0.045),
    ],
)
def test_share_of_the_scale_term_in_the_map_gradient(golden, group, level, attached, detached):
    """Norms measured on the authors' program with and without gradient through the energy range, three decimals."""
    for scale_grad, expected in (("attached", attached), ("detached", detached)):
        _, taps_1, taps_2 = run(golden, group, scale_grad=scale_grad)
        gradients = torch.stack([taps_1[str(level)].grad, taps_2[str(level)].grad])
        assert gradients.norm().item() == pytest.approx(expected, abs=5.1e-4)


def test_teachers_get_exactly_zero_gradient(golden):
    result, taps_1, taps_2 = run(golden, "qsd_typical")
    assert result.stats["kept"].item() == 14
    for teachers, taps, students in (
        (golden["qsd_typical/teacher_in_1"], taps_1, golden["qsd_typical/teacher_in_2"]),
        (golden["qsd_typical/teacher_in_2"], taps_2, golden["qsd_typical/teacher_in_1"]),
    ):
        for tap in taps.values():
            assert not tap.grad[teachers].any()
            assert tap.grad[students].flatten(1).any(dim=1).all()
