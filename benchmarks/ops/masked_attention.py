"""Dense self-attention on packed projections: qkv [B, N, 3, H, D] to [B, N, H, D], and back.

All providers take the packed tensor and return one gradient for it, as a ViT's block needs: what
a library spends on another layout is part of its time. `fwd` runs without autograd, as a frozen
block does; `bwd` is the backward alone; `full` is both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from maect_fast.benchmarks.registry import (
    EAGER,
    OURS,
    Call,
    Op,
    Outputs,
    Sizes,
    UnavailableError,
    check_budget,
    compile_peer,
    import_peer,
    judged_samples,
)
from maect_fast.kernels import masked_attention
from maect_fast.kernels.masked_attention.op import gluon_obstacle
from maect_fast.testing import random_qkv

__all__ = ["OP"]

# (N, H, D) of ViT-H/14, H/16, L/16, B/16 tuning; H/14, H/16, L/16 encoders and both decoders in
# MAE pre-training (arXiv 2304.10520, appendix; ml-jku/MAE-CT: yamls/).
VIT = (
    *((257, 16, 80), (197, 16, 80), (197, 16, 64), (197, 12, 64)),
    *((65, 16, 80), (50, 16, 80), (50, 16, 64)),
    *((257, 16, 32), (197, 16, 32)),
)
# (B, N, H, D): the ViTs of VISION_SHAPES in xformers/benchmarks/benchmark_mem_eff_attention.py.
VISION = (
    *((384, 197, 1, 88), (384, 197, 1, 80), (384, 197, 1, 64)),
    *((1024, 197, 1, 88), (1024, 197, 1, 80), (1024, 197, 1, 64)),
    *((512, 197, 1, 80), (32, 197, 16, 80), (32, 197, 16, 64), (32, 197, 16, 128)),
    *((256, 197, 1, 88), (16, 197, 16, 88), (16, 197, 16, 64), (16, 197, 16, 128)),
    *((1024, 82, 8, 64), (150, 256, 16, 64), (64, 256, 12, 64)),
)
# One token, around tile borders, and with head dimensions that are no power of two.
ODD = ((1, 2, 16), (50, 2, 64), (65, 2, 80), (127, 2, 96), (129, 1, 72), (197, 2, 32), (257, 2, 80))


def _sizes(B: int, N: int, H: int, D: int) -> Sizes:
    return {"B": B, "H": H, "N": N, "D": D}


@dataclass(frozen=True, slots=True)
class Inputs:
    qkv: Tensor
    """[B, N, 3, H, D]."""
    do: Tensor
    """[B, N, H, D]."""

    @property
    def judged(self) -> Tensor:
        """Samples that the gate looks at."""
        B, N, _, H, _ = self.qkv.shape
        return judged_samples(B, H * N**2, self.qkv.device)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Inputs:
    B, H, N, D = (sizes[letter] for letter in "BHND")
    qkv = random_qkv(B, N, heads=H, dim=D, dtype=dtype, device=device)
    do = random_qkv(B, N, heads=H, dim=D, dtype=dtype, device=device, seed=1)[:, :, 0]
    return Inputs(qkv, do.contiguous())


def _definition(x: Inputs, mode: str, dtype: torch.dtype) -> Outputs:
    part = Inputs(x.qkv[x.judged].to(dtype), x.do[x.judged].to(dtype))
    return _differentiate(part, mode, _eager)()


def _check(x: Inputs, found: Outputs, eager: Outputs, truth: Outputs) -> None:
    check_budget({name: value[x.judged] for name, value in found.items()}, eager, truth)


def _num_bytes(sizes: Sizes, mode: str, itemsize: int) -> int:
    # Forward: q, k, v, o. Backward: q, k, v, do, dq, dk, dv, with delta formed on the way.
    tensors = {"fwd": 4, "bwd": 7, "full": 11}[mode]
    return tensors * itemsize * sizes["B"] * sizes["N"] * sizes["H"] * sizes["D"]


def _num_flops(sizes: Sizes, mode: str) -> int:
    # Forward two products of N x N x D, backward five.
    products = {"fwd": 2, "bwd": 5, "full": 7}[mode]
    return 2 * products * sizes["B"] * sizes["H"] * sizes["N"] ** 2 * sizes["D"]


OP: Op[Inputs] = Op(
    name="masked_attention",
    letters="BHND",
    modes=("fwd", "bwd", "full"),
    sizes={
        "cuda": tuple(_sizes(512, *shape) for shape in VIT),
        "cpu": tuple(_sizes(8, *shape) for shape in VIT),
        "vision": tuple(_sizes(*shape) for shape in VISION),
        "check": tuple(_sizes(3, *shape) for shape in ODD),
        "quick": (_sizes(4, 50, 16, 64), _sizes(4, 197, 12, 64)),
    },
    inputs=_inputs,
    definition=_definition,
    check=_check,
    num_bytes=_num_bytes,
    num_flops=_num_flops,
)


def _differentiate(x: Inputs, mode: str, forward: Callable[[Tensor], Tensor]) -> Call:
    """The call of a mode, for an attention that autograd knows."""
    if mode == "fwd":

        def fwd() -> Outputs:
            with torch.no_grad():
                return {"o": forward(x.qkv)}

        return fwd
    leaf = x.qkv.detach().requires_grad_()
    if mode == "bwd":
        o = forward(leaf)

        def bwd() -> Outputs:
            return {"dqkv": torch.autograd.grad(o, leaf, x.do, retain_graph=True)[0]}

        return bwd

    def full() -> Outputs:
        o = forward(leaf)
        return {"o": o.detach(), "dqkv": torch.autograd.grad(o, leaf, x.do)[0]}

    return full


def _heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [B, H, N, D] views."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _eager(qkv: Tensor) -> Tensor:
    q, k, v = _heads_first(qkv)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    o: Tensor = (weights @ v).transpose(1, 2)
    return o


@OP.provider(OURS)
def ours(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, masked_attention)


@OP.provider(f"{OURS} Gluon")
def gluon(x: Inputs, mode: str) -> Call:
    """The warp-specialised kernels, which "auto" takes once rows of this say that it should."""
    if reason := gluon_obstacle((None,) * 5, 1.0, *x.qkv.unbind(2)):
        raise UnavailableError(reason)
    return _differentiate(x, mode, partial(masked_attention, backend="gluon"))


@OP.provider(EAGER)
def eager(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _eager)


@OP.provider("official")
def official(x: Inputs, mode: str) -> Call:
    """FlashAttention 1 on half precision, else what timm had (models/modules/)."""
    if x.qkv.dtype in (torch.float16, torch.bfloat16):
        module = import_peer("flash_attn.flash_attention")
        attend = module.FlashAttention(softmax_scale=x.qkv.shape[-1] ** -0.5)
        return _differentiate(x, mode, lambda qkv: attend(qkv)[0])

    def forward(qkv: Tensor) -> Tensor:
        B, N, _, H, D = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * D**-0.5).softmax(dim=-1)
        # The copy to [B, N, C] is what its projection reads.
        o: Tensor = (weights @ v).transpose(1, 2).reshape(B, N, H * D).view(B, N, H, D)
        return o

    return _differentiate(x, mode, forward)


@OP.provider("torch.compile")
def compiled(x: Inputs, mode: str) -> Call:
    return _differentiate(x, mode, _compile_eager())


@cache
def _compile_eager() -> Callable[[Tensor], Tensor]:
    return compile_peer(_eager)


def _sdpa(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*_heads_first(qkv)).transpose(1, 2)


@OP.provider("SDPA")
def sdpa(x: Inputs, mode: str) -> Call:
    """Whichever backend torch takes."""
    return _differentiate(x, mode, _sdpa)


def _pin(backend: SDPBackend) -> Callable[[Inputs, str], Call]:
    def make(x: Inputs, mode: str) -> Call:
        def forward(qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return _sdpa(qkv)

        if not x.qkv.is_cuda and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise UnavailableError("needs CUDA")
        return _differentiate(x, mode, forward)

    return make


OP.provider("SDPA flash")(_pin(SDPBackend.FLASH_ATTENTION))
OP.provider("SDPA efficient")(_pin(SDPBackend.EFFICIENT_ATTENTION))
OP.provider("SDPA cuDNN")(_pin(SDPBackend.CUDNN_ATTENTION))
OP.provider("SDPA math")(_pin(SDPBackend.MATH))


@OP.provider("FlexAttention")
def flex(x: Inputs, mode: str) -> Call:
    if mode != "fwd" and not x.qkv.is_cuda:
        raise UnavailableError("no backward on a CPU")
    attend = _compile_flex()
    return _differentiate(x, mode, lambda qkv: attend(*_heads_first(qkv)).transpose(1, 2))


@cache
def _compile_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return compile_peer(flex_attention)


@OP.provider("xformers")
def xformers(x: Inputs, mode: str) -> Call:
    if not x.qkv.is_cuda:
        raise UnavailableError("needs CUDA")
    ops = import_peer("xformers.ops")
    return _differentiate(
        x, mode, lambda qkv: ops.memory_efficient_attention(*ops.unbind(qkv, dim=2))
    )


@OP.provider("flash-attn")
def flash_attn(x: Inputs, mode: str) -> Call:
    if not x.qkv.is_cuda:
        raise UnavailableError("needs CUDA")
    return _differentiate(x, mode, import_peer("flash_attn").flash_attn_qkvpacked_func)
