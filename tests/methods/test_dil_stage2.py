"""Stage 2 with tiny networks: replay, the bank, branches, options; severity of codes."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from dil_recorded import recorded
from dil_small import NUM_CLASSES, pictures, small_networks
from torch import Tensor

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil import (
    ClassBlock,
    DegradationAttention,
    DegradationBank,
    DualBranchReID,
    ReplayAugmenter,
    SensitiveBranch,
    Stage2Options,
    fit_severity,
    flip_averaged_codes,
    severity,
    stage2_terms,
    with_severity,
)
from qsd_plugin.methods.dil.severity import linear_svm
from qsd_plugin.networks.resnet_stages import BasicBlock


@pytest.fixture(scope="module")
def networks() -> Any:
    return small_networks()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return pictures(4, 11)


def augmenter(networks: Any, bank: DegradationBank | None, **options: Any) -> ReplayAugmenter:
    return ReplayAugmenter(networks.content_encoder, networks.degradation_encoder, networks.generator, bank, **options)


class TestReplay:
    def test_the_bank_s_codes_are_rendered_with_the_images_contents(self, networks: Any, images: Tensor) -> None:
        bank = DegradationBank.build(networks.degradation_encoder, [images[:3], images[3:]])
        torch.testing.assert_close(bank.codes, flip_averaged_codes(networks.degradation_encoder, images))
        replay = augmenter(networks, bank)
        same, rendered = replay(images, torch_stream(1))
        assert same is images
        codes = bank.sample(4, torch_stream(1))
        with torch.no_grad():
            content = replay.content_encoder(images).content
            torch.testing.assert_close(rendered, networks.generator(content, codes))
        assert not rendered.requires_grad
        assert torch.equal(rendered, replay(images, torch_stream(1))[1])
        assert not torch.equal(rendered, replay(images, torch_stream(2))[1])

    def test_it_is_a_frozen_copy(self, networks: Any, images: Tensor) -> None:
        networks = copy.deepcopy(networks)
        replay = augmenter(networks, None, mode="shuffle")
        before = {name: value.clone() for name, value in replay.state_dict().items()}
        expected = replay(images, torch_stream(0))[1]
        replay.train()
        for parameter in networks.generator.parameters():
            parameter.data.zero_()
        assert torch.equal(replay(images, torch_stream(0))[1], expected)
        assert all(torch.equal(value, before[name]) for name, value in replay.state_dict().items())
        assert not any(parameter.requires_grad for parameter in replay.parameters())

    def test_without_replay(self, networks: Any, images: Tensor) -> None:
        same, rendered = augmenter(networks, None, mode="none")(images, torch_stream(0))
        assert same is images
        assert rendered is None

    def test_repeats_lie_together(self, networks: Any, images: Tensor) -> None:
        bank = DegradationBank.build(networks.degradation_encoder, [images])
        repeated, rendered = augmenter(networks, bank, repeats=3)(images, torch_stream(4))
        assert torch.equal(repeated, images[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
        single = ReplayAugmenter.forward(augmenter(networks, bank), repeated, torch_stream(4))[1]
        assert torch.equal(rendered, single)

    def test_changing_places(self, networks: Any, images: Tensor) -> None:
        many = images[:1].expand(200, -1, -1, -1)
        bank = DegradationBank(torch.zeros(1, networks.degradation_encoder.code_dim))
        first, second = augmenter(networks, bank, swap=0.25)(many, torch_stream(3))
        original = [torch.isclose(part, many).all(dim=3).all(dim=2).all(dim=1) for part in (first, second)]
        assert (original[0] ^ original[1]).all()
        assert original[1].sum().item() == pytest.approx(50, abs=20)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"mode": "banc"}, r"DIL replay mode: got 'banc'.*Did you mean 'bank'"),
            ({"mode": "bank"}, r"needs a bank.*Build one"),
            ({"mode": "shuffle", "repeats": 0}, r"repeats and swap: got \(0, 0"),
            ({"mode": "shuffle", "repeats": 2, "swap": 0.5}, r"no swap of several renderings"),
        ],
    )
    def test_refusals(self, networks: Any, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            augmenter(networks, None, **options)


class TestBank:
    def test_draws_are_uniform_with_replacement(self) -> None:
        bank = DegradationBank(torch.arange(10.0)[:, None])
        counts = bank.sample(20_000, torch_stream(0)).flatten().long().bincount(minlength=10)
        assert (counts - 2000).abs().max().item() < 200

    def test_draws_from_some_codes(self) -> None:
        bank = DegradationBank(torch.arange(10.0)[:, None])
        drawn = bank.sample(1000, torch_stream(0), where=bank.codes[:, 0] >= 7)
        assert set(drawn.flatten().tolist()) == {7.0, 8.0, 9.0}
        with pytest.raises(DataError, match="no code is left to draw from"):
            bank.sample(1, torch_stream(0), where=bank.codes[:, 0] > 9)

    def test_another_number_of_codes_can_be_loaded(self) -> None:
        full, empty = DegradationBank(torch.randn(7, 3)), DegradationBank(torch.zeros(1, 3))
        empty.load_state_dict(full.state_dict())
        assert torch.equal(empty.codes, full.codes)

    def test_refusals(self) -> None:
        with pytest.raises(DataError, match=r"DIL bank: codes: got \(0, 3\)"):
            DegradationBank(torch.zeros(0, 3))
        with pytest.raises(DataError, match="not finite: got '1 of 2'"):
            DegradationBank(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))
        with pytest.raises(DataError, match="there is no image to build it from"):
            DegradationBank.build(small_networks().degradation_encoder, [])


def small_model(networks: Any, **options: Any) -> DualBranchReID:
    torch.manual_seed(2)
    encoder = copy.deepcopy(networks.content_encoder)
    layer4 = torch.nn.Sequential(BasicBlock(encoder.model.channels[-1], 40, 2, torch.nn.BatchNorm2d))
    sensitive = SensitiveBranch(layer4, ClassBlock(40, NUM_CLASSES, embedding_dim=6))
    joined = ClassBlock(40 + encoder.identity_dim, NUM_CLASSES, embedding_dim=6)
    return DualBranchReID(encoder, sensitive, joined, **options)


class TestBranches:
    def test_features_and_logits(self, networks: Any, images: Tensor) -> None:
        model = small_model(networks).eval()
        outputs = model(images)
        assert torch.equal(
            outputs.features["fuse"], torch.cat([outputs.features["sen"], outputs.features["inv"]], dim=1)
        )
        assert all(logits.shape == (4, NUM_CLASSES) for logits in outputs.logits.values())
        torch.testing.assert_close(model.robust_logits(images), outputs.logits["inv"])
        inv, sen = model.embed(images, "inv"), model.embed(images, "sen")
        torch.testing.assert_close(model.embed(images), torch.cat([sen, inv], dim=1))
        torch.testing.assert_close(sen, model.sensitive.classifier.embed(outputs.features["sen"]))
        maps = model.content_encoder.maps(images, trunk_grad=False)
        peak = model.sensitive.model["layer4"](maps[-1]).amax(dim=(2, 3))
        torch.testing.assert_close(outputs.features["sen"], peak)
        with pytest.raises(ConfigError, match=r"DIL feature: got 'fused'.*Did you mean 'fuse'"):
            model.embed(images, "fused")

    def test_everything_that_takes_part_is_trained(self, networks: Any, images: Tensor) -> None:
        model = small_model(networks)
        outputs = model(images)
        terms = stage2_terms(outputs, model.robust_logits(images.flip(3)), torch.tensor([0, 0, 1, 1]))
        torch.stack(list(terms.values())).sum().backward()
        missing = {name for name, value in model.named_parameters() if value.grad is None}
        assert missing == {name for name, _ in model.named_parameters() if "head.content" in name}
        assert missing == {name for name, value in model.named_parameters() if not value.requires_grad}

    def test_the_robust_branch_alone_moves_no_other_statistics(self, networks: Any, images: Tensor) -> None:
        model = small_model(networks)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.robust_logits(images)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all(name.startswith("content_encoder") for name in moved)

    def test_attention_is_a_factor_without_gradient_of_its_own_input(self, networks: Any, images: Tensor) -> None:
        torch.manual_seed(3)
        plain = small_model(networks).eval()
        attended = small_model(networks, attention=DegradationAttention(feature_dim=40, code_dim=4, hidden=6)).eval()
        feature = plain(images).features["sen"]
        factor = attended.attention(feature)
        assert ((factor > 0) & (factor < 1)).all()
        found = attended(images).features["sen"]
        torch.testing.assert_close(found, feature * factor)


class TestTerms:
    def test_no_replay_leaves_the_term_out(self, networks: Any, images: Tensor) -> None:
        outputs, labels = small_model(networks)(images), torch.tensor([0, 0, 1, 1])
        assert set(stage2_terms(outputs, None, labels)) == {"fuse", "inv", "sen"}
        replayed = outputs.logits["inv"].detach()
        terms = stage2_terms(outputs, replayed, labels, Stage2Options(replay_identity=2.0))
        expected = 2 * torch.nn.functional.cross_entropy(replayed, labels)
        torch.testing.assert_close(terms["replay_identity"], expected)
        assert terms["replay"].item() == pytest.approx(0, abs=1e-6)
        assert "replay" not in stage2_terms(outputs, replayed, labels, Stage2Options(replay_weight=0))

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match=r"stage 2 inv_loss: got 'ce_trii'.*Did you mean 'ce_tri'"):
            Stage2Options(inv_loss="ce_trii")
        with pytest.raises(ConfigError, match=r"stage 2 replay_loss: got 'mse'"):
            Stage2Options(replay_loss="mse")
        with pytest.raises(ConfigError, match=r"DIL stage 2 weights: .*expected numbers >= 0"):
            Stage2Options(fuse_weight=-1)


class TestSeverity:
    def test_recorded_codes_along_a_direction(self) -> None:
        """Ten values from -3 to 3; the direction itself follows from the difference of two of them."""
        codes = torch.from_numpy(recorded("codes")["manip.linear(-3,3,10)"])
        direction = (codes[0, 9] - codes[0, 0]) / 6
        assert direction.norm().item() == pytest.approx(1)
        found = with_severity(codes[:, 4], direction, torch.linspace(-3, 3, 10, dtype=torch.float64))
        np.testing.assert_allclose(found.numpy(), codes.numpy(), atol=1e-6)  # their ten values are float32

    def test_values_are_reached_and_the_rest_of_the_code_stays(self) -> None:
        codes = torch.randn(5, 8, dtype=torch.float64, generator=torch_stream(0))
        direction = torch.nn.functional.normalize(torch.randn(8, dtype=torch.float64, generator=torch_stream(1)), dim=0)
        values = torch.tensor([-1.0, 2.0], dtype=torch.float64)
        moved = with_severity(codes, direction, values)
        for index, value in enumerate(values):
            torch.testing.assert_close(severity(moved[:, index], direction), value.expand(5))
            rest = moved[:, index] - codes
            torch.testing.assert_close(rest, (rest @ direction)[:, None] * direction)

    def test_the_machine_is_scikit_learn_s(self) -> None:
        from sklearn.svm import LinearSVC

        target = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(30)
        points = torch.randn(60, 5, dtype=torch.float64, generator=torch_stream(2))
        points[:, 1] += 0.7 * target
        for cost in (0.05, 1.0, 50.0):
            reference = LinearSVC(
                C=cost, loss="squared_hinge", dual=True, tol=1e-10, max_iter=2_000_000, random_state=0
            )
            reference.fit(points.numpy(), target.numpy())
            expected = np.append(reference.coef_[0], reference.intercept_)
            np.testing.assert_allclose(linear_svm(points, target, cost).numpy(), expected, atol=1e-5)

    def test_the_planted_direction_is_found(self) -> None:
        codes = torch.randn(4000, 16, generator=torch_stream(4))
        planted = torch.zeros(16)
        planted[3] = 1
        quality = -codes @ planted + 0.2 * torch.randn(4000, generator=torch_stream(5))
        found = fit_severity(codes, quality, torch_stream(6))
        assert found.direction @ planted > 0.95
        assert found.accuracy == 1
        assert found.direction.norm().item() == pytest.approx(1)
        nonsense = fit_severity(codes, torch.randn(4000, generator=torch_stream(7)), torch_stream(6))
        assert nonsense.accuracy < 0.75

    def test_refusals(self) -> None:
        codes = torch.zeros(20, 3)
        with pytest.raises(DataError, match="0 best and 0 worst of 20 codes"):
            fit_severity(codes, torch.zeros(20), torch_stream(0))
        with pytest.raises(DataError, match=r"DIL severity: codes and quality: got \(\(20, 3\), \(19,\)\)"):
            fit_severity(codes, torch.zeros(19), torch_stream(0))
        with pytest.raises(DataError, match="finite numbers"):
            fit_severity(codes, torch.full((20,), math.nan), torch_stream(0))
