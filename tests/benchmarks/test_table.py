from collections.abc import Mapping
from dataclasses import replace

from maect_fast.benchmarks.results import Row
from maect_fast.benchmarks.table import markdown, number, reasons, summary

FLOORS = [
    Row(op="floors", provider="copy", gbps=3900.0),
    Row(op="floors", provider="GEMM", dtype="bf16", tflops=690.0),
]


def attention(provider: str, p50: float | None, *, N: int = 197, reason: str = "") -> Row:
    return Row(
        op="masked_attention",
        provider=provider,
        mode="fwd",
        dtype="bf16",
        B=512,
        H=12,
        N=N,
        D=64,
        p50_ms=p50,
        p20_ms=p50 and p50 - 0.01,
        p80_ms=p50 and p50 + 0.01,
        gbps=p50 and 100.0,
        tflops=p50 and 300.0,
        floor_ms=0.1,
        gpu="NVIDIA H200",
        commit="abc1234",
        date="2026-11-21",
        reason=reason,
    )


ROWS = [
    *FLOORS,
    attention("eager", 1.0),
    attention("SDPA flash", 0.4),
    attention("maect-fast", 0.2),
    attention("xformers", None, reason="not installed"),
    attention("xformers", None, N=50, reason="not installed"),
    attention("maect-fast", 0.3, N=50),
    attention("SDPA flash", 0.2, N=50),
]


def cells(text: str) -> list[Mapping[str, str]]:
    """Lines of the text's only table by heading."""
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(table[0], line, strict=True)) for line in table[2:]]


def test_full_table() -> None:
    text = markdown(ROWS)
    lines = cells(text)
    assert [(line["shape"], line["provider"]) for line in lines] == [
        ("B512 H12 N50 D64", "maect-fast"),
        ("B512 H12 N50 D64", "SDPA flash"),
        ("B512 H12 N197 D64", "maect-fast"),
        ("B512 H12 N197 D64", "SDPA flash"),
        ("B512 H12 N197 D64", "eager"),
    ]
    assert [line["to best peer"] for line in lines] == ["1.50", "1.00", "0.500", "1.00", "2.50"]
    assert [line["of floor"] for line in lines] == ["33%", "50%", "50%", "25%", "10%"]
    assert lines[2]["p50 (p20-p80), ms"] == "0.200 (0.190-0.210)"
    assert (lines[2]["GB/s"], lines[2]["TFLOP/s"]) == ("100", "300")
    assert "### masked_attention, bf16\n\nNVIDIA H200; commit abc1234, 2026-11-21.\n" in text
    assert "copy 3,900 GB/s, GEMM bf16 690 TFLOP/s" in text


def test_columns_without_a_value_are_left_out() -> None:
    assert "peak, MiB" not in markdown(ROWS)
    row = Row(op="info_nce", provider="eager", p50_ms=1.0, graph_ms=0.5, peak_mib=0.0)
    assert [line["peak, MiB"] for line in cells(markdown([row]))] == ["0"]
    assert [line["kernels, ms"] for line in cells(markdown([row]))] == ["0.500"]


def on_gpu(provider: str, p50: float, graph: float | None, *, spread: float = 0.01) -> Row:
    row = attention(provider, p50)
    return replace(row, graph_ms=graph, p20_ms=p50 - spread / 2, p80_ms=p50 + spread / 2)


# By calls SDPA is the best peer, by kernels cuDNN; official cannot be captured.
GPU_ROWS = [
    on_gpu("maect-fast", 1.0, 0.2),
    on_gpu("SDPA", 0.5, 0.4),
    on_gpu("SDPA cuDNN", 0.8, 0.1),
    on_gpu("official", 0.9, None, spread=0.3),
]


def test_calls_and_kernels_each_have_their_best_peer() -> None:
    lines = {line["provider"]: line for line in cells(markdown(GPU_ROWS))}
    assert [line["to best peer"] for line in lines.values()] == ["2.00", "1.00", "1.60", "1.80"]
    kernels = {name: line["kernels to best peer"] for name, line in lines.items()}
    assert kernels == {"maect-fast": "2.00", "SDPA": "4.00", "SDPA cuDNN": "1.00", "official": ""}
    # Rates and floors are of the kernels: 300 TFLOP/s in 1 ms are 1,500 in 0.2.
    ours = lines["maect-fast"]
    assert (ours["TFLOP/s"], ours["GB/s"], ours["of floor"]) == ("1,500", "500", "50%")
    assert (lines["official"]["TFLOP/s"], lines["official"]["of floor"]) == ("300", "11%")
    assert "Kernels: the same call replayed as a CUDA graph" in markdown(GPU_ROWS)
    (line,) = cells(summary(GPU_ROWS))
    assert (line["best peer"], line["to best peer"]) == ("SDPA", "2.00")
    assert (line["best peer's kernels"], line["kernels to best peer"]) == ("SDPA cuDNN", "2.00")
    assert line["maect-fast, kernels, ms"] == "0.200"


