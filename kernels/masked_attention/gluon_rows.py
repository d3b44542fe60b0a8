"""Rows of the warp-specialised attention kernels: where they lie, how they are copied and stored.

As in `triton_rows`, D features are a tuple of blocks of powers of two: 80 is (64, 16). Layouts are
Gluon's to choose: copies and stores take 16 bytes a thread, products those of warp groups.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from maect_fast.kernels.masked_attention.triton_rows import feature_blocks, get, start_of

__all__ = [
    "barriers",
    "buffers",
    "columns_of",
    "copy_key_flags",
    "copy_rows",
    "find_sample",
    "flat",
    "half_of",
    "key_rows",
    "left_of",
    "mma",
    "part_of",
    "row_copies",
    "row_dot",
    "row_vector",
    "rows_of",
    "stage_of",
    "store_rows",
    "swizzled",
    "wait_for",
    "zeros",
]


@triton.constexpr_function
def mma(width):
    """Layout of a product of one warp group, 64 x width."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16]
    )


@triton.constexpr_function
def rows_of(width):
    """Layout of one number for each row of such a product."""
    return gl.SliceLayout(1, mma(width))


@triton.constexpr_function
def columns_of(width):
    """The same of each column."""
    return gl.SliceLayout(0, mma(width))


@triton.constexpr_function
def left_of(width):
    """Layout of a factor from registers."""
    return gl.DotOperandLayout(0, mma(width), 2)


@triton.constexpr_function
def row_copies(width):
    """Layout in which a thread of a warp group holds 8 numbers of a row."""
    lanes = width // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@triton.constexpr_function
def row_vector():
    """Layout of one number a row, in a warp group."""
    return gl.BlockedLayout([1], [32], [4], [0])


@triton.constexpr_function
def swizzled(width):
    """Layout of rows in shared memory, as products read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=2)


@triton.constexpr_function
def flat():
    """Layout of one number a row in shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, order=[0])


