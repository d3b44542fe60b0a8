"""Which implementation of an op runs."""

from typing import Literal, TypeAlias

from torch import Tensor

from maect_fast.kernels._common import cpp

__all__ = ["Backend", "check_backend"]

Backend: TypeAlias = Literal["auto", "triton", "cpp", "reference"]


def check_backend(op: str, backend: str, *, cpp_inputs: tuple[Tensor, ...] = ()) -> None:
    """Refuse a backend that `op` cannot run; nothing falls back silently.

    Args:
        op: public name of the op, for the message.
        backend: what the caller asked for.
        cpp_inputs: what the op's C++ kernel would take; empty if it has none.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend exists, but not for this op or not for its inputs.
    """
    if backend in ("auto", "reference"):
        return
    built = ("auto", "cpp", "reference") if cpp_inputs else ("auto", "reference")
    usable = ", ".join(repr(name) for name in built)
    if backend not in ("triton", "cpp"):
        raise ValueError(f"{op}: expected backend to be one of {usable}, got {backend!r}")
    if backend not in built:
        raise RuntimeError(f"{op}: backend {backend!r} is not built here; use one of {usable}")
    obstacle = cpp.obstacle(*cpp_inputs)
    if obstacle is not None:
        raise RuntimeError(f"{op}: backend {backend!r} {obstacle}")
