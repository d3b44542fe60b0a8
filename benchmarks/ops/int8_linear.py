"""A linear layer on int8 rows, beside the same layer on the numbers that they stand for.

The operands are quantised outside the timed part, where norm and GELU do it in training. Peers in
the dtype of the benchmark start from the numbers, peers in int8 from the operands.

M tokens of all images, N features out, K features in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maect_fast.benchmarks.registry import (
    EAGER,
    OURS,
    Call,
    Op,
    Outputs,
    Sizes,
    UnavailableError,
    check_budget,
)
from maect_fast.kernels import int8_linear, quantize_rows

__all__ = ["OP"]

# fc1, fc2 and qkv of ViT-L/16 at 512 images; fc1 and fc2 of ViT-H/14 at 256.
L16, H14 = 512 * 197, 256 * 257
LAYERS = (
    *((L16, 4096, 1024), (L16, 1024, 4096), (L16, 3072, 1024)),
    *((H14, 5120, 1280), (H14, 1280, 5120)),
)
# One token, odd numbers of rows and columns.
ODD = ((1, 5, 64), (7, 40, 384), (37, 300, 72))


def _sizes(M: int, N: int, K: int) -> Sizes:
    return {"M": M, "N": N, "K": K}


@dataclass(frozen=True, slots=True)
class Inputs:
    x: Tensor
    """[M, K] int8."""
    x_scale: Tensor
    """[M] fp32."""
    weight: Tensor
    """[N, K] int8."""
    weight_scale: Tensor
    """[N] fp32."""
    bias: Tensor
    """[N] in the dtype of the benchmark."""

    @property
    def dtype(self) -> torch.dtype:
        return self.bias.dtype

    def numbers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What the int8 operands stand for, and the bias."""
        operands = ((self.x, self.x_scale), (self.weight, self.weight_scale))
        x, weight = (q.to(dtype) * scale.to(dtype)[:, None] for q, scale in operands)
        return x, weight, self.bias.to(dtype)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    M, N, K = (sizes[letter] for letter in "MNK")

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, weight = quantize_rows(randn(M, K)), quantize_rows(randn(N, K))
    return Inputs(*x, *weight, randn(N).to(dtype))


def _num_bytes(sizes: Sizes, mode: str, itemsize: int) -> int:
    M, N, K = (sizes[letter] for letter in "MNK")
    return (M + N) * K + M * N * itemsize


def _addmm(x: Inputs, dtype: torch.dtype) -> Call:
    numbers, weight, bias = x.numbers(dtype)
    return lambda: {"y": torch.addmm(bias, numbers, weight.t())}


OP: Op[Inputs] = Op(
    name="int8_linear",
    letters="MNK",
    modes=("fwd",),
    sizes={
        "cuda": tuple(_sizes(*shape) for shape in LAYERS),
        "cpu": (_sizes(8 * 197, 4096, 1024),),
        "check": tuple(_sizes(*shape) for shape in ODD),
        "quick": (_sizes(197, 1024, 1024),),
    },
    inputs=_inputs,
    definition=lambda x, mode, dtype: _addmm(x, dtype)(),
    check=lambda x, found, eager, truth: check_budget(found, eager, truth),
    num_bytes=_num_bytes,
    num_flops=lambda sizes, mode: 2 * sizes["M"] * sizes["N"] * sizes["K"],
)


@OP.provider(OURS)
def ours(x: Inputs, mode: str) -> Call:
    inputs = (x.x, x.x_scale, x.weight, x.weight_scale, x.bias)
    return lambda: {"y": int8_linear(*inputs, dtype=x.dtype)}


@OP.provider(EAGER)
def eager(x: Inputs, mode: str) -> Call:
    """The layer without int8, what the op has to beat."""
    return _addmm(x, x.dtype)


@OP.provider("torch._int_mm")
def int_mm(x: Inputs, mode: str) -> Call:
    """PyTorch's int8 product, whose int32 result is scaled in passes of its own."""
    if x.x.is_cuda and (len(x.x) <= 16 or x.x.shape[1] % 8 or len(x.weight) % 8):
        raise UnavailableError("takes more than 16 rows and multiples of 8")

    def call() -> Outputs:
        sums = torch._int_mm(x.x, x.weight.t())
        y = sums * x.x_scale[:, None] * x.weight_scale + x.bias
        return {"y": y.to(x.dtype)}

    return call
