"""Row statistics of the InfoNCE loss and their gradient, forward and backward, in Triton.

Predictions are normalised and rounded once (`_prepare_kernel`). The forward streams the softmax's
columns past a resident block of rows and keeps one sum per row: a part, added up in a fixed order
by `_finish_kernel`. The backward is attention with constants as keys and values: logits again,
probabilities, their product with the neighbours; `_normalize_backward_kernel` adds those parts.

Exponents are natural until the last step: logits to base 2 would lose digits against the positives'
and against what other ranks and the backward read. The README has the mathematics.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors, sm_arch
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting

__all__ = ["finish", "gradient", "machine_code", "num_parts", "row_stats"]

EPS = tl.constexpr(1e-12)
LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit, and finite: its difference to itself is zero.
LOWEST = tl.constexpr(-1e30)
# For fp32 three products of rounded factors, together as good as one in fp32; no matter for halves.
PRECISION = tl.constexpr("tf32x3")
# Numbers in the parts of a view's gradient: 3 MiB.
MAX_PARTS = 3 << 18


@triton.jit
def _number(x, IS_STORED: tl.constexpr):
    """A scalar argument's value, or what is stored there."""
    if IS_STORED:
        x = tl.load(x).to(tl.float32)
    return x


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _fit(ptr):
    """What probabilities are multiplied with: fp16 has no exponents for those of large batches."""
    return 16384.0 if ptr.dtype.element_ty == tl.float16 else 1.0


@triton.jit
def _meet(a, LENGTH_A: tl.constexpr, b, LENGTH_B: tl.constexpr):
    """Whether two ranges of numbers have one in common."""
    return (a < b + LENGTH_B) & (b < a + LENGTH_A)


