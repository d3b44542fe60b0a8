import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maect_fast.config import Config
from maect_fast.training.log import RunLog, read_metrics
from maect_fast.training.waiting import DataWait


def slow(count: int, seconds: float) -> Iterator[int]:
    for i in range(count):
        time.sleep(seconds)
        yield i


def test_the_time_in_which_batches_are_awaited_is_counted_but_for_the_first() -> None:
    wait = DataWait(torch.device("cpu"))
    began = time.monotonic()
    for _ in wait(slow(4, 0.03)):
        time.sleep(0.01)
    whole = time.monotonic() - began
    counted = wait.read()
    assert 0.09 <= counted <= whole - 0.03 - 0.04
    assert wait.read() == 0
    # Later epochs have no first batch of the run.
    list(wait(slow(2, 0.03)))
    assert wait.read() >= 0.06


def test_on_a_gpu_no_more_is_counted_than_the_device_lay_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gaps = iter((5.0, 1e6))  # ms between two marks, of which the first is before any batch

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return next(gaps)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    wait = DataWait(torch.device("cuda"))
    list(wait(slow(3, 0.03)))
    assert 0.035 <= wait.read() < 1
    assert next(gaps, None) is None


def test_a_log_says_when_updates_wait_and_warns_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, Config(trackers=[]), start=0, total=4) as log:
        for update, wait in ((1, 0.01), (2, 0.19), (3, 0.4), (4, 0.6)):
            log.last_line = -1e9
            line = {"update": update, "epoch": 1, "loss": 1.0, "images_per_second": 9.0}
            log.write({**line, "data_wait": wait})
    lines = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in lines if "bench loader" in line]
    assert warning.startswith("updates wait for data 40% of the time; ")
    shown = [line.partition("waits for data ")[2][:3] for line in lines if "ETA" in line]
    assert shown == ["", "19%", "40%", "60%"]
    assert [line["data_wait"] for line in read_metrics(tmp_path)] == [0.01, 0.19, 0.4, 0.6]
