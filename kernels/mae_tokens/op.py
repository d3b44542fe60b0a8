"""Registration of the token ops with torch.library.

Who runs is decided inside, by device and dtype, so that a compiled program decides it too. On the
CPU the definition runs, with its backward written out: no gather's gradient is scattered.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.library import Differentiable, needs_gradient, operator
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.mae_tokens import reference

__all__ = [
    "gather_patches",
    "gather_patches_fwd",
    "masked_patch_mse",
    "masked_patch_mse_fwd",
    "mse_gradient",
    "mse_obstacle",
    "restore_gradient",
    "restore_tokens",
    "restore_tokens_fwd",
    "triton_obstacle",
]

GATHER, RESTORE, RESTORE_BACKWARD, MSE, MSE_BACKWARD = (Plans() for _ in range(5))
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
    return backend == "triton" or (backend == "auto" and gpu.is_gpu(tensor) and obstacle is None)


def _triton() -> ModuleType:
    from maect_fast.kernels.mae_tokens import triton_kernel

    return triton_kernel


def _gather_fake(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return images.new_empty((*ids.shape, images.shape[1] * patch_size**2), dtype=dtype)


@operator("gather_patches", fake=_gather_fake)
def gather_patches_fwd(
    images: Tensor, ids: Tensor, patch_size: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Rows [B, N, C * K * K] in `dtype`."""
    planned = ((images, ids), (patch_size, dtype, backend))
    found = GATHER.replay(*planned)
    if found is None:
        if not _is_triton(backend, images, triton_obstacle(images, dtype=dtype)):
            return reference.gather_patches(images, ids, patch_size, dtype)
        launcher = partial(_triton().gather_patches, images, ids, patch_size, dtype)
        found = GATHER.record(lambda: (launcher(),), *planned)
    return found[0]


def gather_patches(*arguments: Any) -> Tensor:
    """The same with its gradient."""
    rows: Tensor = _differentiate(_GatherPatches, gather_patches_fwd, 1, arguments)
    return rows


