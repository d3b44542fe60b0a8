"""What an op launches: a profile of one shape per mode, as a table and a Chrome trace."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from maect_fast.benchmarks.registry import OURS, Op, Sizes
from maect_fast.benchmarks.run import gate

__all__ = ["trace_op"]

CALLS = 5


def trace_op(
    op: Op[Any], sizes: Sizes, dtype: torch.dtype, device: torch.device, *, out: Path
) -> str:
    """Profile our own op; write `out/<op>_<mode>.json.gz`, a Chrome trace, per mode.

    Returns:
        Per mode the operators (on a GPU the kernels) that take the most time.

    Raises:
        ValueError: the op fails its gate.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    x = op.inputs(sizes, dtype, device)
    out.mkdir(parents=True, exist_ok=True)
    tables = []
    for mode in op.modes:
        calls, reasons = gate(op, x, mode, dtype, [OURS])
        if OURS in reasons:
            raise ValueError(f"{op.name} {mode}: {reasons[OURS]}")
        with profile(activities=activities, acc_events=True) as recorded:
            for _ in range(CALLS):
                calls[OURS]()
        path = out / f"{op.name}_{mode}.json.gz"
        recorded.export_chrome_trace(str(path))
        averages = recorded.key_averages()
        table = averages.table(sort_by=f"self_{device.type}_time_total", row_limit=8)
        tables.append(f"{path}\n{table}")
    return "\n".join(tables)
