"""The authors' functions: who calls their `find_nn` and `nnclr_loss_fn` swaps one import.

    from utils.nnclr_util import find_nn
    from losses.nnclr_loss import nnclr_loss_fn

become the import below. Their lines are written out here, to compare.

Source: ml-jku/MAE-CT: utils/nnclr_util.py, losses/nnclr_loss.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from maect_fast.official import find_nn, nnclr_loss_fn

BATCH_SIZE, DIM, QUEUE_SIZE, TEMPERATURE = 64, 128, 4096, 0.15


def their_find_nn(
    projected: Tensor, ids: Tensor, queue: Tensor, queue_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """All similarities at once, own ids by a mask."""
    similarity = F.normalize(projected, dim=-1) @ queue.T
    similarity[queue_ids[None, :] == ids[:, None]] = -1.0
    index = similarity.max(dim=1)[1]
    return index, queue[index]


def their_loss(predicted: Tensor, neighbour: Tensor) -> Tensor:
    """All logits at once."""
    logits = neighbour @ F.normalize(predicted, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits)))


def main() -> int:
    """0 if neighbours are the same, and loss and gradient to rounding."""
    torch.manual_seed(0)
    queue = F.normalize(torch.randn(QUEUE_SIZE, DIM), dim=-1)
    queue_ids = torch.arange(QUEUE_SIZE) % 1000
    projected, ids = torch.randn(BATCH_SIZE, DIM), torch.arange(BATCH_SIZE)
    index, neighbour = find_nn(projected, ids, queue, queue_ids)
    their_index, their_neighbour = their_find_nn(projected, ids, queue, queue_ids)
    same = torch.equal(index, their_index) and torch.equal(neighbour, their_neighbour)
    print(f"find_nn: {BATCH_SIZE} neighbours of {QUEUE_SIZE}, {'all' if same else 'NOT'} the same")

    predicted = (projected + torch.randn(BATCH_SIZE, DIM)).requires_grad_()
    loss, expected = (
        nnclr_loss_fn(predicted, neighbour, TEMPERATURE),
        their_loss(predicted, neighbour),
    )
    grads = [torch.autograd.grad(x, predicted)[0] for x in (loss, expected)]
    difference = max((loss - expected).abs().item(), (grads[0] - grads[1]).abs().max().item())
    print(f"nnclr_loss_fn: {loss.item():.6f}, theirs {expected.item():.6f}")
    print(f"loss and gradient: largest difference {difference:.1e}")
    return 0 if same and difference <= 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
