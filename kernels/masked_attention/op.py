"""Registration, and the op out of PyTorch's own kernels.

Two op pairs: `masked_attention` on packed q, k, v and `attention` on separate ones. Their arguments
are positional and complete; defaults and checks are the public functions'. The second output of a
forward op, lse, is private to its pair and has the rows of the padded batch: [B, H, M], with `keep`
[B, H, Nk], with `cu_seqlens` [S, H, max_seqlen].

Every addressing mode becomes one padded batch with a mask over its keys: lengths are such a mask,
kept tokens and packed segments are gathered, attended to and scattered back. Nothing is read on the
host. On the CPU the attention is the kernel behind `F.scaled_dot_product_attention`, forward and
backward; elsewhere plain matrix products in fp32 (fp64 for fp64) that hold [B, H, M, N] scores.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

__all__ = ["attention_bwd", "attention_fwd", "masked_attention_bwd", "masked_attention_fwd"]

DEVICES = ("cpu", "cuda")
aten = torch.ops.aten


@torch.library.custom_op("maect_fast::masked_attention_fwd", mutates_args=(), device_types=DEVICES)
def masked_attention_fwd(
    qkv: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and lse; `seqlens` bounds queries and keys."""
    q, k, _ = qkv.unbind(-3)
    rows = _select(q, k, keep, seqlens, cu_seqlens, max_seqlen, key_mask, bound_queries=True)
    o, lse = _forward(rows, scale, *_gather(qkv, rows.source).unbind(-3))
    return _scatter(o, rows.source, like=q), lse


@torch.library.custom_op("maect_fast::masked_attention_bwd", mutates_args=(), device_types=DEVICES)
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
) -> Tensor:
    """The gradient of qkv, one contiguous buffer."""
    q, k, _ = qkv.unbind(-3)
    rows = _select(q, k, keep, seqlens, cu_seqlens, max_seqlen, key_mask, bound_queries=True)
    do, qkv_rows, o = (_gather(x, rows.source) for x in (do, qkv, o))
    gradients = _backward(rows, scale, lse, do, o, *qkv_rows.unbind(-3))
    return _scatter(torch.stack(gradients, dim=-3), rows.source, like=qkv)


@torch.library.custom_op("maect_fast::attention_fwd", mutates_args=(), device_types=DEVICES)
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
) -> tuple[Tensor, Tensor]:
    """Output and lse; `seqlens` bounds keys only."""
    rows = _select(q, k, keep, seqlens, cu_seqlens, max_seqlen, key_mask, bound_queries=False)
    o, lse = _forward(rows, scale, *(_gather(x, rows.source) for x in (q, k, v)))
    return _scatter(o, rows.source, like=q), lse


@torch.library.custom_op("maect_fast::attention_bwd", mutates_args=(), device_types=DEVICES)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each contiguous."""
    rows = _select(q, k, keep, seqlens, cu_seqlens, max_seqlen, key_mask, bound_queries=False)
    gathered = (_gather(x, rows.source) for x in (do, o, q, k, v))
    dq, dk, dv = _backward(rows, scale, lse, *gathered)
    return (
        _scatter(dq, rows.source, like=q).contiguous(),
        _scatter(dk, rows.source, like=k).contiguous(),
        _scatter(dv, rows.source, like=v).contiguous(),
    )


def _empty_outputs(
    q: Tensor, keep: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and layouts of a forward op's outputs."""
    H = q.shape[-2]
    if cu_seqlens is not None:
        assert max_seqlen is not None
        lse_shape = (cu_seqlens.shape[0] - 1, H, max_seqlen)
    elif keep is not None:
        lse_shape = (q.shape[0], H, keep.shape[1])
    else:
        lse_shape = (q.shape[0], H, q.shape[1])
    lse = q.new_empty(lse_shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@masked_attention_fwd.register_fake
def _masked_attention_fwd_fake(
    qkv: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv.select(-3, 0), keep, cu_seqlens, max_seqlen)


@attention_fwd.register_fake
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
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, keep, cu_seqlens, max_seqlen)


