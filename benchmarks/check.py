"""Is every op right on this device? Each against its definition in fp64, in seconds."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from maect_fast.benchmarks.machine_code.cli import registered
from maect_fast.benchmarks.ops import OPS
from maect_fast.benchmarks.registry import OURS, Op, Outputs, Sizes, check_budget
from maect_fast.benchmarks.run import dtype_name, first_line, gate
from maect_fast.kernels import attention, masked_attention
from maect_fast.kernels._common.backend import Backend
from maect_fast.testing import random_qkv

__all__ = ["check", "launch_sizes"]

REMEDY = (
    'pass backend="reference" to the op, which is slower and right, and report this line with '
    "what `maect-fast doctor` prints"
)
# Tokens of masked samples: one, and those of MAE's encoder and of the whole ViT.
MASKED_N = (1, 50, 197)

Results = list[tuple[str, str | None]]
"""Cases and what is wrong with them."""


def check(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Run every op in every mode, forward and backward, at odd sizes.

    On a GPU also at the sizes of every launch row that it would use.

    Yields:
        One line per op and dtype, and whether all was right; what is wrong comes with the remedy.
    """
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        for op in OPS.values():
            yield _verdict(op.name, dtype, _plain(op, dtype, device))
        masked = [result for N in MASKED_N for result in _masked(3, N, dtype, device)]
        yield _verdict("masked_attention, masked", dtype, masked)


def _verdict(name: str, dtype: torch.dtype, results: Results) -> tuple[str, bool]:
    head = f"{name:<24} {dtype_name(dtype)}"
    faults = [f"{case}: {fault}" for case, fault in results if fault is not None]
    if not faults:
        return f"{head}  {len(results)} cases right", True
    more = f" (and {len(faults) - 1} more of {len(results)} cases)" if len(faults) > 1 else ""
    return f"{head}  {faults[0]}{more}; {REMEDY}", False


def _plain(op: Op[Any], dtype: torch.dtype, device: torch.device) -> Results:
    """The op as the benchmarks call it."""
    results: Results = []
    for sizes in (*op.sizes["check"], *launch_sizes(op.name, device)):
        x = op.inputs(sizes, dtype, device)
        shape = " ".join(f"{letter}{size}" for letter, size in sizes.items())
        for mode in op.modes:
            _, reasons = gate(op, x, mode, dtype, [OURS])
            results.append((f"{shape} {mode}", reasons.get(OURS)))
    return results


def launch_sizes(name: str, device: torch.device) -> list[Sizes]:
    """Example sizes of the op's launch rows for this device."""
    module = f"maect_fast.kernels.{name}.triton_kernel"
    if device.type != "cuda" or module not in registered():
        return []
    major, minor = torch.cuda.get_device_capability(device)
    launches = importlib.import_module(module).machine_code(10 * major + minor)
    # Rows of several kernels, forward and backward, share their sizes.
    return list({str(launch.row.sizes): launch.row.sizes for launch in launches}.values())


Attend = Callable[[Tensor, Backend], Tensor]


def _masked(B: int, N: int, dtype: torch.dtype, device: torch.device) -> Results:
    """Attention with tokens left out."""
    qkv = random_qkv(B, N, heads=2, dim=64, dtype=dtype, device=device)
    results: Results = []
    for name, attend in _maskings(B, N, device).items():
        case = f"B{B} N{N} {name}"
        try:
            found = _differentiate(attend, qkv, "auto")
            eager = _differentiate(attend, qkv, "reference")
            check_budget(found, eager, _differentiate(attend, qkv.double(), "reference"))
            results.append((case, None))
        except (AssertionError, RuntimeError) as error:
            results.append((case, first_line(error)))
    return results


def _maskings(B: int, N: int, device: torch.device) -> dict[str, Attend]:
    """Every way to leave tokens out, on qkv [B, N, 3, H, D]."""
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(B, N, generator=generator).argsort(dim=1)[:, : -(-N // 4)].to(device)
    seqlens = torch.randint(N + 1, (B,), generator=generator).to(device)
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=device) * N
    key_mask = (torch.rand(B, N, generator=generator) < 0.5).to(device)
    # A sample without a key: zeros, not NaN.
    key_mask[0] = False
    return {
        "keep": lambda qkv, backend: masked_attention(qkv, keep=keep, backend=backend),
        "seqlens": lambda qkv, backend: masked_attention(qkv, seqlens=seqlens, backend=backend),
        "cu_seqlens": lambda qkv, backend: masked_attention(
            qkv.flatten(0, 1), cu_seqlens=cu_seqlens, max_seqlen=N, backend=backend
        ),
        "key_mask": lambda qkv, backend: masked_attention(qkv, key_mask=key_mask, backend=backend),
        "class token": lambda qkv, backend: attention(
            qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2], backend=backend
        ),
    }


def _differentiate(attend: Attend, qkv: Tensor, backend: Backend) -> Outputs:
    leaf = qkv.detach().requires_grad_()
    o = attend(leaf, backend)
    # Some cotangent that differs from row to row.
    do = torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype)
    return {"o": o.detach(), "dqkv": torch.autograd.grad(o, leaf, do)[0]}
