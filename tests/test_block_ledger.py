"""What a block reads, writes, launches, saves and multiplies, counted on meta tensors.

u is one half tensor of M x C, tokens times width. `python tests/test_block_ledger.py` prints it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from maect_fast import block as block_module
from maect_fast.block import Stream, run_blocks
from maect_fast.nn import fuse

BF16, FP32 = torch.bfloat16, torch.float32
# ViT-L/16, 256 images.
B, N, C, H = 256, 197, 1024, 16
M = B * N
U = 2 * M * C

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
PRODUCTS = ("mm", "addmm", "int8_linear")
# All weights of a chain in one call: of a block 12 C^2 numbers of 4 bytes to 2, beside biases.
CASTS, CAST = "_foreach_copy_", 12 * C**2 * (4 + 2) / U
ATTENTION = ("masked_attention_fwd", "masked_attention_bwd")
# Kernels behind an op of ours that reaches the dispatcher once; the sum of parts is one more.
LAUNCHES = {"residual_norm_bwd": 2, "gelu_bwd": 2}


@dataclass
class Counted:
    """Of one direction of one block."""

    launches: int = 0
    num_bytes: int = 0
    """Of M rows or more, read or written beside products and attention."""
    small_bytes: int = 0
    """Statistics, parameters and their gradients."""
    cast_bytes: int = 0
    """Of weights read, and written in the dtype of products."""
    wide: list[str] = field(default_factory=list)
    """Ops that read or write an fp32 tensor of M x C or more."""
    names: list[str] = field(default_factory=list)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as a GPU would run it: views and allocations launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in ALLOCATIONS:
            return out
        counted = self.counted
        counted.launches += LAUNCHES.get(name, 1)
        counted.names.append(name)
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        for x in tensors:
            if x.numel() >= M * C and x.dtype == FP32:
                counted.wide.append(name)
            if name in PRODUCTS or name in ATTENTION:
                continue
            if name == CASTS:
                counted.cast_bytes += x.nbytes
            elif x.numel() >= M * C:
                counted.num_bytes += x.nbytes
            else:
                counted.small_bytes += x.nbytes
        return out


@contextmanager
def on_a_gpu(autocast: torch.dtype | None) -> Iterator[None]:
    """Meta tensors take what tensors on a GPU do."""
    with (
        mock.patch.object(block_module, "is_gpu", return_value=True),
        mock.patch.object(block_module, "_autocast_dtype", return_value=autocast),
    ):
        yield


@dataclass
class Run:
    """Of a chain of blocks."""

    forward: Counted
    backward: Counted
    saved: dict[int, int]
    """Bytes by storage."""
    flops: tuple[int, int]
    """Of matrix products, forward and backward."""


def run(
    num_blocks: int,
    *,
    stream: torch.dtype,
    weights: torch.dtype,
    trains: bool,
    int8: bool = False,
) -> Run:
    blocks = [Block(C, H, qkv_bias=True, device="meta", dtype=weights) for _ in range(num_blocks)]
    chain: Any = fuse(nn.Sequential(*blocks)).requires_grad_(trains)
    for block in chain:
        block.is_int8 = int8
    x = torch.empty(B, N, C, dtype=stream, device="meta", requires_grad=trains)
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.numel() >= M * C:
            storage = x.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
        return x

    with on_a_gpu(BF16 if weights == FP32 else None):
        if int8:
            # Weights are quantized here, once for each of their values.
            run_blocks(chain, Stream(x))
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            FlopCounterMode(display=False) as flops,
            Ledger() as forward,
        ):
            r, branch, _ = run_blocks(chain, Stream(x))
        products = [products_of(flops)]
        assert branch is not None
        with FlopCounterMode(display=False) as flops, Ledger() as backward:
            if trains:
                upstream = [torch.empty_like(x) for x in (r, branch)]
                torch.autograd.backward([r, branch], upstream)
        products.append(products_of(flops))
    assert all((p.grad is not None) == trains for p in chain.parameters() if p is not last(chain))
    return Run(forward.counted, backward.counted, saved, (products[0], products[1]))


def last(chain: Any) -> Tensor:
    """The bias that is still to be added, which the next norm's backward gives a gradient."""
    bias: Tensor = chain[-1].mlp.fc2.bias
    return bias


def products_of(flops: FlopCounterMode) -> int:
    """Without attention's, which are of N^2."""
    found = flops.get_flop_counts().get("Global", {})
    return sum(n for op, n in found.items() if "attention" not in str(op))


@dataclass
class PerBlock:
    """What one block more costs."""

    launches: tuple[int, int]
    traffic: tuple[float, float]
    """In u."""
    small: tuple[float, float]
    cast: float
    saved: float
    flops: tuple[float, float]
    """In M C^2."""
    wide: int
    """Operands of M x C or more in fp32."""


