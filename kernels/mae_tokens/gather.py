"""Public function: pixels of chosen patches; and the checks of images that the loss shares.

Source: arXiv 2111.06377; ml-jku/MAE-CT: models/vit/masked_encoder.py, which embeds all patches.
"""

import torch
from torch import Tensor

from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import (
    FLOATING,
    INDEX,
    check_int,
    check_tensor,
    check_tensors,
    expect,
)
from maect_fast.kernels.mae_tokens import op

__all__ = ["check_images", "gather_patches"]


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Pixels of the chosen patches: rows that ``F.linear(rows, proj.weight.flatten(1))`` embeds.

    Args:
        images: [B, C, H, W] floats of any strides, H and W multiples of K; the only input with a
            gradient, in plain PyTorch: the sum over patches gathered twice.
        ids: [B, N] int32 or int64 in 0..L - 1, counted row by row; the kernel makes NaN of others.
        patch_size: K.
        dtype: of the result, a float; None: that of the images.
        backend: "auto" is "triton" on CUDA but for fp64, else "reference".

    Returns:
        [B, N, C * K * K] contiguous; channels first, as in a convolution's weight.

    Raises:
        ValueError, TypeError: a shape, size or device, a dtype that does not fit.
        RuntimeError: a backend that is not there, or not for these inputs.
    """
    check_tensors(images=images, ids=ids)
    to = images.dtype if dtype is None else dtype
    check_backend("gather_patches", backend, triton=lambda: op.triton_obstacle(images, dtype=to))
    check_images(images, patch_size)
    expect(to in FLOATING, "dtype", "a float", to, TypeError)
    check_tensor("ids", ids, images, INDEX, (images.shape[0], None))
    return op.gather_patches(images, ids, patch_size, to, backend)


def check_images(images: Tensor, patch_size: int) -> int:
    """Refuse what is no image batch of whole patches; returns the numbers of a patch, F."""
    check_int("patch_size", patch_size, 1)
    expect(images.dtype in FLOATING, "images", "floats", images.dtype, TypeError)
    if images.ndim != 4 or any(n % patch_size for n in images.shape[2:]):
        expected = f"[B, C, H, W] with H and W multiples of the patch size {patch_size}"
        raise ValueError(f"images: expected {expected}, got {list(images.shape)}")
    return int(images.shape[1]) * patch_size**2
