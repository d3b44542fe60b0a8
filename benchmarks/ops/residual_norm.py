"""What a transformer block does between two products: r + branch + bias, then its norm.

Stream, branch and the norm's result have the dtype of the benchmark, parameters are fp32. Eager
PyTorch adds, casts, and norms in fp32, as autocast does.

M tokens of all images, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from maect_fast.benchmarks.registry import (
    EAGER,
    OURS,
    Call,
    Op,
    Outputs,
    Sizes,
    check_sums,
    compile_peer,
)
from maect_fast.kernels import residual_norm

__all__ = ["OP"]

EPS = 1e-6
# 512 images of ViT-L/16 and 256 of ViT-H/14.
BLOCKS = ((512 * 197, 1024), (256 * 257, 1280))
# One row, rows that fill no tile, widths that are no power of two.
ODD = ((1, 64), (7, 48), (37, 200), (5, 1280))


def _sizes(M: int, D: int) -> Sizes:
    return {"M": M, "D": D}


@dataclass(frozen=True, slots=True)
class Inputs:
    r: Tensor
    """[M, D], as are the next three."""
    branch: Tensor
    dr_out: Tensor
    """Gradient of the sum."""
    dy: Tensor
    """Gradient of the norm's result."""
    branch_bias: Tensor
    """[D] fp32, as are the last two."""
    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Rows in `dtype`, parameters in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        values = [getattr(self, field.name) for field in fields(self)]
        return Inputs(*(x.to(dtype if x.ndim == 2 else wide) for x in values))


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    M, D = sizes["M"], sizes["D"]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows, columns = (randn(M, D) for _ in range(4)), (randn(D) for _ in range(3))
    return Inputs(*rows, *columns).to(dtype)


def _num_bytes(sizes: Sizes, mode: str, itemsize: int) -> int:
    # r, branch, r_out, y; gradients of y and r_out, r_out, one gradient for r and branch.
    tensors = {"fwd": 4, "bwd": 4, "full": 8}[mode]
    return tensors * sizes["M"] * sizes["D"] * itemsize


def _check(x: Inputs, found: Outputs, eager: Outputs, truth: Outputs) -> None:
    terms = {}
    if "dr" in truth:
        wide = x.to(torch.float64)
        out = wide.r + wide.branch + wide.branch_bias
        unit = F.layer_norm(out, out.shape[-1:], eps=EPS)
        terms = {"dbranch_bias": truth["dr"], "dweight": wide.dy * unit, "dbias": wide.dy}
    check_sums(found, eager, truth, terms)


OP: Op[Inputs] = Op(
    name="residual_norm",
    letters="MD",
    modes=("fwd", "bwd", "full"),
    sizes={
        "cuda": tuple(_sizes(*shape) for shape in BLOCKS),
        "cpu": (_sizes(8 * 197, 1024), _sizes(256 * 17, 64)),
        "check": tuple(_sizes(*shape) for shape in ODD),
        "quick": (_sizes(8 * 197, 256),),
    },
    inputs=_inputs,
    definition=lambda x, mode, dtype: _differentiate(x.to(dtype), mode, _plain)(),
    check=_check,
    num_bytes=_num_bytes,
    # No matrix product.
    num_flops=lambda sizes, mode: 0,
)

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(r, branch, its bias, the norm's weight and bias) -> r_out, y."""
NAMES = ("dr", "dbranch", "dbranch_bias", "dweight", "dbias")


def _plain(
    r: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch with its own autograd."""
    out = r + (branch + branch_bias).to(branch.dtype)
    y = F.layer_norm(out.to(weight.dtype), out.shape[-1:], weight, bias, EPS)
    return out, y.to(branch.dtype)


def _fused(
    r: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return residual_norm(r, branch, branch_bias, weight=weight, bias=bias, eps=EPS)


def _differentiate(x: Inputs, mode: str, forward: Forward) -> Call:
    """The call of a mode, for functions that autograd knows."""
    inputs = (x.r, x.branch, x.branch_bias, x.weight, x.bias)

    def fwd() -> Outputs:
        with torch.no_grad():
            return dict(zip(("out", "y"), forward(*inputs), strict=True))

    if mode == "fwd":
        return fwd
    r, branch, branch_bias, weight, bias = leaves = [t.detach().requires_grad_() for t in inputs]

    def backward(out: Tensor, y: Tensor, *, again: bool) -> Outputs:
        grads = torch.autograd.grad([out, y], leaves, [x.dr_out, x.dy], retain_graph=again)
        return dict(zip(NAMES, grads, strict=True))

    if mode == "bwd":
        saved = forward(r, branch, branch_bias, weight, bias)
        return lambda: backward(*saved, again=True)

    def full() -> Outputs:
        out, y = forward(r, branch, branch_bias, weight, bias)
        return {"out": out.detach(), "y": y.detach(), **backward(out, y, again=False)}

    return full


@OP.provider(OURS)
def ours(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _fused)


@OP.provider(EAGER)
def eager(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _plain)


@OP.provider("torch.compile")
def compiled(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _compile_plain())


@cache
def _compile_plain() -> Forward:
    return compile_peer(_plain)
