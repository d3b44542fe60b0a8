"""Every addressing mode as one padded batch, with a mask over its keys, in PyTorch's own kernels.

Lengths are such a mask; kept tokens and packed segments are gathered, attended to and scattered
back. Nothing is read on the host. On the CPU the attention is the kernel behind
`F.scaled_dot_product_attention`, forward and backward; elsewhere plain matrix products in fp32
(fp64 for fp64) that hold [B, H, M, N] scores.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["backward", "forward"]

aten = torch.ops.aten

Modes = tuple[Tensor | None, Tensor | None, Tensor | None, int | None, Tensor | None]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: Modes,
    scale: float,
    *,
    bound_queries: bool,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output and lse, which is empty unless saved; `bound_queries`: lengths bound them, too."""
    rows = _select(q, k, *modes, bound_queries=bound_queries)
    o, lse = _forward(rows, scale, *(_gather(x, rows.source) for x in (q, k, v)))
    return _scatter(o, rows.source, like=q), lse if save_lse else lse.new_empty(0)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    modes: Modes,
    scale: float,
    *,
    bound_queries: bool,
    is_packed: bool,
) -> tuple[Tensor, ...]:
    """The gradient of packed q, k, v, [.., 3, H, D]; or those of the three. Contiguous."""
    rows = _select(q, k, *modes, bound_queries=bound_queries)
    gathered = (_gather(x, rows.source) for x in (do, o, q, k, v))
    gradients = _backward(rows, scale, lse, *gathered)
    if is_packed:
        return (_scatter(torch.stack(gradients, dim=-3), rows.source, like=q),)
    return tuple(
        _scatter(gradient, rows.source, like=x).contiguous()
        for gradient, x in zip(gradients, (q, k, v), strict=True)
    )


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
        do, q, k, v = (x.to(lse.dtype) for x in (do, q, k, v))
        p = (_scores(q, k, bias, scale) - lse[..., None]).exp()
        dp = do @ v.transpose(-1, -2)
        # Equals the sum over o * do, whose roundings are others than those of dp: where dp hardly
        # differs from its mean, as with one key or two, dp - delta would be made of them.
        delta = (p * dp).sum(-1, keepdim=True)
        ds = p * (dp - delta) * scale
        dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * (q @ k.transpose(-1, -2))
    return scores if bias is None else scores + bias
