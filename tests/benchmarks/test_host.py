from dataclasses import replace

import pytest
import torch

from maect_fast.benchmarks import host
from maect_fast.benchmarks.cli import main

ROW = host.HostRow(
    op="info_nce",
    mode="fwd",
    us=12.34,
    adds=5.67,
    ordinary_us=89.0,
    launches=3,
    driver="stub",
    gpu="",
    torch="2.11.0",
    triton="3.6.0",
    commit="abc",
    date="2026-11-28",
    cpu="a CPU",
    threads=1,
)


def test_table() -> None:
    lines = host.table([ROW]).splitlines()
    assert "a CPU" in lines[0]
    assert "launches go nowhere" in lines[0]
    assert lines[-1] == "| info_nce | fwd | 12.3 | 5.7 | 89.0 | 3 |"
    on_gpu = host.table([replace(ROW, driver="cuda", gpu="a GPU", launches=None)]).splitlines()
    assert "a GPU, wall time" in on_gpu[0]
    assert on_gpu[-1].endswith("| 89.0 |  |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no stand-in")
def test_interpreted_kernels_have_no_host_time(capsys: pytest.CaptureFixture[str]) -> None:
    """What the tests themselves run with: the time would be the interpreter's."""
    assert main(["host"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
