"""Kernels that no op should register: each breaks one rule of the machine-code gate."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maect_fast.benchmarks.machine_code.controls import GOOD, group_maxima, group_maxima_kernel
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits


@triton.jit
def atomic_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(x_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1, "no such block")


def launch(kernel: Any, x: Tensor, *, row: LaunchRow, launched_as: LaunchRow | None = None) -> None:
    kernel[(1,)](x, **(launched_as or row).options)


ROW = LaunchRow(
    label="small",
    archs=(80,),
    num_warps=4,
    num_stages=1,
    blocks={"BLOCK": 128},
    sizes={"N": 128},
    limits=Limits(registers=255),
)


def machine_code(arch: int) -> Iterator[Launch]:
    if arch != 80:
        return
    x = torch.empty(512, 256, dtype=torch.float32, device="meta")
    for kernel in (atomic_kernel, wrong_kernel):
        yield Launch(kernel=kernel, row=ROW, call=partial(launch, kernel, x, row=ROW))
    forgotten = replace(ROW, label="forgotten")
    yield Launch(kernel=atomic_kernel, row=forgotten, call=lambda: None)
    stale = replace(ROW, label="stale", num_warps=8)
    call = partial(launch, atomic_kernel, x, row=stale, launched_as=ROW)
    yield Launch(kernel=atomic_kernel, row=stale, call=call)
    half = x.to(torch.float16)
    for label, limits in (
        ("undeclared", replace(GOOD.limits, products=())),
        ("crowded", replace(GOOD.limits, registers=64, shared_bytes=8192, blocks_per_sm=6)),
    ):
        row = replace(GOOD, label=label, limits=limits)
        yield Launch(
            kernel=group_maxima_kernel,
            row=row,
            call=partial(group_maxima, half, half, row=row),
            variant="fp16",
        )
