"""A linear layer on int8 operands: tiles of int32 sums, scaled as they are stored.

Both operands have their features side by side, as the tensor cores of sm_90 read int8. Programs
that run beside each other share a few tiles of rows and of columns, which stay in the L2 cache.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from maect_fast.kernels._common.gpu import table_arch
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch

__all__ = ["forward", "launch_config", "machine_code"]


def _row(label: str, *, archs: Sequence[int], stages: int) -> LaunchRow:
    """A launch at fc1 of ViT-L/16, eight images: half of a thread's registers are sums."""
    return LaunchRow(
        label=label,
        archs=tuple(archs),
        num_warps=8,
        num_stages=stages,
        blocks={"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "GROUP_M": 8},
        sizes={"M": 8 * 197, "N": 4096, "K": 1024},
        limits=Limits(
            registers=255,
            products=((128, 256, 128),),
            # Of each thread 128 results, eight a store.
            opcodes={"STG.E.128": 16},
        ),
    )


FORWARD = (
    _row("sm_90", archs=(90,), stages=4),
    # 96 KiB, which a block of GeForce's can have, too.
    _row("sm_80", archs=(80, 86), stages=3),
)


def launch_config(arch: int) -> LaunchRow:
    """The first row for an architecture."""
    return next(row for row in FORWARD if arch in row.archs)


@triton.jit(do_not_specialize=["M"])
def fwd_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    stride_xm,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of the result; GROUP_M tiles of rows go through all columns together."""
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first_m = tl.program_id(0) // (GROUP_M * TILES_N) * GROUP_M
    in_group = tl.program_id(0) % (GROUP_M * TILES_N)
    group_m = tl.minimum(GROUP_M, tl.cdiv(M, BLOCK_M) - first_m)
    start_m = (first_m + in_group % group_m) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = in_group // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M - start_m, offs_n < N
    # Beyond the end the last row again, so that no load is masked; nobody reads its sums.
    rows = tl.minimum(offs_m, M - start_m - 1)
    columns = tl.minimum(offs_n, N - 1)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + start_m.to(tl.int64) * stride_xm + rows[:, None] * stride_xm + offs_k[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * K + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0)
            weight = tl.load(weight_ptrs, mask=mask_k[:, None], other=0)
        acc = tl.dot(x, weight, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    x_scale = tl.load(x_scale_ptr + start_m + offs_m, mask=mask_m, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + offs_n, mask=mask_n, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + start_m.to(tl.int64) * N + (offs_m[:, None] * N + offs_n[None, :])
    tl.store(y_ptrs, y, mask=mask_m[:, None] & mask_n[None, :])


def forward(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    row: LaunchRow | None = None,
) -> Tensor:
    """`reference.int8_linear`."""
    row = row or launch_config(table_arch(x.device))
    N, K = weight.shape
    M = x.numel() // K
    y = x.new_empty((*x.shape[:-1], N), dtype=dtype)
    tiles = triton.cdiv(M, row.blocks["BLOCK_M"]) * triton.cdiv(N, row.blocks["BLOCK_N"])
    if tiles > 0:
        launch(
            fwd_kernel,
            (tiles,),
            *(x, x_scale, weight, weight_scale, bias, y, M),
            x.view(-1, K).stride(0),
            N=N,
            K=K,
            HAS_BIAS=bias is not None,
            **row.options,
        )
    return y


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row with a bias, by the dtype of the result."""
    for row in fitting(FORWARD, arch):
        for variant, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            call = partial(_forward_at, row, dtype)
            yield Launch(kernel=fwd_kernel, row=row, call=call, variant=variant)


def _forward_at(row: LaunchRow, dtype: torch.dtype) -> None:
    """On tensors without memory."""
    M, N, K = (row.sizes[letter] for letter in "MNK")
    x, weight = (torch.empty(n, K, dtype=torch.int8, device="meta") for n in (M, N))
    x_scale, weight_scale = (torch.empty(n, device="meta") for n in (M, N))
    forward(x, x_scale, weight, weight_scale, weight_scale, dtype, row)
