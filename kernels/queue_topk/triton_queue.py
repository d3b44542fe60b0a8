"""The ring buffer's update and its shadow, the copy that the search multiplies.

Legend: B rows to be written, Q slots, D features, T tiles of TILE slots.

One program owns one tile of the buffer: it writes the new rows that fall into it, then its part of
the shadow anew. So each slot has one writer, whatever B, and the tile's bounds, which are maxima
over its rows, need no atomics.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch

__all__ = ["TILE", "enqueue", "machine_code", "make_shadow", "padded_dim"]

EPS = tl.constexpr(1e-12)
# Slots that share bounds, and in int8 a scale; a tile of the search lies within one.
TILE = tl.constexpr(128)
# Columns of `bound`: largest distance of a row to its rounding, largest norm, scale (1 in fp16).
NUM_BOUNDS = tl.constexpr(3)
# Wider rows are multiplied in slices, so they are padded to whole ones.
WIDEST, SLICE, NARROWEST = 256, 128, 32


@triton.jit
def _row_norm(base_ptr, mask, D, BLOCK_D: tl.constexpr, NUM_ROWS: tl.constexpr):
    """max(norm, EPS) of rows [NUM_ROWS] as fp32: exact products, summed in fp64."""
    square = tl.zeros((NUM_ROWS,), tl.float64)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(base_ptr[:, None] + offs_d[None, :], mask & (offs_d[None, :] < D), other=0.0)
        x = x.to(tl.float32).to(tl.float64)
        square += tl.sum(x * x, axis=1)
    norm = tl.sqrt(square).to(tl.float32)
    # NaN stays NaN.
    return tl.where(norm < EPS, EPS, norm)


@triton.jit
def _slice(
    queue_ptrs,
    rows_ptrs,
    norm,
    in_queue,
    in_rows,
    d,
    D,
    IS_UPDATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Features d .. d + BLOCK_D of the tile as it will be, fp32."""
    offs_d = d + tl.arange(0, BLOCK_D)
    mask_d = offs_d[None, :] < D
    c = tl.load(queue_ptrs[:, None] + offs_d[None, :], in_queue[:, None] & mask_d, other=0.0)
    c = c.to(tl.float32)
    if IS_UPDATE:
        mask = in_rows[:, None] & mask_d
        x = tl.load(rows_ptrs[:, None] + offs_d[None, :], mask, other=0.0)
        unit = tl.div_rn(x.to(tl.float32), norm[:, None])
        # As it will be stored.
        c = tl.where(mask, unit.to(queue_ptrs.dtype.element_ty).to(tl.float32), c)
    return c


