"""Registration with torch.library, and which implementation runs.

Two op pairs: `masked_attention` on packed q, k, v and `attention` on separate ones. Their arguments
are positional and complete; defaults and checks are the public functions'. The second output of a
forward op, lse, is private to its pair, Triton's to base 2, and has the rows of the padded batch:
[B, H, M], with `keep` [B, H, Nk], with `cu_seqlens` [S, H, max_seqlen]; without `save_lse`, which a
backward needs, none.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.backend import Obstacle
from maect_fast.kernels._common.launch import triton_minor
from maect_fast.kernels._common.library import (
    LIBRARY,
    Differentiable,
    needs_gradient,
    operator,
)
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.masked_attention import padded

__all__ = [
    "attention",
    "attention_bwd",
    "attention_fwd",
    "masked_attention",
    "masked_attention_bwd",
    "masked_attention_fwd",
    "obstacles",
    "triton_obstacle",
]

Modes = tuple[Tensor | None, Tensor | None, Tensor | None, int | None, Tensor | None]
PACKED_FORWARD, PACKED_BACKWARD, FORWARD, BACKWARD = Plans(), Plans(), Plans(), Plans()
MAX_HEAD_DIM = 128
# A row of scores and one of results are in the registers of a warp group.
GLUON_HEAD_DIM, GLUON_TOKENS = 80, 272
# Releases that the Gluon kernels were compiled with, which changes between them.
GLUON_RELEASES = ((3, 6),)
# Rows of a sample are found by 32-bit offsets.
MAX_OFFSET = 2**31


def triton_obstacle(scale: float, *inputs: Tensor) -> str | None:
    """Why the Triton kernels cannot take packed or separate q, k, v, or None."""
    D = inputs[0].shape[-1]
    if D % 8 or not 8 <= D <= MAX_HEAD_DIM:
        return f"takes D a multiple of 8 up to {MAX_HEAD_DIM}, got {D}"
    if not scale > 0:
        return f"takes a scale above 0, got {scale}"
    for x in inputs:
        if x.is_cuda and x.dtype == torch.float32:
            return "takes float16 and bfloat16, got float32 ('auto' takes PyTorch's products)"
        if x.ndim > 3 and x.shape[1] * x.stride(1) >= MAX_OFFSET:
            return f"takes samples that span fewer than {MAX_OFFSET} numbers"
    return gpu.obstacle(*inputs)


def obstacles(modes: Modes, scale: float, *inputs: Tensor) -> dict[str, Obstacle]:
    """By backend, what says why it cannot take these arguments."""
    return {
        "triton": partial(triton_obstacle, scale, *inputs),
        "gluon": partial(gluon_obstacle, modes, scale, *inputs),
    }


def gluon_obstacle(modes: Modes, scale: float, *inputs: Tensor) -> str | None:
    """Why the warp-specialised kernels cannot take packed or separate q, k, v, or None."""
    keep, _, _, max_seqlen, _ = modes
    D, device, dtype = inputs[0].shape[-1], inputs[0].device, inputs[0].dtype
    tokens = max(x.shape[1] for x in inputs)
    if max_seqlen is not None:
        tokens = max_seqlen
    elif keep is not None:
        tokens = keep.shape[1]
    if device.type != "cuda" or torch.version.cuda is None:
        return f"runs on CUDA, got a tensor on {device}: use backend='auto'"
    if (why := gpu.obstacle(*inputs)) is not None:
        return why
    if (arch := gpu.sm_arch(device)) != 90:
        return f"is for sm_90 (H100, H200), got sm_{arch}: use backend='triton'"
    if (release := triton_minor()) not in GLUON_RELEASES:
        known = " or ".join(".".join(map(str, x)) for x in GLUON_RELEASES)
        found = ".".join(map(str, release))
        return f"is compiled with Triton {known}, got {found}: use backend='triton'"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, got {str(dtype).split('.')[1]}: use backend='auto'"
    if D > GLUON_HEAD_DIM or tokens > GLUON_TOKENS:
        most = f"takes up to {GLUON_TOKENS} tokens and D up to {GLUON_HEAD_DIM}"
        return f"{most}, got {tokens} and {D}: use backend='triton'"
    return triton_obstacle(scale, *inputs)


def _implementation(backend: str, scale: float, *inputs: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` run; "auto" takes Triton for halves on CUDA."""
    if backend == "auto":
        is_half = all(gpu.is_gpu(x) and x.itemsize == 2 for x in inputs)
        backend = "triton" if is_half and triton_obstacle(scale, *inputs) is None else "padded"
    if backend == "padded":
        return padded
    if backend == "gluon":
        from maect_fast.kernels.masked_attention import gluon_kernel

        return gluon_kernel
    from maect_fast.kernels.masked_attention import triton_kernel

    return triton_kernel


