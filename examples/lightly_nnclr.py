"""lightly's NNCLR loop: its memory bank and NTXentLoss beside our queue and losses.

Two swaps. The first computes what lightly's loop does: NTXentLoss has negatives of the same view
(neighbours against neighbours, predictions against predictions), which the NNCLR paper's loss has
not. The second is the paper's and MAE-CT's: a neighbour drawn from the k nearest, the own image of
the last epoch left out, negatives of the other view alone.
"""

import copy
from collections.abc import Callable

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule
from torch import Tensor, nn

from maect_fast.kernels import symmetric_info_nce
from maect_fast.nn import FeatureQueue, NNCLRLoss

STEPS, BATCH_SIZE, DIM, QUEUE_SIZE, TEMPERATURE = 10, 32, 32, 256, 0.1


class NNCLR(nn.Module):
    """The model of lightly's tutorial, with a small backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.ReLU())
        self.projection_head = NNCLRProjectionHead(64, 64, DIM)
        self.prediction_head = NNCLRPredictionHead(DIM, 64, DIM)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Projections, without gradient, and predictions."""
        projected = self.projection_head(self.backbone(images))
        return projected.detach(), self.prediction_head(projected)


def two_views(step: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of the same images."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH_SIZE, 3, 8, 8, generator=generator)
    noise = torch.randn(2, *images.shape, generator=generator)
    return images + 0.2 * noise[0], images + 0.2 * noise[1]


def train(model: NNCLR, loss_of: Callable[..., Tensor]) -> list[float]:
    """The loop of lightly's tutorial; the loss gets projections and predictions of both views."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        (z0, p0), (z1, p1) = (model(view) for view in two_views(step))
        loss = loss_of(step, z0, p0, z1, p1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> int:
    """0 if the first swap trains as lightly does, and the second one learns."""
    torch.manual_seed(0)
    model = NNCLR()
    queue = FeatureQueue(QUEUE_SIZE, DIM)
    memory_bank = NNMemoryBankModule(size=(QUEUE_SIZE, DIM))
    memory_bank.bank.copy_(queue.queue)
    criterion = NTXentLoss(temperature=TEMPERATURE)

    def lightlys(_: int, z0: Tensor, p0: Tensor, z1: Tensor, p1: Tensor) -> Tensor:
        n0, n1 = memory_bank(z0, update=False), memory_bank(z1, update=True)
        return (criterion(n0, p1) + criterion(n1, p0)) / 2

    nearest = torch.zeros(2, BATCH_SIZE, dtype=torch.int64)  # rank 0 of 1

    def ours(_: int, z0: Tensor, p0: Tensor, z1: Tensor, p1: Tensor) -> Tensor:
        # One search for both views; the bank is neither copied nor normalised anew.
        n0, n1 = queue.search(torch.stack((z0, z1)), k=1, pick=nearest).picked_neighbour
        queue.enqueue(z1)
        options = {"temperature": TEMPERATURE, "same_view": True}
        return (symmetric_info_nce(n0, p1, **options) + symmetric_info_nce(n1, p0, **options)) / 2

    papers_loss = NNCLRLoss(queue_size=QUEUE_SIZE, dim=DIM, topk=5, temperature=TEMPERATURE)

    def papers(step: int, z0: Tensor, p0: Tensor, z1: Tensor, p1: Tensor) -> Tensor:
        return papers_loss(torch.stack((z0, z1)), torch.stack((p0, p1)), step=step).loss

    losses = {
        name: train(copy.deepcopy(model), loss_of)
        for name, loss_of in (("lightly", lightlys), ("ours", ours), ("paper's", papers))
    }
    for name, values in losses.items():
        print(f"{name:8} loss {values[0]:.4f} -> {values[-1]:.4f}")
    pairs = zip(losses["lightly"], losses["ours"], strict=True)
    difference = max(abs(one - other) for one, other in pairs)
    print(f"lightly and ours over {STEPS} updates: largest difference {difference:.1e}")
    print("the paper's loss has no negatives of the same view, so it is another number")
    return 0 if difference <= 1e-4 and losses["paper's"][-1] < losses["paper's"][0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
