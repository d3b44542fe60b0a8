"""open_clip's ClipLoss and ours in the same loop: one import is swapped, the calls stay."""

import copy
import math

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maect_fast.nn import ClipLoss  # instead of: from open_clip import ClipLoss

STEPS, BATCH_SIZE, DIM = 20, 64, 32


class TwoTowers(nn.Module):
    """Image and text towers of one layer, with open_clip's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(48, DIM), nn.Linear(24, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """What open_clip's models return, with ``output_dict``."""
        return {
            "image_features": F.normalize(self.image(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def train(model: TwoTowers, criterion: nn.Module) -> list[float]:
    """Images and texts are two linear views of the same numbers."""
    views = [torch.randn(16, n, generator=torch.Generator().manual_seed(n)) for n in (48, 24)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        hidden = torch.randn(BATCH_SIZE, 16, generator=torch.Generator().manual_seed(step))
        loss = criterion(**model(hidden @ views[0], hidden @ views[1]), output_dict=True)
        optimizer.zero_grad()
        loss["contrastive_loss"].backward()
        optimizer.step()
        losses.append(loss["contrastive_loss"].item())
    return losses


def main() -> int:
    """0 if both losses train the same model."""
    torch.manual_seed(0)
    model = TwoTowers()
    twin = copy.deepcopy(model)
    losses = train(model, ClipLoss())
    expected = train(twin, open_clip.ClipLoss())
    difference = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    scales = model.logit_scale.item(), twin.logit_scale.item()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, open_clip's {expected[-1]:.4f}")
    print(f"over {STEPS} updates: largest difference {difference:.1e}")
    print(f"logit_scale {scales[0]:.6f}, open_clip's {scales[1]:.6f}")
    return 0 if difference <= 1e-4 and losses[-1] < losses[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
