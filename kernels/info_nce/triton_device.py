"""The Triton kernels of the InfoNCE loss: what runs on the device.

Predictions are operands as they come: a logit gets 1 / (norm * T) after its product, so that unit
rows are never stored. A block of predictions stays, neighbours stream past it. `sums_kernel` leaves
parts of every softmax row's sum and the predictions' 1 / norm, `close_kernel` joins the parts and
has the mean. The backward is attention with constants as keys and values: logits again,
probabilities, their product with the neighbours; `normalize_backward_kernel` adds those parts.

Exponents are natural until the last step: logits to base 2 would lose digits against the positives'
and against what other ranks and the backward read. The README has the mathematics.
"""

import triton
import triton.language as tl

__all__ = ["bwd_kernel", "close_kernel", "normalize_backward_kernel", "sums_kernel"]

EPS = tl.constexpr(1e-12)
# Powers of two as fp32 has them: of features below 2^-40, about EPS, the norm is not needed, and
# 2^126 is the last with an inverse.
SMALLEST, LARGEST = tl.constexpr(0x2B800000), tl.constexpr(0x7E800000)
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
def _inverse_norm(ptrs, LENGTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / max(norm, EPS) of LENGTH rows in fp32, whose range their squares may leave."""
    size = tl.full((LENGTH,), SMALLEST, tl.int32)
    total = tl.zeros((LENGTH,), tl.float32)
    shrink = total
    for d in range(0, D, BLOCK_D):
        x = _load_rows(ptrs, d + tl.arange(0, BLOCK_D), D, BLOCK_D).to(tl.float32)
        # Scaled by powers of two, which costs no rounding.
        power = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        larger = tl.minimum(tl.maximum(size, power), LARGEST)
        shrink = (0x7F000000 - larger).to(tl.float32, bitcast=True)
        x *= shrink[:, None]
        ratio = size.to(tl.float32, bitcast=True) * shrink
        total = total * (ratio * ratio) + tl.sum(x * x, axis=1)
        size = larger
    # The device's root is one of Newton's steps from all digits, which cost branches otherwise.
    root = tl.rsqrt(tl.where(total == 0, 1.0, total))
    root += 0.5 * root * (1.0 - total * root * root)
    least = EPS * shrink
    return tl.where(total < least * least, 1.0 / EPS, root * shrink)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], all digits right: 2 atanh(x / (2 + x)) by its series."""
    z = x / (2.0 + x)
    series = 1.0 / 17
    for i in tl.static_range(8):
        series = series * z * z + 1.0 / (15 - 2 * i)
    return 2.0 * z * series


@triton.jit
def _product(p, k, TRANSPOSED: tl.constexpr, acc=None):
    """Of predictions [BLOCK_N, ..] and neighbours [BLOCK_P, ..]; the softmax's rows come first."""
    if TRANSPOSED:
        acc = tl.dot(p, tl.trans(k), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(k, tl.trans(p), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "P", "first", "span"])
def sums_kernel(
    predicted_ptr,
    neighbour_ptr,
    temperature,
    max_ptr,
    sum_ptr,
    positive_ptr,
    inverse_ptr,
    N,
    P,
    first,
    span,
    stride_pv,
    stride_pn,
    stride_kv,
    stride_kp,
    D: tl.constexpr,
    IS_STORED: tl.constexpr,
    ONLINE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax rows' shifts and sums of exponentials over a part of the columns, and positives.

    BLOCK_N predictions meet `span` neighbours. These are the rows, each complete after its tile;
    TRANSPOSED: the columns, and a row's sum is carried along. Prediction j and neighbour first + j
    are a positive pair. Its logit comes from the same product as the others: where a row has
    several equal ones, their differences must be zero.
    """
    part, view = tl.program_id(1), tl.program_id(2).to(tl.int64)
    block = tl.program_id(0) * BLOCK_N
    offs_n = block + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    scale = 1.0 / _number(temperature, IS_STORED)
    shift = 0.0 if ONLINE else scale
    # Beyond the end the last row is taken again: no mask per element.
    own = tl.minimum(offs_n, N - 1).to(tl.int64)
    p_ptrs = predicted_ptr + view * stride_pv + own[:, None] * stride_pn
    p = _load_rows(p_ptrs, offs_d, D, BLOCK_D)
    inverse = _inverse_norm(p_ptrs, BLOCK_N, D, BLOCK_D)
    tl.store(inverse_ptr + view * N + offs_n, inverse, mask=(offs_n < N) & (part == 0))
    factor = inverse * scale
    bias = tl.where(offs_n < N, -shift, float("-inf"))
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    positive = tl.zeros((BLOCK_N,), tl.float32)
    stop = tl.minimum(P, part * span + span)
    for start in range(part * span, stop, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        columns = tl.minimum(offs_p, P - 1).to(tl.int64)
        k_ptrs = neighbour_ptr + view * stride_kv + columns[:, None] * stride_kp
        k = _load_rows(k_ptrs, offs_d, D, BLOCK_D)
        s = _product(p, k, TRANSPOSED)
        # Not from zeros: the ptxas of Triton 3.6 takes such a sliced product for zero.
        for d in range(BLOCK_D, D, BLOCK_D):
            p_d = _load_rows(p_ptrs, d + offs_d, D, BLOCK_D)
            k_d = _load_rows(k_ptrs, d + offs_d, D, BLOCK_D)
            s = _product(p_d, k_d, TRANSPOSED, s)
        if TRANSPOSED:
            columns_bias = tl.where(offs_p < P, -shift, float("-inf"))
            s = s * factor[:, None] + columns_bias[None, :]
        else:
            s = s * factor[None, :] + bias[None, :]
        own_positive = tl.zeros((s.shape[0],), tl.float32)
        if _meet(start, BLOCK_P, block + first, BLOCK_N):
            if TRANSPOSED:
                pair = offs_n[:, None] + first == offs_p[None, :]
            else:
                pair = offs_p[:, None] == offs_n[None, :] + first
            own_positive = tl.sum(tl.where(pair, s, 0.0), axis=1)
            s = tl.where(pair, float("-inf"), s)
        if TRANSPOSED:
            positive += own_positive
            if ONLINE:
                m_new = tl.maximum(m, tl.max(s, axis=1))
                total = total * _exp(m - m_new) + tl.sum(_exp(s - m_new[:, None]), axis=1)
                m = m_new
            else:
                total += tl.sum(_exp(s), axis=1)
        else:
            row_max = tl.full((BLOCK_P,), 1.0, tl.float32) * scale
            if ONLINE:
                row_max = tl.maximum(tl.max(s, axis=1), LOWEST)
                s -= row_max[:, None]
            offs_out = (tl.program_id(0) * tl.num_programs(2) + view) * P + offs_p
            tl.store(max_ptr + offs_out, row_max, mask=offs_p < P)
            tl.store(sum_ptr + offs_out, tl.sum(_exp(s), axis=1), mask=offs_p < P)
            j = offs_p - first
            is_here = (block <= j) & (j < tl.minimum(N, block + BLOCK_N)) & (offs_p < P)
            tl.store(positive_ptr + view * N + j, own_positive + shift, mask=is_here)
    if TRANSPOSED:
        mask = offs_n < N
        offs_out = (part * tl.num_programs(2) + view) * N + offs_n
        j = offs_n + first
        is_here = (part * span <= j) & (j < stop) & mask
        tl.store(positive_ptr + view * N + offs_n, positive + shift, mask=is_here)
        row_max = m if ONLINE else tl.full((BLOCK_N,), 1.0, tl.float32) * scale
        tl.store(max_ptr + offs_out, row_max, mask=mask)
        tl.store(sum_ptr + offs_out, total, mask=mask)


@triton.jit(do_not_specialize=["V", "N", "R", "first", "num_parts", "num_own", "span"])
def close_kernel(
    max_ptr,
    sum_ptr,
    positive_ptr,
    mean_ptr,
    lse_ptr,
    weight_ptr,
    normaliser_ptr,
    V,
    N,
    R,
    first,
    num_parts,
    num_own,
    span,
    BLOCK_R: tl.constexpr,
):
    """`reference.finish` of rows whose parts it joins in their order, and the mean loss.

    The first `num_own` programs have the rows first .. first + N of every view, which have losses
    here: `span` of them each, one after the other. The rest have BLOCK_R of the others.
    ``loss = log(1 + sum / exp(positive - shift))``: the digits of the smallest loss are right.
    """
    program = tl.program_id(0)
    is_own = program < num_own
    count = tl.where(is_own, N, R - N)
    begin = tl.where(is_own, program * span, (program - num_own) * BLOCK_R)
    stop = tl.minimum(V * count, begin + tl.where(is_own, span, BLOCK_R))
    losses = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(begin, stop, BLOCK_R):
        offs = start + tl.arange(0, BLOCK_R)
        mask = offs < stop
        view, r = offs // count, offs % count
        r += tl.where(is_own, first, tl.where(r < first, 0, N))
        offs_r = view * R + r
        m = tl.load(max_ptr + offs_r, mask=mask, other=0.0)
        total = tl.load(sum_ptr + offs_r, mask=mask, other=1.0)
        for part in tl.range(1, num_parts, loop_unroll_factor=4):
            offs_part = part * V * R + offs_r
            m_part = tl.load(max_ptr + offs_part, mask=mask, other=0.0)
            m_new = tl.maximum(m, m_part)
            total *= tl.exp(m - m_new)
            total += tl.load(sum_ptr + offs_part, mask=mask, other=1.0) * tl.exp(m_part - m_new)
            m = m_new
        positive = tl.load(positive_ptr + offs_r, mask=mask, other=0.0)
        # A row may have no other column.
        is_alone = total == 0
        odds = tl.log(tl.where(is_alone, 1.0, total)) + (m - positive)
        t = tl.where(is_alone, float("-inf"), odds)
        e = tl.exp(-tl.abs(t))
        loss = tl.where(t > 0, t, 0.0) + _log1p(e)
        losses += tl.where(mask, loss, 0.0)
        mask_own = mask & is_own
        tl.store(lse_ptr + offs, positive + loss, mask=mask_own)
        tl.store(weight_ptr + offs, -tl.where(t > 0, 1.0, e) / (1.0 + e), mask=mask_own)
        tl.store(normaliser_ptr + offs_r, m, mask=mask)
        # Beyond fp32's range all other probabilities are zero.
        gap = tl.where(t < -80, 80.0, positive - m)
        tl.store(normaliser_ptr + V * R + offs_r, 1.0 / (total + tl.exp(gap)), mask=mask)
    if is_own:
        tl.store(mean_ptr + program, tl.sum(losses) / (V * N))


@triton.jit(do_not_specialize=["N", "P", "first", "span"])
def bwd_kernel(
    predicted_ptr,
    inverse_ptr,
    neighbour_ptr,
    by_neighbour_ptr,
    by_predicted_ptr,
    temperature,
    part_ptr,
    N,
    P,
    first,
    span,
    stride_pv,
    stride_pn,
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
    p_ptrs = predicted_ptr + view * stride_pv + own.to(tl.int64)[:, None] * stride_pn
    predicted = _load_rows(p_ptrs, offs_d, D, BLOCK_D)
    factor = tl.load(inverse_ptr + rows) * scale
    if by_predicted_ptr is not None:
        shift_n = tl.load(by_predicted_ptr + rows)
        factor_n = tl.load(by_predicted_ptr + tl.num_programs(2) * N + rows) * _fit(predicted_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(part * span, tl.minimum(P, part * span + span), BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        columns = tl.minimum(offs_p, P - 1).to(tl.int64)
        k_ptrs = neighbour_ptr + view * stride_kv + columns[:, None] * stride_kp
        k = _load_rows(k_ptrs, offs_d, D, BLOCK_D)
        s = _product(predicted, k, True)
        for d in range(BLOCK_D, D, BLOCK_D):
            p_d = _load_rows(p_ptrs, d + offs_d, D, BLOCK_D)
            k_d = _load_rows(k_ptrs, d + offs_d, D, BLOCK_D)
            s = _product(p_d, k_d, True, s)
        s = s * factor[:, None] + tl.where(offs_p < P, 0.0, float("-inf"))[None, :]
        if _meet(start, BLOCK_P, tl.program_id(0) * BLOCK_N + first, BLOCK_N):
            s = tl.where(offs_p[None, :] == own[:, None] + first, float("-inf"), s)
        p = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
        if by_neighbour_ptr is not None:
            shift_ptrs = by_neighbour_ptr + view * P + columns
            shift_p = tl.load(shift_ptrs)
            factor_p = tl.load(shift_ptrs + tl.num_programs(2) * P) * _fit(predicted_ptr)
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


@triton.jit(do_not_specialize=["N", "first", "num_parts", "num_losses"])
def normalize_backward_kernel(
    part_ptr,
    predicted_ptr,
    inverse_ptr,
    neighbour_ptr,
    grad_ptr,
    weight_ptr,
    temperature,
    out_ptr,
    radial_ptr,
    N,
    first,
    num_parts,
    num_losses,
    stride_pv,
    stride_pn,
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
    # `grad` is that of the losses' mean.
    each = tl.load(grad_ptr).to(tl.float32) / num_losses
    grad = (acc + weight[:, None] * k) * (each / _number(temperature, IS_STORED))
    p_ptrs = predicted_ptr + view * stride_pv + offs_n[:, None] * stride_pn
    p = tl.load(p_ptrs + offs_d[None, :], mask=mask, other=0.0)
    inverse = tl.load(inverse_ptr + view * N + offs_n, mask=mask_n, other=0.0)
    unit = p.to(tl.float32) * inverse[:, None]
    radial = tl.sum(grad * unit, axis=1)
    # A divisor that is the constant EPS has no gradient of its own.
    tangent = grad - tl.where(inverse < 1.0 / EPS, radial, 0.0)[:, None] * unit
    tl.store(out_ptr + offs, tangent * inverse[:, None], mask=mask)
    tl.store(radial_ptr + view * N + offs_n, radial, mask=mask_n)
