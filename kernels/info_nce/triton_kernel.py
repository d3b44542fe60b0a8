"""Launches of the InfoNCE loss's Triton kernels: tables, launchers, what the machine code holds."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors, table_arch
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.info_nce.triton_device import (
    bwd_kernel,
    close_kernel,
    normalize_backward_kernel,
    sums_kernel,
)

__all__ = [
    "finish",
    "gradient",
    "machine_code",
    "num_means",
    "num_parts",
    "row_losses",
    "row_stats",
]

# Numbers in the parts of a view's gradient, 8 MiB: two views' stay in an L2 cache of 50 MB. For n
# 512 and D 256 these are 16 parts, which give an H100 two programs per multiprocessor where six
# parts, which were timed, left it one at most. That it pays is predicted, not timed.
MAX_PARTS = 16 << 17
# Rows with losses that one program closes: four blocks, one after the other. Of more than one
# program, another launch adds up the sums.
MAX_OWN = 4096


def _row(
    label: str,
    tile: tuple[int, ...],
    *,
    archs: tuple[int, ...] = (80, 90),
    D: int,
    P: int = 512,
    warps: int = 4,
    registers: int,
    blocks: int = 2,
    waste: float = 1.0,
    backing: str = "compiled",
) -> LaunchRow:
    """A launch with products, for up to D features and from P neighbours on.

    Its tile is BLOCK_N, BLOCK_P, BLOCK_D, and in the backward BLOCK_O.
    """
    M, N, K, *out = tile
    names = ("BLOCK_N", "BLOCK_P", "BLOCK_D", "BLOCK_O")[: len(tile)]
    return LaunchRow(
        label=label,
        archs=archs,
        num_warps=warps,
        num_stages=2,
        blocks=dict(zip(names, tile, strict=True)),
        sizes={"V": 2, "n": 512, "P": P, "D": D},
        limits=Limits(
            registers=registers,
            blocks_per_sm=blocks,
            # The first slice of D features, and a loop over the others.
            products=((M, N, K),) * (1 if D <= K else 2) + tuple((M, x, N) for x in out),
            max_waste=waste,
            opcodes={"MUFU.EX2": M * N // (32 * warps)},
        ),
        backing=backing,
    )


# By the bytes of a number. fp32 takes three products: waste 3. A tile of 64 rows belongs to four
# warps: on sm_90 eight would repeat work, on sm_80 eight share its columns.
FORWARD = {
    2: (
        # Neighbours are read once per block of predictions: 256 halve what 128 read.
        _row(
            "many neighbours",
            (256, 64, 256),
            archs=(90,),
            D=256,
            P=8192,
            warps=8,
            registers=255,
            blocks=1,
        ),
        _row("half", (64, 64, 256), D=256, registers=143),
        _row("wide", (64, 64, 128), D=1024, registers=232),
    ),
    4: (
        # Either may be the products' rows, of which HGMMA takes 64.
        _row("fp32", (64, 64, 32), archs=(90,), D=1024, registers=224, waste=3.0),
        _row("fp32", (64, 32, 32), archs=(80,), D=1024, registers=208, waste=3.0),
    ),
}
BACKWARD = {
    2: (
        _row(
            "half",
            (64, 64, 256, 256),
            archs=(90,),
            D=256,
            registers=252,
        ),
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
CLOSE = LaunchRow(
    label="any",
    num_warps=16,
    num_stages=1,
    blocks={"BLOCK_R": 1024},
    sizes={"P": 512},
    limits=Limits(registers=32, shared_bytes=64, blocks_per_sm=4, opcodes={"MUFU.EX2": 6}),
)


def launch_config(table: dict[int, tuple[LaunchRow, ...]], predicted: Tensor, P: int) -> LaunchRow:
    """The first row of a table for these sizes; with fewer neighbours than any, the last."""
    arch = table_arch(predicted.device)
    # No row of sm_80 takes more shared memory than any device has.
    rows = fitting(table[predicted.itemsize], 80 if arch == 86 else arch)
    rows = [row for row in rows if row.sizes["D"] >= predicted.shape[-1]]
    return next((row for row in rows if row.sizes["P"] <= P), rows[-1])


def _span(predicted: Tensor, P: int, row: LaunchRow, others: int = 1, most: int = 1 << 31) -> int:
    """Length of a part of the neighbours, such that the programs fill the multiprocessors once.

    `others` programs share a part and a block of predictions; there are at most `most` parts.
    """
    num_programs = len(predicted) * triton.cdiv(predicted.shape[1], row.blocks["BLOCK_N"]) * others
    num_tiles = triton.cdiv(P, row.blocks["BLOCK_P"])
    fill = min(2, row.limits.blocks_per_sm) * num_multiprocessors(predicted.device)
    parts = max(1, min(fill // num_programs, most, num_tiles))
    return int(triton.cdiv(num_tiles, parts) * row.blocks["BLOCK_P"])


def num_parts(predicted: Tensor, P: int, transposed: bool) -> int:
    """Into how many parts `row_stats` divides the columns."""
    row = launch_config(FORWARD, predicted, P)
    if transposed:
        return int(triton.cdiv(P, _span(predicted, P, row)))
    return int(triton.cdiv(predicted.shape[1], row.blocks["BLOCK_N"]))


def num_means(num_own: int) -> int:
    """By how many programs `finish` adds up so many rows' losses."""
    return int(triton.cdiv(num_own, MAX_OWN))


