"""Timing and rows: turns, percentiles, memory, floors, reasons."""

import sys
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from maect_fast.benchmarks import floors, timing
from maect_fast.benchmarks.check import REMEDY, check, launch_sizes
from maect_fast.benchmarks.ops import OPS
from maect_fast.benchmarks.registry import EAGER, OURS, Call, Outputs
from maect_fast.benchmarks.run import floor_rows, measure_op

CPU = torch.device("cpu")
# The others are timed as slow ones: what times them is one.
QUICK = ("masked_attention", "queue_topk")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    monkeypatch.setattr(timing, "SECONDS_PER_CALL", 0.0)
    monkeypatch.setattr(floors, "STREAM_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(floors, "GEMM_SIDE", {"cpu": 64, "cuda": 64})
    floors.bandwidth.cache_clear()
    floors.matrix_rate.cache_clear()


def test_providers_take_turns() -> None:
    order = []

    def call(name: str) -> Call:
        def run() -> Outputs:
            order.append(name)
            return {}

        return run

    timing.measure({"a": call("a"), "b": call("b")}, CPU)
    # Each once for its memory, then in turn: once to warm up, once for the clock.
    assert order == ["a", "b", *["a", "a", "b", "b"] * 3]


def test_milliseconds() -> None:
    def sleep() -> Outputs:
        time.sleep(0.02)
        return {}

    (found,) = timing.measure({"sleep": sleep}, CPU).values()
    assert 20 <= found.p20_ms <= found.p50_ms <= found.p80_ms < 200
    assert found.graph_ms is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_a_call_allocates() -> None:
    def allocate() -> Outputs:
        # Written, as untouched pages are not resident.
        return {"x": torch.ones(64 << 20, dtype=torch.uint8)}

    (found,) = timing.measure({"allocate": allocate}, CPU).values()
    assert found.peak_mib is not None
    assert 63 <= found.peak_mib < 80


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_events_graphs_and_memory() -> None:
    x = torch.ones(16 << 20, device="cuda")

    def add() -> Outputs:
        return {"x": x + 1}

    def wait() -> Outputs:
        return {"x": x * x.sum().item()}

    calls = {"add": add, "wait": wait}
    found = timing.measure(calls, torch.device("cuda"), frozenset(calls))
    assert found["add"].graph_ms is not None
    # 128 MiB read and written: no device of today needs a second, none does it in a microsecond.
    assert 0.001 < found["add"].p50_ms < 1000
    assert 64 <= (found["add"].peak_mib or 0) < 80
    # A call that waits for the device cannot be captured, and is timed all the same.
    assert found["wait"].graph_ms is None
    assert found["wait"].p50_ms > 0


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPS]
)
def test_rows(name: str) -> None:
    op = OPS[name]
    sizes = op.sizes["quick"][0]
    absent = {
        "masked_attention": "SDPA cuDNN",
        "queue_topk": "faiss-gpu",
        "info_nce": "Liger",
    }
    missing = [absent[name]] if name in absent else []
    providers = [OURS, EAGER, *missing]
    mode = op.modes[0]
    rows = list(measure_op(op, sizes, torch.float32, CPU, modes=[mode], providers=providers))
    assert [row.provider for row in rows] == providers
    ours, eager, *untimed = rows
    for row in (ours, eager):
        assert row.p50_ms is not None
        assert row.tflops == pytest.approx(op.num_flops(sizes, mode) / row.p50_ms / 1e9)
        assert row.gbps == pytest.approx(op.num_bytes(sizes, mode, 4) / row.p50_ms / 1e6)
        assert row.sizes == dict(sizes)
        assert row.reason == ""
    assert all((row.p50_ms, row.reason) == (None, "needs CUDA") for row in untimed)
    by_bytes = 1e3 * op.num_bytes(sizes, mode, 4) / floors.bandwidth(CPU)
    rate = max(
        floors.matrix_rate(dtype, CPU) for dtype in (torch.float32, op.products_dtype) if dtype
    )
    by_flops = 1e3 * op.num_flops(sizes, mode) / rate
    assert ours.floor_ms == pytest.approx(max(by_bytes, by_flops))
    assert ours.floor_kind == ("bytes" if by_bytes > by_flops else "FLOPs")


def test_floors_are_rows() -> None:
    bandwidth, *rates = floor_rows([torch.float32, torch.bfloat16], CPU)
    assert bandwidth.provider == "triad"
    assert bandwidth.gbps is not None
    assert bandwidth.gbps > 0
    assert [(row.provider, row.dtype) for row in rates] == [("GEMM", "fp32"), ("GEMM", "bf16")]
    assert all(row.tflops is not None and row.tflops > 0 for row in rates)


def test_check_is_right_here() -> None:
    told: list[str] = []
    lines = list(check(CPU, tell=told.append))
    assert len(lines) == len(OPS) + 1
    # Nothing is compiled for a CPU.
    assert told == []
    assert all(right for _, right in lines), lines


def test_check_runs_every_launch_row_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(sizes: dict[str, int]) -> SimpleNamespace:
        return SimpleNamespace(row=SimpleNamespace(sizes=sizes))

    small, large = {"B": 3, "N": 50, "H": 2, "D": 64}, {"B": 2, "N": 257, "H": 2, "D": 80}
    attention = [launch({"M": 1} | small), launch(large), launch({"M": 50} | small)]
    # The loss's rows have other letters; helpers' rows lack some.
    loss = [launch({"V": 2, "n": 8, "P": 64, "D": 16}), launch({"D": 16}), launch({"P": 64})]
    modules = {}
    for name, launches in (("masked_attention", attention), ("info_nce", loss)):
        module = f"maect_fast.kernels.{name}.triton_kernel"
        tables = {90: launches, 80: []}
        kernel = SimpleNamespace(machine_code=lambda arch, tables=tables: iter(tables[arch]))
        monkeypatch.setitem(sys.modules, module, cast("ModuleType", kernel))
        modules[name] = module
    monkeypatch.setattr("maect_fast.benchmarks.check.registered", lambda: [*modules.values()])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    assert launch_sizes(OPS["masked_attention"], cuda) == [small, large]
    assert launch_sizes(OPS["info_nce"], cuda) == [{"B": 8, "N": 64, "D": 16}]
    assert launch_sizes(OPS["mae_tokens"], cuda) == []
    assert launch_sizes(OPS["masked_attention"], CPU) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton")
@pytest.mark.parametrize("name", list(OPS))
def test_launch_rows_have_sizes_that_the_op_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS[name]
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, x=capability: x)
        found = launch_sizes(op, torch.device("cuda"))
        assert found
        for sizes in found:
            assert list(sizes) == [*op.letters]
            assert all(op.num_bytes(sizes, mode, 2) > 0 for mode in op.modes)


def test_check_says_what_is_wrong_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["info_nce"]
    make: Any = op.providers[OURS].make

    def off(x: Any, mode: str) -> Call:
        call = make(x, mode)
        return lambda: {name: value * 1.01 for name, value in call().items()}

    monkeypatch.setitem(op.providers, OURS, replace(op.providers[OURS], make=off))
    lines = dict(check(CPU, ["info_nce", "mae_tokens"]))
    wrong = [line for line, right in lines.items() if not right]
    assert (len(lines), len(wrong)) == (2, 1)
    assert wrong[0].startswith("info_nce")
    assert "budget" in wrong[0]
    assert wrong[0].endswith(REMEDY)
    assert "\n" not in wrong[0]
