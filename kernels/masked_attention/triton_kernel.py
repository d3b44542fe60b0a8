"""Launches of the attention's Triton kernels: launchers, what the machine code holds."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.launch import Launch, LaunchRow, fitting, triton_minor
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.masked_attention.triton_backward import (
    bwd_block_kernel,
    bwd_two_phase_kernel,
)
from maect_fast.kernels.masked_attention.triton_forward import (
    fwd_resident_kernel,
    fwd_streaming_kernel,
)
from maect_fast.kernels.masked_attention.triton_rows import zero_tail_kernel
from maect_fast.kernels.masked_attention.triton_table import (
    BACKWARD,
    DENSE_FIT,
    FORWARD,
    TRITON_39,
    VARIANTS,
    ZERO,
    ZERO_PROGRAMS,
    launch_config,
    num_keys,
)

__all__ = ["backward", "empty_rows", "forward", "launch_modes", "machine_code"]

Modes = tuple[Tensor | None, Tensor | None, Tensor | None, int | None, Tensor | None]

# Numbers in 16 bytes of half precision, which one load instruction takes.
ALIGN = 8


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Unit, and strides of sample, row and head in that unit; packed rows have no sample."""
    found = [(0, *x.stride()[:2]) if x.ndim == 3 else x.stride()[:3] for x in tensors]
    flat = [stride for strides in found for stride in strides]
    align = ALIGN if all(stride % ALIGN == 0 for stride in flat) else 1
    return align, [stride // align for stride in flat]


def launch_modes(
    q: Tensor, k: Tensor, modes: Modes, bound_queries: bool
) -> tuple[tuple[int, int, int], tuple[Any, ...], tuple[int, int], dict[str, bool]]:
    """Sizes B, M, N; pointers; strides of the mask; switches. What is not there is not read."""
    keep, seqlens, cu_seqlens, max_seqlen, key_mask = modes
    sizes = (len(q), q.shape[1], k.shape[1])
    if cu_seqlens is not None:
        assert max_seqlen is not None
        sizes = (len(cu_seqlens) - 1, max_seqlen, max_seqlen)
    elif keep is not None:
        sizes = (len(keep), keep.shape[1], keep.shape[1])
    bounds = seqlens if cu_seqlens is None else cu_seqlens
    pointers = (
        q if bounds is None else bounds.contiguous(),
        q if keep is None else keep.contiguous(),
        q if key_mask is None else key_mask.view(torch.uint8),
    )
    stride_mb, stride_mn = (0, 0) if key_mask is None else key_mask.stride()
    switches = {
        "IS_PACKED": cu_seqlens is not None,
        "HAS_LENGTHS": seqlens is not None,
        "IS_BOUND": bound_queries and bounds is not None,
        "HAS_KEEP": keep is not None,
        "HAS_MASK": key_mask is not None,
    }
    return sizes, pointers, (stride_mb, stride_mn), switches


def empty_rows(x: Tensor, shape: tuple[int, ...], modes: Modes) -> Tensor:
    """A result of which the kernels write the sample's rows, zeros in the others."""
    keep, _, cu_seqlens, _, _ = modes
    if keep is not None:
        return x.new_zeros(shape)
    rows = x.new_empty(shape)
    if cu_seqlens is not None:
        width = rows[0].numel() if len(rows) else 0
        arguments = (rows, cu_seqlens[-1:], len(rows))
        launch(zero_tail_kernel, (ZERO_PROGRAMS,), *arguments, WIDTH=width, **ZERO.options)
    return rows


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: Modes,
    scale: float,
    *,
    bound_queries: bool,
    save_lse: bool,
    row: LaunchRow | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse, which is empty unless saved."""
    (B, M, N), pointers, mask_strides, switches = launch_modes(q, k, modes, bound_queries)
    *_, H, D = q.shape
    o = empty_rows(q, q.shape, modes)
    lse = q.new_empty((B, H, M) if save_lse else (0,), dtype=torch.float32)
    if B * M * H == 0 or N == 0:
        # A dense row is one with keys.
        return o.zero_(), lse.fill_(float("-inf"))
    row = row or launch_config(FORWARD, q, M, N)
    align, strides = _strides(q, k, v)
    stride_ob = 0 if o.ndim == 3 else o.stride(0)
    arguments = (q, k, v, o, lse, *pointers, scale, M, N, *strides, stride_ob, *mask_strides)
    switches |= {"IS_PACKED_QKV": q.stride() == k.stride() == v.stride(), "SAVE_LSE": save_lse}
    options = {"H": H, "D": D, "ALIGN": align, **switches, **row.options}
    if "BLOCK_N" in row.blocks:
        grid = (B * H * triton.cdiv(M, row.blocks["BLOCK_M"]),)
        launch(fwd_streaming_kernel, grid, *arguments, **options)
    else:
        launch(fwd_resident_kernel, (B * H,), *arguments, NUM_KEYS=num_keys(N), **options)
    return o, lse


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
    row: LaunchRow | None = None,
) -> tuple[Tensor, ...]:
    """The gradient of packed q, k, v, [.., 3, H, D]; or those of the three. Contiguous."""
    (B, M, N), pointers, mask_strides, switches = launch_modes(q, k, modes, bound_queries)
    *_, H, D = q.shape
    gradients: tuple[Tensor, ...]
    if is_packed:
        gradients = (empty_rows(q, (*q.shape[:-2], 3, H, D), modes),)
        dq, dk, dv = gradients[0].unbind(-3)
    else:
        dq, dk, dv = gradients = tuple(empty_rows(x, x.shape, modes) for x in (q, k, v))
    if B * M * H == 0 or N == 0:
        # No program runs that would write what the other side has.
        return tuple(x.zero_() for x in gradients)
    if do.stride(-1) != 1:
        do = do.contiguous()
    row = row or launch_config(BACKWARD, q, M, N)
    align, strides = _strides(do, q, k, v)
    batch_strides = [0 if x.ndim == 3 else x.stride(0) for x in (o, dq, dk)]
    arguments = (do, q, k, v, o, lse, dq, dk, dv, *pointers, scale, M, N)
    arguments += (*strides, *batch_strides, dq.stride(-3), *mask_strides)
    options = {"H": H, "D": D, "ALIGN": align, **switches, **row.options}
    num_heads = B * H
    if "BLOCK" in row.blocks:
        launch(bwd_block_kernel, (num_heads,), *arguments, **options)
    else:
        num_blocks = triton.cdiv(N, row.blocks["KEYS_N"]) + triton.cdiv(M, row.blocks["QUERIES_M"])
        launch(bwd_two_phase_kernel, (num_heads * num_blocks,), *arguments, **options)
    return gradients


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row as it is launched at its sizes, in its variants."""
    for row in fitting(FORWARD, arch):
        kernel = fwd_streaming_kernel if "BLOCK_N" in row.blocks else fwd_resident_kernel
        for variant, modes in VARIANTS.items():
            call = partial(_forward_at, row, **modes)
            held = row
            if not modes and triton_minor() < TRITON_39:
                fit = DENSE_FIT.get((arch, row.label), row.limits.blocks_per_sm)
                held = replace(row, limits=replace(row.limits, blocks_per_sm=fit))
            yield Launch(kernel=kernel, row=held, call=call, variant=variant)
    for row in fitting(BACKWARD, arch):
        kernel = bwd_block_kernel if "BLOCK" in row.blocks else bwd_two_phase_kernel
        for variant, modes in VARIANTS.items():
            call = partial(_backward_at, row, **modes)
            yield Launch(kernel=kernel, row=row, call=call, variant=variant)
    call = partial(_packed_at, fitting(FORWARD, arch)[-1])
    yield Launch(kernel=zero_tail_kernel, row=ZERO, call=call)


def _inputs_at(
    row: LaunchRow, *, seqlens: bool = False, key_mask: bool = False
) -> tuple[Tensor, Tensor, Tensor, Modes]:
    B, H, M, N, D = (row.sizes[letter] for letter in "BHMND")
    qkv = torch.empty(B, N, 3, H, D, dtype=torch.bfloat16, device="meta")
    lengths = torch.empty(B, dtype=torch.int32, device="meta") if seqlens else None
    mask = torch.empty(B, N, dtype=torch.bool, device="meta") if key_mask else None
    return qkv[:, :M, 0], qkv[:, :, 1], qkv[:, :, 2], (None, lengths, None, None, mask)


def _forward_at(row: LaunchRow, **given: bool) -> None:
    q, k, v, modes = _inputs_at(row, **given)
    forward(q, k, v, modes, 0.1, bound_queries=q.shape == k.shape, save_lse=True, row=row)


def _backward_at(row: LaunchRow, **given: bool) -> None:
    q, k, v, modes = _inputs_at(row, **given)
    is_square = q.shape == k.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = o.new_empty(o.shape[0], o.shape[2], o.shape[1], dtype=torch.float32)
    backward(o, q, k, v, o, lse, modes, 0.1, bound_queries=is_square, is_packed=is_square, row=row)


def _packed_at(row: LaunchRow) -> None:
    q, k, v, _ = _inputs_at(row)
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    modes = (None, None, bounds, q.shape[1], None)
    forward(q[0], k[0], v[0], modes, 0.1, bound_queries=True, save_lse=True, row=row)