@gluon.jit
def buffers(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Shared memory for so many times ROWS rows, in blocks of features."""
    SIZES: gl.constexpr = feature_blocks(D)
    x = ()
    for i in gl.static_range(len(SIZES)):
        x = x + (
            gl.allocate_shared_memory(dtype, [COUNT, ROWS, get(SIZES, i)], swizzled(get(SIZES, i))),
        )
    return x


@gluon.jit
def barriers(COUNT: gl.constexpr, arrivals: gl.constexpr):
    """So many barriers, each of which so many arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit
def zeros(D: gl.constexpr):
    """Accumulators [64, D] fp32, in blocks."""
    SIZES: gl.constexpr = feature_blocks(D)
    x = ()
    for i in gl.static_range(len(SIZES)):
        x = x + (gl.zeros([64, get(SIZES, i)], gl.float32, mma(get(SIZES, i))),)
    return x


@gluon.jit
def wait_for(products, outstanding: gl.constexpr):
    """Results of asynchronous products once at most so many are under way."""
    x = warpgroup_mma_wait(outstanding, deps=products)
    if len(products) == 1:
        x = (x,)
    return x


@gluon.jit
def stage_of(bufs, i):
    """Buffer i of each block."""
    x = ()
    for j in gl.static_range(len(bufs)):
        x = x + (bufs[j].index(i),)
    return x


@gluon.jit
def half_of(bufs, number: gl.constexpr):
    """A warp group's 64 of 128 rows of each block."""
    x = ()
    for j in gl.static_range(len(bufs)):
        x = x + (bufs[j].slice(64 * number, 64),)
    return x


@gluon.jit
def part_of(x, first: gl.constexpr, count: gl.constexpr):
    """Some of a tuple."""
    y = ()
    for i in gl.static_range(count):
        y = y + (x[first + i],)
    return y


@gluon.jit
def find_sample(
    b,
    M,
    N,
    bounds_ptr,
    IS_PACKED: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    IS_BOUND: gl.constexpr,
):
    """Of sample b: its first row among packed ones, its numbers of queries and of keys."""
    first = b * 0
    if IS_PACKED:
        first = gl.load(bounds_ptr + b).to(gl.int64)
        N = gl.minimum(gl.load(bounds_ptr + b + 1).to(gl.int64) - first, N).to(gl.int32)
    elif HAS_LENGTHS:
        length = gl.load(bounds_ptr + b).to(gl.int64)
        N = gl.minimum(gl.maximum(length, 0), N).to(gl.int32)
    if IS_BOUND:
        M = N
    return first, M, N


@gluon.jit
def key_rows(
    offs,
    num_rows,
    keep_ptr,
    mask_ptr,
    stride_mn,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
):
    """Rows of some tokens in their sample, and which of them take part."""
    mask = offs < num_rows
    rows = offs
    if HAS_KEEP:
        rows = gl.load(keep_ptr + offs, mask=mask, other=0).to(gl.int32)
    if HAS_MASK:
        mask = mask & (gl.load(mask_ptr + rows * stride_mn, mask=mask, other=0) != 0)
    return rows, mask


@gluon.jit
def copy_rows(
    ptr,
    first,
    num_rows,
    keep_ptr,
    mask_ptr,
    stride_mn,
    bufs,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    STRIDE: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
    IS_FULL: gl.constexpr,
):
    """Begin to copy rows first .. first + ROWS into shared memory; zeros for those without part."""
    SIZES: gl.constexpr = feature_blocks(D)
    for i in gl.static_range(len(SIZES)):
        _copy_block(
            ptr,
            first,
            num_rows,
            keep_ptr,
            mask_ptr,
            stride_mn,
            bufs[i],
            ROWS,
            D,
            start_of(SIZES, i),
            get(SIZES, i),
            STRIDE,
            HAS_KEEP,
            HAS_MASK,
            IS_FULL,
        )


@gluon.jit
def _copy_block(
    ptr,
    first,
    num_rows,
    keep_ptr,
    mask_ptr,
    stride_mn,
    buf,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    START: gl.constexpr,
    WIDTH: gl.constexpr,
    STRIDE: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
    IS_FULL: gl.constexpr,
):
    offs = gl.arange(0, ROWS, gl.SliceLayout(1, row_copies(WIDTH)))
    offs_d = gl.arange(0, WIDTH, gl.SliceLayout(0, row_copies(WIDTH)))
    if HAS_KEEP or HAS_MASK:
        rows, mask = key_rows(
            first + offs, num_rows, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
        )
        ptrs = ptr + START + (rows[:, None] * STRIDE + offs_d[None, :])
    else:
        # What does not depend on `first` is made once.
        mask = first + offs < num_rows
        ptrs = ptr + (first * STRIDE + START) + (offs[:, None] * STRIDE + offs_d[None, :])
    if START + WIDTH > D:
        inside = mask[:, None] & (START + offs_d < D)[None, :]
        async_copy.async_copy_global_to_shared(buf, ptrs, mask=inside)
    elif IS_FULL:
        async_copy.async_copy_global_to_shared(buf, ptrs)
    else:
        async_copy.async_copy_global_to_shared(buf, ptrs, mask=mask[:, None])


@gluon.jit
def copy_key_flags(
    first,
    num_rows,
    keep_ptr,
    mask_ptr,
    stride_mn,
    buf,
    ROWS: gl.constexpr,
    HAS_KEEP: gl.constexpr,
):
    """Which keys first .. first + ROWS take part, 1 or 0, into shared memory."""
    offs = first + gl.arange(0, ROWS, row_vector())
    _, takes_part = key_rows(offs, num_rows, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, True)
    buf.store(takes_part.to(gl.int32))


@gluon.jit
def store_rows(
    ptr,
    first,
    num_inside,
    keep_ptr,
    x,
    D: gl.constexpr,
    STRIDE: gl.constexpr,
    HAS_KEEP: gl.constexpr,
):
    """Store x [64, D], in blocks of products, to rows from `first` on, as far as they are there."""
    SIZES: gl.constexpr = feature_blocks(D)
    for i in gl.static_range(len(SIZES)):
        _store_block(
            ptr,
            first,
            num_inside,
            keep_ptr,
            x[i],
            D,
            start_of(SIZES, i),
            get(SIZES, i),
            STRIDE,
            HAS_KEEP,
        )


@gluon.jit
def _store_block(
    ptr,
    first,
    num_inside,
    keep_ptr,
    x,
    D: gl.constexpr,
    START: gl.constexpr,
    WIDTH: gl.constexpr,
    STRIDE: gl.constexpr,
    HAS_KEEP: gl.constexpr,
):
    y = gl.convert_layout(x.to(ptr.dtype.element_ty), row_copies(WIDTH))
    offs = gl.arange(0, 64, gl.SliceLayout(1, row_copies(WIDTH)))
    offs_d = gl.arange(0, WIDTH, gl.SliceLayout(0, row_copies(WIDTH)))
    inside = first + offs < num_inside
    if HAS_KEEP:
        rows = gl.load(keep_ptr + first + offs, mask=inside, other=0).to(gl.int32)
        ptrs = ptr + START + (rows[:, None] * STRIDE + offs_d[None, :])
    else:
        ptrs = ptr + (first * STRIDE + START) + (offs[:, None] * STRIDE + offs_d[None, :])
    mask = inside[:, None]
    if START + WIDTH > D:
        mask = mask & (START + offs_d < D)[None, :]
    gl.store(ptrs, y, mask=mask)


@gluon.jit
def row_dot(
    x_ptr,
    y_ptr,
    first,
    num_rows,
    keep_ptr,
    D: gl.constexpr,
    STRIDE_X: gl.constexpr,
    STRIDE_Y: gl.constexpr,
    HAS_KEEP: gl.constexpr,
):
    """``sum_d x[., d] * y[., d]`` of 64 rows from `first` on, fp32; zeros behind the last."""
    SIZES: gl.constexpr = feature_blocks(D)
    total = gl.zeros([64], gl.float32, row_vector())
    for i in gl.static_range(len(SIZES)):
        total += _block_dot(
            x_ptr,
            y_ptr,
            first,
            num_rows,
            keep_ptr,
            D,
            start_of(SIZES, i),
            get(SIZES, i),
            STRIDE_X,
            STRIDE_Y,
            HAS_KEEP,
        )
    return total


@gluon.jit
def _block_dot(
    x_ptr,
    y_ptr,
    first,
    num_rows,
    keep_ptr,
    D: gl.constexpr,
    START: gl.constexpr,
    WIDTH: gl.constexpr,
    STRIDE_X: gl.constexpr,
    STRIDE_Y: gl.constexpr,
    HAS_KEEP: gl.constexpr,
):
    offs = gl.arange(0, 64, gl.SliceLayout(1, row_copies(WIDTH)))
    offs_d = START + gl.arange(0, WIDTH, gl.SliceLayout(0, row_copies(WIDTH)))
    rows, mask = key_rows(first + offs, num_rows, keep_ptr, keep_ptr, 0, HAS_KEEP, False)
    inside = mask[:, None]
    if START + WIDTH > D:
        inside = inside & (offs_d < D)[None, :]
    x = gl.load(x_ptr + (rows[:, None] * STRIDE_X + offs_d[None, :]), mask=inside, other=0.0)
    y = gl.load(y_ptr + (rows[:, None] * STRIDE_Y + offs_d[None, :]), mask=inside, other=0.0)
    return gl.convert_layout(gl.sum(x.to(gl.float32) * y.to(gl.float32), axis=1), row_vector())
