"""Launches of the token ops' Triton kernels: tables, launchers, what the machine code holds."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.mae_tokens.triton_device import (
    gather_kernel,
    mse_backward_kernel,
    mse_kernel,
    restore_backward_kernel,
    restore_kernel,
)

__all__ = [
    "gather_patches",
    "machine_code",
    "masked_patch_mse",
    "mse_gradient",
    "restore_gradient",
    "restore_tokens",
]

# Of tokens and predictions, under autocast and without; images and positions are fp32.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Programs of the mask token's sum per multiprocessor, and so its parts.
PROGRAMS = 4


def _row(
    label: str,
    *,
    K: int = 16,
    warps: int = 4,
    registers: int,
    blocks: int,
    wide_loads: int,
    **tile: int,
) -> LaunchRow:
    """A launch for 64 images of ViT-L/16's decoder, unless the patch is another."""
    return LaunchRow(
        label=label,
        num_warps=warps,
        num_stages=1,
        blocks=tile,
        sizes={"B": 64, "H": 224, "N": (224 // K) ** 2 // 4, "D": 512, "K": K},
        limits=Limits(registers=registers, blocks_per_sm=blocks, opcodes={"LDG.E.128": wide_loads}),
    )


# Of a patch with sides of 16 a load takes 128 bits, of one with 14 the 64 that it has aligned.
GATHER = (_row("any", registers=40, blocks=12, wide_loads=2, BLOCK_R=4, BLOCK_F=256),)
RESTORE = (_row("any", registers=40, blocks=12, wide_loads=7, BLOCK_R=4, BLOCK_D=512),)
RESTORE_BACKWARD = (_row("any", registers=72, blocks=7, wide_loads=4, BLOCK_R=4, BLOCK_D=512),)
# By ascending BLOCK_F, which holds a whole patch. The predictions' loads are the wide ones: their
# order, channels last, is that of the threads, and the images' pixels come through the L1 cache.
MSE = (
    _row("up to 256", K=8, registers=40, blocks=12, wide_loads=1, BLOCK_R=4, BLOCK_F=256),
    _row("up to 1024", registers=32, blocks=16, wide_loads=1, BLOCK_R=1, BLOCK_F=1024),
    _row(
        "up to 4096", K=32, warps=8, registers=48, blocks=5, wide_loads=2, BLOCK_R=1, BLOCK_F=4096
    ),
)


def gather_patches(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, row: LaunchRow = GATHER[0]
) -> Tensor:
    """`reference.gather_patches`."""
    (B, N), F = ids.shape, images.shape[1] * patch_size**2
    out = images.new_empty((B, N, F), dtype=dtype)
    grid = (triton.cdiv(B * N, row.blocks["BLOCK_R"]), triton.cdiv(F, row.blocks["BLOCK_F"]))
    arguments = (images, ids, out, B * N, N, *_grid_size(images, patch_size))
    if out.numel() > 0:
        launch(
            gather_kernel,
            grid,
            *arguments,
            *images.stride(),
            *ids.stride(),
            K=patch_size,
            F=F,
            **row.options,
        )
    return out


def restore_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    ids_restore: Tensor,
    row: LaunchRow = RESTORE[0],
) -> Tensor:
    """`reference.restore_tokens`."""
    (B, num_tokens, D), L = tokens.shape, ids_restore.shape[1]
    dtype = torch.promote_types(tokens.dtype, pos_embed.dtype)
    out = tokens.new_empty((B, 1 + L, D), dtype=dtype)
    R = B * (1 + L)
    grid = (triton.cdiv(R, row.blocks["BLOCK_R"]), triton.cdiv(D, row.blocks["BLOCK_D"]))
    arguments = (tokens, mask_token, pos_embed, ids_restore, out, R, num_tokens, L)
    strides = (*tokens.stride()[:2], pos_embed.stride(1), *ids_restore.stride())
    if out.numel() > 0:
        launch(restore_kernel, grid, *arguments, *strides, D=D, **row.options)
    return out


def restore_gradient(
    grad: Tensor,
    ids_restore: Tensor,
    num_tokens: int,
    dtype: torch.dtype,
    row: LaunchRow = RESTORE_BACKWARD[0],
) -> tuple[Tensor, Tensor]:
    """`reference.restore_gradient`; of the mask token's in parts [.., D], to be added up."""
    (B, L), D = ids_restore.shape, grad.shape[2]
    out = grad.new_empty((B, num_tokens, D), dtype=dtype)
    R, block = B * (1 + L), row.blocks["BLOCK_R"]
    slices = triton.cdiv(D, row.blocks["BLOCK_D"])
    most = triton.cdiv(PROGRAMS * num_multiprocessors(grad.device), slices)
    span = triton.cdiv(triton.cdiv(R, block), most) * block
    num_parts = triton.cdiv(R, span) if R > 0 else 0
    part = grad.new_empty((num_parts, D), dtype=torch.float32)
    arguments = (grad, ids_restore, out, part, R, span, num_tokens, L)
    if part.numel() > 0:
        launch(
            restore_backward_kernel,
            (num_parts, slices),
            *arguments,
            *grad.stride(),
            *ids_restore.stride(),
            D=D,
            **row.options,
        )
    return out, part


def launch_config(images: Tensor, patch_size: int) -> LaunchRow:
    """The first row of `MSE` whose block holds a patch."""
    F = images.shape[1] * patch_size**2
    return next(row for row in MSE if row.blocks["BLOCK_F"] >= F)


def masked_patch_mse(
    predicted: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    normalize: bool,
    row: LaunchRow | None = None,
) -> Tensor:
    """Sums of the squared error of `reference.masked_patch_mse` over each patch, [B, M]."""
    row = row or launch_config(images, patch_size)
    sums = predicted.new_empty(predicted.shape[:2], dtype=torch.float32)
    arguments, options = _mse(predicted, images, ids, patch_size, normalize, row)
    launch(mse_kernel, _mse_grid(ids, row), predicted, images, ids, sums, *arguments, **options)
    return sums


def mse_gradient(
    grad: Tensor,
    predicted: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    normalize: bool,
    row: LaunchRow | None = None,
) -> Tensor:
    """`reference.mse_gradient`, whose error is computed again."""
    row = row or launch_config(images, patch_size)
    out = predicted.new_empty(predicted.shape)
    arguments, options = _mse(predicted, images, ids, patch_size, normalize, row)
    launch(
        mse_backward_kernel,
        _mse_grid(ids, row),
        grad,
        2 / predicted.numel(),
        predicted,
        images,
        ids,
        out,
        *arguments,
        **options,
    )
    return out


def _mse_grid(ids: Tensor, row: LaunchRow) -> tuple[int]:
    return (triton.cdiv(ids.numel(), row.blocks["BLOCK_R"]),)


def _mse(
    predicted: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    normalize: bool,
    row: LaunchRow,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes, strides and keyword arguments of both kernels of the loss."""
    sizes = (ids.numel(), ids.shape[1], *_grid_size(images, patch_size))
    strides = (*predicted.stride()[:2], *images.stride(), *ids.stride())
    options = {"C": images.shape[1], "K": patch_size, "NORMALIZE": normalize}
    options["IS_CONTIGUOUS"] = predicted.is_contiguous()
    return (*sizes, *strides), options | row.options


def _grid_size(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    return images.shape[2] // patch_size, images.shape[3] // patch_size


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row as it is launched at its sizes, under autocast and in fp32."""
    for row in fitting(GATHER, arch):
        for variant, dtype in DTYPES.items():
            x = _inputs_at(row, dtype)
            call = partial(gather_patches, x.images, x.kept, row.sizes["K"], dtype, row)
            yield Launch(kernel=gather_kernel, row=row, call=call, variant=variant)
    for row in fitting(RESTORE, arch):
        for variant, dtype in DTYPES.items():
            x = _inputs_at(row, dtype)
            call = partial(restore_tokens, x.tokens, x.mask_token, x.pos_embed, x.ids_restore, row)
            yield Launch(kernel=restore_kernel, row=row, call=call, variant=variant)
    for row in fitting(RESTORE_BACKWARD, arch):
        for variant, dtype in DTYPES.items():
            x = _inputs_at(row, dtype)
            inputs = (x.restored, x.ids_restore, x.tokens.shape[1], dtype)
            backward = partial(restore_gradient, *inputs, row)
            yield Launch(kernel=restore_backward_kernel, row=row, call=backward, variant=variant)
    for row in fitting(MSE, arch):
        for variant, dtype in DTYPES.items():
            x = _inputs_at(row, dtype)
            arguments = (x.predicted, x.images, x.removed, row.sizes["K"], True, row)
            call = partial(masked_patch_mse, *arguments)
            yield Launch(kernel=mse_kernel, row=row, call=call, variant=variant)
            call = partial(mse_gradient, x.images[0, 0, 0, 0], *arguments)
            yield Launch(kernel=mse_backward_kernel, row=row, call=call, variant=variant)


class _Inputs(NamedTuple):
    """Tensors without memory."""

    images: Tensor
    kept: Tensor
    removed: Tensor
    ids_restore: Tensor
    tokens: Tensor
    mask_token: Tensor
    pos_embed: Tensor
    restored: Tensor
    predicted: Tensor


def _inputs_at(row: LaunchRow, dtype: torch.dtype) -> _Inputs:
    B, H, N, D, K = row.sizes.values()
    meta = partial(torch.empty, device="meta")
    L, F = (H // K) ** 2, 3 * K**2
    ids = meta(B, L, dtype=torch.int64)
    return _Inputs(
        images=meta(B, 3, H, H),
        # Of one tensor, as random masking makes them.
        kept=ids[:, :N],
        removed=ids[:, N:],
        ids_restore=ids,
        tokens=meta(B, 1 + N, D, dtype=dtype),
        mask_token=meta(1, 1, D),
        pos_embed=meta(1, L, D),
        restored=meta(B, 1 + L, D),
        predicted=meta(B, L - N, F, dtype=dtype),
    )
