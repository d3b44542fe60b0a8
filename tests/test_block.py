"""timm's block against its fused form, which the CPU reaches where a test says that it pays."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from maect_fast import block as block_module
from maect_fast.block import FusedBlock, Stream, normed, run_blocks
from maect_fast.config import EncoderConfig
from maect_fast.kernels._common import gpu
from maect_fast.models.encoder import Encoder
from maect_fast.nn import fuse, unfuse, why_not
from maect_fast.testing import assert_within_budget

FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
B, N, C, H = 2, 5, 32, 2


@pytest.fixture(params=["definitions", "interpreted"])
def reached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks take the fused path on a CPU, by the ops' definitions or by their kernels."""
    monkeypatch.setattr(block_module, "_place_obstacle", lambda x, dtype: None)
    if request.param == "interpreted":
        pytest.importorskip("triton")
        monkeypatch.setattr(gpu, "is_gpu", lambda x: True)
    return str(request.param)


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_module, "_place_obstacle", lambda x, dtype: None)


def make(**options: Any) -> Any:
    """A block of timm's in which no parameter is what it starts as."""
    block = Block(C, H, **{"qkv_bias": True, **options})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return block


def advances(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes the fused path's calls: whether the last bias was kept."""
    seen: list[bool] = []
    advance = FusedBlock.advance

    def noted(self: FusedBlock, stream: Stream, *, keeps_bias: bool) -> Stream:
        seen.append(keeps_bias)
        return advance(self, stream, keeps_bias=keeps_bias)

    monkeypatch.setattr(FusedBlock, "advance", noted)
    return seen


def run(model: Callable[[Tensor], Tensor], x: Tensor, parameters: Any) -> dict[str, Tensor]:
    """The result, and the gradients of x and of all parameters that have one."""
    x = x.detach().requires_grad_(x.is_floating_point())
    wanted = {"dx": x} | {f"d {name}": p for name, p in parameters if p.requires_grad}
    out = model(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(wanted.values()), upstream)
    return {"out": out.detach()} | dict(zip(wanted, grads, strict=True))


def double(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


# Dtypes of modules, tokens and autocast.
MODES: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]] = {
    "fp32": (FP32, FP32, None),
    "half modules": (FP16, FP16, None),
    "autocast, fp32 stream": (FP32, FP32, FP16),
    "autocast, half stream": (FP32, FP16, FP16),
}


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"proj_bias": False}], ids=str)
def test_equals_timms_block(
    mode: str, options: dict[str, Any], reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, tokens, mixed = MODES[mode]
    block = make(**options).to(modules)
    x = torch.randn(B, N, C).to(tokens)
    twin = double(block)
    exact = run(twin, x.double(), twin.named_parameters())
    with autocast(mixed):
        eager = run(block, x, block.named_parameters())
        fuse(nn.Sequential(block))
        seen = advances(monkeypatch)
        found = run(block, x, block.named_parameters())
    assert seen == [False]
    assert len(found) == 2 + len(list(block.parameters()))
    for name, value in found.items():
        assert_within_budget(value, eager[name].to(value.dtype), exact[name], name=name)
