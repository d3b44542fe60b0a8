"""Launches of the InfoNCE loss's Triton kernels: tables, launchers, what the machine code holds."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors, table_arch
from maect_fast.kernels._common.launch import H200, Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.info_nce.triton_device import (
    bwd_kernel,
    finish_kernel,
    fwd_kernel,
    normalize_backward_kernel,
    prepare_kernel,
)

__all__ = ["finish", "gradient", "machine_code", "num_parts", "row_losses", "row_stats"]

# Numbers in the parts of a view's gradient, 8 MiB: two views' stay in an L2 cache of 50 MB. For n
# 512 and D 256 these are 16 parts, which give an H100 two programs per multiprocessor where six
# parts, which were timed, left it one at most. That it pays is predicted, not timed.
MAX_PARTS = 16 << 17


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
    backing: str = "compiled",
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
        backing=backing,
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
            backing=f"measured: 52 us at 512 x 32,768, alone, {H200}",
        ),
        _row(
            "half",
            (64, 64, 256),
            D=256,
            registers=126,
            backing=f"measured: 9.4 us at 512 x 4,096, alone, {H200}",
        ),
        _row("wide", (64, 64, 128), D=1024, registers=224),
    ),
    4: (_row("fp32", (64, 32, 32), D=1024, registers=208, waste=3.0),),
}
BACKWARD = {
    2: (
        _row(
            "half",
            (64, 64, 256, 256),
            archs=(90,),
            D=256,
            registers=252,
            backing=f"measured: 18 us at 512 x 4,096 in 6 parts instead of 16, alone, {H200}",
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
    arch = table_arch(predicted.device)
    # No row of sm_80 takes more shared memory than any device has.
    rows = fitting(table[predicted.itemsize], 80 if arch == 86 else arch)
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
    launch(prepare_kernel, grid, predicted, unit, N, *predicted.stride(), **options)
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
    arguments = (x, y, temperature, row_max, row_sum, positive, *sizes, *x_strides, *y_strides)
    launch(fwd_kernel, grid, *arguments, ONLINE=online, **_options(row, D, temperature))
    return row_max, row_sum, positive


def row_losses(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor | float,
    first: int,
    transposed: bool,
    online: bool,
) -> tuple[Tensor, ...]:
    """loss, lse, positive, weight, normaliser: `row_stats` and `finish`."""
    row_max, row_sum, positive = row_stats(
        predicted, neighbour, temperature, first, transposed, online
    )
    loss, lse, weight, normaliser = finish(row_max, row_sum, positive)
    return loss, lse, positive, weight, normaliser


def finish(row_max: Tensor, row_sum: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
    """`reference.finish`."""
    loss, lse, weight = (torch.empty_like(positive) for _ in range(3))
    normaliser = positive.new_empty(2, *positive.shape)
    R = positive.numel()
    arguments = (row_max, row_sum, positive, loss, lse, weight, normaliser, R, len(row_max))
    grid = (triton.cdiv(R, FINISH.blocks["BLOCK_R"]),)
    launch(finish_kernel, grid, *arguments, **FINISH.options)
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
    unit = _prepare(predicted)
    (V, N, D), P = predicted.shape, neighbour.shape[1]
    radial = unit.new_empty(V, N, dtype=torch.float32)
    row = row or launch_config(BACKWARD, predicted, N)
    options = _options(row, D, temperature)
    num_blocks = triton.cdiv(N, row.blocks["BLOCK_N"])
    slices = triton.cdiv(D, options["BLOCK_O"])
    num_programs, most = V * num_blocks * slices, MAX_PARTS // (N * D)
    span = _span(P, row.blocks["BLOCK_P"], num_programs, most, predicted.device)
    num_parts = triton.cdiv(P, span)
    part = radial.new_empty(num_parts, V, N, D)
    arguments = (unit, last, by_neighbour, by_predicted, temperature, part, N, P, first, span)
    launch(bwd_kernel, (num_blocks, num_parts * slices, V), *arguments, *strides, **options)
    # The unit rows have been used: their place takes the gradient.
    outputs = (unit, radial, N, first, num_parts, *predicted.stride(), *strides)
    inputs = (part, predicted, last, grad, weight, temperature)
    grid = (triton.cdiv(N, ROWS.blocks["BLOCK_N"]), V)
    options = _options(ROWS, D, temperature)
    launch(normalize_backward_kernel, grid, *inputs, *outputs, **options)
    return unit, radial


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row as it is launched at its sizes, in its variants."""
    for itemsize, rows in FORWARD.items():
        for row in fitting(rows, arch):
            for variant, online in (("fixed shift", False), ("online", True)):
                call = partial(_forward_at, row, itemsize, online)
                yield Launch(kernel=fwd_kernel, row=row, call=call, variant=variant)
    for itemsize, rows in BACKWARD.items():
        for row in fitting(rows, arch):
            for variant, both in (("one sum", False), ("both sums", True)):
                call = partial(_backward_at, row, itemsize, both)
                yield Launch(kernel=bwd_kernel, row=row, call=call, variant=variant)
    call = partial(_backward_at, fitting(BACKWARD[2], arch)[-1], 2, False)
    yield Launch(kernel=normalize_backward_kernel, row=ROWS, call=call)
    call = partial(_forward_at, fitting(FORWARD[2], arch)[-1], 2, True)
    yield Launch(kernel=prepare_kernel, row=ROWS, call=call)
    yield Launch(kernel=finish_kernel, row=FINISH, call=call)


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