@triton.jit
def _load_rows(ptrs, offs_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some features of some rows, [rows, features]."""
    if D % BLOCK_D == 0:
        rows = tl.load(ptrs + offs_d[None, :])
    else:
        rows = tl.load(ptrs + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0)
    return rows


@triton.jit
def _normalize(x):
    """Unit rows of x [.., D] fp32, norms, divisors; squares of x may leave the range of fp32."""
    largest = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True)
    # A power of two, which costs no rounding.
    size = (largest & 0x7F800000).to(tl.float32, bitcast=True)
    size = tl.where(size > 0, size, 1.0)
    scaled = x / size[:, None]
    norm = size * tl.sqrt(tl.sum(scaled * scaled, axis=1))
    divisor = tl.where(norm < EPS, EPS, norm)
    return x / divisor[:, None], norm, divisor


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], all digits right: 2 atanh(x / (2 + x)) by its series."""
    z = x / (2.0 + x)
    series = 1.0 / 17
    for i in tl.static_range(8):
        series = series * z * z + 1.0 / (15 - 2 * i)
    return 2.0 * z * series


@triton.jit(do_not_specialize=["N"])
def _prepare_kernel(
    predicted_ptr,
    unit_ptr,
    N,
    stride_pv,
    stride_pn,
    stride_pd,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Unit predictions, rounded to the products' type."""
    view = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    p_ptrs = predicted_ptr + view * stride_pv + offs_n[:, None] * stride_pn
    p = tl.load(p_ptrs + offs_d[None, :] * stride_pd, mask=mask, other=0.0)
    unit, _norm, _divisor = _normalize(p.to(tl.float32))
    tl.store(unit_ptr + (view * N + offs_n)[:, None] * D + offs_d[None, :], unit, mask=mask)


@triton.jit(do_not_specialize=["R", "C", "diagonal", "span"])
def _fwd_kernel(
    x_ptr,
    y_ptr,
    temperature,
    max_ptr,
    sum_ptr,
    positive_ptr,
    R,
    C,
    diagonal,
    span,
    stride_xv,
    stride_xr,
    stride_yv,
    stride_yc,
    D: tl.constexpr,
    IS_STORED: tl.constexpr,
    ONLINE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Shift and sum of exponentials of BLOCK_R rows over `span` columns; apart, the positives.

    Column c is the positive of row c + diagonal. Its logit comes from the same product as the
    others: where a row has several equal ones, their differences must be zero.
    """
    part, view = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    scale = 1.0 / _number(temperature, IS_STORED)
    # Beyond the end the last row is taken again: no mask per element.
    rows = tl.minimum(offs_r, R - 1).to(tl.int64)
    x_ptrs = x_ptr + view * stride_xv + rows[:, None] * stride_xr
    x = _load_rows(x_ptrs, offs_d, D, BLOCK_D)
    m = tl.full((BLOCK_R,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    positive = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(part * span, tl.minimum(C, part * span + span), BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        columns = tl.minimum(offs_c, C - 1).to(tl.int64)
        y_ptrs = y_ptr + view * stride_yv + columns[:, None] * stride_yc
        y = _load_rows(y_ptrs, offs_d, D, BLOCK_D)
        # Not from zeros: the ptxas of Triton 3.6 takes such a sliced product for zero.
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        for d in range(BLOCK_D, D, BLOCK_D):
            x_d, y_d = (
                _load_rows(x_ptrs, d + offs_d, D, BLOCK_D),
                _load_rows(y_ptrs, d + offs_d, D, BLOCK_D),
            )
            s = tl.dot(x_d, tl.trans(y_d), s, input_precision=PRECISION)
        s = s * scale + tl.where(offs_c < C, 0.0 if ONLINE else -scale, float("-inf"))[None, :]
        if _meet(start + diagonal, BLOCK_C, tl.program_id(0) * BLOCK_R, BLOCK_R):
            pair = offs_c[None, :] + diagonal == offs_r[:, None]
            positive += tl.sum(tl.where(pair, s, 0.0), axis=1)
            s = tl.where(pair, float("-inf"), s)
        if ONLINE:
            m_new = tl.maximum(m, tl.max(s, axis=1))
            total = total * _exp(m - m_new) + tl.sum(_exp(s - m_new[:, None]), axis=1)
            m = m_new
        else:
            total += tl.sum(_exp(s), axis=1)
    offs_out = (part * tl.num_programs(2) + view) * R + offs_r
    offs_c = offs_r - diagonal
    is_here = (part * span <= offs_c) & (offs_c < tl.minimum(C, part * span + span))
    # As many pairs as predictions, numbered as they are.
    positive_ptrs = positive_ptr + view * tl.minimum(R, C) + offs_r - tl.maximum(diagonal, 0)
    positive = positive if ONLINE else positive + scale
    tl.store(positive_ptrs, positive, mask=is_here & (offs_r < R))
    shift = m if ONLINE else tl.full((BLOCK_R,), 1.0, tl.float32) * scale
    tl.store(max_ptr + offs_out, shift, mask=offs_r < R)
    tl.store(sum_ptr + offs_out, total, mask=offs_r < R)


@triton.jit(do_not_specialize=["R", "num_parts"])
def _finish_kernel(
    max_ptr,
    sum_ptr,
    positive_ptr,
    loss_ptr,
    lse_ptr,
    weight_ptr,
    normaliser_ptr,
    R,
    num_parts,
    BLOCK_R: tl.constexpr,
):
    """`reference.finish` of rows whose parts it joins in their order.

    ``loss = log(1 + sum / exp(positive - shift))``: the digits of the smallest loss are right.
    """
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = offs_r < R
    m = tl.load(max_ptr + offs_r, mask=mask, other=0.0)
    total = tl.load(sum_ptr + offs_r, mask=mask, other=1.0)
    for part in range(1, num_parts):
        offs = part * R + offs_r
        m_part = tl.load(max_ptr + offs, mask=mask, other=0.0)
        m_new = tl.maximum(m, m_part)
        total *= tl.exp(m - m_new)
        total += tl.load(sum_ptr + offs, mask=mask, other=1.0) * tl.exp(m_part - m_new)
        m = m_new
    positive = tl.load(positive_ptr + offs_r, mask=mask, other=0.0)
    # A row may have no other column.
    is_alone = total == 0
    m = tl.where(is_alone, positive, m)
    t = tl.where(is_alone, float("-inf"), tl.log(tl.where(is_alone, 1.0, total)) + (m - positive))
    e = tl.exp(-tl.abs(t))
    loss = tl.where(t > 0, t, 0.0) + _log1p(e)
    tl.store(loss_ptr + offs_r, loss, mask=mask)
    tl.store(lse_ptr + offs_r, positive + loss, mask=mask)
    tl.store(weight_ptr + offs_r, -tl.where(t > 0, 1.0, e) / (1.0 + e), mask=mask)
    tl.store(normaliser_ptr + offs_r, m, mask=mask)
    # Beyond fp32's range all other probabilities are zero.
    gap = tl.where(t < -80, 80.0, positive - m)
    tl.store(normaliser_ptr + R + offs_r, 1.0 / (total + tl.exp(gap)), mask=mask)


@triton.jit(do_not_specialize=["N", "P", "first", "span"])
def _bwd_kernel(
    unit_ptr,
    neighbour_ptr,
    by_neighbour_ptr,
    by_predicted_ptr,
    temperature,
    part_ptr,
    N,
    P,
    first,
    span,
    stride_kv,
    stride_kp,
    D: tl.constexpr,
    IS_STORED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sum over `span` neighbours of probability * neighbour: BLOCK_O features of BLOCK_N rows."""
    slices: tl.constexpr = (D + BLOCK_O - 1) // BLOCK_O
    part, view = tl.program_id(1) // slices, tl.program_id(2).to(tl.int64)
    offs_o = tl.program_id(1) % slices * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    scale = 1.0 / _number(temperature, IS_STORED)
    own = tl.minimum(offs_n, N - 1)
    rows = view * N + own
    unit_ptrs = unit_ptr + rows[:, None] * D
    unit = _load_rows(unit_ptrs, offs_d, D, BLOCK_D)
    if by_predicted_ptr is not None:
        shift_n = tl.load(by_predicted_ptr + rows)
        factor_n = tl.load(by_predicted_ptr + tl.num_programs(2) * N + rows) * _fit(unit_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(part * span, tl.minimum(P, part * span + span), BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        columns = tl.minimum(offs_p, P - 1).to(tl.int64)
        k_ptrs = neighbour_ptr + view * stride_kv + columns[:, None] * stride_kp
        k = _load_rows(k_ptrs, offs_d, D, BLOCK_D)
        s = tl.dot(unit, tl.trans(k), input_precision=PRECISION)
        for d in range(BLOCK_D, D, BLOCK_D):
            unit_d, k_d = (
                _load_rows(unit_ptrs, d + offs_d, D, BLOCK_D),
                _load_rows(k_ptrs, d + offs_d, D, BLOCK_D),
            )
            s = tl.dot(unit_d, tl.trans(k_d), s, input_precision=PRECISION)
        s = s * scale + tl.where(offs_p < P, 0.0, float("-inf"))[None, :]
        if _meet(start, BLOCK_P, tl.program_id(0) * BLOCK_N + first, BLOCK_N):
            s = tl.where(offs_p[None, :] == own[:, None] + first, float("-inf"), s)
        p = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        if by_neighbour_ptr is not None:
            shift_ptrs = by_neighbour_ptr + view * P + columns
            shift_p = tl.load(shift_ptrs)
            factor_p = tl.load(shift_ptrs + tl.num_programs(2) * P) * _fit(unit_ptr)
            p += _exp(s - shift_p[None, :]) * factor_p[None, :]
        if by_predicted_ptr is not None:
            p += _exp(s - shift_n[:, None]) * factor_n[:, None]
        p = p.to(k.dtype)
        if slices > 1 or BLOCK_D != BLOCK_O:
            k = _load_rows(k_ptrs, offs_o, D, BLOCK_O)
        acc = tl.dot(p, k, acc, input_precision=PRECISION)
    offs_out = (part * tl.num_programs(2) + view) * N + offs_n
    mask = (offs_n < N)[:, None] & (offs_o < D)[None, :]
    tl.store(part_ptr + offs_out[:, None] * D + offs_o[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["N", "first", "num_parts"])
def _normalize_backward_kernel(
    part_ptr,
    predicted_ptr,
    neighbour_ptr,
    grad_ptr,
    weight_ptr,
    temperature,
    out_ptr,
    radial_ptr,
    N,
    first,
    num_parts,
    stride_pv,
    stride_pn,
    stride_pd,
    stride_kv,
    stride_kp,
    D: tl.constexpr,
    IS_STORED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds parts in their order, and the positive; gradient through the normalisation."""
    view = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    offs = (view * N + offs_n)[:, None] * D + offs_d[None, :]
    acc = tl.load(part_ptr + offs, mask=mask, other=0.0)
    for part in range(1, num_parts):
        step = part * tl.num_programs(1).to(tl.int64) * N * D
        acc += tl.load(part_ptr + step + offs, mask=mask, other=0.0)
    acc /= _fit(out_ptr)
    k_ptrs = neighbour_ptr + view * stride_kv + (first + offs_n)[:, None] * stride_kp
    k = tl.load(k_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + view * N + offs_n, mask=mask_n, other=0.0)
    grad = (acc + weight[:, None] * k) * (
        tl.load(grad_ptr).to(tl.float32) / _number(temperature, IS_STORED)
    )
    p_ptrs = predicted_ptr + view * stride_pv + offs_n[:, None] * stride_pn
    p = tl.load(p_ptrs + offs_d[None, :] * stride_pd, mask=mask, other=0.0)
    unit, norm, divisor = _normalize(p.to(tl.float32))
    radial = tl.sum(grad * unit, axis=1)
    # A divisor that is the constant EPS has no gradient of its own.
    tangent = grad - tl.where(norm < EPS, 0.0, radial)[:, None] * unit
    tl.store(out_ptr + offs, tangent / divisor[:, None], mask=mask)
    tl.store(radial_ptr + view * N + offs_n, radial, mask=mask_n)


def _row(
    label: str,
    tile: tuple[int, ...],
    *,
    archs: tuple[int, ...] = (80, 90),
    D: int,
    R: int = 512,
    warps: int = 4,
    registers: int,
    blocks: int = 2,
    waste: float = 1.0,
) -> LaunchRow:
    """A launch with products, for up to D features and from R softmax rows on.

    Its tile is BLOCK_R, BLOCK_C, BLOCK_D, or BLOCK_N, BLOCK_P, BLOCK_D, BLOCK_O.
    """
    M, N, K, *out = tile
    names = (
        ("BLOCK_N", "BLOCK_P", "BLOCK_D", "BLOCK_O") if out else ("BLOCK_R", "BLOCK_C", "BLOCK_D")
    )
    return LaunchRow(
        label=label,
        archs=archs,
        num_warps=warps,
        num_stages=2,
        blocks=dict(zip(names, tile, strict=True)),
        sizes={"V": 2, "n": 512, "R": R, "D": D},
        limits=Limits(
            registers=registers,
            blocks_per_sm=blocks,
            # The first slice of D features, and a loop over the others.
            products=((M, N, K),) * (1 if D <= K else 2) + tuple((M, x, N) for x in out),
            max_waste=waste,
            opcodes={"MUFU.EX2": M * N // (32 * warps)},
        ),
    )


# By the bytes of a number. fp32 takes three products: waste 3. A tile of 64 rows belongs to four
# warps: on sm_90 eight would repeat work, on sm_80 eight share its columns.
FORWARD = {
    2: (
        _row(
            "many rows",
            (128, 128, 256),
            archs=(90,),
            D=256,
            R=8192,
            warps=8,
            registers=188,
            blocks=1,
        ),
        _row("half", (64, 64, 256), D=256, registers=126),
        _row("wide", (64, 64, 128), D=1024, registers=224),
    ),
    4: (_row("fp32", (64, 32, 32), D=1024, registers=208, waste=3.0),),
}
BACKWARD = {
    2: (
        _row("half", (64, 64, 256, 256), archs=(90,), D=256, registers=252),
        _row("half", (64, 64, 256, 256), archs=(80,), D=256, warps=8, registers=168, blocks=1),
        _row("wide", (64, 64, 128, 128), archs=(90,), D=1024, registers=255),
        _row("wide", (64, 64, 64, 256), archs=(80,), D=1024, warps=8, registers=216, blocks=1),
    ),
    4: (
        _row("fp32", (64, 32, 32, 128), archs=(90,), D=1024, registers=240, waste=3.0),
        _row("fp32", (64, 32, 32, 64), archs=(80,), D=1024, registers=240, waste=3.0),
    ),
}
# Without products.
ROWS = LaunchRow(
    label="any",
    num_warps=4,
    num_stages=1,
    blocks={"BLOCK_N": 2},
    sizes={"D": 1024},
    limits=Limits(registers=64, shared_bytes=64, blocks_per_sm=8),
)
FINISH = LaunchRow(
    label="any",
    num_warps=4,
    num_stages=1,
    blocks={"BLOCK_R": 128},
    sizes={"R": 512},
    limits=Limits(registers=32, shared_bytes=0, blocks_per_sm=16, opcodes={"MUFU.EX2": 3}),
)


def launch_config(table: dict[int, tuple[LaunchRow, ...]], predicted: Tensor, R: int) -> LaunchRow:
    """The first row of a table for these sizes; with fewer softmax rows than any, the last."""
    rows = fitting(table[predicted.itemsize], sm_arch(predicted.device))
    rows = [row for row in rows if row.sizes["D"] >= predicted.shape[-1]]
    return next((row for row in rows if row.sizes["R"] <= R), rows[-1])


def _span(length: int, block: int, num_programs: int, most: int, device: torch.device) -> int:
    """Length of a part, such that at most `most` parts give each multiprocessor two programs."""
    num_tiles = triton.cdiv(length, block)
    parts = max(1, min(2 * num_multiprocessors(device) // num_programs, most, num_tiles))
    return int(triton.cdiv(num_tiles, parts) * block)


def _forward_span(predicted: Tensor, R: int, C: int, row: LaunchRow) -> int:
    num_programs = predicted.shape[0] * triton.cdiv(R, row.blocks["BLOCK_R"])
    return _span(C, row.blocks["BLOCK_C"], num_programs, C, predicted.device)


def num_parts(predicted: Tensor, num_neighbours: int, transposed: bool) -> int:
    """Into how many parts `row_stats` divides the columns."""
    sizes = predicted.shape[1], num_neighbours
    R, C = sizes if transposed else sizes[::-1]
    row = launch_config(FORWARD, predicted, R)
    return int(triton.cdiv(C, _forward_span(predicted, R, C, row)))


def _options(row: LaunchRow, D: int, scalar: Tensor | float) -> dict[str, Any]:
    """Keyword arguments of a launch; tiles are no wider than a row of features."""
    widest = triton.next_power_of_2(D)
    narrow = {"BLOCK_D": widest} | {
        name: min(widest, size)
        for name, size in row.blocks.items()
        if name in ("BLOCK_D", "BLOCK_O")
    }
    return {**row.options, **narrow, "D": D, "IS_STORED": isinstance(scalar, Tensor)}


def _scalar(temperature: Tensor | float, predicted: Tensor) -> Tensor | float:
    """A number, or where a kernel loads it from, so that nothing waits for the device.

    On the CPU, fp64 holds what the caller gave as a float.
    """
    if not isinstance(temperature, Tensor) or not temperature.is_cpu:
        return temperature
    is_loaded = predicted.is_cpu and temperature.dtype != torch.float64
    return temperature if is_loaded else float(temperature)


def _crossed(predicted: Tensor, neighbour: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Neighbours of the last view, in the products' type, and strides: views in falling order."""
    neighbour = neighbour.to(predicted.dtype)
    if neighbour.stride(-1) != 1:
        neighbour = neighbour.contiguous()
    return neighbour[-1], (-neighbour.stride(0), neighbour.stride(1))


def _prepare(predicted: Tensor) -> Tensor:
    V, N, D = predicted.shape
    unit = torch.empty_like(predicted, memory_format=torch.contiguous_format)
    options = {"D": D, "BLOCK_D": triton.next_power_of_2(D), **ROWS.options}
    grid = (triton.cdiv(N, ROWS.blocks["BLOCK_N"]), V)
    _prepare_kernel[grid](predicted, unit, N, *predicted.stride(), **options)
    return unit


def row_stats(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor | float,
    first: int,
    transposed: bool,
    online: bool,
    row: LaunchRow | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.row_stats`, by parts of the columns; unless `online`, row_max is 1 / T."""
    last, strides = _crossed(predicted, neighbour)
    scalar = _scalar(temperature, predicted)
    unit = _prepare(predicted)
    (V, N, D), P = predicted.shape, neighbour.shape[1]
    positive = unit.new_empty(V, N, dtype=torch.float32)
    R, C = (N, P) if transposed else (P, N)
    row = row or launch_config(FORWARD, predicted, R)
    span = _forward_span(predicted, R, C, row)
    grid = (triton.cdiv(R, row.blocks["BLOCK_R"]), triton.cdiv(C, span), V)
    row_max, row_sum = (positive.new_empty(grid[1], V, R) for _ in range(2))
    pairs = ((unit, unit.stride()[:2]), (last, strides))
    (x, x_strides), (y, y_strides) = pairs if transposed else pairs[::-1]
    sizes = (R, C, -first if transposed else first, span)
    arguments = (x, y, scalar, row_max, row_sum, positive, *sizes, *x_strides, *y_strides)
    _fwd_kernel[grid](*arguments, ONLINE=online, **_options(row, D, scalar))
    return row_max, row_sum, positive


def finish(row_max: Tensor, row_sum: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
    """`reference.finish`."""
    loss, lse, weight = (torch.empty_like(positive) for _ in range(3))
    normaliser = positive.new_empty(2, *positive.shape)
    R = positive.numel()
    arguments = (row_max, row_sum, positive, loss, lse, weight, normaliser, R, len(row_max))
    _finish_kernel[(triton.cdiv(R, FINISH.blocks["BLOCK_R"]),)](*arguments, **FINISH.options)
    return loss, lse, weight, normaliser


def gradient(
    grad: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor | float,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
    row: LaunchRow | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.gradient`."""
    last, strides = _crossed(predicted, neighbour)
    scalar = _scalar(temperature, predicted)
    unit = _prepare(predicted)
    (V, N, D), P = predicted.shape, neighbour.shape[1]
    radial = unit.new_empty(V, N, dtype=torch.float32)
    row = row or launch_config(BACKWARD, predicted, N)
    options = _options(row, D, scalar)
    num_blocks = triton.cdiv(N, row.blocks["BLOCK_N"])
    slices = triton.cdiv(D, options["BLOCK_O"])
    num_programs, most = V * num_blocks * slices, MAX_PARTS // (N * D)
    span = _span(P, row.blocks["BLOCK_P"], num_programs, most, predicted.device)
    num_parts = triton.cdiv(P, span)
    part = radial.new_empty(num_parts, V, N, D)
    arguments = (unit, last, by_neighbour, by_predicted, scalar, part, N, P, first, span)
    _bwd_kernel[(num_blocks, num_parts * slices, V)](*arguments, *strides, **options)
    # The unit rows have been used: their place takes the gradient.
    outputs = (unit, radial, N, first, num_parts, *predicted.stride(), *strides)
    _normalize_backward_kernel[(triton.cdiv(N, ROWS.blocks["BLOCK_N"]), V)](
        part, predicted, last, grad, weight, scalar, *outputs, **_options(ROWS, D, scalar)
    )
    return unit, radial


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row as it is launched at its sizes, in its variants."""
    for itemsize, rows in FORWARD.items():
        for row in fitting(rows, arch):
            for variant, online in (("fixed shift", False), ("online", True)):
                call = partial(_forward_at, row, itemsize, online)
                yield Launch(kernel=_fwd_kernel, row=row, call=call, variant=variant)
    for itemsize, rows in BACKWARD.items():
        for row in fitting(rows, arch):
            for variant, both in (("one sum", False), ("both sums", True)):
                call = partial(_backward_at, row, itemsize, both)
                yield Launch(kernel=_bwd_kernel, row=row, call=call, variant=variant)
    call = partial(_backward_at, fitting(BACKWARD[2], arch)[-1], 2, False)
    yield Launch(kernel=_normalize_backward_kernel, row=ROWS, call=call)
    call = partial(_forward_at, fitting(FORWARD[2], arch)[-1], 2, True)
    yield Launch(kernel=_prepare_kernel, row=ROWS, call=call)
    yield Launch(kernel=_finish_kernel, row=FINISH, call=call)


def _inputs_at(row: LaunchRow, itemsize: int) -> tuple[Tensor, Tensor]:
    V, n, R, D = row.sizes.values()
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    predicted, neighbour = (torch.empty(V, x, D, dtype=dtype, device="meta") for x in (n, R))
    return predicted, neighbour


def _forward_at(row: LaunchRow, itemsize: int, online: bool) -> None:
    row_max, row_sum, _ = row_stats(*_inputs_at(row, itemsize), 0.2, 0, False, online, row)
    finish(row_max, row_sum, row_max[0])


def _backward_at(row: LaunchRow, itemsize: int, both: bool) -> None:
    predicted, neighbour = _inputs_at(row, itemsize)
    normaliser = torch.empty(2, *predicted.shape[:2], device="meta")
    weight, other = normaliser[0], normaliser if both else None
    gradient(weight[0, 0], predicted, neighbour, 0.2, weight, normaliser, other, 0, row)
