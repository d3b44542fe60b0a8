"""How much memory operations take."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Allocated", "NoSync", "PeakMemory"]

NoSync = Callable[[], AbstractContextManager[None]]


class PeakMemory:
    """The most bytes that tensors on a CUDA device take at a time, beside those before."""

    num_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Self:
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.num_bytes = torch.cuda.max_memory_allocated(self.device) - self.before


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that operations allocate."""

    num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.num_bytes += out.numel() * out.element_size()
        return out
