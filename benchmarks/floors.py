"""What this device can do at best: memory bandwidth and matrix rate, measured with random data."""

from functools import cache, partial

import torch
import torch.nn.functional as F

from maect_fast.benchmarks.registry import Call
from maect_fast.benchmarks.timing import measure

__all__ = ["bandwidth", "bandwidth_name", "matrix_rate"]

# Many times the last-level cache, so that memory is measured.
STREAM_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
# Large enough for the library's best tiles, small enough for a second of CPU time.
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
# The best counts: a machine that is shared with others can be slow for seconds.
REPEATS = 3


def bandwidth_name(device: torch.device) -> str:
    """How bandwidth is measured: a copy on a GPU; on a CPU a triad, as STREAM does."""
    return "copy" if device.type == "cuda" else "triad"


@cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written ones counted, of ``a = b`` or, on a CPU, ``a = b + s c``.

    The triad counts three arrays, as STREAM counts it.
    """
    size = STREAM_BYTES[device.type] // 4
    b, c = torch.randn(2, size, device=device).unbind()
    a = torch.empty_like(b)
    if device.type == "cuda":
        return 2 * 4 * size / _seconds(lambda: {"a": a.copy_(b)}, device)
    return 3 * 4 * size / _seconds(lambda: {"a": torch.add(b, c, alpha=3.0, out=a)}, device)


@cache
def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of a square matrix product in `dtype`, by the faster of torch's libraries."""
    side = GEMM_SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    a, b = (draw(side, side).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    seconds = _seconds(lambda: {"out": torch.mm(a, b, out=out)}, device)
    if device.type == "cpu" and dtype == torch.float32 and _has_onednn():
        # MKL, behind torch.mm, leaves half of the fp32 rate of an AMD CPU to oneDNN.
        x, weight = a.to_mkldnn(), b.to_mkldnn()
        seconds = min(seconds, _seconds(lambda: {"out": F.linear(x, weight)}, device))
    return 2 * side**3 / seconds


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _seconds(call: Call, device: torch.device) -> float:
    """The best median."""
    return min(measure({"": call}, device)[""].p50_ms for _ in range(REPEATS)) / 1e3
