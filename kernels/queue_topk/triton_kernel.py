"""Exact top-k in the ring buffer: launch tables and launchers of the search's three kernels.

Letters as in `triton_select`. `_score_kernel` multiplies the queries with the queue's shadow and
leaves each row the maxima of its groups of slots; `_select_kernel` finds the first K among them;
`_finish_kernel` makes good where that was not enough and writes the results. The README says why
these are exact however the shadow is rounded.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.launch import H200, Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.queue_topk import triton_queue, triton_score
from maect_fast.kernels.queue_topk.triton_queue import (
    NUM_BOUNDS,
    TILE,
    make_shadow,
    padded_dim,
)
from maect_fast.kernels.queue_topk.triton_score import num_groups, score, span_of
from maect_fast.kernels.queue_topk.triton_select import _finish_kernel, _select_kernel

__all__ = ["machine_code", "make_shadow", "search"]

# Candidates of a row; more of them, and the row is searched by brute force.
NUM_CANDIDATES = 512
# By ascending K, which decides the length of a row's list.
SELECT = tuple(
    LaunchRow(
        label=f"K up to {k}",
        num_warps=num_warps,
        num_stages=1,
        blocks={"BLOCK_C": block_c, "BLOCK_D": block_d},
        sizes={"B": 1024, "Q": 65_536, "D": 256, "K": k},
        # Left alone, the assembler spills a little to fit one block more.
        maxnreg=registers,
        limits=Limits(registers=registers, blocks_per_sm=blocks_per_sm),
        backing=f"measured: {microseconds} us at 512 rows, K {at_k}, alone, {H200}"
        if microseconds
        else "compiled",
    )
    for k, block_c, num_warps, block_d, registers, blocks_per_sm, microseconds, at_k in (
        (16, 16, 4, 32, 144, 3, 30, 1),
        (32, 16, 4, 32, 144, 3, 62, 20),
        (64, 32, 4, 32, 240, 2, 0, 0),
        (128, 32, 8, 64, 240, 1, 316, 100),
        (200, 32, 8, 64, 240, 1, 0, 0),
    )
)
FINISH = LaunchRow(
    label="any K",
    num_warps=4,
    num_stages=1,
    maxnreg=128,
    blocks={"BLOCK_Q": 32, "BLOCK_D": 32},
    sizes={"B": 1024, "Q": 65_536, "D": 256, "K": 20},
    limits=Limits(registers=128, blocks_per_sm=4),
    backing=f"measured: 1.5 us at 512 rows that needed no search, alone, {H200}",
)
# Memory of a search: maxima and candidates of as many rows at a time as fit into so many bytes, and
# of a queue without a shadow so many bytes of one at a time.
ROW_BYTES = 15 << 20
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
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    select: LaunchRow | None = None,
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
        out: values, indices, picked_index, picked_neighbour, label_hit.
        select: row of the launch table; None takes that of `k`.
    """
    n, D = query.shape[-2:]
    Q = len(queue)
    select = select or next(row for row in SELECT if k <= row.sizes["K"])
    L = max(16, triton.next_power_of_2(k))
    rows = query.reshape(-1, D)
    values, indices = (x.view(-1, k) for x in out[:2])
    picked, hit = out[2].view(-1), out[4].view(-1)
    neighbour = out[3].view(-1, D)
    ranks = None if rank is None else rank.view(-1)
    seed, step, view, row = draw or (0, 0, 0, 0)
    numbers = row if isinstance(row, Tensor) and row.ndim > 0 else None

    tiles = SHADOW_BYTES // (padded_dim(D) * torch.float16.itemsize) // TILE.value
    part = Q if shadow else min(Q, max(1, tiles) * TILE.value)
    span = span_of(part)
    G = num_groups(part, span)
    block = max(1, ROW_BYTES // (6 * G + 4 * NUM_CANDIDATES))
    # Of a queue in parts, one search's lists are where the next begins.
    lists = rows.new_empty((2 if part < Q else 1, len(rows), L), dtype=torch.int64)
    block = min(block, len(rows))
    firsts = rows.new_empty(block * G, dtype=torch.float32)
    seconds = torch.empty_like(firsts, dtype=torch.int16)
    candidate = rows.new_empty((block, NUM_CANDIDATES), dtype=torch.int32)
    verdict = rows.new_empty((block, 2), dtype=torch.float32)
    for i, offset in enumerate(range(0, Q, part)):
        end = min(offset + part, Q)
        copy, bound = shadow or make_shadow(queue[offset:end], torch.float16)
        for start in range(0, len(rows), block):
            here = slice(start, min(start + block, len(rows)))
            x = rows[here]
            # The last part may have fewer groups.
            shape = len(x), num_groups(end - offset, span)
            first, second = (y[: math.prod(shape)].view(shape) for y in (firsts, seconds))
            score(x, copy, bound, first, second, num_slots=end - offset, span=span)
            before = lists[(i + 1) % 2, here] if i > 0 else None
            launch(
                _select_kernel,
                (len(x),),
                x,
                queue,
                query_id,
                queue_id,
                bound,
                first,
                second,
                before,
                lists[i % 2, here],
                candidate,
                verdict,
                start,
                n,
                k,
                offset,
                end,
                shape[1],
                x.stride(0),
                queue.stride(0),
                D=D,
                SPAN=span,
                IS_INT8=copy.dtype == torch.int8,
                L=L,
                C=NUM_CANDIDATES,
                BLOCK_G=triton.next_power_of_2(shape[1]),
                **select.options,
            )
            launch(
                _finish_kernel,
                (len(x),),
                x,
                queue,
                query_id,
                queue_id,
                query_label,
                queue_label,
                first,
                before,
                lists[i % 2, here],
                verdict,
                None if ranks is None else ranks[here],
                numbers,
                values[here],
                indices[here],
                picked[here],
                neighbour[here],
                hit[here],
                seed,
                step,
                view,
                0 if numbers is not None else row,
                start,
                n,
                k,
                offset,
                end,
                shape[1],
                x.stride(0),
                queue.stride(0),
                D=D,
                SPAN=span,
                IS_LAST=end == Q,
                HAS_PICK=rank is not None or len(draw) > 0,
                L=L,
                **FINISH.options,
            )


def machine_code(arch: int) -> Iterator[Launch]:
    """Launches for the compiler."""
    yield from triton_queue.machine_code(arch)
    yield from triton_score.machine_code(arch)
    meta = partial(torch.empty, device="meta")
    ids = partial(meta, dtype=torch.int64)
    for row in (*fitting(SELECT, arch), FINISH):
        B, Q, D, K = (row.sizes[letter] for letter in "BQDK")
        n = B // 2
        out = (meta(2, n, K), ids(2, n, K), ids(2, n), meta(2, n, D), meta(2, n, dtype=torch.bool))
        labels = (ids(n), ids(Q), ids(n), ids(Q))
        draw: list[Tensor | int] = [3, ids(()), 0, n]
        query, queue = meta(2, n, D, dtype=torch.bfloat16), meta(Q, D)
        for dtype in (torch.float16, torch.int8):
            shadow = meta(Q, padded_dim(D), dtype=dtype), meta(Q // TILE.value, NUM_BOUNDS.value)
            arguments = (query, queue, shadow, K, *labels, None, draw, out)
            kernel = _finish_kernel if row is FINISH else _select_kernel
            call = partial(search, *arguments, select=None if row is FINISH else row)
            yield Launch(kernel=kernel, row=row, call=call, variant=str(dtype)[6:])
