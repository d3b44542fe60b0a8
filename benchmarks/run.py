"""Measure ops: inputs, gate, timing, one row per provider."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from maect_fast.benchmarks import floors
from maect_fast.benchmarks.registry import Call, Op, Sizes, UnavailableError
from maect_fast.benchmarks.results import Row, environment_columns
from maect_fast.benchmarks.timing import Timing, measure

__all__ = ["dtype_name", "first_line", "floor_rows", "gate", "measure_op"]


def gate(
    op: Op[Any], x: Any, mode: str, dtype: torch.dtype, providers: Sequence[str]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Set the providers up and check their outputs.

    Returns:
        The calls of those that may be timed, and for each of the others the reason, one line.
    """
    eager, truth = op.definition(x, mode, dtype), op.definition(x, mode, torch.float64)
    calls, reasons = {}, {}
    for name in providers:
        try:
            call = op.providers[name].make(x, mode)
            op.check(x, call(), eager, truth)
            calls[name] = call
        except UnavailableError as unavailable:
            reasons[name] = str(unavailable)
        except AssertionError as error:
            reasons[name] = f"wrong: {first_line(error)}"
        # A peer may raise whatever it likes.
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {first_line(error)}"
    return calls, reasons


def measure_op(
    op: Op[Any],
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    *,
    modes: Sequence[str],
    providers: Sequence[str],
) -> Iterator[Row]:
    """Rows of one shape; those of a mode come together, when all its providers have been timed."""
    # A compiled peer is to be compiled for this shape alone.
    torch._dynamo.reset()
    x = op.inputs(sizes, dtype, device)
    environment = environment_columns(device)
    for mode in modes:
        calls, reasons = gate(op, x, mode, dtype, providers)
        capturable = frozenset(name for name in calls if op.providers[name].capturable)
        timings = measure(calls, device, capturable)
        num_bytes, num_flops = op.num_bytes(sizes, mode, dtype.itemsize), op.num_flops(sizes, mode)
        by_bytes = 1e3 * num_bytes / floors.bandwidth(device)
        rate = floors.matrix_rate(dtype, device)
        if op.products_dtype is not None:
            rate = max(rate, floors.matrix_rate(op.products_dtype, device))
        by_flops = 1e3 * num_flops / rate
        for name in providers:
            columns: dict[str, Any] = {**sizes, **environment, "reason": reasons.get(name, "")}
            if name in timings:
                columns |= _columns(timings[name], num_bytes, num_flops)
            yield Row(
                op=op.name,
                provider=name,
                mode=mode,
                dtype=dtype_name(dtype),
                floor_ms=max(by_bytes, by_flops),
                floor_kind="bytes" if by_bytes > by_flops else "FLOPs",
                **columns,
            )


def floor_rows(dtypes: Sequence[torch.dtype], device: torch.device) -> list[Row]:
    """What this device can do at best, measured in this process."""
    environment = environment_columns(device)
    gbps = floors.bandwidth(device) / 1e9
    rows = [Row(op="floors", provider=floors.bandwidth_name(device), gbps=gbps, **environment)]
    for dtype in dtypes:
        tflops = floors.matrix_rate(dtype, device) / 1e12
        name = dtype_name(dtype)
        rows.append(Row(op="floors", provider="GEMM", dtype=name, tflops=tflops, **environment))
    return rows


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16, fp16: as everyone calls them."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _columns(timing: Timing, num_bytes: int, num_flops: int) -> dict[str, float | None]:
    seconds = timing.p50_ms / 1e3
    return {
        "p20_ms": timing.p20_ms,
        "p50_ms": timing.p50_ms,
        "p80_ms": timing.p80_ms,
        "graph_ms": timing.graph_ms,
        "peak_mib": timing.peak_mib,
        "gbps": num_bytes / seconds / 1e9,
        "tflops": num_flops / seconds / 1e12,
    }


def first_line(error: BaseException) -> str:
    """An error's message as far as a line of a report holds it."""
    return str(error).strip().partition("\n")[0]