@triton.jit(do_not_specialize=["B", "Q"])
def _tile_kernel(
    rows_ptr,
    id_ptr,
    label_ptr,
    queue_ptr,
    queue_y_ptr,
    queue_id_ptr,
    pointer_ptr,
    shadow_ptr,
    bound_ptr,
    B,
    Q,
    stride_rb,
    stride_qq,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile per program, from the pointer's on: new rows, then the shadow and its bounds."""
    tile = tl.program_id(0)
    in_rows = tl.zeros((BLOCK_Q,), tl.int1)
    row = tl.zeros((BLOCK_Q,), tl.int64)
    if IS_UPDATE:
        pointer = tl.load(pointer_ptr)
        tile = (pointer // BLOCK_Q + tile) % tl.cdiv(Q, BLOCK_Q)
    slot = tile.to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_queue = slot < Q
    if IS_UPDATE:
        # Of B > Q rows the last Q stay.
        skipped = tl.maximum(B - Q, 0)
        row = skipped + ((slot - pointer - skipped) % Q + Q) % Q
        in_rows = in_queue & (row < B)
    queue_ptrs = queue_ptr + slot * stride_qq
    rows_ptrs = rows_ptr + row * stride_rb
    norm = tl.full((BLOCK_Q,), 1.0, tl.float32)
    if IS_UPDATE:
        norm = _row_norm(rows_ptrs, in_rows[:, None], D, BLOCK_D, BLOCK_Q)
        none = tl.full((BLOCK_Q,), -1, tl.int64)
        sample_id, label = none, none
        if id_ptr is not None:
            sample_id = tl.load(id_ptr + row, in_rows, other=-1)
        if label_ptr is not None:
            label = tl.load(label_ptr + row, in_rows, other=-1)
        tl.store(queue_id_ptr + slot, sample_id, in_rows)
        tl.store(queue_y_ptr + slot, label, in_rows)
    scale = 1.0
    if IS_INT8:
        largest = tl.zeros((BLOCK_Q,), tl.float32)
        for d in range(0, D, BLOCK_D):
            c = _slice(queue_ptrs, rows_ptrs, norm, in_queue, in_rows, d, D, IS_UPDATE, BLOCK_D)
            # NaN and infinity have no say: their rows are judged by their norms.
            c = tl.where(tl.abs(c) < float("inf"), c, 0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(c), axis=1))
        scale = tl.maximum(tl.max(largest), 1e-30) / 127
    # In fp64 no square vanishes.
    square = tl.zeros((BLOCK_Q,), tl.float64)
    residual = tl.zeros((BLOCK_Q,), tl.float64)
    for d in range(0, PADDED_D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        c = _slice(queue_ptrs, rows_ptrs, norm, in_queue, in_rows, d, D, IS_UPDATE, BLOCK_D)
        if IS_UPDATE:
            mask = in_rows[:, None] & (offs_d[None, :] < D)
            tl.store(queue_ptrs[:, None] + offs_d[None, :], c, mask)
        if HAS_SHADOW:
            if IS_INT8:
                finite = tl.where(tl.abs(c) < float("inf"), c, 0.0)
                stored = tl.floor(finite / scale + 0.5).to(tl.int8)
                rounded = stored.to(tl.float32) * scale
            else:
                stored = c.to(tl.float16)
                rounded = stored.to(tl.float32)
            tl.store(shadow_ptr + slot[:, None] * PADDED_D + offs_d[None, :], stored)
            distance = c.to(tl.float64) - rounded.to(tl.float64)
            square += tl.sum(c.to(tl.float64) * c.to(tl.float64), axis=1)
            residual += tl.sum(distance * distance, axis=1)
    if HAS_SHADOW:
        # A row with NaN has no score, so its rounding matters to none. One with an infinity, or too
        # large for the shadow, has no bound: the search then does without the shadow.
        is_nan = square != square
        residual = tl.where(residual != residual, float("inf"), residual)
        residual, square = tl.where(is_nan, 0.0, residual), tl.where(is_nan, 0.0, square)
        bound_ptrs = bound_ptr + tile * NUM_BOUNDS
        tl.store(bound_ptrs, tl.sqrt(tl.max(residual)).to(tl.float32))
        tl.store(bound_ptrs + 1, tl.sqrt(tl.max(square)).to(tl.float32))
        tl.store(bound_ptrs + 2, scale)


@triton.jit(do_not_specialize=["B", "Q"])
def _advance_kernel(pointer_ptr, B, Q):
    """After all tiles: they read the pointer."""
    tl.store(pointer_ptr, (tl.load(pointer_ptr) + B) % Q)


TILES = (
    LaunchRow(
        label="D 256",
        num_warps=8,
        num_stages=1,
        blocks={"BLOCK_Q": TILE.value, "BLOCK_D": 32},
        sizes={"B": 1024, "Q": 65_536, "D": 256},
        limits=Limits(registers=120, blocks_per_sm=2),
    ),
)
ADVANCE = LaunchRow(
    label="pointer",
    num_warps=1,
    num_stages=1,
    blocks={},
    sizes={"B": 1024, "Q": 65_536, "D": 256},
    limits=Limits(registers=20, blocks_per_sm=32),
)


def padded_dim(D: int) -> int:
    """Features of a shadow's row: those beyond D are zero."""
    if D <= WIDEST:
        return max(NARROWEST, int(triton.next_power_of_2(D)))
    return int(triton.cdiv(D, SLICE)) * SLICE


def make_shadow(
    queue: Tensor, dtype: torch.dtype, *, row: LaunchRow = TILES[0]
) -> tuple[Tensor, Tensor]:
    """Shadow [T * TILE, padded_dim(D)] of queue [Q, D] in fp16 or int8, and bounds [T, 3]."""
    Q, D = queue.shape
    num_tiles = triton.cdiv(Q, TILE.value)
    shadow = queue.new_empty((num_tiles * TILE.value, padded_dim(D)), dtype=dtype)
    bound = queue.new_empty((num_tiles, NUM_BOUNDS.value), dtype=torch.float32)
    with gpu.current(queue):
        _launch((num_tiles,), queue, None, None, queue, None, None, None, shadow, bound, 0, row)
    return shadow, bound


def enqueue(
    queue: Tensor,
    queue_y: Tensor,
    queue_id: Tensor,
    queue_ptr: Tensor,
    shadow: Tensor | None,
    bound: Tensor | None,
    rows: Tensor,
    sample_id: Tensor | None,
    label: Tensor | None,
    *,
    row: LaunchRow = TILES[0],
) -> None:
    """Write normalize(rows [B, D]) at the pointer, renew the shadow there, advance the pointer."""
    B, Q = len(rows), len(queue)
    if B == 0:
        return
    # B rows in a row touch so many tiles at most, two of them in part, and perhaps the short last.
    grid = (min(triton.cdiv(B, TILE.value) + 2, triton.cdiv(Q, TILE.value)),)
    buffers = (queue, queue_y, queue_id, queue_ptr, shadow, bound)
    _launch(grid, rows, sample_id, label, *buffers, B, row)
    launch(_advance_kernel, (1,), queue_ptr, B, Q, **ADVANCE.options)


def _launch(
    grid: tuple[int],
    rows: Tensor,
    sample_id: Tensor | None,
    label: Tensor | None,
    queue: Tensor,
    queue_y: Tensor | None,
    queue_id: Tensor | None,
    queue_ptr: Tensor | None,
    shadow: Tensor | None,
    bound: Tensor | None,
    B: int,
    row: LaunchRow,
) -> None:
    Q, D = queue.shape
    launch(
        _tile_kernel,
        grid,
        rows,
        sample_id,
        label,
        queue,
        queue_y,
        queue_id,
        queue_ptr,
        shadow,
        bound,
        B,
        Q,
        rows.stride(0),
        queue.stride(0),
        D=D,
        PADDED_D=padded_dim(D),
        IS_UPDATE=B > 0,
        HAS_SHADOW=shadow is not None,
        IS_INT8=shadow is not None and shadow.dtype == torch.int8,
        **row.options,
    )


def machine_code(arch: int) -> Iterator[Launch]:
    """Launches for the compiler."""
    for row in fitting(TILES, arch):
        B, Q, D = (row.sizes[letter] for letter in "BQD")
        meta = partial(torch.empty, device="meta")
        ids = partial(meta, dtype=torch.int64)
        queue, rows = meta(Q, D), meta(B, D, dtype=torch.bfloat16)
        for dtype in (torch.float16, torch.int8):
            shadow, bound = meta(Q, D, dtype=dtype), meta(Q // TILE.value, NUM_BOUNDS.value)
            buffers = (queue, ids(Q), ids(Q), ids(1), shadow, bound)
            write = partial(enqueue, *buffers, rows, ids(B), ids(B), row=row)
            name = str(dtype).removeprefix("torch.")
            yield Launch(kernel=_tile_kernel, row=row, call=write, variant=f"enqueue {name}")
            make = partial(make_shadow, queue, dtype, row=row)
            yield Launch(kernel=_tile_kernel, row=row, call=make, variant=f"shadow {name}")
        bare = partial(enqueue, *buffers[:4], None, None, rows, ids(B), ids(B), row=row)
        yield Launch(kernel=_tile_kernel, row=row, call=bare, variant="enqueue, no shadow")
        yield Launch(kernel=_advance_kernel, row=ADVANCE, call=write)
