"""FlopCounterMode counts the ops by the formulas of their READMEs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maect_fast.kernels import enqueue, info_nce, queue_topk
from maect_fast.testing import random_queue, unit_rows


def test_search() -> None:
    state = random_queue(31, 8, num_ids=62, num_classes=3)
    with FlopCounterMode(display=False) as counter:
        queue_topk(unit_rows(2, 5, 8), state, k=3)
    assert counter.get_total_flops() == 2 * (2 * 5 * 31 * 8)


def test_enqueue_multiplies_no_matrices() -> None:
    state = random_queue(31, 8, num_ids=62, num_classes=3)
    with FlopCounterMode(display=False) as counter:
        enqueue(state, unit_rows(5, 8))
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_loss(transposed: bool) -> None:
    predicted, neighbour = unit_rows(2, 5, 8).requires_grad_(), unit_rows(2, 5, 8, seed=1)
    with FlopCounterMode(display=False) as counter:
        loss = info_nce(predicted, neighbour, temperature=0.2, transposed=transposed)
        assert counter.get_total_flops() == 2 * 2 * 5 * 5 * 8
        torch.autograd.grad(loss, predicted)
    # The backward pass computes the logits again.
    assert counter.get_total_flops() == 3 * (2 * 2 * 5 * 5 * 8)


def test_loss_with_predictions_of_one_rank_only() -> None:
    """n local predictions meet the P neighbours of all ranks."""
    predicted, neighbour = unit_rows(2, 3, 8), unit_rows(2, 12, 8, seed=1)
    arguments = (predicted, neighbour, torch.tensor(0.2), 0, False, False, "auto")
    with FlopCounterMode(display=False) as counter:
        torch.ops.maect_fast.info_nce_stats(*arguments)
    assert counter.get_total_flops() == 2 * 2 * 3 * 12 * 8
