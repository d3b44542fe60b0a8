"""Hugging Face's ViT and ViTMAE: `fuse` registers our attention with transformers' interface.

Nothing is replaced inside of the model: `model.config._attn_implementation` names our function
until `unfuse`. The models have random weights; `from_pretrained` gives the same classes.
"""

import copy

import torch
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from maect_fast.nn import attention_maps, fuse, unfuse

SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def pretrain(model: ViTMAEForPreTraining, steps: int = 5) -> list[float]:
    """Masked autoencoding of noise, the same patches masked in every run."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 64, 64, generator=generator)
        loss = model(images, noise=torch.rand(8, 16, generator=generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> int:
    """0 if fused models equal Hugging Face's."""
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**SIZE)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = vit(images).last_hidden_state
        features = fuse(vit)(images).last_hidden_state
    difference = (features - expected).abs().max().item()
    print(f"ViT attends by {vit.config._attn_implementation}: largest difference {difference:.1e}")
    maps = attention_maps(vit, images)
    print(f"attention_maps: {len(maps)} blocks of {list(maps[0].shape)}")
    unfuse(vit)

    mae = ViTMAEForPreTraining(ViTMAEConfig(**SIZE, **DECODER))
    fused = fuse(copy.deepcopy(mae))
    losses, theirs = pretrain(fused), pretrain(mae)
    gap = max(abs(ours - other) for ours, other in zip(losses, theirs, strict=True))
    print(f"ViTMAE, loss {losses[0]:.4f} -> {losses[-1]:.4f}: largest difference {gap:.1e}")
    return 0 if difference <= 1e-5 and gap <= 1e-5 else 1


if __name__ == "__main__":
    raise SystemExit(main())
