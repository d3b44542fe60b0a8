"""Public functions: the decoder's input, and the loss.

Source: arXiv 2111.06377; ml-jku/MAE-CT: models/vit/masked_decoder.py, losses/mae_vit_loss.py.
"""

from torch import Tensor

from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import FLOATING, INDEX, check_tensor, check_tensors, expect
from maect_fast.kernels.mae_tokens import op
from maect_fast.kernels.mae_tokens.gather import check_images

__all__ = ["masked_patch_mse", "restore_tokens"]


def restore_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    ids_restore: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The decoder's input: patches in their order, mask tokens for the removed ones, positions.

    ``out[0] = tokens[0]``, ``out[1 + l] = cat(tokens[1:], mask tokens)[ids_restore[l]] + pos[l]``.

    Args:
        tokens: [B, 1 + N, D] floats, class token first, last stride 1 as below; gets a gradient.
        mask_token: [1, 1, D], rounded to the dtype of `tokens`; its gradient is summed in fp32.
        pos_embed: [1, L, D], of patches alone; gets a gradient if it requires one.
        ids_restore: [B, L] int32 or int64, rows permutations of 0..L - 1, which is not checked.
        backend: as of `gather_patches`.

    Returns:
        [B, 1 + L, D] contiguous, the wider dtype of tokens and positions; no second derivative.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit; a last stride not 1.
        RuntimeError: a backend that is not there, or not for these inputs.
    """
    check_tensors(
        tokens=tokens, mask_token=mask_token, pos_embed=pos_embed, ids_restore=ids_restore
    )
    x = (tokens, mask_token, pos_embed)
    check_backend("restore_tokens", backend, triton=lambda: op.triton_obstacle(*x))
    check_tensor("tokens", tokens, tokens, FLOATING, (None, None, None))
    B, num_tokens, D = tokens.shape
    check_tensor("ids_restore", ids_restore, tokens, INDEX, (B, None))
    L = ids_restore.shape[1]
    check_tensor("mask_token", mask_token, tokens, FLOATING, (1, 1, D))
    check_tensor("pos_embed", pos_embed, tokens, FLOATING, (1, L, D))
    if not 1 <= num_tokens <= 1 + L:
        raise ValueError(f"tokens: expected 1 to {1 + L} of an image, got {num_tokens}")
    return op.restore_tokens(tokens, mask_token, pos_embed, ids_restore, backend)


def masked_patch_mse(
    predicted: Tensor,
    images: Tensor,
    ids_removed: Tensor,
    patch_size: int,
    *,
    normalize: bool,
    backend: Backend = "auto",
) -> Tensor:
    """MAE's loss on the removed patches' pixels, ``mean((predicted - target) ** 2)``.

    With `normalize` the target is ``(patch - mean) / sqrt(unbiased variance + 1e-6)``.

    Args:
        predicted: [B, M, K * K * C] floats, channels last, M >= 1; the only one with a gradient.
        images: as of `gather_patches`, but a constant.
        ids_removed: [B, M], as `ids` of `gather_patches`.
        patch_size: K.
        normalize: every patch by its own mean and deviation; needs more than one number of it.
        backend: as of `gather_patches`; the kernel takes C * K * K up to 4096.

    Returns:
        0-d, fp32 (fp64 if an input is), as is all inside; no second derivative.

    Raises:
        ValueError, TypeError, RuntimeError: as `restore_tokens`.
    """
    check_tensors(predicted=predicted, images=images, ids_removed=ids_removed)
    x = (predicted, images)
    check_backend("masked_patch_mse", backend, triton=lambda: op.mse_obstacle(*x))
    F = check_images(images, patch_size)
    check_tensor("ids_removed", ids_removed, images, INDEX, (images.shape[0], None))
    check_tensor("predicted", predicted, images, FLOATING, (*ids_removed.shape, F))
    expect(ids_removed.numel() > 0, "ids_removed", "at least one patch", "none")
    expect(F > 1 or not normalize, "normalize", "patches of more than one number", F)
    return op.masked_patch_mse(predicted, images, ids_removed, patch_size, normalize, backend)
