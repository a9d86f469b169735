"""Samplers that never yield, never start, or divide by zero: refused with a sentence or replaced (S14, S15, S23)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from qsd_plugin.data.samplers import SetWeightedIdentitySampler, check_batch_fits, check_identity_sampling
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together


def _check_identity_samplers() -> Undo:
    from fastreid.data.samplers import triplet_sampler

    return together(
        _check_arguments(triplet_sampler.NaiveIdentitySampler, shared_by_ranks=True),
        _check_arguments(triplet_sampler.BalancedIdentitySampler, shared_by_ranks=False),
    )


def _check_arguments(sampler: Any, *, shared_by_ranks: bool) -> Undo:
    host_init = sampler.__init__

    @functools.wraps(host_init)
    def checked_init(
        self: Any, data_source: Sequence[Any], mini_batch_size: int, num_instances: int, *args: Any, **kwargs: Any
    ) -> None:
        from fastreid.utils import comm

        identities = [item[1] for item in data_source]
        check_identity_sampling(
            identities,
            mini_batch_size,
            num_instances,
            world_size=comm.get_world_size(),
            shared_by_ranks=shared_by_ranks,
        )
        host_init(self, data_source, mini_batch_size, num_instances, *args, **kwargs)

    return replace(sampler, "__init__", checked_init)


class SetReWeightSampler(SetWeightedIdentitySampler):
    """``SAMPLER_TRAIN: SetReWeightSampler``, which takes ``SET_WEIGHT[s]`` shares of every batch from training set s.

    The host's class looks cameras up by number, which its own data sets name by strings, and would then wait for a
    batch longer than what it collects. A set is what the host's camera names begin with, ``market1501`` in
    ``market1501_3``; where cameras are numbers they are the sets, as in the challenge the host's class was written for.

    Args:
        data_source: Training items (path, identity, camera).
        mini_batch_size: Images per batch and process.
        num_instances: Images per identity.
        set_weight: Relative share of each set in the order of ``DATASETS.NAMES``, positive integers.
        seed: Equal in all processes; ``None`` agrees on a random one.
    """

    def __init__(
        self,
        data_source: Sequence[Any],
        mini_batch_size: int,
        num_instances: int,
        set_weight: Sequence[int],
        seed: int | None = None,
    ) -> None:
        from fastreid.utils import comm

        names = [camera.partition("_")[0] if isinstance(camera, str) else camera for _, _, camera in data_source]
        by_number = not any(isinstance(name, str) for name in names)
        order = sorted(set(names)) if by_number else list(dict.fromkeys(names))
        place = {name: index for index, name in enumerate(order)}
        super().__init__(
            [item[1] for item in data_source],
            [place[name] for name in names],
            mini_batch_size,
            num_instances,
            set_weight,
            seed=int(comm.shared_random_seed()) if seed is None else seed,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )


def _replace_set_sampler() -> Undo:
    from fastreid.data import samplers
    from fastreid.data.samplers import triplet_sampler

    return together(
        *(replace(module, "SetReWeightSampler", SetReWeightSampler) for module in (samplers, triplet_sampler))
    )


def _check_size_of_training_set() -> Undo:
    from fastreid.engine.defaults import DefaultTrainer

    host_build: Callable[..., Any] = DefaultTrainer.build_train_loader.__func__

    @functools.wraps(host_build)
    def build_train_loader(cls: type, cfg: Any) -> Any:
        loader = host_build(cls, cfg)
        check_batch_fits(len(loader.dataset), cfg.SOLVER.IMS_PER_BATCH)
        return loader

    return replace(DefaultTrainer, "build_train_loader", classmethod(build_train_loader))


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S14",
        where="data/samplers/triplet_sampler.py:84,241",
        symptom="with too few identities, or a batch that K does not divide, training hangs without a message",
        action="NaiveIdentitySampler and BalancedIdentitySampler refuse what can never fill a batch",
        needed=always,
        apply=_check_identity_samplers,
        proof="test_s14_refuses_what_never_fills_a_batch",
    ),
    Patch(
        row="S15",
        where="data/samplers/triplet_sampler.py:181",
        symptom="SetReWeightSampler raises ValueError on the host's own data sets",
        action="replaced by a sampler that takes SET_WEIGHT shares of every batch from the training sets",
        needed=always,
        apply=_replace_set_sampler,
        proof="test_s15_weights_two_data_sets",
    ),
    Patch(
        row="S23",
        where="engine/defaults.py:218",
        symptom="a training set smaller than a batch ends in ZeroDivisionError",
        action="DefaultTrainer refuses it before the model is built",
        needed=always,
        apply=_check_size_of_training_set,
        proof="test_s23_refuses_set_smaller_than_batch",
    ),
)