class _GatherPatches(Differentiable):
    op = "gather_patches"
    forward = staticmethod(gather_patches_fwd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, ids, ctx.patch_size, _, _ = inputs
        ctx.save_for_backward(images, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, ids = ctx.saved_tensors
        return reference.scatter_patches(grad, ids, images, ctx.patch_size), *[None] * 4


def _restore_fake(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, backend: str
) -> Tensor:
    B, _, D = tokens.shape
    dtype = torch.promote_types(tokens.dtype, pos_embed.dtype)
    return tokens.new_empty((B, 1 + ids_restore.shape[1], D), dtype=dtype)


@operator("restore_tokens_fwd", fake=_restore_fake)
def restore_tokens_fwd(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor, backend: str
) -> Tensor:
    """Tokens [B, 1 + L, D]."""
    inputs = (tokens, mask_token, pos_embed, ids_restore)
    found = RESTORE.replay(inputs, (backend,))
    if found is None:
        if not _is_triton(backend, tokens, triton_obstacle(*inputs[:3])):
            return reference.restore_tokens(*inputs)
        launcher = partial(_triton().restore_tokens, *inputs)
        found = RESTORE.record(lambda: (launcher(),), inputs, (backend,))
    return found[0]


def _restore_gradient_fake(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    B, _, D = grad.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty((B, num_tokens, D), dtype=dtype), grad.new_empty((D,), dtype=wide)


@operator("restore_tokens_bwd", fake=_restore_gradient_fake)
def restore_gradient(
    grad: Tensor, ids_restore: Tensor, num_tokens: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradient of the tokens, and of the mask token in at least fp32, [D]."""
    planned = ((grad, ids_restore), (num_tokens, dtype, backend))
    found = RESTORE_BACKWARD.replay(*planned)
    if found is None:
        inputs = (grad, ids_restore, num_tokens, dtype)
        if not _is_triton(backend, grad, triton_obstacle(grad, dtype=dtype)):
            return reference.restore_gradient(*inputs)
        launcher = partial(_triton().restore_gradient, *inputs)
        found = RESTORE_BACKWARD.record(launcher, *planned)
    grad_tokens, part = found
    return grad_tokens, part.sum(0)


def restore_tokens(*arguments: Any) -> Tensor:
    """The op with its gradients."""
    restored: Tensor = _differentiate(_RestoreTokens, restore_tokens_fwd, 3, arguments)
    return restored


class _RestoreTokens(Differentiable):
    op = "restore_tokens"
    forward = staticmethod(restore_tokens_fwd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, mask_token, pos_embed, ids_restore, ctx.backend = inputs
        ctx.num_tokens = tokens.shape[1]
        ctx.dtypes = [x.dtype for x in (tokens, mask_token, pos_embed)]
        ctx.save_for_backward(ids_restore)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids_restore,) = ctx.saved_tensors
        dtype, mask_dtype, pos_dtype = ctx.dtypes
        arguments = (grad, ids_restore, ctx.num_tokens, dtype, ctx.backend)
        grad_tokens, grad_mask = restore_gradient(*arguments)
        grad_pos = None
        if ctx.needs_input_grad[2]:
            grad_pos = grad[:, 1:].sum(0, keepdim=True).to(pos_dtype)
        grads = _RestoreTokens.last((grad,), grad_tokens, grad_mask.to(mask_dtype)[None, None])
        return *grads, grad_pos, None, None


def _mse_fake(
    predicted: Tensor, images: Tensor, ids: Tensor, patch_size: int, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    is_triton = _is_triton(backend, predicted, mse_obstacle(predicted, images))
    dtype = torch.promote_types(predicted.dtype, images.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    error = predicted.new_empty((0,) if is_triton else predicted.shape, dtype=wide)
    return error.new_empty(()), error


@operator("masked_patch_mse_fwd", fake=_mse_fake)
def masked_patch_mse_fwd(
    predicted: Tensor, images: Tensor, ids: Tensor, patch_size: int, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss, 0-d, and the error that the definition's backward multiplies; of the kernels none."""
    planned = ((predicted, images, ids), (patch_size, normalize, backend))
    found = MSE.replay(*planned)
    if found is None:
        inputs = (predicted, images, ids, patch_size, normalize)
        if not _is_triton(backend, predicted, mse_obstacle(predicted, images)):
            return reference.masked_patch_mse(*inputs)
        launcher = partial(_triton().masked_patch_mse, *inputs)
        found = MSE.record(lambda: (launcher(),), *planned)
    loss = found[0].sum() / predicted.numel()
    return loss, loss.new_empty((0,))


def _mse_gradient_fake(grad: Tensor, predicted: Tensor, *_: Any) -> Tensor:
    return predicted.new_empty(predicted.shape)


@operator("masked_patch_mse_bwd", fake=_mse_gradient_fake)
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
    planned = ((grad, predicted, images, ids), (patch_size, normalize, backend))
    found = MSE_BACKWARD.replay(*planned)
    if found is None:
        if not _is_triton(backend, predicted, mse_obstacle(predicted, images)):
            return reference.mse_gradient(grad, error, predicted.dtype)
        inputs = (grad, predicted, images, ids, patch_size, normalize)
        launcher = partial(_triton().mse_gradient, *inputs)
        found = MSE_BACKWARD.record(lambda: (launcher(),), *planned)
    return found[0]


def masked_patch_mse(*arguments: Any) -> Tensor:
    """The loss with its gradient."""
    result: Tensor = _differentiate(_MaskedPatchMSE, masked_patch_mse_fwd, 1, arguments)[0]
    return result


class _MaskedPatchMSE(Differentiable):
    op = "masked_patch_mse"
    forward = staticmethod(masked_patch_mse_fwd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        predicted, images, ids, ctx.patch_size, ctx.normalize, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        # No zeros for the error, which has no gradient.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(predicted, images, ids, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        # Read once: activation checkpointing makes them anew for each reading.
        saved = ctx.saved_tensors
        result = mse_gradient(grad, *saved, ctx.patch_size, ctx.normalize, ctx.backend)
        return *_MaskedPatchMSE.last((grad, saved[0]), result), *[None] * 5


def _differentiate(
    function: type[Differentiable], forward: Any, num_inputs: int, arguments: tuple[Any, ...]
) -> Any:
    if needs_gradient(function.op, *arguments[:num_inputs]):
        return function.call(*arguments)
    return forward(*arguments)
