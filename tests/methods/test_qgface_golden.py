"""QGFace and AdaFace against numbers recorded from the authors' programs: heads, contrastive branch, joint steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from qgface_recorded import RUNS, STEPS, Golden, JointRun, recorded
from torch import Tensor

from qsd_plugin.methods.qgface import (
    AdaFaceHead,
    ContrastResult,
    Negatives,
    NormStatistics,
    QGContrast,
    QGFaceHead,
    classification_gate,
)

#: Recorded heads: how they start, whether gated.
HEADS: dict[str, tuple[type[AdaFaceHead], dict[str, Any]]] = {
    "A_adaface_ref_t0.01": (AdaFaceHead, {}),
    "A_adaface_ref_t1.0": (AdaFaceHead, {"momentum": 1.0}),
    "A_qg_zeroinit_q0": (QGFaceHead, {"threshold": 0.0, "start": "zeros"}),
    "A_qg_zeroinit_q0.2": (QGFaceHead, {"threshold": 0.2, "start": "zeros"}),
    "A_qg_adaface_init_q0": (QGFaceHead, {"threshold": 0.0, "start": "adaface"}),
    "A_qg_warm_q0": (QGFaceHead, {"threshold": 0.0, "start": (18.0, 3.0)}),
    "A_qg_warm_q0.2": (QGFaceHead, {"threshold": 0.2, "start": (18.0, 3.0)}),
    "A_qg_warm_q0.2_f32": (QGFaceHead, {"threshold": 0.2, "start": (18.0, 3.0)}),
    "A_qg_t1_q0.2": (QGFaceHead, {"threshold": 0.2, "start": "zeros", "momentum": 1.0}),
}
#: Recorded calls of the contrastive branch.
CALLS: dict[str, dict[str, Any]] = {
    "B_paperfig": {},
    "B_codedefault_masked": {"coupling": "double", "detach_positive": False},
    "B_d2n_detach_dyn_cos": {
        "coupling": "double",
        "weighting": "cos",
        "weight_range": "whole",
        "select": "mean",
        "margin_method": "dynamic",
    },
    "B_s2n_static_linear": {
        "detach_positive": False,
        "weighting": "linear",
        "select": "high",
        "threshold": 0.5,
        "margin_method": "static",
        "rescale": False,
    },
    "B_q0_nogate": {"coupling": "double", "detach_positive": False, "threshold": 0.0},
    "B_instmask_chunkN": {"coupling": "double", "detach_positive": False, "threshold": 0.5, "mask": "instance"},
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return recorded()


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("run", HEADS)
def test_six_batches_through_a_head(golden: Golden, run: str) -> None:
    single = run.endswith("_f32")
    dtype = torch.float32 if single else torch.float64
    build, options = HEADS[run]
    head = build(16, 10, **options).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(golden["A/kernel"].T))
    tolerance, gradient_tolerance = (1e-4, 1e-4) if single else (1e-9, 1e-8)
    for step in range(6):
        embedding, norm = (torch.from_numpy(golden[f"A/{name}"][step]).to(dtype) for name in ("emb", "norm"))
        embedding.requires_grad_()
        result = head(embedding, norm, torch.from_numpy(golden["A/label"][step]))
        head.zero_grad()
        result.loss.backward()
        if f"{run}/ms" in golden:
            close(result.scaler, golden[f"{run}/ms"][step], tolerance)
        close(head.statistics.mean, golden[f"{run}/mean"][step, 0], tolerance)
        close(head.statistics.std, golden[f"{run}/std"][step, 0], tolerance)
        close(result.stats["norm_mean"], golden[f"{run}/mean"][step, 0], tolerance)
        close(result.logits, golden[f"{run}/logits"][step], tolerance)
        close(result.loss, golden[f"{run}/loss"][step], tolerance)
        close(embedding.grad, golden[f"{run}/gemb"][step], gradient_tolerance)
        close(head.weight.grad.T, golden[f"{run}/gker"][step], gradient_tolerance)
    assert head.statistics.updates.item() == 6


def test_four_hundred_steps_of_the_statistics_from_nothing(golden: Golden) -> None:
    statistics = NormStatistics(mean_init=0.0, std_init=0.0).double()
    for step, norm in enumerate(torch.from_numpy(golden["A_ema/norm"])):
        statistics.update(norm)
        scaler = statistics.scaler(norm)
        close(statistics.mean, golden["A_ema/mean"][step])
        close(statistics.std, golden["A_ema/std"][step])
        close(scaler, golden["A_ema/ms"][step])


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5])
def test_classification_gate(golden: Golden, threshold: float) -> None:
    gate = classification_gate(torch.from_numpy(golden["A_gate/ms"])[:, None], threshold)
    close(gate[:, 0], golden[f"A_gate/q{threshold}"])


class Call:
    """The recorded batch of six pairs against twenty negatives."""

    def __init__(self, golden: Golden, **options: Any) -> None:
        tensor = {name: torch.from_numpy(golden[f"B/{name}"]) for name in ("q", "k", "queue", "q_ms", "k_ms")}
        self.anchor, self.positive = (tensor[name].clone().requires_grad_() for name in "qk")
        labels, queue_labels = (torch.from_numpy(golden[f"B/{name}"]) for name in ("q_label", "queue_label"))
        self.negatives = Negatives(tensor["queue"], queue_labels, torch.ones(20, dtype=torch.bool))
        self.module = QGContrast(**options).double()
        own = torch.arange(6)[:, None]
        self.result: ContrastResult = self.module(
            self.anchor, self.positive, self.negatives, labels, tensor["q_ms"], tensor["k_ms"], own
        )
        self.result.loss.backward()

    def gradients(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in (self.anchor, self.positive))


@pytest.mark.parametrize("run", CALLS)
def test_a_call_of_the_contrastive_branch(golden: Golden, run: str) -> None:
    call = Call(golden, **CALLS[run])
    anchor, positive = call.gradients()
    close(call.result.loss, golden[f"{run}/loss"])
    close(call.result.logits, golden[f"{run}/logits"])
    if f"{run}/sim" in golden:
        close(call.result.similarity[:, None], golden[f"{run}/sim"])
        close(call.module.gap[None], golden[f"{run}/margin_ema"])
    close(anchor, golden[f"{run}/gq"], 1e-8)
    close(positive, golden[f"{run}/gk"], 1e-8)
    if run == "B_paperfig":
        assert call.positive.grad is None  # the gradient of the clean view is cut, not small


@pytest.mark.parametrize("coupling", ["S2N", "D2N"])
def test_every_combination_of_the_contrastive_branch(golden: Golden, coupling: str) -> None:
    names = golden["B_grid/name"].tolist()
    chosen = [index for index, name in enumerate(names) if name.startswith(coupling)]
    assert len(chosen) == 432
    for index in chosen:
        _, detach, weighting, weight_range, select, margin, rescale, threshold = names[index].split("|")
        call = Call(
            golden,
            coupling={"S2N": "single", "D2N": "double"}[coupling],
            detach_positive=detach == "True",
            weighting=weighting,
            weight_range=weight_range,
            select=select,
            margin_method=margin.lower(),
            rescale=rescale == "True",
            threshold=float(threshold),
        )
        anchor, positive = call.gradients()
        expected = [golden[f"B_grid/{key}"][index] for key in ("loss", "margin_ema", "mean_pos_sim")]
        actual = torch.stack([call.result.loss, call.module.gap, call.result.stats["similarity"]])
        np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-9, atol=1e-9, err_msg=names[index])
        norms = torch.stack([anchor.norm(), positive.norm()])
        expected = [golden[f"B_grid/{key}"][index] for key in ("gq_norm", "gk_norm")]
        np.testing.assert_allclose(norms.numpy(), expected, rtol=1e-8, atol=1e-8, err_msg=names[index])


def test_masked_and_gated_entries(golden: Golden) -> None:
    """Masked negatives have logit 0, a row without weight the loss ln 129 after rescaling."""
    call = Call(golden, threshold=0.5)
    same = torch.from_numpy(golden["B/q_label"])[:, None] == call.negatives.labels
    assert same.any()
    assert (call.result.logits[:, 1:][same] == 0).all()
    gated = Call(golden, threshold=1e-9)
    assert gated.result.stats["active"] == 0
    assert gated.result.loss.item() == pytest.approx(math.log(129), abs=1e-12)
    assert not gated.anchor.grad.any()


@pytest.mark.parametrize("name", RUNS)
def test_eight_joint_steps(golden: Golden, name: str) -> None:
    run = JointRun(golden, name)
    single = run.dtype == torch.float32
    fill = []
    for index in STEPS:
        left = run.step(index)
        fill.append(len(left["queue_labels"]))
        for key, value in left.items():
            expected = golden[f"{name}/{key}"]
            if key in ("fc_w", "kernel", "moco_fc_w"):
                if index not in (0, 7):
                    continue
                expected = expected[0 if index == 0 else 1]
            elif key in ("queue_embeds", "queue_proxies"):
                if index not in (4, 7):
                    continue
                expected = expected[0 if index == 4 else 1]
            else:
                expected = expected[index]
            if key == "con_logits":
                expected = expected[:, : fill[-1] + 1]
            if key in ("queue_labels", "queue_corrected"):
                assert len(expected) == 28
                expected = expected[: fill[-1]]
            tolerance = 1e-4 if single else 1e-8 if key.startswith("g_") else 1e-9
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(
                value.reshape(expected.shape).numpy(),
                expected,
                rtol=tolerance,
                atol=tolerance * scale,
                err_msg=f"{key} of step {index}",
            )
    assert fill == ([6, 12, 18, 24] + [28] * 4 if name == "C_moco" else [12, 24] + [28] * 6)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_resumed_run_goes_on_exactly(golden: Golden, cut: int) -> None:
    """Cut while the queue is filling, when it is about to wrap, and when it is full."""
    whole = JointRun(golden, "C_proxy_dyn_cos")
    expected = [whole.step(index) for index in STEPS]
    first = JointRun(golden, "C_proxy_dyn_cos")
    for index in range(cut):
        first.step(index)
    second = JointRun(golden, "C_proxy_dyn_cos")
    second.load(first.saved())
    for index in range(cut, 8):
        left = second.step(index)
        for key, value in expected[index].items():
            assert torch.equal(left[key], value), (index, key)
