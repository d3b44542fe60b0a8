"""maect-fast: fused ops and a tuning program for MAE-CT (arXiv 2304.10520)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maect_fast.api import ImageEncoder, Run, load, prepare_head, pretrain, tune

__version__ = "0.1.0"

__all__ = ["ImageEncoder", "Run", "load", "prepare_head", "pretrain", "tune"]


def __getattr__(name: str) -> Any:
    # What trains takes seconds to import, and the kernels need none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maect_fast import api

    return getattr(api, name)
