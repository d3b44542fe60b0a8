"""A timm ViT in the training loop that you have: `fuse` it, train, `unfuse` it.

Two copies of a model train on the same images, one of them fused. Losses and weights stay the same,
and so do the names in the state dict, so that checkpoints go both ways.
"""

import copy

import timm
import torch
import torch.nn.functional as F

from maect_fast.nn import fuse, unfuse, why_not

STEPS, BATCH_SIZE, CLASSES = 20, 16, 4


def images_and_labels(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright quarter, whose number is the label."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, generator=generator)
    labels = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[:, top : top + 16, left : left + 16] += 1
    return images, labels


def train(model: torch.nn.Module) -> list[float]:
    """The loop as it was: nothing in it knows of maect-fast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        images, labels = images_and_labels(step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> int:
    """0 if the fused model trained as timm's own."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **size)
    before = list(model.state_dict())

    fused = fuse(copy.deepcopy(model))
    for line in why_not(fused):
        print(f"why_not: {line}")

    losses, expected = train(fused), train(model)
    unfuse(fused)
    names_stayed = list(fused.state_dict()) == before
    pairs = zip(fused.state_dict().values(), model.state_dict().values(), strict=True)
    difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, timm's own {expected[-1]:.3f}")
    print(f"weights after {STEPS} updates: largest difference {difference:.1e}")
    print(f"names in the state dict {'stayed' if names_stayed else 'CHANGED'}")
    return 0 if names_stayed and difference <= 1e-6 and losses[-1] < losses[0] else 1


if __name__ == "__main__":
    raise SystemExit(main())
