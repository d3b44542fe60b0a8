from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from maect_fast import profiling
from maect_fast.config import load_config, load_recipe
from maect_fast.models.maect import build_contrastive
from maect_fast.profiling import Profile, RangeTime, profile_range, range_times
from maect_fast.training.distributed import init_world

CPU = torch.device("cpu")


def annotation(name: str, start: float, end: float, thread: int = 1) -> dict[str, Any]:
    return event("user_annotation", name, start, end, tid=thread)


def event(cat: str, name: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, **more}


def by_name(events: list[dict[str, Any]], num_updates: int = 1) -> dict[str, RangeTime]:
    return {time.name: time for time in range_times(events, num_updates=num_updates)}


def test_ranges_are_free_while_nothing_is_profiled() -> None:
    assert profile_range("head") is profile_range("loss")
    with torch.profiler.profile(acc_events=True) as trace, profile_range("head"):
        torch.ones(1)
    assert "head" not in {event.name for event in trace.events() or ()}


def test_wall_time_belongs_to_the_innermost_range() -> None:
    times = by_name(
        [
            annotation(profiling.WINDOW, 1000, 21_000),
            annotation("head", 2000, 10_000),
            annotation("search", 4000, 7000),
            annotation("loss", 7000, 8000),
            annotation("head", 12_000, 14_000),
            annotation("somebody else's", 15_000, 19_000),
            event("python_function", "data", 15_000, 19_000),
        ],
        num_updates=2,
    )
    assert {name: time.host_ms for name, time in times.items()} == pytest.approx(
        {"head": 3.0, "search": 1.5, "loss": 0.5, "other": 5.0}
    )
    assert list(times) == ["head", "search", "loss", "other"]


def test_ranges_that_begin_or_end_together() -> None:
    times = by_name(
        [
            annotation(profiling.WINDOW, 0, 9500),
            annotation("search", 0, 3000),
            annotation("loss", 0, 9000),
            annotation("enqueue", 6000, 9000),
            annotation("head", 7000, 7000),
        ]
    )
    assert {name: time.host_ms for name, time in times.items()} == pytest.approx(
        {"search": 3.0, "loss": 3.0, "enqueue": 3.0, "other": 0.5}
    )


def test_operators_belong_to_the_range_that_is_open_when_they_start() -> None:
    times = by_name(
        [
            annotation(profiling.WINDOW, 0, 10_000),
            annotation("backward", 1000, 5000, thread=1),
            event("cpu_op", "AddmmBackward0", 1500, 4000, tid=2),
            event("cpu_op", "aten::mm", 1600, 3000, tid=2),
            event("cpu_op", "aten::add", 6000, 6500, tid=1),
        ],
    )
    assert times["backward"].operators == 2
    assert times["other"].operators == 1


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    """The device is late, and autograd launches from a thread of its own."""

    def launch(time: float, correlation: int, cat: str = "cuda_runtime") -> dict[str, Any]:
        args = {"correlation": correlation}
        return event(cat, "launch", time, time + 5, tid=2, args=args)

    def device(cat: str, start: float, end: float, correlation: int) -> dict[str, Any]:
        return event(cat, "work", start, end, tid=7, args={"correlation": correlation})

    times = by_name(
        [
            annotation(profiling.WINDOW, 0, 1000),
            annotation("data", 100, 200),
            annotation("backward", 200, 500),
            launch(150, 1),
            launch(250, 2),
            launch(260, 3, "cuda_driver"),
            launch(700, 4),
            device("gpu_memcpy", 400, 2400, 1),
            device("kernel", 5000, 8000, 2),
            device("kernel", 8000, 9000, 3),
            device("gpu_memset", 9000, 9500, 4),
            device("kernel", 9500, 9600, 99),
            event("gpu_user_annotation", "backward", 5000, 9000, tid=7),
        ]
    )
    device_ms = {name: time.device_ms for name, time in times.items()}
    assert device_ms == pytest.approx({"data": 2.0, "backward": 4.0, "other": 0.6})
    assert {name: time.launches for name, time in times.items()} == {
        "data": 1,
        "backward": 2,
        "other": 2,
    }


