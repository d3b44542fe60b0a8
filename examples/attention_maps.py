"""Attention maps of a fused model, beside timm's AttentionExtract on an unfused one.

A fused attention never holds its weights, so hooks on `attn_drop` see nothing: `why_not` says so,
and `attention_maps` makes the weights beside the ops.
"""

import timm
import torch
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

from maect_fast.nn import attention_maps, fuse, why_not


def main() -> int:
    """0 if the maps are timm's."""
    torch.manual_seed(0)
    # timm holds the weights only without its own fused attention.
    set_fused_attn(False)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **size).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = AttentionExtract(model, method="hook")(images)

    maps = attention_maps(fuse(model), images)
    difference = 0.0
    for weights, (name, theirs) in zip(maps, expected.items(), strict=True):
        gap = (weights - theirs).abs().max().item()
        print(f"{name}: {list(weights.shape)}, largest difference {gap:.1e}")
        difference = max(difference, gap)
    print(f"why_not: {next(line for line in why_not(model) if 'attn_drop' in line)}")
    return 0 if difference <= 1e-6 else 1


if __name__ == "__main__":
    raise SystemExit(main())