@masked_attention_bwd.register_fake
def _masked_attention_bwd_fake(do: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


@attention_bwd.register_fake
def _attention_bwd_fake(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, keep, seqlens, cu_seqlens, max_seqlen, key_mask, scale = inputs
    ctx.save_for_backward(*qkv, *output, keep, seqlens, cu_seqlens, key_mask)
    ctx.mark_non_differentiable(output[1])
    ctx.max_seqlen, ctx.scale = max_seqlen, scale


def _masked_attention_backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, o, lse, keep, seqlens, cu_seqlens, key_mask = ctx.saved_tensors
    modes = (keep, seqlens, cu_seqlens, ctx.max_seqlen, key_mask)
    return masked_attention_bwd(do, qkv, o, lse, *modes, ctx.scale), *(None,) * 6


def _attention_backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, lse, keep, seqlens, cu_seqlens, key_mask = ctx.saved_tensors
    modes = (keep, seqlens, cu_seqlens, ctx.max_seqlen, key_mask)
    return *attention_bwd(do, q, k, v, o, lse, *modes, ctx.scale), *(None,) * 6


masked_attention_fwd.register_autograd(_masked_attention_backward, setup_context=_save)
attention_fwd.register_autograd(_attention_backward, setup_context=_save)


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


class _Rows(NamedTuple):
    """How the padded batch is made of the input's rows, and which of its rows count."""

    source: tuple[Tensor, ...] | None
    """[B, M] each: sample and token, or packed row, where T stands for none; None: as it is."""
    query: Tensor | None
    """[B, M] bool, True = the query gets a result; None: all do."""
    key: Tensor | None
    """[B, N] bool, True = the key takes part; None: all do."""


def _select(
    q: Tensor,
    k: Tensor,
    keep: Tensor | None,
    seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    key_mask: Tensor | None,
    *,
    bound_queries: bool,
) -> _Rows:
    """Translate an addressing mode; with `bound_queries` lengths bound queries as well as keys."""
    if cu_seqlens is not None:
        assert max_seqlen is not None
        start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
        row = start + torch.arange(max_seqlen, device=q.device)  # [S, max_seqlen] int64
        inside = row < end
        return _Rows((row.where(inside, len(q)),), inside, inside)
    if keep is not None:
        index = (torch.arange(len(keep), device=q.device)[:, None], keep.long())
        return _Rows(index, None, None if key_mask is None else key_mask[index])
    if seqlens is None:
        return _Rows(None, None, key_mask)
    inside = torch.arange(k.shape[1], device=q.device) < seqlens[:, None]
    key = inside if key_mask is None else inside & key_mask
    return _Rows(None, inside if bound_queries else None, key)


def _gather(x: Tensor, index: tuple[Tensor, ...] | None) -> Tensor:
    """The padded batch; where there is no row, some other row's values."""
    if index is None:
        return x
    if len(index) == 2:
        return x[index]
    (row,) = index
    return x[row.clamp(max=len(x) - 1)] if len(x) else x.new_zeros(*row.shape, *x.shape[1:])


def _scatter(x: Tensor, index: tuple[Tensor, ...] | None, *, like: Tensor) -> Tensor:
    """The padded batch back in the row dimensions of `like`; other rows are zero. Contiguous."""
    if index is None:
        return x
    if len(index) == 2:
        out = x.new_zeros(*like.shape[:2], *x.shape[2:])
        out[index] = x
        return out
    # One more row takes what has none.
    out = x.new_zeros(len(like) + 1, *x.shape[2:])
    out[index] = x
    return out[:-1]


def _forward(rows: _Rows, scale: float, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, M, H, D] and lse [B, H, M] of a padded batch, both contiguous."""
    B, M, H, _ = q.shape
    if q.numel() == 0 or k.numel() == 0:
        accumulate = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(q.shape), q.new_full((B, H, M), float("-inf"), dtype=accumulate)
    live, bias = _live(rows), _bias(rows.key, q.dtype)
    k, v = _zero(k, rows.key), _zero(v, rows.key)
    attend = _sdpa_forward if q.device.type == "cpu" else _math_forward
    o, lse = attend(bias, scale, *(x.transpose(1, 2) for x in (q, k, v)))
    if live is not None:
        lse = lse.masked_fill(~live[:, None], float("-inf"))
    # Queries that get no result are not cleaned beforehand: each spoils its own row alone.
    return _zero_(o.transpose(1, 2), live).contiguous(), lse.contiguous()


def _backward(
    rows: _Rows, scale: float, lse: Tensor, do: Tensor, o: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B, M, H, D], k and v [B, N, H, D] of a padded batch."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    live, bias = _live(rows), _bias(rows.key, q.dtype)
    do, o, q = _zero(do, live), _zero(o, live), _zero(q, live)
    k, v = _zero(k, rows.key), _zero(v, rows.key)
    if live is not None:
        # Rows without a result have lse = -inf; with +inf their P = exp(S - lse) is 0, not NaN.
        lse = lse.masked_fill(~live[:, None], float("inf"))
    differentiate = _sdpa_backward if q.device.type == "cpu" else _math_backward
    transposed = (x.transpose(1, 2) for x in (do, o, q, k, v))
    dq, dk, dv = (x.transpose(1, 2) for x in differentiate(bias, scale, lse, *transposed))
    return _zero_(dq, live), _zero_(dk, rows.key), _zero_(dv, rows.key)


def _live(rows: _Rows) -> Tensor | None:
    """[B, M or 1] bool, True = the query gets a result and has a key; None: all."""
    if rows.key is None:
        return rows.query
    any_key = rows.key.any(1, keepdim=True)
    return any_key if rows.query is None else any_key & rows.query


def _bias(key: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, 1, 1, N]: what is added to the scores, 0 or, for keys that take no part, -inf."""
    if key is None:
        return None
    return torch.zeros_like(key, dtype=dtype).masked_fill(~key, float("-inf"))[:, None, None]


def _zero(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, M or N, H, D] with zeros where the mask is False."""
    return x if mask is None else x.masked_fill(~mask[..., None, None], 0)


def _zero_(x: Tensor, mask: Tensor | None) -> Tensor:
    """`_zero` in place."""
    return x if mask is None else x.masked_fill_(~mask[..., None, None], 0)


def _sdpa_forward(
    bias: Tensor | None, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    return o, lse


def _sdpa_backward(
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    do: Tensor,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, False, attn_mask=bias, scale=scale
    )
    return dq, dk, dv


def _math_forward(
    bias: Tensor | None, scale: float, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    # Autocast would round the operands of fp32 products.
    with torch.autocast(q.device.type, enabled=False):
        accumulate = torch.promote_types(q.dtype, torch.float32)
        scores = _scores(q.to(accumulate), k.to(accumulate), bias, scale)
        lse = scores.logsumexp(-1)
        return (scores.softmax(-1) @ v.to(accumulate)).to(q.dtype), lse


def _math_backward(
    bias: Tensor | None,
    scale: float,
    lse: Tensor,
    do: Tensor,
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        dtype = q.dtype
        do, q, k, v, o = (x.to(lse.dtype) for x in (do, q, k, v, o))
        p = (_scores(q, k, bias, scale) - lse[..., None]).exp()
        delta = (o * do).sum(-1, keepdim=True)
        ds = p * (do @ v.transpose(-1, -2) - delta) * scale
        dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * (q @ k.transpose(-1, -2))
    return scores if bias is None else scores + bias
