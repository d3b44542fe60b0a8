"""Is every op right on this device? Each against its definition in fp64, in seconds."""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maect_fast.benchmarks.machine_code.cli import launches_for, registered
from maect_fast.benchmarks.ops import OPS
from maect_fast.benchmarks.registry import OURS, Op, Outputs, Sizes, check_budget
from maect_fast.benchmarks.run import dtype_name, first_line, gate
from maect_fast.benchmarks.warm import compile_ahead
from maect_fast.kernels import attention, masked_attention
from maect_fast.kernels._common.backend import Backend
from maect_fast.kernels.masked_attention.op import gluon_obstacle
from maect_fast.testing import random_qkv

__all__ = ["check", "launch_sizes", "own_call"]

REMEDY = (
    'pass backend="reference" to the op, which is slower and right, and report this line with '
    "what `maect-fast doctor` prints"
)
# Tokens of masked samples: one, and those of MAE's encoder and of the whole ViT.
MASKED_N = (1, 50, 197)
GLUON_N = (*MASKED_N, 257)

Results = list[tuple[str, str | None]]
"""Cases and what is wrong with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing that is to be right."""

    name: str
    call: Callable[[], object]
    """What the op does, for the compiler."""
    judge: Callable[[], str | None]
    """Does it again and compares; says what is wrong."""


def check(
    device: torch.device,
    names: Collection[str] = tuple(OPS),
    tell: Callable[[str], None] = print,
) -> Iterator[tuple[str, bool]]:
    """Run ops in every mode, forward and backward, at odd sizes.

    On a GPU also at the sizes of every launch row that it would use, after all kernels have been
    compiled in parallel. Every sample is judged at the odd sizes; see `judged_samples`.

    Args:
        device: where the ops run.
        names: of the ops.
        tell: gets lines of progress.

    Yields:
        One line per op and dtype, and whether all was right; what is wrong comes with the remedy.
    """
    plan = list(_plan(device, names))
    compile_ahead((case.call for _, _, cases in plan for case in cases), device, tell)
    for name, dtype, cases in plan:
        began = time.monotonic()
        results = [(case.name, case.judge()) for case in cases]
        yield _verdict(name, dtype, results, time.monotonic() - began)


def _plan(
    device: torch.device, names: Collection[str]
) -> Iterator[tuple[str, torch.dtype, list[Case]]]:
    """What each line is about."""
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.float16, torch.bfloat16]
    for dtype in dtypes:
        is_half = dtype == torch.float16
        for op in map(OPS.__getitem__, names):
            # The last mode has both directions, or search and pick. fp16 has the kernels of bf16,
            # and every case compiles its own.
            modes = op.modes[-1:] if is_half else op.modes
            cases = [(sizes, mode) for sizes in op.sizes["check"] for mode in modes]
            if not is_half:
                cases += [(sizes, op.modes[-1]) for sizes in launch_sizes(op, device)]
            yield op.name, dtype, [_plain(op, *case, dtype, device) for case in cases]
        if "masked_attention" in names:
            masked = [case for N in MASKED_N for case in _masked(3, N, dtype, device)]
            yield "masked_attention, masked", dtype, masked
    some_qkv = torch.empty(1, 1, 3, 1, 64, dtype=torch.bfloat16, device=device)
    if (
        "masked_attention" in names
        and gluon_obstacle((None,) * 5, 1.0, *some_qkv.unbind(2)) is None
    ):
        # Last: no GPU has run it, and a wrong barrier would hang.
        gluon = [x for N in GLUON_N for x in _masked(3, N, some_qkv.dtype, device, "gluon")]
        yield "masked_attention, gluon", some_qkv.dtype, gluon


def _verdict(name: str, dtype: torch.dtype, results: Results, seconds: float) -> tuple[str, bool]:
    head = f"{name:<24} {dtype_name(dtype)}"
    faults = [f"{case}: {fault}" for case, fault in results if fault is not None]
    if not faults:
        return f"{head}  {len(results)} cases right, {seconds:.1f} s", True
    more = f" (and {len(faults) - 1} more of {len(results)} cases)" if len(faults) > 1 else ""
    return f"{head}  {faults[0]}{more}; {REMEDY}", False


def _plain(op: Op[Any], sizes: Sizes, mode: str, dtype: torch.dtype, device: torch.device) -> Case:
    """The op as the benchmarks call it; inputs are made anew each time, so that none waits."""

    def judge() -> str | None:
        return gate(op, op.inputs(sizes, dtype, device), mode, dtype, [OURS])[1].get(OURS)

    shape = " ".join(f"{letter}{size}" for letter, size in sizes.items())
    return Case(name=f"{shape} {mode}", call=own_call(op, sizes, mode, dtype, device), judge=judge)


def own_call(
    op: Op[Any], sizes: Sizes, mode: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Our own call, its inputs included."""
    return lambda: op.providers[OURS].make(op.inputs(sizes, dtype, device), mode)()


def launch_sizes(op: Op[Any], device: torch.device) -> list[Sizes]:
    """Example sizes of the op's launch rows for this device, in the op's own letters.

    Rows of helpers, which state some of the letters, are launched beside those that state all.
    """
    module = f"maect_fast.kernels.{op.name}.triton_kernel"
    if device.type != "cuda" or module not in registered():
        return []
    major, minor = torch.cuda.get_device_capability(device)
    found: dict[tuple[int, ...], Sizes] = {}
    for launch in launches_for(10 * major + minor, module):
        row = {op.row_letters.get(letter, letter): n for letter, n in launch.row.sizes.items()}
        if row.keys() >= set(op.letters):
            # Rows of several kernels, forward and backward, share their sizes.
            sizes = {letter: row[letter] for letter in op.letters}
            found[tuple(sizes.values())] = sizes
    return list(found.values())


Attend = Callable[[Tensor, Backend], Tensor]


def _masked(
    B: int, N: int, dtype: torch.dtype, device: torch.device, backend: Backend = "auto"
) -> Iterator[Case]:
    """Attention with tokens left out, and with none."""
    make = partial(random_qkv, B, N, heads=2, dim=64, dtype=dtype, device=device)

    def judge(attend: Attend) -> str | None:
        qkv = make()
        try:
            found = _differentiate(attend, qkv, backend)
            eager = _differentiate(attend, qkv, "reference")
            check_budget(found, eager, _differentiate(attend, qkv.double(), "reference"))
        except (AssertionError, RuntimeError) as error:
            return first_line(error)
        return None

    for name, attend in _maskings(B, N, device).items():
        yield Case(
            name=f"B{B} N{N} {name}",
            call=lambda attend=attend: _differentiate(attend, make(), backend),  # type: ignore[misc]
            judge=partial(judge, attend),
        )


def _maskings(B: int, N: int, device: torch.device) -> dict[str, Attend]:
    """Every way to leave tokens out, on qkv [B, N, 3, H, D]."""
    generator = torch.Generator(device).manual_seed(3)
    rand = partial(torch.rand, generator=generator, device=device)
    keep = rand(B, N).argsort(dim=1)[:, : -(-N // 4)]
    seqlens = torch.randint(N + 1, (B,), generator=generator, device=device)
    cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=device) * N
    key_mask = rand(B, N) < 0.5
    # A sample without a key: zeros, not NaN.
    key_mask[0] = False
    return {
        "dense": lambda qkv, backend: masked_attention(qkv, backend=backend),
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
