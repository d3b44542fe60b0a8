"""The Triton kernels of the InfoNCE loss: what runs on the device.

Predictions are normalised and rounded once (`prepare_kernel`). The forward streams the softmax's
columns past a resident block of rows and keeps one sum per row: a part, added up in a fixed order
by `finish_kernel`. The backward is attention with constants as keys and values: logits again,
probabilities, their product with the neighbours; `normalize_backward_kernel` adds those parts.

Exponents are natural until the last step: logits to base 2 would lose digits against the positives'
and against what other ranks and the backward read. The README has the mathematics.
"""

import triton
import triton.language as tl

__all__ = [
    "bwd_kernel",
    "finish_kernel",
    "fwd_kernel",
    "normalize_backward_kernel",
    "prepare_kernel",
]

EPS = tl.constexpr(1e-12)
LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit, and finite: its difference to itself is zero.
LOWEST = tl.constexpr(-1e30)
# For fp32 three products of rounded factors, together as good as one in fp32; no matter for halves.
PRECISION = tl.constexpr("tf32x3")


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
def prepare_kernel(
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
def fwd_kernel(
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
def finish_kernel(
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
def bwd_kernel(
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
def normalize_backward_kernel(
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
