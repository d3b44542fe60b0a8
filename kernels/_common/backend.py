"""Which implementation of an op runs."""

from typing import Literal, TypeAlias

__all__ = ["Backend", "check_backend"]

Backend: TypeAlias = Literal["auto", "triton", "cpp", "reference"]


def check_backend(op: str, backend: str, built: tuple[str, ...] = ()) -> None:
    """Refuse a backend that `op` cannot run; nothing falls back silently.

    Args:
        op: public name of the op, for the message.
        backend: what the caller asked for.
        built: the compiled backends that this op has.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend exists, but not for this op.
    """
    if backend in ("auto", "reference", *built):
        return
    usable = ", ".join(repr(name) for name in ("auto", "reference", *built))
    if backend in ("triton", "cpp"):
        raise RuntimeError(f"{op}: backend {backend!r} is not built here; use one of {usable}")
    raise ValueError(f"{op}: expected backend to be one of {usable}, got {backend!r}")