def _options(row: LaunchRow, D: int, scalar: Tensor | float) -> dict[str, Any]:
    """Keyword arguments of a launch; tiles are no wider than a row of features."""
    widest = triton.next_power_of_2(D)
    narrow = {"BLOCK_D": widest} | {
        name: min(widest, size)
        for name, size in row.blocks.items()
        if name in ("BLOCK_D", "BLOCK_O")
    }
    return {**row.options, **narrow, "D": D, "IS_STORED": isinstance(scalar, Tensor)}


def _operands(predicted: Tensor, neighbour: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Neighbours of the last view, and strides: that one meets the first view's predictions."""
    assert predicted.dtype == neighbour.dtype
    assert predicted.stride(-1) == neighbour.stride(-1) == 1
    view, row, _ = neighbour.stride()
    return neighbour[-1], (*predicted.stride()[:2], -view, row)


def row_stats(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor | float,
    first: int,
    transposed: bool,
    online: bool,
    row: LaunchRow | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.row_stats`, by parts of the columns, and the predictions' 1 / norm [V, n].

    Unless `online`, row_max is 1 / T.
    """
    last, strides = _operands(predicted, neighbour)
    (V, N, D), P = predicted.shape, neighbour.shape[1]
    positive, inverse = (predicted.new_empty(V, N, dtype=torch.float32) for _ in range(2))
    row = row or launch_config(FORWARD, predicted, P)
    span = _span(predicted, P, row)
    grid = (triton.cdiv(N, row.blocks["BLOCK_N"]), triton.cdiv(P, span), V)
    shape = (grid[1], V, N) if transposed else (grid[0], V, P)
    row_max, row_sum = (positive.new_empty(shape) for _ in range(2))
    outputs = (row_max, row_sum, positive, inverse)
    arguments = (predicted, last, temperature, *outputs, N, P, first, span, *strides)
    options = _options(row, D, temperature)
    launch(sums_kernel, grid, *arguments, ONLINE=online, TRANSPOSED=transposed, **options)
    return outputs


def finish(
    row_max: Tensor, row_sum: Tensor, positive: Tensor, first: int, n: int
) -> tuple[Tensor, ...]:
    """mean, lse, weight, normaliser by `reference.finish`: the first three of n rows from `first`.

    The mean is 0-d, or if there are many such rows, it is the sum of what it comes in.
    """
    num_parts, V, R = row_max.shape
    num_own = num_means(V * n)
    mean = positive.new_empty(() if num_own == 1 else num_own)
    lse, weight = (positive.new_empty(V, n) for _ in range(2))
    normaliser = positive.new_empty(2, V, R)
    outputs = (mean, lse, weight, normaliser)
    sizes = (V, n, R, first, num_parts, num_own, MAX_OWN)
    grid = (num_own + triton.cdiv(V * (R - n), CLOSE.blocks["BLOCK_R"]),)
    launch(close_kernel, grid, row_max, row_sum, positive, *outputs, *sizes, **CLOSE.options)
    return outputs


def row_losses(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor | float,
    first: int,
    transposed: bool,
    online: bool,
) -> tuple[Tensor, ...]:
    """mean, lse, positive, weight, normaliser, 1 / norm: `row_stats` and `finish`."""
    row_max, row_sum, positive, inverse = row_stats(
        predicted, neighbour, temperature, first, transposed, online
    )
    mean, lse, weight, normaliser = finish(row_max, row_sum, positive, 0, predicted.shape[1])
    return mean, lse, positive, weight, normaliser, inverse


def gradient(
    grad: Tensor,
    predicted: Tensor,
    inverse: Tensor,
    neighbour: Tensor,
    temperature: Tensor | float,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
    num_losses: int,
    row: LaunchRow | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.gradient` of the mean of so many losses; `inverse` as `row_stats` leaves it."""
    last, strides = _operands(predicted, neighbour)
    (V, N, D), P = predicted.shape, neighbour.shape[1]
    row = row or launch_config(BACKWARD, predicted, P)
    options = _options(row, D, temperature)
    num_blocks = triton.cdiv(N, row.blocks["BLOCK_N"])
    slices = triton.cdiv(D, options["BLOCK_O"])
    span = _span(predicted, P, row, slices, MAX_PARTS // (N * D))
    num_parts = triton.cdiv(P, span)
    part = inverse.new_empty(num_parts, V, N, D)
    rows = (by_neighbour, by_predicted, temperature)
    arguments = (predicted, inverse, last, *rows, part, N, P, first, span, *strides)
    launch(bwd_kernel, (num_blocks, num_parts * slices, V), *arguments, **options)
    out, radial = predicted.new_empty(V, N, D), inverse.new_empty(V, N)
    inputs = (part, predicted, inverse, last, grad, weight, temperature)
    outputs = (out, radial, N, first, num_parts, num_losses, *strides)
    grid = (triton.cdiv(N, ROWS.blocks["BLOCK_N"]), V)
    options = _options(ROWS, D, temperature)
    launch(normalize_backward_kernel, grid, *inputs, *outputs, **options)
    return out, radial


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row as it is launched at its sizes, in its variants."""
    for itemsize, rows in FORWARD.items():
        for row in fitting(rows, arch):
            for transposed, online in product((False, True), repeat=2):
                words = ("transposed, " * transposed, "online" if online else "fixed shift")
                call = partial(_forward_at, row, itemsize, transposed, online)
                yield Launch(kernel=sums_kernel, row=row, call=call, variant="".join(words))
    for itemsize, rows in BACKWARD.items():
        for row in fitting(rows, arch):
            for variant, both in (("one sum", False), ("both sums", True)):
                call = partial(_backward_at, row, itemsize, both)
                yield Launch(kernel=bwd_kernel, row=row, call=call, variant=variant)
    call = partial(_backward_at, fitting(BACKWARD[2], arch)[-1], 2, False)
    yield Launch(kernel=normalize_backward_kernel, row=ROWS, call=call)
    call = partial(_forward_at, fitting(FORWARD[2], arch)[0], 2, False, False)
    yield Launch(kernel=close_kernel, row=CLOSE, call=call)


def _inputs_at(row: LaunchRow, itemsize: int) -> tuple[Tensor, Tensor]:
    V, n, P, D = row.sizes.values()
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    predicted, neighbour = (torch.empty(V, x, D, dtype=dtype, device="meta") for x in (n, P))
    return predicted, neighbour


def _forward_at(row: LaunchRow, itemsize: int, transposed: bool, online: bool) -> None:
    predicted, neighbour = _inputs_at(row, itemsize)
    row_max, row_sum, *_ = row_stats(predicted, neighbour, 0.2, 0, transposed, online, row)
    finish(row_max, row_sum, row_max[0], 0, predicted.shape[1])


def _backward_at(row: LaunchRow, itemsize: int, both: bool) -> None:
    predicted, neighbour = _inputs_at(row, itemsize)
    normaliser = torch.empty(2, *predicted.shape[:2], device="meta")
    weight, other = normaliser[0], normaliser if both else None
    rows = (weight, normaliser, other)
    gradient(weight[0, 0], predicted, weight, neighbour, 0.2, *rows, 0, 1024, row)