def per_block(
    *, stream: torch.dtype, weights: torch.dtype, trains: bool, int8: bool = False
) -> PerBlock:
    """Chains of three and of two blocks, less one another: the middle of any chain."""
    two, three = (run(n, stream=stream, weights=weights, trains=trains, int8=int8) for n in (2, 3))

    def both(name: str, unit: int) -> Any:
        pairs = ((two.forward, three.forward), (two.backward, three.backward))
        found = ((getattr(more, name) - getattr(less, name)) / unit for less, more in pairs)
        return tuple(found)

    launches = both("launches", 1)
    return PerBlock(
        launches=(int(launches[0]), int(launches[1])),
        traffic=both("num_bytes", U),
        small=both("small_bytes", U),
        cast=both("cast_bytes", U)[0],
        saved=(sum(three.saved.values()) - sum(two.saved.values())) / U,
        flops=tuple((b - a) / (M * C**2) for a, b in zip(two.flops, three.flops, strict=True)),  # type: ignore[arg-type]
        wide=sum(len(x.wide) for x in (three.forward, three.backward)),
    )


@pytest.mark.parametrize("weights", [BF16, FP32], ids=["half modules", "autocast"])
def test_a_tuned_block_with_a_half_stream(weights: torch.dtype) -> None:
    found = per_block(stream=BF16, weights=weights, trains=True)
    # 16 u and 29 u are norms, GELU and the qkv bias's sum; 10 u two streams, qkv, o and h.
    assert found.traffic == (16, 29)
    assert max(found.small) < 0.25
    assert found.cast == pytest.approx(CAST if weights == FP32 else 0, rel=1e-3)
    assert found.saved == 10
    assert found.wide == 0
    assert found.launches[0] == 8
    assert found.launches[1] <= 20
    assert found.flops == (24, 48)


def test_a_tuned_block_with_an_fp32_stream() -> None:
    """As the recipes have it: each stream read or written is twice the bytes."""
    found = per_block(stream=FP32, weights=FP32, trains=True)
    assert found.traffic == (20, 41)
    assert found.saved == 12
    assert found.launches[0] == 8
    assert found.launches[1] <= 20
    assert found.flops == (24, 48)


@pytest.mark.parametrize("stream", [BF16, FP32], ids=str)
def test_a_frozen_block(stream: torch.dtype) -> None:
    found = per_block(stream=stream, weights=FP32, trains=False)
    assert found.launches == (8, 0)
    assert found.traffic[0] == (16 if stream == BF16 else 20)
    assert found.saved == 0
    assert found.cast == pytest.approx(CAST, rel=1e-3)
    assert found.flops == (24, 0)


@pytest.mark.parametrize("stream", [BF16, FP32], ids=str)
def test_a_frozen_block_in_int8(stream: torch.dtype) -> None:
    """Norms write half, GELU 2 u instead of 4; what products read is half as well, not counted."""
    found = per_block(stream=stream, weights=FP32, trains=False, int8=True)
    assert found.launches == (8, 0)
    assert found.traffic[0] == (13 if stream == BF16 else 17)
    assert max(found.small) < 0.05
    assert found.saved == 0
    assert found.flops == (24, 0)


def main() -> None:
    cases = {
        "tuned, half modules": {"stream": BF16, "weights": BF16, "trains": True},
        "tuned, autocast, bf16 stream": {"stream": BF16, "weights": FP32, "trains": True},
        "tuned, autocast, fp32 stream": {"stream": FP32, "weights": FP32, "trains": True},
        "frozen, autocast, bf16 stream": {"stream": BF16, "weights": FP32, "trains": False},
        "frozen, autocast, fp32 stream": {"stream": FP32, "weights": FP32, "trains": False},
        "frozen, int8, bf16 stream": {
            "stream": BF16,
            "weights": FP32,
            "trains": False,
            "int8": True,
        },
        "frozen, int8, fp32 stream": {
            "stream": FP32,
            "weights": FP32,
            "trains": False,
            "int8": True,
        },
    }
    head = (
        "per block of ViT-L/16",
        "launches",
        "traffic, u",
        "beside, u",
        "casts, u",
        "saved, u",
        "M C^2",
    )
    lines = [f"{head[0]:30}" + "".join(f"{cell:>16}" for cell in head[1:])]
    for name, case in cases.items():
        x = per_block(**case)  # type: ignore[arg-type]
        small = tuple(round(s, 3) for s in x.small)
        pairs = (x.launches, x.traffic, small, round(x.cast, 3), x.saved, x.flops)
        cells = (f"{p[0]:g} + {p[1]:g}" if isinstance(p, tuple) else f"{p:g}" for p in pairs)
        lines.append(f"{name:30}" + "".join(f"{cell:>16}" for cell in cells))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
