from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from maect_fast.data import Feed


def numbered(count: int, log: list[str] | None = None) -> Iterator[tuple[Tensor, ...]]:
    for i in range(count):
        if log is not None:
            log.append(f"made {i}")
        yield torch.full((2, 3), float(i)), torch.tensor([i])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_passes_on_every_batch_in_order(count: int, device: torch.device) -> None:
    found = list(Feed(device)(numbered(count)))
    assert [int(index) for _, index in found] == list(range(count))
    for value, (filled, index) in enumerate(found):
        assert filled.device.type == index.device.type == device.type
        assert filled.eq(value).all()


def test_reads_nothing_ahead_on_a_cpu() -> None:
    log: list[str] = []
    for batch in Feed("cpu")(numbered(2, log)):
        log.append(f"used {int(batch[1])}")
    assert log == ["made 0", "used 0", "made 1", "used 1"]


def test_the_next_batch_is_sent_before_this_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    feed = Feed("cpu")

    def send(batch: tuple[Tensor, ...], stream: object) -> tuple[tuple[Tensor, ...], int]:
        log.append(f"sent {int(batch[1])}")
        return batch, int(batch[1])

    def receive(batch: tuple[Tensor, ...], arrived: int) -> tuple[Tensor, ...]:
        log.append(f"awaited {arrived}")
        return batch

    monkeypatch.setattr(feed, "_stream", object())
    monkeypatch.setattr(feed, "_send", send)
    monkeypatch.setattr(feed, "_receive", receive)
    for batch in feed(numbered(3)):
        log.append(f"used {int(batch[1])}")
    steps = ["sent 0", "sent 1", "awaited 0", "used 0", "sent 2", "awaited 1", "used 1"]
    assert log == [*steps, "awaited 2", "used 2"]


def test_copies_and_computation_do_not_meet(cuda: torch.device) -> None:
    """Batches of 64 MiB whose use takes longer than a copy, and whose memory is used again."""
    feed = Feed(cuda)
    batches = [(torch.full((1 << 24,), float(i)).pin_memory(),) for i in range(12)]
    sums = []
    for (batch,) in feed(batches):
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        sums.append(batch.sum(dtype=torch.float64))
        del batch
    assert [float(total) for total in sums] == [float(i << 24) for i in range(12)]


def test_the_host_does_not_wait(cuda: torch.device) -> None:
    """A batch is handed over while the one before is still computed with."""
    feed = Feed(cuda)
    batches = [(torch.full((1 << 20,), float(i)).pin_memory(),) for i in range(2)]
    done = []
    for (batch,) in feed(batches):
        torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
        done.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
        done[-1].record()
        assert not done[0].query()  # type: ignore[no-untyped-call]
        assert batch.is_cuda
    torch.cuda.synchronize(cuda)
