"""GELU of a transformer block's MLP, from the first linear layer's product and its bias.

The product has the dtype of the benchmark, the bias is fp32, as under autocast. In eager PyTorch
the linear layer adds the bias and rounds; here both start from the product without it.

M tokens of all images, D features of the hidden layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from maect_fast.kernels import gelu

__all__ = ["OP"]

# 512 images of ViT-L/16 and 256 of ViT-H/14.
BLOCKS = ((512 * 197, 4096), (256 * 257, 5120))
# One token, widths that are no power of two.
ODD = ((1, 64), (7, 48), (37, 200), (5, 1536))


def _sizes(M: int, D: int) -> Sizes:
    return {"M": M, "D": D}


@dataclass(frozen=True, slots=True)
class Inputs:
    h: Tensor
    """[M, D]."""
    bias: Tensor
    """[D] fp32."""
    dg: Tensor
    """[M, D]."""

    def to(self, dtype: torch.dtype) -> "Inputs":
        """As under autocast to `dtype`; fp64: everything."""
        wide = torch.promote_types(dtype, torch.float32)
        return Inputs(self.h.to(dtype), self.bias.to(wide), self.dg.to(dtype))


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    M, D = sizes["M"], sizes["D"]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return Inputs(h=randn(M, D), bias=randn(D), dg=randn(M, D)).to(dtype)


def _num_bytes(sizes: Sizes, mode: str, itemsize: int) -> int:
    # One tensor in and one out; two in and one out.
    tensors = {"fwd": 2, "bwd": 3, "full": 5}[mode]
    return tensors * sizes["M"] * sizes["D"] * itemsize


def _check(x: Inputs, found: Outputs, eager: Outputs, truth: Outputs) -> None:
    terms = {"dbias": truth["dh"]} if "dh" in truth else {}
    check_sums(found, eager, truth, terms)


OP: Op[Inputs] = Op(
    name="gelu",
    letters="MD",
    modes=("fwd", "bwd", "full"),
    sizes={
        "cuda": tuple(_sizes(*shape) for shape in BLOCKS),
        "cpu": (_sizes(8 * 197, 4096), _sizes(256 * 17, 256)),
        "check": tuple(_sizes(*shape) for shape in ODD),
        "quick": (_sizes(8 * 197, 1024),),
    },
    inputs=_inputs,
    definition=lambda x, mode, dtype: _differentiate(x.to(dtype), mode, _plain)(),
    check=_check,
    num_bytes=_num_bytes,
    # No matrix product.
    num_flops=lambda sizes, mode: 0,
)

Forward = Callable[[Tensor, Tensor], Tensor]
"""(h, bias) -> g."""


def _plain(h: Tensor, bias: Tensor) -> Tensor:
    """Plain PyTorch with its own autograd; rounded after the bias as the linear layer does."""
    return F.gelu((h + bias).to(h.dtype))


def _differentiate(x: Inputs, mode: str, forward: Forward) -> Call:
    """The call of a mode, for functions that autograd knows."""

    def fwd() -> Outputs:
        with torch.no_grad():
            return {"g": forward(x.h, x.bias)}

    if mode == "fwd":
        return fwd
    leaves = [x.h.detach().requires_grad_(), x.bias.detach().requires_grad_()]

    def backward(g: Tensor, *, again: bool) -> Outputs:
        grads = torch.autograd.grad(g, leaves, x.dg, retain_graph=again)
        return dict(zip(("dh", "dbias"), grads, strict=True))

    if mode == "bwd":
        saved = forward(*leaves)
        return lambda: backward(saved, again=True)

    def full() -> Outputs:
        g = forward(*leaves)
        return {"g": g.detach(), **backward(g, again=False)}

    return full


@OP.provider(OURS)
def ours(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, gelu)


@OP.provider(EAGER)
def eager(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _plain)


@OP.provider("torch.compile")
def compiled(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _compile_plain())


@cache
def _compile_plain() -> Forward:
    return compile_peer(_plain)
