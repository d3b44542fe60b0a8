"""The public functions: contract, checks, choice of the backend."""

import torch
from torch import Tensor

from maect_fast.kernels._common import checks
from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import FLOATING, INDEX, check_tensor, expect
from maect_fast.kernels.masked_attention import op, reference
from maect_fast.kernels.masked_attention.op import Modes

__all__ = ["attention", "masked_attention"]


def masked_attention(
    qkv: Tensor,
    *,
    keep: Tensor | None = None,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Self-attention on packed projections: ``softmax(scale * Q K^T) V`` per sample and head.

    At most one of `keep`, `seqlens`, `cu_seqlens` says which tokens there are; without, all N. Rows
    of others, and queries without a key, are zero in the result and its gradient. NaN and Inf in
    what takes no part go nowhere. The gradient goes to `qkv` alone, as one contiguous buffer.

    Args:
        qkv: [B, N, 3, H, D] or packed [T, 3, H, D]; fp16, bf16, fp32 or fp64; last stride 1.
        keep: [B, Nk] int32 or int64, kept tokens, unique in a row (the reference checks this).
        seqlens: [B] int32 or int64, clamped to 0..N; tokens from there on are padding.
        cu_seqlens: [S + 1] int32, where packed segments start and end, from 0 to at most T.
        max_seqlen: with `cu_seqlens`, an int; what a longer segment gives is undefined.
        key_mask: [B, N] bool, True = takes part as a key (as a query it does anyway).
        scale: factor of the scores, ``D ** -0.5`` by default.
        backend: "auto": Triton for halves on CUDA, else PyTorch's; "triton"; "gluon"; "reference".

    Returns:
        [B, N, H, D] or, packed, [T, H, D]; contiguous, dtype of `qkv`.

    Raises:
        ValueError: two modes at once, a wrong combination, shape, last stride or device.
        TypeError: a wrong dtype; a `max_seqlen` that is no int.
        RuntimeError: a backend that is not there, or not for these inputs.

    Source: arXiv 1706.03762; ml-jku/MAE-CT: models/modules/flash_attention_wrapper.py.
    """
    modes = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
    check_tensor("qkv", qkv, qkv, FLOATING, (*_check_modes(modes), 3, None, None))
    _check_tensors(qkv, modes)
    return _attend("masked_attention", (qkv,), modes, scale, backend)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: Tensor | None = None,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`masked_attention` on q [B, M, H, D] and k, v [B, N, H, D]; all three get gradients.

    Class token only: ``attention(qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2])``. The rest as there,
    but `seqlens` bounds the keys only, and `keep` and `cu_seqlens` (q, k, v [T, H, D]) need M = N.
    """
    modes = (keep, seqlens, cu_seqlens, max_seqlen, key_mask)
    square = keep is not None or cu_seqlens is not None
    checks.check_tensors(q=q, k=k, v=v)
    check_tensor("v", v, v, FLOATING, (*_check_modes(modes), None, None))
    check_tensor("k", k, v, (v.dtype,), v.shape)
    check_tensor("q", q, v, (v.dtype,), v.shape if square else (v.shape[0], None, *v.shape[2:]))
    _check_tensors(v, modes)
    return _attend("attention", (q, k, v), modes, scale, backend)


def _attend(
    name: str, inputs: tuple[Tensor, ...], modes: Modes, scale: float | None, backend: Backend
) -> Tensor:
    factor = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    checks.check_number("scale", factor)
    if backend != "auto":
        check_backend(name, backend, **op.obstacles(modes, factor, *inputs))
        if backend == "reference":
            return getattr(reference, name)(*inputs, *modes, factor)[0]  # type: ignore[no-any-return]
    differentiable = op.masked_attention if len(inputs) == 1 else op.attention
    return differentiable(*inputs, *modes, factor, backend)


def _check_modes(modes: Modes) -> tuple[None, ...]:
    """Refuse arguments that exclude each other; return the row dimensions, of any size."""
    keep, seqlens, cu_seqlens, max_seqlen, key_mask = modes
    given = (keep is not None) + (seqlens is not None) + (cu_seqlens is not None)
    expect(given < 2, "keep, seqlens, cu_seqlens", "at most one", given)
    if cu_seqlens is None:
        expect(max_seqlen is None, "max_seqlen", "None without cu_seqlens", max_seqlen)
        return None, None
    expect(key_mask is None, "key_mask", "None with cu_seqlens (use lengths)", "a tensor")
    expect(max_seqlen is not None, "max_seqlen", "an int with cu_seqlens", None)
    checks.check_int("max_seqlen", max_seqlen, 0)
    return (None,)


def _check_tensors(like: Tensor, modes: Modes) -> None:
    keep, seqlens, cu_seqlens, _, key_mask = modes
    # Not by len(), whose int torch.export would take for the only batch size there is.
    check_tensor("keep", keep, like, INDEX, (like.shape[0], None))
    check_tensor("seqlens", seqlens, like, INDEX, like.shape[:1])
    check_tensor("cu_seqlens", cu_seqlens, like, INDEX[:1], (None,))
    expect(cu_seqlens is None or cu_seqlens.shape[0] > 0, "cu_seqlens", "at least one bound", 0)
    check_tensor("key_mask", key_mask, like, (torch.bool,), like.shape[:2])
