"""A fused model in `torch.export`, with any batch size, and in `torch.func`, sample by sample."""

import timm
import torch
from torch import Tensor

from maect_fast.nn import fuse


def main() -> int:
    """0 if the exported program and the gradients per sample equal the eager model's."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    model = fuse(timm.create_model("vit_tiny_patch16_224", num_classes=5, **size)).eval()

    batch = torch.export.Dim("batch")
    example = (torch.randn(2, 3, 32, 32),)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
    differences = []
    for num_images in (1, 7):
        images = torch.randn(num_images, 3, 32, 32)
        with torch.no_grad():
            difference = (program.module()(images) - model(images)).abs().max().item()
        print(f"exported for 2 images, run on {num_images}: largest difference {difference:.1e}")
        differences.append(difference)

    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    images = torch.randn(4, 3, 32, 32)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    difference = 0.0
    for i, image in enumerate(images):
        one = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for grads, expected in zip(per_sample.values(), one, strict=True):
            difference = max(difference, (grads[i] - expected).abs().max().item())
    print(f"gradients of {len(images)} samples by vmap: largest difference {difference:.1e}")
    return 0 if max(differences) <= 1e-6 and difference <= 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
