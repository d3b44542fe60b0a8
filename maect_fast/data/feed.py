"""Batches on their way to the device."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Feed"]

Tensors: TypeAlias = tuple[Tensor, ...]


class Feed:
    """Brings batches to a device; to a GPU the next one while it computes with this one.

    Copies run on a stream of their own, for which the stream that takes a batch waits. The host
    waits for none that starts in pinned memory.

    Args:
        device: where the batches go. Keep one feed for it: memory that one stream had is not given
            to another.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def __call__(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """The batches in their order; to a GPU one is read ahead."""
        if self._stream is None:
            for batch in batches:
                yield tuple(x.to(self.device) for x in batch)
            return
        ahead = None
        for batch in batches:
            # Before the last one is given away: its user may wait for its results.
            sent = self._send(batch, self._stream)
            if ahead is not None:
                yield self._receive(*ahead)
            ahead = sent
        if ahead is not None:
            yield self._receive(*ahead)

    def _send(self, batch: Tensors, stream: torch.cuda.Stream) -> tuple[Tensors, torch.cuda.Event]:
        """Start the copies; the event is when they have ended."""
        with torch.cuda.stream(stream):
            sent = tuple(x.to(self.device, non_blocking=True) for x in batch)
        return sent, stream.record_event()

    def _receive(self, batch: Tensors, arrived: torch.cuda.Event) -> Tensors:
        """Let the current stream wait for the copies."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        for x in batch:
            # Its memory belongs to the other stream, which must not write there before this one,
            # too, is done with it.
            x.record_stream(stream)
        return batch
