"""Exact top-k in the ring buffer: launch tables and launchers of the search's three kernels.

Letters as in `triton_rank`. `_score_kernel` multiplies the queries with the queue's shadow and
leaves each row the maxima of its groups of slots; `_rank_kernel` finds the first K among them and
writes the results; `_rescue_kernel` makes good where that was not enough. The README says why these
are exact however the shadow is rounded.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.queue_topk import triton_queue, triton_score
from maect_fast.kernels.queue_topk.triton_queue import (
    NUM_BOUNDS,
    TILE,
    make_shadow,
    padded_dim,
)
from maect_fast.kernels.queue_topk.triton_rank import VERDICT, _rank_kernel, _rescue_kernel
from maect_fast.kernels.queue_topk.triton_score import (
    AGAIN_FEATURES,
    AGAIN_ROWS,
    AGAIN_SLOTS,
    MAX_PARTS,
    num_groups,
    score,
    span_of,
)

__all__ = ["machine_code", "make_shadow", "search"]

# By the shadow's type and ascending K: warps; C groups that are looked into, more of which send a
# row to the rescue; N places of a row's list; and tiles.
RANK_SHAPES = {
    torch.float16: (
        (20, 4, {"C": 64, "N": 128, "BLOCK_C": 8, "BLOCK_N": 16}),
        (100, 8, {"C": 256, "N": 512, "BLOCK_C": 16, "BLOCK_N": 8}),
        (200, 8, {"C": 512, "N": 1024, "BLOCK_C": 16, "BLOCK_N": 2}),
    ),
    # A margin 40 times as wide: up to 134 groups for 20 neighbours.
    torch.int8: (
        (20, 4, {"C": 256, "N": 128, "BLOCK_C": 8, "BLOCK_N": 16}),
        (200, 8, {"C": 512, "N": 1024, "BLOCK_C": 16, "BLOCK_N": 2}),
    ),
}


def _rows(dtype: torch.dtype, registers: int, num_stages: int, **limits: Any) -> list[LaunchRow]:
    """A table with these shapes, for so many registers."""
    return [
        LaunchRow(
            label=f"K up to {k}",
            num_warps=num_warps,
            num_stages=num_stages,
            blocks=blocks,
            sizes={"B": 1024, "Q": 65_536, "D": 256, "K": k},
            maxnreg=registers,
            limits=Limits(registers=registers, blocks_per_sm=warps // num_warps, **limits),
        )
        for k, num_warps, blocks in RANK_SHAPES[dtype]
        for warps in (65_536 // 32 // registers // 4 * 4,)
    ]


# 16 warps of a multiprocessor, whose trips to memory overlap.
RANK = {dtype: _rows(dtype, 128, 1) for dtype in RANK_SHAPES}
RESCUE = {
    dtype: _rows(
        dtype,
        255,
        3,
        # Three products for one: what fp32 keeps beside tf32. Tiles of 16 rows are for HMMA.
        products=((AGAIN_ROWS.value, AGAIN_SLOTS.value, AGAIN_FEATURES.value),),
        max_waste=3.0,
        hmma=96,
    )
    for dtype in RANK_SHAPES
}
# Memory of a search: of as many rows at a time as fit into so many bytes, and of a queue without a
# shadow so many bytes of one at a time.
ROW_BYTES = 16_000_000
SHADOW_BYTES = 64 << 20


def search(
    query: Tensor,
    queue: Tensor,
    shadow: Sequence[Tensor],
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
    draw: Sequence[Tensor | int],
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    rank_row: LaunchRow | None = None,
    rescue_row: LaunchRow | None = None,
) -> None:
    """Fill `out`, the fields of TopK, of query [.., n, D] in queue [Q, D].

    Args:
        query: rows of any norm.
        queue: the master rows.
        shadow: rows and bounds by `make_shadow`; empty: made here, part by part.
        k: 1 .. 200.
        query_id: [n]; with `queue_id`.
        queue_id: [Q].
        query_label: [n]; with `queue_label`.
        queue_label: [Q].
        rank: [.., n], or None.
        draw: seed, step, view and row of a Pick, ints or 0-d, the row perhaps [n]; or empty.
        out: values, indices, picked_index, picked_neighbour, label_hit, searched_again.
        rank_row: row of RANK; None takes that of the shadow and `k`.
        rescue_row: row of RESCUE.
    """
    n, D = query.shape[-2:]
    Q = len(queue)
    dtype = shadow[0].dtype if shadow else torch.float16
    at = next(i for i, (most, *_) in enumerate(RANK_SHAPES[dtype]) if k <= most)
    rank_row, rescue_row = rank_row or RANK[dtype][at], rescue_row or RESCUE[dtype][at]
    L = max(16, triton.next_power_of_2(k))
    rows = query.reshape(-1, D)
    values, indices = (x.view(-1, k) for x in out[:2])
    picked, hit, again = (out[i].view(-1) for i in (2, 4, 5))
    neighbour = out[3].view(-1, D)
    ranks = None if rank is None else rank.view(-1)
    seed, step, view, row = draw or (0, 0, 0, 0)
    numbers = row if isinstance(row, Tensor) and row.ndim > 0 else None

    tiles = SHADOW_BYTES // (padded_dim(D) * torch.float16.itemsize) // TILE.value
    part = Q if shadow else min(Q, max(1, tiles) * TILE.value)
    span = span_of(part)
    G = num_groups(part, span)
    C, N = (rank_row.blocks[letter] for letter in "CN")
    block = min(len(rows), max(1, ROW_BYTES // row_bytes(G, C, N)))
    # Of a queue in parts, one search's lists are where the next begins.
    lists = rows.new_empty((2, len(rows), L) if part < Q else (0, 0, 0), dtype=torch.int64)
    scratch = rows.new_empty(block * row_bytes(G, C, N) + 8 * MAX_PARTS, dtype=torch.uint8)
    entry, candidate, reach, firsts, seconds, verdict = _views(
        scratch,
        (block * N, torch.int64),
        (block * 2 * C, torch.int32),
        (2 * MAX_PARTS, torch.float32),
        (block * G, torch.float32),
        (block * G, torch.int16),
        (block * VERDICT.value, torch.float32),
    )
    for i, offset in enumerate(range(0, Q, part)):
        end = min(offset + part, Q)
        copy, bound = shadow or make_shadow(queue[offset:end], dtype)
        for start in range(0, len(rows), block):
            here = slice(start, min(start + block, len(rows)))
            x = rows[here]
            # The last part may have fewer groups.
            shape = len(x), num_groups(end - offset, span)
            first, second = (y[: math.prod(shape)].view(shape) for y in (firsts, seconds))
            num_parts = score(
                x, copy, bound, first, second, reach, num_slots=end - offset, span=span
            )
            ids_and_labels = (query_id, queue_id, query_label, queue_label)
            results = (values[here], indices[here], picked[here], neighbour[here], hit[here])
            lists_and_draw = (
                lists[(i + 1) % 2, here] if i > 0 else None,
                candidate,
                entry,
                lists[i % 2, here] if part < Q else None,
                verdict,
                None if ranks is None else ranks[here],
                numbers,
            )
            sizes = (
                *(seed, step, view, 0 if numbers is not None else row, start, n, k, offset, end),
                *(shape[1], x.stride(0), queue.stride(0)),
            )
            constants = {
                "D": D,
                "SPAN": span,
                "IS_LAST": end == Q,
                "HAS_PICK": rank is not None or len(draw) > 0,
                "L": L,
                "BLOCK_G": triton.next_power_of_2(shape[1]),
            }
            launch(
                _rank_kernel,
                (len(x),),
                x,
                queue,
                *ids_and_labels,
                reach,
                first,
                second,
                *lists_and_draw,
                *results,
                again[here],
                num_parts,
                *sizes,
                IS_INT8=dtype == torch.int8,
                BLOCK_P=triton.next_power_of_2(num_parts),
                **constants,
                **rank_row.options,
            )
            launch(
                _rescue_kernel,
                (len(x),),
                x,
                queue,
                *ids_and_labels,
                first,
                second,
                *lists_and_draw,
                *results,
                len(x),
                *sizes,
                **constants,
                **rescue_row.options,
            )


def row_bytes(G: int, C: int, N: int) -> int:
    """Memory of a row beside its results: maxima, candidates, list, verdict."""
    num_bytes: int = 6 * G + 8 * C + 8 * N + 4 * VERDICT.value
    return num_bytes


def _views(memory: Tensor, *parts: tuple[int, torch.dtype]) -> Iterator[Tensor]:
    """So many numbers of these types, one behind the other."""
    begin = 0
    for size, dtype in parts:
        end = begin + size * dtype.itemsize
        yield memory[begin:end].view(dtype)
        begin = end


def machine_code(arch: int) -> Iterator[Launch]:
    """Launches for the compiler."""
    yield from triton_queue.machine_code(arch)
    yield from triton_score.machine_code(arch)
    meta = partial(torch.empty, device="meta")
    ids = partial(meta, dtype=torch.int64)
    for dtype in RANK_SHAPES:
        for rank_row, rescue_row in zip(
            fitting(RANK[dtype], arch), fitting(RESCUE[dtype], arch), strict=True
        ):
            B, Q, D, K = (rank_row.sizes[letter] for letter in "BQDK")
            n = B // 2
            shadow = meta(Q, padded_dim(D), dtype=dtype), meta(Q // TILE.value, NUM_BOUNDS.value)
            query, queue = meta(2, n, D, dtype=torch.bfloat16), meta(Q, D)
            labels = (ids(n), ids(Q), ids(n), ids(Q))
            draw: list[Tensor | int] = [3, ids(()), 0, n]
            flags = partial(meta, 2, n, dtype=torch.bool)
            out = (meta(2, n, K), ids(2, n, K), ids(2, n), meta(2, n, D), flags(), flags())
            arguments = (query, queue, shadow, K, *labels, None, draw, out)
            call = partial(search, *arguments, rank_row=rank_row, rescue_row=rescue_row)
            for kernel, row in ((_rank_kernel, rank_row), (_rescue_kernel, rescue_row)):
                yield Launch(kernel=kernel, row=row, call=call, variant=str(dtype)[6:])
