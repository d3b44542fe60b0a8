"""EVA-02 and DINOv3 of timm, whose queries and keys are rotated: `fuse` takes them as they are.

The rotation is timm's own, before our op; output and gradients are compared with timm's.
"""

import timm
import torch
from torch import Tensor, nn

from maect_fast.nn import fuse

MODELS = ("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224")


def output_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Of one forward and backward pass."""
    out = model(images)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


def main() -> int:
    """0 if fused models equal timm's."""
    torch.manual_seed(0)
    largest = 0.0
    for name in MODELS:
        side = 56 if "patch14" in name else 64
        size = {"img_size": side, "embed_dim": 96, "depth": 2, "num_heads": 4, "num_classes": 10}
        model, images = timm.create_model(name, **size), torch.randn(2, 3, side, side)
        expected = output_and_gradients(model, images)
        results = output_and_gradients(fuse(model), images)
        pairs = zip(results, expected, strict=True)
        difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        print(
            f"{name}: output and {len(results) - 1} gradients, largest difference {difference:.1e}"
        )
        largest = max(largest, difference)
    return 0 if largest <= 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
