"""What QSD inside fast-reid makes of labels: spreads, a live network, wrong scales, constant labels, empty steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qsd_toy import ANCHORS, PARTNERS, QUALITY, batch, build, qsd_cfg, step, use_images, with_partners
from torch import nn

from qsd_plugin.core.errors import ConfigError, LabelError
from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid.meta_arch.qsd_pairs import BatchLabels, ImageLabels, pair_labels
from qsd_plugin.hosts.fastreid.quality import ImageQuality
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.methods.qsd import QSDLoss
from qsd_plugin.quality import QualityLabels

host.activate()

CPU = torch.device("cpu")
DECLARED = {"dataset": "Market1501", "scale": "minmax"}


@pytest.fixture(autouse=True)
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_images(tmp_path / "data", monkeypatch)


class Brightness(nn.Module):
    """A quality network without parameters: the mean pixel of the host's 0 to 255, on a scale to 100."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((1, 2, 3)) / 2.55


def constant(values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((8,), 50.0), torch.ones(8, dtype=torch.bool)


def thousands(values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(8.0) * 100, torch.ones(8, dtype=torch.bool)


def small(values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(8.0) / 8, torch.ones(8, dtype=torch.bool)


def live(function: Any) -> dict[str, Any]:
    return {"QUALITY.SOURCE": f"import:{__name__}:{function.__name__}", "QUALITY.FILES": ()}


def save_labels(folder: Path, scores: Any, meta: dict[str, Any], spread: Any = None) -> None:
    keys = tuple(f"Market1501/bounding_box_train/{Path(path).name}" for path in [*ANCHORS, *PARTNERS])
    scores = np.asarray(scores, dtype=np.float64)
    QualityLabels(scores, scores, scores if spread is None else spread, keys, meta).save(folder / "labels.npz")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Other tests of the process may have set the host's logger to a lower level."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- spreads


@pytest.mark.parametrize("pairing", ["inbatch", "partner"])
def test_pairs_within_the_spread_of_their_labels_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairing: str
) -> None:
    spread = np.linspace(5, 50, 16)
    cfg = qsd_cfg(tmp_path, spread=spread, **{"QSD.CONFIDENCE": 1.0, "QSD.PAIRING": pairing})
    results = []
    name = "in_batch" if pairing == "inbatch" else "forward"
    original = getattr(QSDLoss, name)

    def spy(self: QSDLoss, *arguments: Any, **options: Any) -> Any:
        results.append(original(self, *arguments, **options))
        return results[-1]

    monkeypatch.setattr(QSDLoss, name, spy)
    step(build(cfg), with_partners() if pairing == "partner" else batch())
    spread, quality = torch.tensor(spread), torch.cat([QUALITY, 100 - QUALITY]).double()
    if pairing == "inbatch":
        pairs = [(i, j) for block in (0, 4) for i in range(block, block + 4) for j in range(i + 1, block + 4)]
    else:
        pairs = [(i, i + 8) for i in range(8)]
    gaps = torch.stack([(quality[i] - quality[j]).abs() for i, j in pairs])
    sure = torch.stack([(spread[i] ** 2 + spread[j] ** 2).sqrt() for i, j in pairs])
    within = (gaps > 0) & (gaps >= 0.3 * gaps.mean()) & (gaps <= 70 + 0.3 * gaps.mean())
    unsure = (within & (gaps < sure)).sum()
    assert results[0].stats["dropped_unsure"] == unsure > 0
    assert results[0].stats["kept"] == (within & (gaps >= sure)).sum() > 0


def test_spreads_are_those_of_the_file_in_label_units(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    spread = np.array([np.nan, *range(1, 16)])
    save_labels(tmp_path, np.arange(16) * 2 + 10, {**DECLARED, "scale": "none"}, spread)
    got = ImageQuality(cfg).spread([ANCHORS[1], "unknown.jpg", ANCHORS[0]], CPU)
    assert got[0] == 1.0
    assert got[1:].isnan().all()
    cfg.QUALITY.SCALE = "minmax"  # 10 to 40 becomes 0 to 100
    assert ImageQuality(cfg).spread([ANCHORS[3]], CPU).item() == pytest.approx(3 * 100 / 30)
    cfg.QUALITY.SCALE = "rank"
    assert ImageQuality(cfg).spread([ANCHORS[3]], CPU).isnan()
    cfg.QUALITY.SOURCE = "embedding_norm"
    assert ImageQuality(cfg).spread([ANCHORS[3]], CPU).isnan()


def test_confidence_that_can_do_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastreid"):
        build(qsd_cfg(tmp_path, **{"QSD.CONFIDENCE": 1.0}, **live(small)))
        step(build(qsd_cfg(tmp_path, spread=np.full(16, np.nan), **{"QSD.CONFIDENCE": 1.0})), batch())
    assert f"QUALITY.SOURCE import:{__name__}:small knows no spread" in warnings_in(caplog)[0]
    assert "labels.npz holds no spreads" in warnings_in(caplog)[1]


# --- a network


def test_network_scores_the_images_of_the_batch(tmp_path: Path) -> None:
    network = {"QUALITY.SOURCE": "network", "QUALITY.NETWORK": f"import:{__name__}:Brightness", "QUALITY.FILES": ()}
    model = build(qsd_cfg(tmp_path, **network, **{"QSD.TAPS": ["heads.bottleneck"]}))
    taught: list[torch.Tensor] = []
    model.heads.bottleneck.register_forward_hook(lambda m, i, out: out.retain_grad() or taught.append(out))
    inputs = batch()
    inputs["images"] *= torch.tensor([1.0, 0.2, 0.4, 0.6, 0.3, 0.9, 0.5, 0.7])[:, None, None, None]
    step(model, inputs)["loss_qsd"].backward()
    teachers = taught[0].grad.flatten(1).abs().sum(dim=1) == 0
    assert teachers[[0, 5]].all()  # the brightest of each identity
    assert not teachers[[1, 4]].any()


def test_network_without_weights_is_refused_when_the_model_is_built(tmp_path: Path) -> None:
    network = {"QUALITY.SOURCE": "network", "QUALITY.NETWORK": "import:torchvision.models:squeezenet1_1"}
    with pytest.raises(ConfigError, match=r"QUALITY\.NETWORK_WEIGHTS is empty"):
        build(qsd_cfg(tmp_path, **network))


# --- wrong labels


def test_label_file_with_constant_labels_is_refused(tmp_path: Path) -> None:
    cfg = qsd_cfg(tmp_path)
    save_labels(tmp_path, np.full(16, 37.0), DECLARED)
    with pytest.raises(LabelError, match=r"labels\.npz: all 16 labels are equal: got 37.*--stage labels"):
        step(build(cfg), batch())


def test_label_file_on_another_scale_is_refused_or_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = qsd_cfg(tmp_path)
    save_labels(tmp_path, np.arange(16) * 50, {**DECLARED, "scale": "none"})
    with pytest.raises(LabelError, match=r"labels\.npz: 13 of 16 labels out of range, e\.g\. 150.*QUALITY\.SCALE"):
        step(build(cfg), batch())
    save_labels(tmp_path, np.arange(16) / 16, DECLARED)
    with caplog.at_level(logging.WARNING, "fastreid"):
        step(build(cfg), batch())
    assert any("The labels span 0 to 0.938 of a scale from 0 to 100" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (
            constant,
            ["labels of all 60 labelled pairs of the last 5 steps are tied", "5 of 5 steps (100.0%) had no pair"],
        ),
        (small, ["mean label gap is 0.208 on a scale from 0 to 100"]),
    ],
)
def test_live_labels_are_watched_at_the_logging_period(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: Any, messages: list[str]
) -> None:
    model = build(qsd_cfg(tmp_path, **live(source)))
    model._qsd_stats.period = 5
    with caplog.at_level(logging.WARNING, "fastreid"):
        for _ in range(4):
            step(model, batch())
        assert not warnings_in(caplog)
        for _ in range(6):
            step(model, batch())
    assert len(warnings_in(caplog)) == len(messages)  # each once
    for message, said in zip(messages, warnings_in(caplog), strict=True):
        assert message in said


def test_live_labels_out_of_range_stop_the_training_at_the_logging_period(tmp_path: Path) -> None:
    model = build(qsd_cfg(tmp_path, **live(thousands)))
    model._qsd_stats.period = 2
    step(model, batch())
    with pytest.raises(LabelError, match=r"22 of 24 pairs of the last 2 steps have a label out of range.*\[0, 100\]"):
        step(model, batch())


def test_watch_reads_the_means_that_are_written_anyway() -> None:
    seen = []
    statistics = Statistics("x", period=2, watch=lambda means, steps: seen.append((means, steps)) or ())
    for value in (1.0, 2.0, 5.0):
        statistics.add({"pairs": torch.tensor(value)})
    assert seen == [({"pairs": 1.5}, 2)]


def test_the_coin_is_tossed_once_for_a_batch_and_only_if_pairs_are_asked_for() -> None:
    """Who teaches must be the same where images are erased and in the loss; a toss too many would shift all later."""
    images = ImageLabels(torch.arange(64.0), torch.ones(64, dtype=torch.bool), None)
    rows = torch.arange(32), torch.arange(32, 64)
    coin = torch.Generator().manual_seed(0)
    start = coin.get_state()
    labels = BatchLabels(images, rows, coin)
    assert torch.equal(coin.get_state(), start)
    expected = pair_labels(images.rows(rows[0]), images.rows(rows[1]), torch.Generator().manual_seed(0))
    for _ in range(2):
        assert torch.equal(labels.of_pairs.quality_1, expected.quality_1)
        assert torch.equal(labels.of_pairs.quality_2, expected.quality_2)
    assert not torch.equal(labels.of_pairs.quality_1, images.quality[:32])


def test_means_of_counts_losses_and_names_that_come_and_go() -> None:
    statistics = Statistics("x", period=10)
    assert statistics.flush() == {}
    loss = torch.tensor(0.5, requires_grad=True)
    statistics.add({"count": torch.tensor(3), "gap": torch.tensor(0.25, dtype=torch.float64), "loss": loss})
    statistics.add({"gap": torch.tensor(1.25, dtype=torch.float64), "seldom": torch.tensor(True)})
    statistics.add({"count": torch.tensor(1), "gap": torch.tensor(0.0), "loss": loss + 1})
    statistics.add({})
    assert statistics.flush() == {"x/count": 1.0, "x/gap": 0.375, "x/loss": 0.5, "x/seldom": 0.25}
    assert statistics.flush() == {}


# --- config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, (None, "attached", "tie", 0.0)),
        ({"QSD.PRESET": "recommended"}, ("rms", "detached", "exclude", 0.0)),
        (
            {"QSD.PRESET": "recommended", "QSD.MAP_NORM": "none", "QSD.GAP_POWER": 2.0},
            (None, "detached", "exclude", 2.0),
        ),
        ({"QSD.MAP_NORM": "l2", "QSD.SCALE_GRAD": "detached"}, ("l2", "detached", "tie", 0.0)),
    ],
)
def test_options_come_from_the_preset_unless_given(tmp_path: Path, overrides: Any, expected: Any) -> None:
    loss = build(qsd_cfg(tmp_path, **overrides))._qsd_loss
    assert (loss.map_norm, loss.scale_grad, loss.missing, loss.gap_power) == expected


def test_levels_that_mgn_does_not_have_are_named(tmp_path: Path) -> None:
    mgn = {
        "QSD.BASE": "MGN",
        "QSD.TAPS": ["heads.bottleneck"],
        "MODEL.BACKBONE.DEPTH": "50x",
        "MODEL.BACKBONE.FEAT_DIM": 2048,
        "MODEL.HEADS.EMBEDDING_DIM": 256,
    }
    with pytest.raises(ConfigError, match=r"Tap name: got 'heads\.bottleneck'.*Did you mean 'b\d_head\.bottleneck'"):
        build(qsd_cfg(tmp_path, **mgn))
