"""Random erasing in two steps, against torchvision's in one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing

from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.erasing import draw_box, erase

SIZE = (256, 128)


def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(3, *SIZE)
    theirs = np.array(
        [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), value=[0.0])[:4] for _ in range(3000)], dtype=float
    )
    stream = numpy_stream(0, "erasing")
    ours = np.array([draw_box(stream, *SIZE, probability=1.0) for _ in range(3000)], dtype=float)
    for column in range(4):
        difference = ours[:, column].mean() - theirs[:, column].mean()
        error = np.hypot(ours[:, column].std(), theirs[:, column].std()) / np.sqrt(3000)
        assert abs(difference) < 4 * error
        for quantile in (0.1, 0.5, 0.9):
            assert abs(np.quantile(ours[:, column], quantile) - np.quantile(theirs[:, column], quantile)) < 8
    assert (ours[:, 0] + ours[:, 2] <= SIZE[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= SIZE[1]).all()


def test_probability_of_erasing():
    stream = numpy_stream(1, "erasing")
    erased = sum(draw_box(stream, *SIZE, probability=0.3) != (0, 0, 0, 0) for _ in range(2000))
    assert abs(erased - 600) < 4 * np.sqrt(2000 * 0.3 * 0.7)


def test_box_that_never_fits_is_none():
    assert draw_box(numpy_stream(0), 1, 1, probability=1.0, area=(1.0, 1.0)) == (0, 0, 0, 0)


@pytest.mark.parametrize("rows", [None, [True, False, True]])
def test_boxes_are_filled_and_nothing_else(rows):
    images = torch.randn(3, 3, 6, 5)
    boxes = torch.tensor([[1, 2, 3, 2], [0, 0, 6, 5], [0, 0, 0, 0]])
    value = torch.tensor([7.0, 8.0, 9.0])
    expected = images.clone()
    for index, (top, left, tall, wide) in enumerate(boxes.tolist()):
        if rows is None or rows[index]:
            expected[index, :, top : top + tall, left : left + wide] = value[:, None, None]
    before = images.clone()
    assert torch.equal(erase(images, boxes, value, None if rows is None else torch.tensor(rows)), expected)
    assert torch.equal(images, before)