def test_the_table_of_a_gpu_says_device_time() -> None:
    times = [
        RangeTime(name="head", host_ms=2.0, device_ms=3.0, launches=40, operators=90),
        RangeTime(name="other", host_ms=8.0, device_ms=1.0, launches=2, operators=7),
    ]
    header, rows = profiling._table(times, is_cuda=True)
    assert profiling._markdown(header, rows).splitlines() == [
        "| range | device ms per update | share | launches per update | host ms per update |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| head | 3.000 | 0.750 | 40.0 | 2.000 |",
        "| other | 1.000 | 0.250 | 2.0 | 8.000 |",
    ]
    header, rows = profiling._table(times, is_cuda=False)
    assert header[-1] == "operator calls per update"
    assert rows == [["head", "2.000", "0.200", "90.0"], ["other", "8.000", "0.800", "7.0"]]


def test_models_with_ranges_compile_to_one_graph() -> None:
    config = load_config(load_recipe("digits", "tune"), overrides=["encoder.depth=2"])
    model = build_contrastive(config, init_world("cpu"))
    model.encoder.freeze(1)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    views, step = torch.randn(2, 4, 1, 8, 8), torch.tensor(0)
    expected = model(views, step=step)["loss"]
    torch.testing.assert_close(compiled(views, step=step)["loss"], expected)
    with profiling._ranges("torch"):
        torch.testing.assert_close(compiled(views, step=step)["loss"], expected)


def test_nsight_gets_nvtx_ranges_and_the_start_and_stop_of_the_profiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log: list[str] = []

    class Annotate(AbstractContextManager[None]):
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(self.name)

        def __exit__(self, *_: object) -> None:
            log.append(f"end of {self.name}")

    monkeypatch.setattr("nvtx.annotate", Annotate)
    monkeypatch.setattr("torch.cuda.profiler.start", lambda: log.append("start"))
    monkeypatch.setattr("torch.cuda.profiler.stop", lambda: log.append("stop"))
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: log.append("synchronize"))
    monkeypatch.setattr("torch.profiler.profile", None)
    device = torch.device("cuda")
    told: list[str] = []
    profile = Profile(range(1, 2), "nsight", folder=tmp_path, device=device, tell=told.append)
    with profile:
        for _ in profile.batches(iter("abc"), 0):
            with profile_range("loss"):
                log.append(f"threads {torch._C._is_multithreading_enabled()}")
    window = [profiling.WINDOW, "data", "end of data", "loss", "threads False", "end of loss"]
    assert log == [
        *("threads True", "synchronize", "start", *window, f"end of {profiling.WINDOW}"),
        *("synchronize", "stop", "threads True"),
    ]
    assert told == ["profiled updates 1 to 1 for nsight"]
    assert not list(tmp_path.iterdir())


def test_a_failing_run_closes_the_profile(tmp_path: Path) -> None:
    told: list[str] = []
    profile = Profile(range(9), "torch", folder=tmp_path, device=CPU, tell=told.append)

    def run() -> None:
        with profile:
            for number in profile.batches(iter([1, 0]), 0):
                assert number

    with pytest.raises(AssertionError):
        run()
    assert profile_range("head") is profile_range("loss")
    assert told == []
    assert not list(tmp_path.iterdir())


def test_a_profile_may_span_several_passes(tmp_path: Path) -> None:
    """Epochs end anywhere; the numbers go on."""
    told: list[str] = []
    profile = Profile(range(1, 5), "torch", folder=tmp_path, device=CPU, tell=told.append)
    with profile:
        for epoch in range(3):
            assert list(profile.batches(iter("ab"), 2 * epoch)) == ["a", "b"]
            assert (tmp_path / "ranges.csv").exists() is (epoch == 2)
    assert told[0].startswith("profiled updates 1 to 4: ")
    assert len(told) == 1
