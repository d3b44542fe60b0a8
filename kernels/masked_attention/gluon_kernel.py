"""Launches of the attention's warp-specialised kernels, for sm_90: tables, launchers, their code.

Compiled and emulated only: no GPU has run them. Gluon is Triton's lower level and changes between
its minors, so that a row is for the minors that it was compiled with.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.masked_attention.gluon_backward import gluon_bwd_kernel
from maect_fast.kernels.masked_attention.gluon_forward import gluon_fwd_kernel
from maect_fast.kernels.masked_attention.triton_kernel import empty_rows, launch_modes
from maect_fast.kernels.masked_attention.triton_rows import padded_dim
from maect_fast.kernels.masked_attention.triton_table import num_keys

__all__ = ["ARCHS", "backward", "forward", "machine_code"]

Modes = tuple[Tensor | None, Tensor | None, Tensor | None, int | None, Tensor | None]

ARCHS = (90,)
# Numbers in 16 bytes of half precision, which one copy takes.
ALIGN = 8
# Rows of a warp group's product, and keys of two.
TILE, SLAB = 64, 128
# Of a multiprocessor's registers 12 warps get 168 a thread; the roles share them anew.
REGISTERS = 168


def _row(
    N: int,
    D: int,
    products: tuple[tuple[float, float, float], ...],
    work: int,
    *,
    stages: int,
    slots: int,
    registers: tuple[int, int],
    stack: int,
    spills_in_loop: int = 0,
) -> LaunchRow:
    """A launch for up to N queries and keys, rounded up to 16, and up to D features.

    Products are those of both consumers, who have a copy of their code each; `work` is what is
    multiplied for them, padding included.
    """
    consumer, producer = registers
    return LaunchRow(
        label=f"{N} x {N} x {D}",
        archs=ARCHS,
        triton_from=(3, 6),
        triton_below=(3, 7),
        num_warps=4,
        num_stages=1,
        maxnreg=REGISTERS,
        blocks={
            "STAGES": stages,
            "SLOTS": slots,
            "CONSUMER_REGISTERS": consumer,
            "PRODUCER_REGISTERS": producer,
        },
        sizes={"B": 512, "H": 16, "M": N, "N": N, "D": D},
        limits=Limits(
            registers=REGISTERS,
            stack_bytes=stack,
            products=products,
            max_waste=work / sum(m * n * d for m, n, d in products),
            roles=(consumer, consumer, producer),
            spills_in_loop=spills_in_loop,
        ),
        backing="compiled and emulated only",
    )


def _forward_row(N: int, D: int, **limits: Any) -> LaunchRow:
    """A tile of queries: Q K^T and P V."""
    useful = (N / triton.cdiv(N, TILE), N, D)
    return _row(N, D, (useful,) * 4, 4 * TILE * num_keys(N) * padded_dim(D), **limits)


def _backward_row(N: int, D: int, **limits: Any) -> LaunchRow:
    """A tile of queries beside 64 keys: S, dP, dV, dK; beside 128: dQ.

    dQ is in the code a third time, for a half of a slab that has no keys.
    """
    tile = N / triton.cdiv(N, TILE)
    products = ((tile, tile, D),) * 8 + ((tile, 2 * tile, D),) * 3
    work = (8 * TILE**2 + 3 * TILE * SLAB) * padded_dim(D)
    return _row(N, D, products, work, **limits)


# The first row that covers the sizes is taken. Masks cost the stack: the producer's, and of the
# backward at D 80 one load in consumer 1's main loop. Dense main loops have none.
FORWARD = (
    _forward_row(65, 80, stages=4, slots=8, registers=(232, 40), stack=16),
    _forward_row(197, 64, stages=2, slots=4, registers=(232, 40), stack=8),
    _forward_row(257, 80, stages=2, slots=2, registers=(232, 40), stack=120),
)
BACKWARD = (
    _backward_row(65, 80, stages=2, slots=3, registers=(224, 56), stack=24, spills_in_loop=1),
    _backward_row(197, 64, stages=2, slots=3, registers=(224, 56), stack=24),
    _backward_row(257, 80, stages=2, slots=2, registers=(224, 56), stack=24, spills_in_loop=1),
)
VARIANTS: dict[str, dict[str, bool]] = {
    "dense": {},
    "masked": {"seqlens": True, "key_mask": True},
    "kept": {"keep": True},
}


def _launch_row(table: tuple[LaunchRow, ...], N: int, D: int) -> LaunchRow:
    """The first row of a table that covers N queries and keys."""
    return next(
        row for row in fitting(table, 90) if num_keys(row.sizes["N"]) >= N and row.sizes["D"] >= D
    )


def _strides(**tensors: Tensor) -> tuple[list[int], dict[str, int]]:
    """Of samples, in units of 8 numbers, by tensor; those of rows and heads are compiled in."""
    samples: list[int] = []
    compiled: dict[str, int] = {}
    for name, x in tensors.items():
        sample, row, head = (0, *x.stride()[:2]) if x.ndim == 3 else x.stride()[:3]
        if any(stride % ALIGN for stride in (sample, row, head)) or x.data_ptr() % 16:
            raise RuntimeError(
                "masked_attention: backend 'gluon' takes rows that begin at multiples of 16 bytes; "
                "copy the tensor, or use backend='triton'"
            )
        samples.append(sample // ALIGN)
        compiled |= {f"STRIDE_{name}": row, f"STRIDE_{name[:-1]}H": head}
    return samples, compiled


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
    if B * M * H == 0:
        return o, lse
    if N == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    row = row or _launch_row(FORWARD, max(M, N), D)
    samples, compiled = _strides(QM=q, KN=k, VN=v)
    stride_ob = 0 if o.ndim == 3 else o.stride(0)
    grid = (min(B * H, num_multiprocessors(q.device)),)
    launch(
        gluon_fwd_kernel,
        grid,
        *(q, k, v, o, lse, *pointers, scale, M, N, B * H, *samples, stride_ob, *mask_strides),
        **{"H": H, "D": D, **compiled, **switches},
        SAVE_LSE=save_lse,
        NUM_KEYS=num_keys(N),
        **row.options,
    )
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
    row = row or _launch_row(BACKWARD, max(M, N), D)
    samples, compiled = _strides(DOM=do, QM=q, KN=k, VN=v)
    batch_strides = [0 if x.ndim == 3 else x.stride(0) for x in (o, dq, dk)]
    num_programs = min(B * H, num_multiprocessors(q.device))
    tiles = triton.cdiv(M, TILE)
    # Sums of dQ between slabs.
    scratch = num_programs * tiles * TILE * padded_dim(D) if N > SLAB else 0
    part = q.new_empty(scratch, dtype=torch.float32)
    launch(
        gluon_bwd_kernel,
        (num_programs,),
        *(do, q, k, v, o, lse, dq, dk, dv, part, *pointers, scale, M, N, B * H),
        *(*samples, *batch_strides, *mask_strides),
        **{"H": H, "D": D, **compiled, **switches},
        STRIDE_D=dq.stride(-3),
        TILES=tiles,
        **row.options,
    )
    return gradients


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row as it is launched at its sizes, in its variants."""
    for table, kernel, call in (
        (FORWARD, gluon_fwd_kernel, _forward_at),
        (BACKWARD, gluon_bwd_kernel, _backward_at),
    ):
        for row in fitting(table, arch):
            for variant, modes in VARIANTS.items():
                yield Launch(
                    kernel=kernel, row=row, call=partial(call, row, **modes), variant=variant
                )


def _inputs_at(
    row: LaunchRow, *, seqlens: bool = False, key_mask: bool = False, keep: bool = False
) -> tuple[Tensor, Modes]:
    B, H, N, D = (row.sizes[letter] for letter in "BHND")
    empty = partial(torch.empty, device="meta")
    modes = (
        empty(B, N, dtype=torch.int64) if keep else None,
        empty(B, dtype=torch.int32) if seqlens else None,
        None,
        None,
        empty(B, N, dtype=torch.bool) if key_mask else None,
    )
    return empty(B, N, 3, H, D, dtype=torch.bfloat16), modes


def _forward_at(row: LaunchRow, **given: bool) -> None:
    qkv, modes = _inputs_at(row, **given)
    q, k, v = qkv.unbind(2)
    forward(q, k, v, modes, 0.1, bound_queries=True, save_lse=True, row=row)


def _backward_at(row: LaunchRow, **given: bool) -> None:
    qkv, modes = _inputs_at(row, **given)
    o = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
    lse = o.new_empty(o.shape[0], o.shape[2], o.shape[1], dtype=torch.float32)
    q, k, v = qkv.unbind(2)
    backward(o, q, k, v, o, lse, modes, 0.1, bound_queries=True, is_packed=True, row=row)
