"""Masked self-attention by definition, in plain PyTorch, for any floating dtype.

Letters: B samples, M query tokens, N key tokens, H heads, D features of a head; T packed rows, S
segments. O = softmax(scale * Q K^T) V over the keys that take part.

Decided here:
  - a row without keys gets O = 0, lse = -inf and no gradient;
  - keys and values that take no part, and queries outside their sample, are replaced by zeros
    before they are used, so NaN and Inf in them reach neither outputs nor gradients;
  - a key mask concerns keys: the query of a masked token still gets a result;
  - rows outside a sample (beyond its length, beyond the last segment, not kept) are zero in O and
    in every gradient, and -inf in lse;
  - indices and segment bounds are checked, which reads them on the host.
"""

from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["attention", "masked_attention"]


def masked_attention(
    qkv: Tensor,
    keep: Tensor | None = None,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-attention on packed q, k, v: [B, N, 3, H, D], or [T, 3, H, D] with `cu_seqlens`.

    Returns:
        o: [B, N, H, D], or [T, H, D].
        lse: [B, H, N], or [H, T]; the log of each row's softmax denominator; no gradient.

    Raises:
        ValueError: an index of `keep` is out of range or repeated; `cu_seqlens` does not start at
            0, decreases, ends beyond T or has a segment longer than `max_seqlen`.
    """
    q, k, v = qkv.unbind(-3)
    if seqlens is None:
        return attention(q, k, v, keep, None, cu_seqlens, max_seqlen, key_mask, scale)
    # Here the lengths bound the queries, too.
    inside = torch.arange(q.shape[1], device=q.device) < seqlens[:, None]  # [B, N] bool
    q = q.where(inside[..., None, None], 0)
    o, lse = attention(q, k, v, seqlens=seqlens, key_mask=key_mask, scale=scale)
    return o.where(inside[..., None, None], 0), lse.where(inside[:, None], float("-inf"))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, M, H, D] to k, v [B, N, H, D], or of [T, H, D] each with `cu_seqlens`.

    As `masked_attention`, but `seqlens` bounds the keys only; `keep` and `cu_seqlens` need M = N.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if cu_seqlens is not None:
        return _segments(q, k, v, _checked_bounds(cu_seqlens, max_seqlen, len(q)), scale)
    takes_part = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)  # [B, N] bool
    if key_mask is not None:
        takes_part = takes_part & key_mask
    if seqlens is not None:
        takes_part = takes_part & (torch.arange(k.shape[1], device=k.device) < seqlens[:, None])
    if keep is None:
        return _attend(q, k, v, takes_part, scale)

    keep = _checked_indices(keep, q.shape[1])
    rows = (torch.arange(len(keep), device=keep.device)[:, None], keep)
    o_kept, lse_kept = _attend(q[rows], k[rows], v[rows], takes_part[rows], scale)
    o = q.new_zeros(q.shape).index_put(rows, o_kept)
    lse = lse_kept.new_full(q.shape[:3], float("-inf")).index_put(rows, lse_kept.transpose(1, 2))
    return o, lse.transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, takes_part: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One rectangle: q [B, M, H, D], k and v [B, N, H, D], takes_part [B, N]."""
    any_key = takes_part.any(1)  # [B] bool
    k = k.where(takes_part[..., None, None], 0)
    v = v.where(takes_part[..., None, None], 0)
    scores = scale * torch.einsum("bmhd,bnhd->bhmn", q, k)
    scores = scores.where(takes_part[:, None, None], float("-inf"))
    accumulate = torch.promote_types(q.dtype, torch.float32)
    lse = scores.detach().to(accumulate).logsumexp(-1)
    # A row without keys would be 0 / 0: it runs over zeros, and v is zero there.
    scores = scores.where(any_key[:, None, None, None], 0)
    return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v).contiguous(), lse


def _segments(
    q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Each packed segment by itself; the rows behind the last are zeros."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    outputs, lses = [], []
    for start, end in pairwise(bounds):
        rows = slice(start, end)
        everything = torch.ones(1, end - start, dtype=torch.bool, device=q.device)
        o, lse = _attend(q[None, rows], k[None, rows], v[None, rows], everything, scale)
        outputs.append(o[0])
        lses.append(lse[0])
    rest = q[bounds[-1] :].where(q.new_zeros((), dtype=torch.bool), 0)
    lse_rest = rest.new_full((q.shape[1], len(rest)), float("-inf"), dtype=accumulate)
    return torch.cat([*outputs, rest]), torch.cat([*lses, lse_rest], dim=1)


def _checked_bounds(cu_seqlens: Tensor, max_seqlen: int | None, num_rows: int) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] > num_rows or any(n < 0 for n in lengths):
        raise ValueError(
            f"cu_seqlens: expected to rise from 0 to at most {num_rows} rows, got {bounds}"
        )
    if max_seqlen is not None and any(n > max_seqlen for n in lengths):
        raise ValueError(
            f"max_seqlen: expected at least the longest segment, {max(lengths)}, got {max_seqlen}"
        )
    return bounds


def _checked_indices(keep: Tensor, num_tokens: int) -> Tensor:
    ordered = keep.sort(dim=1).values
    if (ordered < 0).any() or (ordered >= num_tokens).any():
        raise ValueError(
            f"keep: expected indices in [0, {num_tokens}), "
            f"got {ordered.min().item()} to {ordered.max().item()}"
        )
    if (ordered.diff(dim=1) == 0).any():
        raise ValueError("keep: expected unique indices in each row, got a repeated one")
    return keep.long()
