"""Stage 1 with tiny networks: phases, the discriminators' own optimizer, options, failures, resuming, learning."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from dil_recorded import recorded
from dil_small import pair, small_networks, small_stage, small_trainer
from torch import Tensor, nn

from qsd_plugin.core.errors import CheckpointError, ConfigError, TrainingError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil import (
    Pair,
    PhaseSchedule,
    Stage1Options,
    Stage1Trainer,
    Stage1Weights,
    dil_networks,
    layers,
    stage1,
)
from qsd_plugin.methods.dil.adam import FlatAdam, stepped_lr
from qsd_plugin.methods.dil.losses import ls_d, r1
from qsd_plugin.methods.dil.stage1 import Stage1
from qsd_plugin.methods.dil.stage1_options import ABLATIONS


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


class TestPhases:
    def test_they_alternate_and_start_paired(self) -> None:
        phases = [PhaseSchedule("unsupervised").phase(iteration) for iteration in range(1, 5)]
        assert phases == ["paired", "unsupervised", "paired", "unsupervised"]

    @pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 4000), (0.3, 1200)])
    def test_a_coin_instead(self, probability: float, expected: int) -> None:
        schedule = PhaseSchedule(paired_probability=probability, seed=3)
        phases = [schedule.phase(iteration) for iteration in range(1, 4001)]
        assert phases.count("paired") == pytest.approx(expected, abs=0 if probability in (0, 1) else 90)
        assert phases == [schedule.phase(iteration) for iteration in range(1, 4001)]
        if 0 < probability < 1:
            other = PhaseSchedule(paired_probability=probability, seed=4)
            assert phases != [other.phase(iteration) for iteration in range(1, 4001)]

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="DIL phase beside paired: got 'paired'; expected 'unpaired' or"):
            PhaseSchedule("paired")
        with pytest.raises(ConfigError, match=r"paired_probability: got 1\.5"):
            PhaseSchedule(paired_probability=1.5)
        with pytest.raises(ConfigError, match=r"DIL phase: got 'pared'.*Did you mean 'paired'"):
            Pair("pared", torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
        with pytest.raises(ConfigError, match="DIL pair: shapes of the images"):
            Pair("paired", torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 8))


class TestAdam:
    @pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.99)])
    def test_it_is_torch_s_with_weight_decay_and_schedule(self, betas: tuple[float, float]) -> None:
        shapes = ((3, 4), (5,), ())
        ours, theirs = (
            [
                torch.randn(shape, dtype=torch.float64, generator=torch_stream(index))
                for index, shape in enumerate(shapes)
            ]
            for _ in range(2)
        )
        adam = FlatAdam(18, lr=0.01, betas=betas, weight_decay=0.1, milestones=(4, 7)).double()
        reference = torch.optim.Adam([part.requires_grad_() for part in theirs], lr=0.01, betas=betas, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.MultiStepLR(reference, (4, 7))
        for step in range(9):
            gradients = [torch.randn(shape, dtype=torch.float64, generator=torch_stream(step, "g")) for shape in shapes]
            for part, gradient in zip(theirs, gradients, strict=True):
                part.grad = gradient.clone()
            reference.step()
            schedule.step()
            adam.step(ours, gradients)
            for own, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(own, expected.detach(), rtol=1e-12, atol=1e-14)
        assert adam.steps.item() == 9

    def test_recorded_learning_rates(self) -> None:
        golden, compared = recorded("codes"), 0
        for name, first in (("lr.dil", 20_000), ("lr.dil_half", 10_000)):
            milestones = (first, first * 3 // 2, first * 7 // 4)
            for entry in (key for key in golden if key.startswith(f"{name}/")):
                iteration = int(entry.rsplit("/")[-1])
                assert stepped_lr(1e-4, iteration - 1, milestones) == pytest.approx(golden[entry].item()), entry
                compared += 1
        assert compared == 8

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="Adam lr, betas, weight_decay, eps"):
            FlatAdam(3, betas=(1.0, 0.9))
        with pytest.raises(ConfigError, match=r"Adam milestones: got \(3, 2\)"):
            FlatAdam(3, milestones=(3, 2))


class TestDiscriminatorStep:
    @pytest.mark.parametrize("phase", ["paired", "unpaired", "unsupervised"])
    def test_a_forward_moves_them_and_nothing_else_of_the_weights(self, phase: str) -> None:
        stage = small_stage()
        before = snapshot(stage)
        result = stage(pair(phase))
        weights = [
            name for name in moved(stage, before) if not name.endswith(("running_mean", "running_var", "tracked"))
        ]
        changed = {name.split(".")[0] for name in weights}
        assert changed == {"real_discriminator", "degradation_discriminator", "adam"}
        assert stage.iteration == 1
        total(result.terms).backward()
        for network in (stage.real_discriminator, stage.degradation_discriminator, stage.content_encoder.model):
            assert not any(parameter.requires_grad for parameter in network.parameters())
            assert all(parameter.grad is None for parameter in network.parameters())

    def test_without_gradients_or_training_nothing_moves(self) -> None:
        stage = small_stage()
        before = snapshot(stage.eval())
        stage(pair("unpaired"))
        assert moved(stage, before) == set()
        stage.train()
        with torch.no_grad():
            result = stage(pair("paired"))
        assert result.stats == {}
        assert not any("discriminator" in name or "adam" in name for name in moved(stage, before))

    def test_the_generator_meets_the_updated_discriminators(self) -> None:
        stage = small_stage(dropout=0.0)
        batch = pair("unpaired")
        frozen = small_stage(dropout=0.0)
        result = stage(batch)
        old = frozen.generator_terms(batch, frozen.render(batch))
        frozen = small_stage(dropout=0.0)
        updated = {name: value for name, value in stage.state_dict().items() if "discriminator" in name}
        frozen.load_state_dict(updated, strict=False)
        new = frozen.generator_terms(batch, frozen.render(batch))
        assert torch.equal(result.terms["realness"], new["realness"])
        assert not torch.equal(result.terms["realness"], old["realness"])
        assert torch.equal(result.terms["self"], old["self"])

    def test_the_penalty_is_taken_in_whole_pairs_of_iterations(self) -> None:
        """With alternating phases, counting iterations would give all penalties to one phase."""
        seen = []

        class Watched(Stage1):
            def discriminator_terms(self, *args: Any, penalty: float, **options: Any) -> dict[str, Tensor]:
                seen.append(penalty)
                return super().discriminator_terms(*args, penalty=penalty, **options)

        stage = Watched(small_networks(), options=Stage1Options(r1_every=3))
        for iteration in range(1, 9):
            stage(pair(PhaseSchedule().phase(iteration)))
        assert seen == [0, 0, 0, 0, 3, 3, 0, 0]

    def test_the_penalty_is_a_summand(self) -> None:
        stage, batch = small_stage(), pair("unpaired")
        for parameter in stage.real_discriminator.parameters():
            parameter.requires_grad_(True)
        rendered = stage.render(batch)
        without, once, thrice = (
            stage.discriminator_terms(batch, rendered, penalty=factor)["discriminator_realness"] for factor in (0, 1, 3)
        )
        images = [batch.better.clone().requires_grad_(), batch.worse.clone().requires_grad_()]
        maps = [stage.real_discriminator(part) for part in images]
        fakes = [stage.real_discriminator(part.detach()) for part in (rendered.ab, rendered.ba)]
        torch.testing.assert_close(without, ls_d(fakes[0], maps[0]) + ls_d(fakes[1], maps[1]))
        penalties = 0.01 * (r1(maps[0], images[0]) + r1(maps[1], images[1]))
        torch.testing.assert_close(once - without, penalties, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(thrice - without, 3 * penalties, rtol=1e-3, atol=1e-6)

    def test_the_coin_is_fair_and_seeded(self) -> None:
        stage = small_stage()
        drawn = [stage.shown_fake(iteration) for iteration in range(2000)]
        assert drawn.count("ab") == pytest.approx(1000, abs=80)
        stage.seed = 1
        assert drawn != [stage.shown_fake(iteration) for iteration in range(2000)]


class TestOptions:
    def test_every_ablation_leaves_out_its_term_only(self) -> None:
        for phase in ("paired", "unpaired"):
            batch, options = pair(phase), {"predictions_agree": True}
            whole = set(small_stage(**options)(batch).terms)
            for name in (entry for entry in ABLATIONS if entry.startswith(f"{phase}.")):
                term = name.split(".")[1]
                left = small_stage(ablate=(name,), **options)(batch)
                assert set(left.terms) == whole - {term}
                assert set(left.stats) >= {"discriminator_realness", "discriminator_degradation"}

    def test_which_parameters_a_phase_leaves_without_gradient(self) -> None:
        for phase, expected in (("paired", {"head.identity", "classifier"}), ("unpaired", {"conv3_sync"})):
            stage = small_stage()
            total(stage(pair(phase)).terms).backward()
            parts = [stage.content_encoder, stage.degradation_encoder, stage.generator]
            missing = {name for part in parts for name, value in part.named_parameters() if value.grad is None}
            missing = {name for name in missing if not name.startswith("model.")}
            assert missing, phase
            assert all(any(name.startswith(prefix) for prefix in expected) for name in missing), missing

    @pytest.mark.parametrize("through", [False, True])
    def test_gradient_of_the_cycle_through_the_trunk(self, through: bool) -> None:
        """Cut at the trunk, content of a rendered image does not pull at the image."""
        ablate = [name for name in ABLATIONS if name != "unpaired.cross"]
        stage = small_stage(cycle_through_trunk=through, ablate=ablate)
        nn.init.zeros_(stage.degradation_encoder.conv3_real.weight)  # the way through the codes is closed
        stage.degradation_encoder.requires_grad_(False)
        rendered = stage.render(pair("unpaired"))
        images = rendered.ab
        images.retain_grad()
        total(stage.generator_terms(pair("unpaired"), rendered)).backward()
        reached = images.grad is not None and images.grad.abs().max().item() > 0
        assert reached == through
        assert all(parameter.grad is None for parameter in stage.content_encoder.model.parameters())

    def test_batch_statistics_of_the_trunk(self) -> None:
        for frozen in (False, True):
            stage = small_stage(freeze_trunk_norm=frozen)
            before = snapshot(stage)
            stage.train()(pair("unpaired"))
            assert frozen != any(name.startswith("content_encoder.model") for name in moved(stage, before))

    def test_rendered_images_move_the_identity_statistics_unless_told_not_to(self) -> None:
        counts = []
        for rendered in (True, False):
            stage = small_stage(rendered_identity=rendered)
            stage(pair("unpaired"))
            counts.append(stage.content_encoder.head.identity[4].norm.num_batches_tracked.item())
        assert counts == [4, 2]

    def test_unknown_labels_of_the_worse_images_count_the_better_ones_twice(self) -> None:
        stage, batch = small_stage(dropout=0.0).eval(), pair("unpaired")
        rendered = stage.render(batch)
        hazy = Pair("unpaired", batch.better, batch.worse, batch.better_labels)
        logits = stage.content_encoder.classifier(rendered.identity_a)
        expected = torch.nn.functional.cross_entropy(logits, batch.better_labels)
        torch.testing.assert_close(stage.generator_terms(hazy, rendered)["identity"], expected)  # 0.5 x 2

    def test_no_labels(self) -> None:
        batch = pair("unpaired")
        bare = Pair("unpaired", batch.better, batch.worse)
        with pytest.raises(
            ConfigError, match=r"identities of the better images of an unpaired batch are missing.*to 0"
        ):
            small_stage()(bare)
        assert "identity" not in small_stage(weights=Stage1Weights(identity=0))(bare).terms

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match=r"DIL ablation: got 'paired\.contents'.*Did you mean 'paired\.content'"):
            Stage1Options(ablate=("paired.contents",))
        with pytest.raises(ConfigError, match=r"DIL pixel loss: got 'l3'"):
            Stage1Options(pixel="l3")
        with pytest.raises(ConfigError, match="weights >= 0 and r1_every >= 1"):
            Stage1Options(r1_every=0)
        with pytest.raises(ConfigError, match="weights >= 0"):
            Stage1Options(weights=Stage1Weights(content=-1))
        with pytest.raises(ConfigError, match="DIL width: got 0"):
            dil_networks(3, width=0)


class TestNotFinite:
    def test_a_term_of_the_discriminators_is_named_and_nothing_is_updated(self) -> None:
        stage = small_stage()
        stage.degradation_discriminator.nets[0][9].bias.data.fill_(torch.nan)
        before = snapshot(stage)
        with pytest.raises(
            TrainingError, match=r"paired phase, discriminators: .*discriminator_degradation.* not finite"
        ):
            stage(pair("paired"))
        unchanged = {name for name in moved(stage, before) if "discriminator" in name or "adam" in name}
        assert unchanged == {name for name, value in before.items() if value.isnan().any()}  # NaN differs from NaN
        assert not any(parameter.requires_grad for parameter in stage.real_discriminator.parameters())

    def test_a_term_of_the_generator_is_named(self) -> None:
        stage = small_stage()
        stage.content_encoder.classifier.classifier[0].bias.data[0] = torch.inf
        with pytest.raises(TrainingError, match=r"unpaired phase, generator: identity not finite \(identity = "):
            stage(pair("unpaired"))


def saved(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


class TestTrainer:
    def test_a_resumed_run_goes_on_exactly(self) -> None:
        """Phases by a coin, dropout on, another seed of the weights before loading."""
        schedule = PhaseSchedule("unsupervised", paired_probability=0.5, seed=2)
        torch.manual_seed(5)
        whole, states = small_trainer(schedule), []
        curve = []
        for index in range(6):
            states.append(saved(whole.state_dict()))
            curve.append(whole.step(pair(whole.next_phase(), seed=index)))
        resumed = small_trainer(schedule, seed=9)
        resumed.load_state_dict(states[3])
        for index in range(3, 6):
            again = resumed.step(pair(resumed.next_phase(), seed=index))
            assert again.keys() == curve[index].keys()
            assert all(torch.equal(again[name], value) for name, value in curve[index].items())
        for name, value in whole.stage.state_dict().items():
            assert torch.equal(value, resumed.stage.state_dict()[name]), name

    def test_the_learning_rate_falls(self) -> None:
        trainer = small_trainer()
        trainer.milestones = trainer.stage.adam.milestones = (1,)
        for index in range(2):
            trainer.step(pair(trainer.next_phase(), seed=index))
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)

    def test_refusals(self) -> None:
        trainer = small_trainer()
        with pytest.raises(ConfigError, match=r"iteration 1: phase: got 'unpaired'; expected 'paired'.*next_phase"):
            trainer.step(pair("unpaired"))
        other = small_trainer(PhaseSchedule(seed=1))
        with pytest.raises(CheckpointError, match="DIL stage 1 state: phases and seed"):
            other.load_state_dict(trainer.state_dict())


@pytest.mark.parametrize("phase", ["paired", "unpaired", "unsupervised"])
def test_half_precision_around_the_step(phase: str) -> None:
    """The discriminators' step does not see it, and all losses are float32."""
    plain, mixed = small_stage(dropout=0.0), small_stage(dropout=0.0)
    batch = pair(phase)
    expected = plain(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixed(batch)
    for name, term in found.terms.items():
        assert term.dtype == torch.float32, name
        torch.testing.assert_close(term, expected.terms[name], rtol=0.1, atol=0.1)
    assert found.stats["discriminator_realness"].dtype == torch.float32
    if phase != "unsupervised":
        key = "discriminator_degradation"  # of real images only: nothing that was rendered in half precision
        torch.testing.assert_close(found.stats[key], expected.stats[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("phase", ["paired", "unpaired", "unsupervised"])
def test_discriminators_penalty_and_norms_see_single_precision_inside_autocast(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every convolution of their step, what the penalty is of, and the statistics of the generator's two norms."""
    stage = small_stage()
    seen: dict[str, set[torch.dtype]] = {key: set() for key in ("step", "judged", "penalty", "adain", "norm")}

    def convolved(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        learning = module.weight.requires_grad or not torch.is_grad_enabled()  # believed_order is without gradient
        seen["step" if learning else "judged"] |= {inputs[0].dtype, output.dtype}

    for judge in (stage.real_discriminator, stage.degradation_discriminator):
        for module in judge.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(convolved)

    def penalised(maps: list[Tensor], images: Tensor, **options: Any) -> Tensor:
        seen["penalty"] |= {images.dtype, *(scores.dtype for scores in maps)}
        return r1(maps, images, **options)

    def normalised(x: Tensor, scale: Tensor | None, shift: Tensor | None, *, over: str, **options: Any) -> Tensor:
        if scale is not None:
            seen["adain" if over == "positions" else "norm"] |= {x.dtype, scale.dtype}
        return normalise(x, scale, shift, over=over, **options)

    normalise = layers.normalise
    monkeypatch.setattr(stage1, "r1", penalised)
    monkeypatch.setattr(layers, "normalise", normalised)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stage(pair(phase))
    assert torch.bfloat16 in seen.pop("judged")  # the generator's side is not an island
    assert seen == {key: {torch.float32} for key in seen}


def test_it_learns_to_reconstruct() -> None:
    """Four images: both ways of rendering them come closer, and contents of sharp and blurred copies draw together."""
    stage = Stage1(small_networks(seed=1, dropout=0.0), lr=1e-3)
    trainer = Stage1Trainer(stage, PhaseSchedule(paired_probability=1.0), lr=1e-2, betas=(0.5, 0.99))
    batch = pair("paired", 4)
    curve = [trainer.step(batch) for _ in range(20)]
    for name, share in (("self", 0.9), ("cross", 0.9), ("content", 0.4), ("discriminator_realness", 0.8)):
        assert curve[-1][name] < share * curve[0][name], name
