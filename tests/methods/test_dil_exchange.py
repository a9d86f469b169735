"""Contents and codes put together anew, the axis of degradation, and clean codes: closed forms on small numbers."""

from __future__ import annotations

import pytest
import torch

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.methods.dil import Generator
from qsd_plugin.methods.dil.clean_codes import CleanCodes, cluster
from qsd_plugin.methods.dil.exchange import degradation_axis, render, render_all


def test_every_content_meets_every_code() -> None:
    torch.manual_seed(0)
    generator = Generator(content_dim=8, code_dim=4, hidden=8).eval()
    contents, codes = torch.randn(3, 8, 5, 6), torch.randn(2, 4)
    images = render_all(generator, contents, codes)
    assert images.shape == (3, 2, 3, 20, 24)
    for row in range(3):
        for column in range(2):
            with torch.no_grad():
                alone = generator(contents[row : row + 1], codes[column : column + 1])[0]
            torch.testing.assert_close(images[row, column], alone, rtol=1e-4, atol=1e-5)
    in_parts = render(generator, contents, codes[[0, 1, 0]], batch=2)
    torch.testing.assert_close(in_parts, images[[0, 1, 2], [0, 1, 0]], rtol=1e-4, atol=1e-5)


def test_the_axis_counts_from_the_clean_to_the_degraded_centre() -> None:
    clean = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    degraded = torch.tensor([[2.0, 2.0, 4.0], [2.0, 2.0, 6.0]])
    axis = degradation_axis(clean, degraded)
    assert axis.length.item() == 5.0
    assert axis.direction.tolist() == [0.0, 0.0, 1.0]
    assert axis.position(torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 5.0], [9.0, -3.0, 2.5]])).tolist() == [0, 1, 0.5]
    moved = axis.moved(torch.tensor([[9.0, -3.0, 2.5]]), torch.tensor([0.0, 1.0, 2.0]))
    assert moved.tolist() == [[[9.0, -3.0, 0.0], [9.0, -3.0, 5.0], [9.0, -3.0, 10.0]]]
    general = degradation_axis(torch.randn(9, 5), torch.randn(7, 5) + 1)
    codes = torch.randn(4, 5)
    found = torch.stack([general.position(row) for row in general.moved(codes, torch.tensor([-1.0, 0.25, 3.0]))])
    torch.testing.assert_close(found, torch.tensor([[-1.0, 0.25, 3.0]]).expand(4, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(general.moved(codes, general.position(codes)).diagonal().T, codes)


def test_an_axis_needs_two_different_centres() -> None:
    codes = torch.ones(3, 2)
    with pytest.raises(DataError, match=r"got \(3, 0\); expected at least one code of clean and one of degraded"):
        degradation_axis(codes, codes[:0])
    with pytest.raises(DataError, match="both have the same centre"):
        degradation_axis(codes, codes.clone())


def test_clusters_are_those_that_were_made() -> None:
    true = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = 0.1 * torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(1))
    centres = cluster((true[:, None] + noise).reshape(-1, 2), 3, torch.Generator().manual_seed(0))
    found = centres[torch.cdist(true, centres).argmin(dim=1)]
    torch.testing.assert_close(found, true + noise.mean(dim=1), rtol=1e-4, atol=1e-4)
    assert len(cluster(true.repeat(5, 1), 9, torch.Generator().manual_seed(0))) == 3


def test_the_clean_code_is_the_mean_or_the_nearest_centre() -> None:
    codes = torch.tensor([[0.0, 0.0], [0.0, 2.0], [8.0, 0.0], [8.0, 2.0]])
    own = torch.tensor([[7.0, 9.0], [1.0, -9.0]])
    assert CleanCodes(codes).of(own).tolist() == [[4.0, 1.0], [4.0, 1.0]]
    assert CleanCodes(codes, mode="nearest", centres=2).of(own).tolist() in (
        [[8.0, 1.0], [0.0, 1.0]],
        [[4.0, 2.0], [4.0, 0.0]],  # the other fixed point of Lloyd's algorithm
    )
    assert CleanCodes(codes, mode="nearest", centres=4).of(own).tolist() == [[8.0, 2.0], [0.0, 0.0]]


def test_bad_clean_codes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"Clean code: got 'meen'; expected 'mean' or 'nearest'\. Did you mean 'mean'"
    ):
        CleanCodes(torch.ones(2, 3), mode="meen")
    with pytest.raises(ConfigError, match="Centres of the clean codes: got 0"):
        CleanCodes(torch.ones(2, 3), mode="nearest", centres=0)
    with pytest.raises(DataError, match=r"Clean codes: got \(0, 3\)"):
        CleanCodes(torch.ones(0, 3))
