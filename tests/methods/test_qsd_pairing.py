"""Pairs within a batch against loops over all pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.qsd import best_vs_rest_pairs, check_blocks, inbatch_pairs

NAN = float("nan")


def as_list(pairs: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, int]]:
    assert all(index.dtype == torch.int64 for index in pairs)
    return list(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))


def test_all_pairs_of_each_identity_once_in_order():
    identities = torch.tensor([7, 3, 7, 9, 3, 7])
    expected = [(i, j) for i, j in itertools.combinations(range(6), 2) if identities[i] == identities[j]]
    assert expected == [(0, 2), (0, 5), (1, 4), (2, 5)]
    assert as_list(inbatch_pairs(identities, torch.rand(6))) == expected


@pytest.mark.parametrize("num_instances", [1, 2, 4])
def test_known_blocks_give_the_same_pairs(num_instances):
    identities = torch.arange(5, -1, -1).repeat_interleave(num_instances)
    quality = torch.rand(len(identities), generator=torch_stream(0))
    for mode in ("all", "best_vs_rest"):
        general = as_list(inbatch_pairs(identities, quality, mode=mode))
        fixed = as_list(inbatch_pairs(identities, quality, mode=mode, num_instances=num_instances))
        assert fixed == general
        per_identity = num_instances * (num_instances - 1) // 2 if mode == "all" else num_instances - 1
        assert len(fixed) == 6 * per_identity


def test_best_vs_rest():
    identities = torch.tensor([7, 3, 7, 9, 3, 7])
    quality = torch.tensor([10.0, 80.0, 30.0, 5.0, 20.0, 20.0])
    assert as_list(best_vs_rest_pairs(identities, quality)) == [(2, 0), (1, 4), (2, 5)]


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ([50.0, 50.0, 40.0], [(0, 1), (0, 2)]),  # the first of equal labels
        ([NAN, 10.0, float("inf")], [(1, 0), (1, 2)]),  # labels that are not finite are never best
        ([NAN, NAN, NAN], [(0, 1), (0, 2)]),
    ],
)
def test_best_with_ties_and_missing_labels(quality, expected):
    # A better image of another identity comes first: it must not be taken for the best.
    identities, labels = torch.tensor([1, 1, 1, 2, 2, 2]), torch.tensor([99.0, 1.0, 1.0, *quality])
    expected = [(0, 1), (0, 2)] + [(best + 3, rest + 3) for best, rest in expected]
    assert as_list(best_vs_rest_pairs(identities, labels)) == expected
    assert as_list(best_vs_rest_pairs(identities, labels, num_instances=3)) == expected


@pytest.mark.parametrize("mode", ["all", "best_vs_rest"])
def test_without_repeated_identities_there_are_no_pairs(mode):
    for size in (0, 3):
        assert as_list(inbatch_pairs(torch.arange(size), torch.rand(size), mode=mode)) == []


@pytest.mark.parametrize("mode", ["all", "best_vs_rest"])
def test_known_blocks_do_not_wait_for_the_device(mode):
    """Fake tensors have no data: a shape that depends on it raises. (On "meta" the block check is off, as on a GPU.)"""
    with FakeTensorMode():
        identities = torch.empty(8, dtype=torch.int64, device="meta")
        first, second = inbatch_pairs(identities, torch.empty(8, device="meta"), mode=mode, num_instances=4)
        assert first.shape == second.shape == ((12,) if mode == "all" else (6,))
        assert first.device.type == second.device.type == "meta"


def test_wrong_input_is_named():
    identities, quality = torch.tensor([1, 1, 2, 1]), torch.rand(4)
    with pytest.raises(DataError, match=r"Block 1 of the batch: got \[2, 1\]; expected 2 images of one identity"):
        inbatch_pairs(identities, quality, num_instances=2)
    with pytest.raises(DataError, match="Block 1"):
        check_blocks(identities, 2)
    with pytest.raises(ConfigError, match=r"num_instances\): got 3; expected a divisor of the batch size 4"):
        inbatch_pairs(identities, quality, num_instances=3)
    with pytest.raises(ConfigError, match="pairing mode: got 'best'"):
        inbatch_pairs(identities, quality, mode="best")
    with pytest.raises(ConfigError, match=r"got \(\(4,\), \(3,\)\)"):
        inbatch_pairs(identities, quality[:3])
