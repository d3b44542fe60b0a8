"""Registration of the token ops with torch.library.

Who runs is decided inside, by device and dtype, so that a compiled program decides it too. On the
CPU the definition runs, with its backward written out: no gather's gradient is scattered.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maect_fast.kernels._common import gpu
from maect_fast.kernels.mae_tokens import reference

__all__ = [
    "gather_patches",
    "masked_patch_mse",
    "mse_gradient",
    "mse_obstacle",
    "restore_gradient",
    "restore_tokens",
    "triton_obstacle",
]

# Numbers of a patch of which the loss's kernels hold all at once.
MAX_NUMBERS = 4096


def triton_obstacle(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the Triton kernels cannot take these tensors or make that dtype, or None."""
    if reason := gpu.obstacle(*tensors):
        return reason
    if dtype not in gpu.DTYPES:
        return f"makes float32, bfloat16 and float16, got {str(dtype).split('.')[1]}"
    return None


def mse_obstacle(predicted: Tensor, images: Tensor) -> str | None:
    """The same for the loss, whose kernels take patches up to a size."""
    F = predicted.shape[-1]
    if F > MAX_NUMBERS:
        return f"takes patches of up to {MAX_NUMBERS} numbers, got {F}"
    return gpu.obstacle(predicted, images)


def _is_triton(backend: str, tensor: Tensor, obstacle: str | None) -> bool:
    """Whether the kernels run: "auto" takes them on CUDA wherever they can."""
    return backend == "triton" or (backend == "auto" and tensor.is_cuda and obstacle is None)


def _triton() -> ModuleType:
    from maect_fast.kernels.mae_tokens import triton_kernel

    return triton_kernel


@torch.library.custom_op("maect_fast::gather_patches", mutates_args=())
def gather_patches(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Rows [B, N, C * K * K] in `dtype`."""
    if not _is_triton(backend, images, triton_obstacle(images, dtype=dtype)):
        return reference.gather_patches(images, ids, patch_size, dtype)
    with gpu.current(images):
        result: Tensor = _triton().gather_patches(images, ids, patch_size, dtype)
    return result


@gather_patches.register_fake
def _(images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, backend: str) -> Tensor:
    return images.new_empty((*ids.shape, images.shape[1] * patch_size**2), dtype=dtype)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, ctx.patch_size, _, _ = inputs
    ctx.save_for_backward(images, ids)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, ids = ctx.saved_tensors
    return reference.scatter_patches(grad, ids, images, ctx.patch_size), *[None] * 4


gather_patches.register_autograd(_gather_backward, setup_context=_save_gather)


@torch.library.custom_op("maect_fast::restore_tokens_fwd", mutates_args=())
def restore_tokens(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, backend: str
) -> Tensor:
    """Tokens [B, 1 + L, D]."""
    inputs = (tokens, mask_token, pos_embed, ids_restore)
    if not _is_triton(backend, tokens, triton_obstacle(*inputs[:3])):
        return reference.restore_tokens(*inputs)
    with gpu.current(tokens):
        result: Tensor = _triton().restore_tokens(*inputs)
    return result


@restore_tokens.register_fake
def _(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, backend: str
) -> Tensor:
    B, _, D = tokens.shape
    dtype = torch.promote_types(tokens.dtype, pos_embed.dtype)
    return tokens.new_empty((B, 1 + ids_restore.shape[1], D), dtype=dtype)


@torch.library.custom_op("maect_fast::restore_tokens_bwd", mutates_args=())
def restore_gradient(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradient of the tokens, and of the mask token in at least fp32, [D]."""
    inputs = (grad, ids_restore, num_tokens, dtype)
    if not _is_triton(backend, grad, triton_obstacle(grad, dtype=dtype)):
        return reference.restore_gradient(*inputs)
    with gpu.current(grad):
        result: tuple[Tensor, Tensor] = _triton().restore_gradient(*inputs)
    return result


@restore_gradient.register_fake
def _(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    B, _, D = grad.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty((B, num_tokens, D), dtype=dtype), grad.new_empty((D,), dtype=wide)


def _save_restore(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, mask_token, pos_embed, ids_restore, ctx.backend = inputs
    ctx.num_tokens = tokens.shape[1]
    ctx.dtypes = [x.dtype for x in (tokens, mask_token, pos_embed)]
    ctx.save_for_backward(ids_restore)


def _restore_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids_restore,) = ctx.saved_tensors
    dtype, mask_dtype, pos_dtype = ctx.dtypes
    arguments = (grad, ids_restore, ctx.num_tokens, dtype, ctx.backend)
    grad_tokens, grad_mask = restore_gradient(*arguments)
    grad_pos = None
    if ctx.needs_input_grad[2]:
        grad_pos = grad[:, 1:].sum(0, keepdim=True).to(pos_dtype)
    return grad_tokens, grad_mask.to(mask_dtype)[None, None], grad_pos, None, None


restore_tokens.register_autograd(_restore_backward, setup_context=_save_restore)


@torch.library.custom_op("maect_fast::masked_patch_mse_fwd", mutates_args=())
def masked_patch_mse(
    predicted: Tensor, images: Tensor, ids: Tensor, patch_size: int, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and the error that the definition's backward multiplies; of the kernels none."""
    inputs = (predicted, images, ids, patch_size, normalize)
    if not _is_triton(backend, predicted, mse_obstacle(predicted, images)):
        return reference.masked_patch_mse(*inputs)
    with gpu.current(predicted):
        loss: Tensor = _triton().masked_patch_mse(*inputs)
    return loss, loss.new_empty((0,))


@masked_patch_mse.register_fake
def _(
    predicted: Tensor, images: Tensor, ids: Tensor, patch_size: int, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    is_triton = _is_triton(backend, predicted, mse_obstacle(predicted, images))
    dtype = torch.promote_types(predicted.dtype, images.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    error = predicted.new_empty((0,) if is_triton else predicted.shape, dtype=wide)
    return error.new_empty(()), error


@torch.library.custom_op("maect_fast::masked_patch_mse_bwd", mutates_args=())
def mse_gradient(
    grad: Tensor,
    predicted: Tensor,
    images: Tensor,
    ids: Tensor,
    error: Tensor,
    patch_size: int,
    normalize: bool,
    backend: str,
) -> Tensor:
    """Gradient of the predictions."""
    if not _is_triton(backend, predicted, mse_obstacle(predicted, images)):
        return reference.mse_gradient(grad, error, predicted.dtype)
    with gpu.current(predicted):
        result: Tensor = _triton().mse_gradient(grad, predicted, images, ids, patch_size, normalize)
    return result


@mse_gradient.register_fake
def _(grad: Tensor, predicted: Tensor, *_: Any) -> Tensor:
    return predicted.new_empty(predicted.shape)


def _save_mse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    predicted, images, ids, ctx.patch_size, ctx.normalize, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(predicted, images, ids, output[1])


def _mse_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    options = (ctx.patch_size, ctx.normalize, ctx.backend)
    return mse_gradient(grad, *ctx.saved_tensors, *options), *[None] * 5


masked_patch_mse.register_autograd(_mse_backward, setup_context=_save_mse)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("restore_tokens and masked_patch_mse have no second derivative")


restore_gradient.register_autograd(_no_second_derivative)
mse_gradient.register_autograd(_no_second_derivative)