def _forward(
    plans: Plans,
    inputs: tuple[Tensor, ...],
    modes: Modes,
    scale: float,
    save_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Of packed or separate q, k, v."""
    keep, seqlens, cu_seqlens, max_seqlen, key_mask = modes
    tensors = (*inputs, keep, seqlens, cu_seqlens, key_mask)
    numbers = (max_seqlen, scale, save_lse, backend)
    found = plans.replay(tensors, numbers)
    if found is None:
        is_packed = len(inputs) == 1
        q, k, v = inputs[0].unbind(-3) if is_packed else inputs
        implementation = _implementation(backend, scale, q, k, v)
        run = partial(
            implementation.forward,
            *(q, k, v, modes, scale),
            bound_queries=is_packed or cu_seqlens is not None,
            save_lse=save_lse,
        )
        found = run() if implementation is padded else plans.record(run, tensors, numbers)
    o, lse = found
    return o, lse


def _backward(
    plans: Plans,
    do: Tensor,
    inputs: tuple[Tensor, ...],
    o: Tensor,
    lse: Tensor,
    modes: Modes,
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """The gradients of `inputs`."""
    keep, seqlens, cu_seqlens, max_seqlen, key_mask = modes
    tensors = (do, *inputs, o, lse, keep, seqlens, cu_seqlens, key_mask)
    numbers = (max_seqlen, scale, backend)
    found = plans.replay(tensors, numbers)
    if found is None:
        is_packed = len(inputs) == 1
        q, k, v = inputs[0].unbind(-3) if is_packed else inputs
        implementation = _implementation(backend, scale, q, k, v)
        run = partial(
            implementation.backward,
            *(do, q, k, v, o, lse, modes, scale),
            bound_queries=is_packed or cu_seqlens is not None,
            is_packed=is_packed,
        )
        found = run() if implementation is padded else plans.record(run, tensors, numbers)
    return found


def _empty_outputs(
    q: Tensor,
    keep: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and layouts of a forward op's outputs."""
    H = q.shape[-2]
    lse_shape: tuple[int, ...]
    if not save_lse:
        lse_shape = (0,)
    elif cu_seqlens is not None:
        assert max_seqlen is not None
        lse_shape = (cu_seqlens.shape[0] - 1, H, max_seqlen)
    elif keep is not None:
        lse_shape = (q.shape[0], H, keep.shape[1])
    else:
        lse_shape = (q.shape[0], H, q.shape[1])
    lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _masked_attention_fwd_fake(
    qkv: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
    save_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv.select(-3, 0), keep, cu_seqlens, max_seqlen, save_lse)


@operator("masked_attention_fwd", fake=_masked_attention_fwd_fake)
def masked_attention_fwd(
    qkv: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
    save_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and lse; `seqlens` bounds queries and keys."""
    modes = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
    return _forward(PACKED_FORWARD, (qkv,), modes, scale, save_lse, backend)


def _masked_attention_bwd_fake(do: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


@operator("masked_attention_bwd", fake=_masked_attention_bwd_fake)
def masked_attention_bwd(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> Tensor:
    """The gradient of qkv, one contiguous buffer."""
    modes = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
    return _backward(PACKED_BACKWARD, do, (qkv,), o, lse, modes, scale, backend)[0]


def _attention_fwd_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
    save_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, keep, cu_seqlens, max_seqlen, save_lse)


@operator("attention_fwd", fake=_attention_fwd_fake)
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
    save_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and lse; `seqlens` bounds keys only."""
    modes = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
    return _forward(FORWARD, (q, k, v), modes, scale, save_lse, backend)


def _attention_bwd_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operator("attention_bwd", fake=_attention_bwd_fake)
def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each contiguous."""
    modes = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
    dq, dk, dv = _backward(BACKWARD, do, (q, k, v), o, lse, modes, scale, backend)
    return dq, dk, dv


def _vmap_rule(op: Any) -> Callable[..., Any]:
    """Rule of vmap: its batch becomes part of B; packed rows have no B, and are looped over."""
    names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        V = info.batch_size

        def batched(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.expand(V, *x.shape) if dim is None else x.movedim(dim, 0)
            return x if x.stride(-1) == 1 else x.contiguous()

        rows = [batched(x, dim) for x, dim in zip(args, in_dims, strict=True)]
        if args[names.index("cu_seqlens")] is None:
            found = op(*(x.flatten(0, 1) if isinstance(x, Tensor) else x for x in rows))
            is_one = isinstance(found, Tensor)
            # An lse that is not saved is empty, of one dimension.
            parts = [
                x.expand(V, 0) if x.ndim == 1 else x.unflatten(0, (V, -1))
                for x in ([found] if is_one else found)
            ]
        else:
            calls = [op(*(x[i] if isinstance(x, Tensor) else x for x in rows)) for i in range(V)]
            is_one = isinstance(calls[0], Tensor)
            parts = [torch.stack(x) for x in ([calls] if is_one else zip(*calls, strict=True))]
        return (parts[0], 0) if is_one else (tuple(parts), (0,) * len(parts))

    return rule


for _op in (masked_attention_fwd, masked_attention_bwd, attention_fwd, attention_bwd):
    torch.library.register_vmap(_op, _vmap_rule(_op), lib=LIBRARY)


def masked_attention(*arguments: Any) -> Tensor:
    """Output for packed q, k, v, modes, scale and backend, with its gradient."""
    return _differentiate(_MaskedAttention, masked_attention_fwd, 1, arguments)


def attention(*arguments: Any) -> Tensor:
    """The same of separate q, k, v."""
    return _differentiate(_Attention, attention_fwd, 3, arguments)


def _differentiate(
    function: type[Differentiable], forward: Any, num_inputs: int, arguments: tuple[Any, ...]
) -> Tensor:
    output: tuple[Tensor, Tensor]
    if needs_gradient(function.op, *arguments[:num_inputs]):
        output = function.call(*arguments)
    else:
        output = forward(*arguments[:-1], False, arguments[-1])
    return output[0]


class _MaskedAttention(Differentiable):
    op = "masked_attention"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return masked_attention_fwd(*arguments[:-1], True, arguments[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _gradients(_MaskedAttention, lambda *x: (masked_attention_bwd(*x),), ctx, do)


class _Attention(Differentiable):
    op = "attention"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return attention_fwd(*arguments[:-1], True, arguments[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return _gradients(_Attention, attention_bwd, ctx, do)


def _gradients(
    function: type[Differentiable],
    backward: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    do: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Of the inputs, and none of the modes, scale and backend."""
    *inputs, o, lse, keep, seqlens, cu_seqlens, key_mask = ctx.saved_tensors
    found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if do is not None:
        modes = (keep, seqlens, cu_seqlens, ctx.max_seqlen, key_mask)
        found = backward(do, *inputs, o, lse, *modes, ctx.scale, ctx.backend)
        found = function.last((do, *inputs), *found)
    return *found, *(None,) * 7


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, keep, seqlens, cu_seqlens, max_seqlen, key_mask, scale, backend = inputs
    ctx.save_for_backward(*qkv, *output, keep, seqlens, cu_seqlens, key_mask)
    ctx.mark_non_differentiable(output[1])
    # No zeros for lse, which has no gradient.
    ctx.set_materialize_grads(False)
    ctx.max_seqlen, ctx.scale, ctx.backend = max_seqlen, scale, backend


def _num_products(q: Any, k: Any, keep: Any, cu_seqlens: Any, max_seqlen: Any) -> int:
    """Multiplications in Q K^T, from shapes: lengths and masks are values and do not lower it."""
    *_, H, D = q
    if cu_seqlens is not None:
        return int(q[0] * max_seqlen * H * D)
    if keep is not None:
        return int(q[0] * keep[1] ** 2 * H * D)
    return int(q[0] * q[1] * k[1] * H * D)


# Multiplications and additions of two matrix products forward and five backward.
FLOP_FORWARD, FLOP_BACKWARD = 2 * 2, 2 * 5


@register_flop_formula(torch.ops.maect_fast.masked_attention_fwd)
def _masked_attention_fwd_flop(qkv: Any, *modes: Any, out_shape: Any) -> int:
    keep, _seqlens, cu_seqlens, max_seqlen, *_rest = modes
    q = (*qkv[:-3], *qkv[-2:])
    return FLOP_FORWARD * _num_products(q, q, keep, cu_seqlens, max_seqlen)


@register_flop_formula(torch.ops.maect_fast.masked_attention_bwd)
def _masked_attention_bwd_flop(
    do: Any, qkv: Any, o: Any, lse: Any, *modes: Any, out_shape: Any
) -> int:
    keep, _seqlens, cu_seqlens, max_seqlen, *_rest = modes
    return FLOP_BACKWARD * _num_products(do, do, keep, cu_seqlens, max_seqlen)


@register_flop_formula(torch.ops.maect_fast.attention_fwd)
def _attention_fwd_flop(q: Any, k: Any, v: Any, *modes: Any, out_shape: Any) -> int:
    keep, _seqlens, cu_seqlens, max_seqlen, *_rest = modes
    return FLOP_FORWARD * _num_products(q, k, keep, cu_seqlens, max_seqlen)


@register_flop_formula(torch.ops.maect_fast.attention_bwd)
def _attention_bwd_flop(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, *modes: Any, out_shape: Any
) -> int:
    keep, _seqlens, cu_seqlens, max_seqlen, *_rest = modes
    return FLOP_BACKWARD * _num_products(q, k, keep, cu_seqlens, max_seqlen)