def test_a_cpu_has_one_time_and_no_empty_columns() -> None:
    for text in (markdown(ROWS), summary(ROWS)):
        assert "ernels" not in text
        heading, _, *lines = (line for line in text.splitlines() if line.startswith("|"))
        columns = list(zip(*(line.split("|")[1:-1] for line in lines), strict=True))
        assert len(columns) == heading.count("|") - 1
        assert all(any(cell.strip() for cell in column) for column in columns)


def test_a_wide_spread_is_named() -> None:
    lines = {line["provider"]: line["p50 (p20-p80), ms"] for line in cells(markdown(GPU_ROWS))}
    assert lines["official"] == "0.900 (0.750-1.05) wide"
    assert not any("wide" in text for name, text in lines.items() if name != "official")
    legend = "wide: from p20 to p80 it is more than 20% of p50"
    assert legend in markdown(GPU_ROWS)
    assert legend not in summary(GPU_ROWS)
    assert legend not in markdown(ROWS)
    wide = summary([on_gpu("maect-fast", 1.0, 0.2, spread=0.21)])
    assert [line["maect-fast, ms"] for line in cells(wide)] == ["1.00 wide"]
    assert legend in wide


def test_reasons_of_all() -> None:
    wrong = attention("eager", None, N=50, reason="wrong: o")
    expected = (
        "* xformers: not installed (fwd; 2 shapes)\n* eager: wrong: o (fwd; B512 H12 N50 D64)"
    )
    assert reasons([*ROWS, wrong]) == expected


def test_reasons_stand_once_below_the_table() -> None:
    text = markdown(ROWS)
    assert text.endswith("\n\n* xformers: not installed (fwd; 2 shapes)")
    wrong = attention("eager", None, N=50, reason="failed the gate")
    assert "* eager: failed the gate (fwd; B512 H12 N50 D64)" in markdown([*ROWS, wrong])


def test_every_op_and_dtype_has_its_table() -> None:
    rows = [Row(op=op, provider="eager", dtype=d, p50_ms=1.0) for op in "ab" for d in ("x", "y")]
    headings = [line for line in markdown(rows).splitlines() if line.startswith("#")]
    assert headings == ["### a, x", "### a, y", "### b, x", "### b, y"]


def test_tables_are_aligned() -> None:
    for text in (markdown(ROWS), summary(ROWS)):
        assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1


def test_summary_has_ours_beside_the_best_peer_losses_included() -> None:
    lost, won = cells(summary(ROWS))
    assert (lost["shape"], lost["best peer"], lost["its ms"]) == (
        "B512 H12 N50 D64", "SDPA flash", "0.200",
    )  # fmt: skip
    assert (lost["maect-fast, ms"], lost["to best peer"], lost["of floor"]) == (
        "0.300", "1.50", "33%",
    )  # fmt: skip
    assert (won["maect-fast, ms"], won["to best peer"]) == ("0.200", "0.500")


def test_summary_says_why_ours_has_no_time() -> None:
    failed = attention("maect-fast", None, reason="failed the gate")
    text = summary([attention("eager", 1.0), failed, attention("maect-fast", 0.1, N=50)])
    assert [line["maect-fast, ms"] for line in cells(text)] == ["0.100", ""]
    assert text.endswith("\n\n* masked_attention: failed the gate (fwd; B512 H12 N197 D64)")


def test_summary_without_a_peer() -> None:
    (line,) = cells(summary([attention("maect-fast", 0.2)]))
    assert (line["best peer"], line["maect-fast, ms"], line["of floor"]) == ("", "0.200", "50%")


def test_numbers_have_three_digits() -> None:
    values = (None, 0.0, 0.012345, 1.0, 12.345, 99.96, 123.4, 12345.0)
    texts = ["", "0", "0.0123", "1.00", "12.3", "100", "123", "12,345"]
    assert [number(value) for value in values] == texts
