"""Definition of MAE's token ops in plain PyTorch, any float dtype up to fp64.

Legend: B images of C channels and H x W pixels, K pixels along a patch's side (`patch_size`), a
grid of L = H/K * W/K patches numbered row by row, N kept and M removed ones, F = C * K * K numbers
of a patch, D width of a token.

A patch that is embedded is (C, K, K), as a convolution's weight; one that is predicted (K, K, C).
"""

import math

import torch
from torch import Tensor

__all__ = [
    "gather_patches",
    "masked_patch_mse",
    "mse_gradient",
    "patch_targets",
    "patch_view",
    "restore_gradient",
    "restore_tokens",
    "scatter_patches",
]

EPS = 1e-6


def patch_view(images: Tensor, patch_size: int) -> Tensor:
    """View of images [B, C, H, W] as patches [B, H/K, W/K, C, K, K]."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return patches.permute(0, 2, 3, 1, 4, 5)


def gather_patches(images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """Pixels of patches ids [B, N] as rows [B, N, C * K * K]."""
    return patch_view(images, patch_size)[_places(images, ids, patch_size)].flatten(2).to(dtype)


def scatter_patches(grad: Tensor, ids: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Gradient of `gather_patches` to images; that of a patch gathered twice is the sum."""
    result = torch.zeros_like(images)
    pixels = grad.reshape(*ids.shape, images.shape[1], patch_size, patch_size).to(images.dtype)
    places = _places(images, ids, patch_size)
    # With accumulate the order of the sum is fixed, on CUDA too.
    patch_view(result, patch_size).index_put_(places, pixels, accumulate=True)
    return result


def restore_tokens(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor
) -> Tensor:
    """Class token, then every patch's token, or the mask token if it has none, plus position.

    Args:
        tokens: [B, 1 + N, D].
        mask_token: [1, 1, D], rounded to the dtype of `tokens`.
        pos_embed: [1, L, D].
        ids_restore: [B, L], of patch l its place among the tokens; from N on it has none.

    Returns:
        [B, 1 + L, D] in the wider dtype of `tokens` and `pos_embed`.
    """
    B, num_tokens, D = tokens.shape
    num_removed = ids_restore.shape[1] + 1 - num_tokens
    mask_tokens = mask_token.to(tokens.dtype).expand(B, num_removed, D)
    shuffled = torch.cat([tokens[:, 1:], mask_tokens], dim=1)
    patches = _gather_rows(shuffled, ids_restore.long())
    return torch.cat([tokens[:, :1], patches + pos_embed], dim=1)


def restore_gradient(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradient of `restore_tokens` to tokens [B, 1 + N, D] and mask token [D].

    The former in `dtype`, the latter, a sum over removed patches, in at least fp32.
    """
    ids_restore = ids_restore.long()
    B, L = ids_restore.shape
    place = torch.arange(L, device=grad.device).expand(B, L)
    ids_shuffle = torch.empty_like(ids_restore).scatter_(1, ids_restore, place)
    kept, removed = ids_shuffle[:, : num_tokens - 1], ids_shuffle[:, num_tokens - 1 :]
    patches = grad[:, 1:]
    grad_tokens = torch.cat([grad[:, :1], _gather_rows(patches, kept)], dim=1).to(dtype)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad_tokens, _gather_rows(patches, removed).sum((0, 1), dtype=wide)


def patch_targets(
    images: Tensor, ids: Tensor, patch_size: int, *, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a decoder is to predict of patches, and how to get back: ``target * std + mean``.

    Args:
        images: [B, C, H, W].
        ids: [B, M] patches.
        patch_size: K.
        normalize: take every patch's own mean and deviation out.

    Returns:
        target [B, M, K * K * C], channel last; mean [B, M, 1]; std [B, M, 1], the root of the
        unbiased variance + 1e-6. Without `normalize` mean and std are 0 and 1. All in at least
        fp32.
    """
    view = patch_view(images, patch_size)[_places(images, ids, patch_size)]
    patches = view.permute(0, 1, 3, 4, 2).flatten(2)
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    if not normalize:
        mean = torch.zeros_like(patches[..., :1])
        return patches, mean, torch.ones_like(mean)
    var, mean = torch.var_mean(patches, dim=2, keepdim=True)
    std = (var + EPS).sqrt()
    return (patches - mean) / std, mean, std


def masked_patch_mse(
    predicted: Tensor, images: Tensor, ids: Tensor, patch_size: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Mean of the squared error, 0-d, and the error [B, M, K * K * C]; in at least fp32.

    Equals ``sum(mean((predicted - target) ** 2, -1) * mask) / sum(mask)`` over all patches.
    """
    target, _, _ = patch_targets(images, ids, patch_size, normalize=normalize)
    error = predicted.to(torch.promote_types(predicted.dtype, target.dtype)) - target
    return error.square().mean(), error


def mse_gradient(grad: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of `masked_patch_mse` to `predicted`, in its dtype, times grad, 0-d."""
    return (error * (grad * (2 / math.prod(error.shape)))).to(dtype)


def _places(images: Tensor, ids: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of patches ids [B, N] into the first three dimensions of `patch_view`."""
    num_columns = images.shape[3] // patch_size
    image = torch.arange(images.shape[0], device=images.device)[:, None].expand_as(ids)
    return image, (ids // num_columns).long(), (ids % num_columns).long()


def _gather_rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens [B, L, D] by ids [B, M]: [B, M, D]."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))
