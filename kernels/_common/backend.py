"""Which implementation of an op runs."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch

__all__ = ["Backend", "Obstacle", "check_backend"]

Backend: TypeAlias = Literal["auto", "triton", "gluon", "cpp", "reference"]
Obstacle: TypeAlias = Callable[[], str | None]


def check_backend(
    op: str,
    backend: str,
    *,
    triton: Obstacle | None = None,
    gluon: Obstacle | None = None,
    cpp: Obstacle | None = None,
) -> None:
    """Refuse a backend that `op` cannot run; nothing falls back silently.

    Args:
        op: public name of the op, for the message.
        backend: what the caller asked for.
        triton: says why the op's Triton kernels cannot take its inputs; None if it has no such.
        gluon: the same of its warp-specialised kernels.
        cpp: the same of its C++ kernel.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend exists, but not for this op or not for its inputs.
    """
    if backend in ("auto", "reference"):
        return
    obstacles = {"triton": triton, "gluon": gluon, "cpp": cpp}
    built = ["auto", *(name for name, why in obstacles.items() if why is not None), "reference"]
    usable = ", ".join(repr(name) for name in built)
    if backend not in obstacles:
        raise ValueError(f"{op}: expected backend to be one of {usable}, got {backend!r}")
    obstacle = obstacles[backend]
    if obstacle is None:
        raise RuntimeError(f"{op}: backend {backend!r} is not built here; use one of {usable}")
    # Obstacles look at files and devices: a compiled program meets them where the op runs.
    reason = None if torch.compiler.is_compiling() else obstacle()
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} {reason}")
